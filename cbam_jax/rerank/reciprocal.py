"""k-reciprocal re-ranking: a distance of soft sets of neighbours, mixed with the one there was."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from cbam_jax.rerank.encodings import Encodings, joint_encodings, nearest_lists
from cbam_jax.search import check_search

_CELLS = 2**21  # Pairs of a query and an item at a time: 16 MiB an array of them.
_UNITS = 2**24  # In which distances, from 0 to 1, are counted;
_NONE = 2**26  # that of an item which a query ignores.


def k_reciprocal(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_: float = 0.3,
    exclude_self: bool | ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
    lists: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery items of each query by k-reciprocal re-ranking, exactly.

    The definition of Zhong et al. 2017 with the conventions of the authors' program. Over queries
    and gallery together, d = squared Euclidean distance / the largest one of the query. The Jaccard
    distance is J = 1 - s / (2 - s), s = sum_j min(v_j, w_j) of two encodings, which are made of the
    k1-reciprocal neighbours (see `cbam_jax.rerank.encodings`) and averaged over the k2 nearest. The
    result is ``(1 - lambda_) J + lambda_ d``. Ties, there left to the sorting algorithm, are broken
    by the index, queries before gallery items.

    A query is ranked with the help of the other queries: the result is transductive. Memory is
    O((q + n) k1), where a matrix of all pairs would take (q + n)^2. k1 suits galleries with about
    as many relevant items; with few, a smaller one is better, to be chosen on validation data.

    Args:
      queries: ``[q, d]``, any float dtype; rounded to float32 first.
      gallery: ``[n, d]``, likewise.
      k: How many to return, from 1 to n.
      k1: Neighbours whose lists are looked into.
      k2: Neighbours to average encodings over, itself included; 1 for none.
      lambda_: Share of the distance itself, from 0 to 1.
      exclude_self: True where query i is gallery item i and not to be found; or ``[q]`` integers,
        the gallery index of each query, -1 for none. A query in the gallery is one image, not two.
      query_group: ``[q]`` integers; items of the query's group are not found, but are neighbours.
      gallery_group: ``[n]`` integers.
      lists: ``[m, min(k1 + 1, m)]`` integers, where they are known: of all m images, first the
        queries that are no gallery items, then the gallery, the indices of the nearest among all
        of them, itself included, nearest first; None: they are searched for.

    Returns:
      Distances ``[q, k]`` float32, ascending, and indices ``[q, k]`` int32 with (inf, -1) at the
      end of rows with fewer items, as `search` returns them.

    Raises:
      ValueError: As `search` does, for a k1, k2 or ``lambda_`` out of range, or other lists.

    Example:
      >>> gallery = np.float32([[0.0], [1.0], [1.1], [5.0]])
      >>> distances, indices = k_reciprocal(gallery, gallery, 2, k1=2, k2=1, exclude_self=True)
      >>> indices.tolist()
      [[1, 2], [2, 0], [1, 0], [2, 1]]
    """
    if k1 < 1 or not 1 <= k2 <= k1 + 1 or not 0 <= lambda_ <= 1:
        raise ValueError(
            f"k1 is {k1}, k2 {k2} and lambda_ {lambda_}; expected at least 1, 1 to k1 + 1, 0 to 1"
        )
    queries, gallery, own, group = check_search(
        queries,
        gallery,
        k,
        exclude_self=exclude_self,
        query_group=query_group,
        gallery_group=gallery_group,
    )
    x, y = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    own = np.full(len(x), -1) if own is None else own
    outside = np.flatnonzero(own < 0)
    points = np.concatenate([x[outside], y])
    lists = nearest_lists(points, k1) if lists is None else _checked_lists(lists, len(points), k1)
    encodings = joint_encodings(points, lists, k1, k2)
    place = own + len(outside)
    place[outside] = np.arange(len(outside))

    def ignored(part: slice) -> np.ndarray:
        itself = own[part, None] == np.arange(len(y))
        return itself if group[0] is None else itself | (group[0][part, None] == group[1])

    return _ranked(encodings, place, len(y), lambda_, k, ignored)


def _checked_lists(lists: ArrayLike, m: int, k1: int) -> np.ndarray:
    lists = np.asarray(lists)
    expected = (m, min(k1 + 1, m))
    if lists.shape != expected or lists.dtype.kind not in "iu":
        raise ValueError(
            f"lists have shape {lists.shape} and dtype {lists.dtype}, expected {expected} ints"
        )
    if lists.size and not 0 <= lists.min() <= lists.max() < m:
        raise ValueError(
            f"lists have indices from {lists.min()} to {lists.max()}, expected 0 to {m - 1}"
        )
    return lists


def _ranked(
    encodings: Encodings, place: np.ndarray, n: int, lambda_: float, k: int, ignored: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The k lowest of each query; ``place`` is its row, the gallery's rows are the last n.

    Distances are whole multiples of 2^-24, float32 numbers all, so that the roundings of sums do
    not part what is equal; with the index they make one integer, and the lowest are found by that.
    """
    gallery = encodings.points[-n:].astype(np.float64)
    columns = sparse.csc_array(encodings.rows[-n:])
    keys = np.empty((len(place), k), np.int64)
    step = max(1, _CELLS // n)
    for start in range(0, len(place), step):
        part = slice(start, start + step)
        shared = _overlaps(encodings.rows[place[part]], columns)
        jaccard = 1 - shared / (2 - shared)
        total = (1 - lambda_) * jaccard + lambda_ * _scaled(encodings, place[part], gallery)
        whole = np.rint(total * _UNITS).astype(np.int64)
        whole[ignored(part)] = _NONE
        key = whole * n + np.arange(n)
        keys[part] = np.sort(np.partition(key, k - 1, axis=1)[:, :k], axis=1)
    found = keys // n < _NONE
    distances = np.where(found, keys // n / _UNITS, np.inf).astype(np.float32)
    return distances, np.where(found, keys % n, -1).astype(np.int32)


def _scaled(encodings: Encodings, rows: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Squared distances of images to the gallery, over the largest of each, [q, n] float64."""
    x = encodings.points[rows].astype(np.float64)
    squares = np.einsum("qd,qd->q", x, x)[:, None] + np.einsum("nd,nd->n", gallery, gallery)
    return np.maximum(squares - 2 * x @ gallery.T, 0) / encodings.furthest[rows, None]


def _overlaps(queries: Any, gallery: Any) -> np.ndarray:
    """sum_j min(v_j, w_j) of queries (by row) and gallery items (by column), [q, n] float64.

    Of each weight of a query the items that have one in the same column are gone through.
    """
    q, n = queries.shape[0], gallery.shape[0]
    begin, end = gallery.indptr[queries.indices], gallery.indptr[queries.indices + 1]
    count = end - begin
    # Places in the gallery's entries: of each weight a run from begin to end.
    entry = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(count.sum())
    row = np.repeat(np.repeat(np.arange(q), np.diff(queries.indptr)), count)
    least = np.minimum(np.repeat(queries.data, count), gallery.data[entry])
    return np.bincount(row * n + gallery.indices[entry], least, minlength=q * n).reshape(q, n)
