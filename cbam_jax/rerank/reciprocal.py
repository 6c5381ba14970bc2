"""k-reciprocal re-ranking: a distance of soft sets of neighbours, mixed with the one there was."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from cbam_jax.rerank.encodings import Encodings, joint_encodings, scaled_distances
from cbam_jax.search import search

_CELLS = 2**21  # Overlaps of a query with every image that are held at a time: 16 MiB.


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
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery items of each query by k-reciprocal re-ranking, exactly.

    The definition of Zhong et al. 2017 with the conventions of the authors' program. Over queries
    and gallery together, d = squared Euclidean distance / the largest one of the query. The Jaccard
    distance is J = 1 - s / (2 - s), s = sum_j min(v_j, w_j) of two encodings, which are made of the
    k1-reciprocal neighbours (see `cbam_jax.rerank.encodings`) and averaged over the k2 nearest. The
    result is (1 - lambda_) J + lambda_ d. Ties, there left to the sorting algorithm, are broken by
    the index, queries before gallery items.

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

    Returns:
      Distances ``[q, k]`` float32, ascending, and indices ``[q, k]`` int32 with (inf, -1) at the
      end of rows with fewer items, as `search` returns them.

    Raises:
      ValueError: As `search` does, or for a k1, k2 or lambda_ out of range.

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
    x, y = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    # All items outside an encoding's reach have J = 1, and come in the order of the search.
    _, near = search(
        x, y, k, exclude_self=exclude_self, query_group=query_group, gallery_group=gallery_group
    )
    own = np.arange(len(y)) if exclude_self is True else exclude_self
    own = np.full(len(x), -1) if own is False else np.asarray(own)
    groups = None if query_group is None else (np.asarray(query_group), np.asarray(gallery_group))
    outside = np.flatnonzero(own < 0)
    encodings = joint_encodings(np.concatenate([x[outside], y]), k1, k2)
    place = own + len(outside)
    place[outside] = np.arange(len(outside))
    return _ranked(encodings, place, len(outside), near, lambda_, own, groups)


def _ranked(
    encodings: Encodings,
    place: np.ndarray,
    first: int,
    near: np.ndarray,
    lambda_: float,
    own: np.ndarray,
    groups: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The k lowest of each query; ``place`` is its row, the gallery's begin at ``first``."""
    by_column: Any = sparse.csc_array(encodings.rows[first:])
    distances = np.full(near.shape, np.inf, np.float32)
    indices = np.full(near.shape, -1, np.int32)
    step = max(1, _CELLS // by_column.shape[0])
    for start in range(0, len(place), step):
        some = np.arange(start, min(start + step, len(place)))
        overlap = _overlaps(encodings.rows[place[some]], by_column)
        for query, shared in zip(some, overlap, strict=True):
            found = np.union1d(np.flatnonzero(shared), near[query][near[query] >= 0])
            found = found[_allowed(found, query, own, groups)]
            jaccard = 1 - shared[found] / (2 - shared[found])
            row = np.full(len(found), place[query])
            d = scaled_distances(encodings.points, encodings.furthest, row, found + first)
            total = ((1 - lambda_) * jaccard + lambda_ * d).astype(np.float32)
            order = np.lexsort((found, total))[: near.shape[1]]
            distances[query, : len(order)], indices[query, : len(order)] = (
                total[order],
                found[order],
            )
    return distances, indices


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


def _allowed(found: np.ndarray, query: np.integer, own: np.ndarray, groups: Any) -> np.ndarray:
    """Which gallery items a query may find, bool."""
    allowed = found != own[query]
    return allowed if groups is None else allowed & (groups[1][found] != groups[0][query])
