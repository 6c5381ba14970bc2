"""Exact nearest neighbours of a few queries, by NumPy: nothing is compiled for a new size.

`cbam_jax.search` is for many queries at once; it compiles a program for each size of gallery, and a
catalogue that grows, or is filtered, has another size each time. The answer is the same: distances
of float64, rounded to float32, ties by position.

One product of matrices in float32 gives squared distances that are wrong by a known amount at most.
All that may be among the k nearest is then measured from x - y in float64. Of a large catalogue
the product is of fewer numbers, see `narrowing`, and of all numbers for the few that it leaves.
"""

import numpy as np

from cbam_jax.catalogue.narrowing import Narrow, lower_bounds, may_be_nearest, projected

_PRODUCTS = 2**26  # Of a block of queries with all items, at most: 256 MB.
_FEW = 2**22  # Multiplications: a millisecond of one core.
_ROWS = 4096  # Rows gathered at a time.
_NARROWED = 4  # Queries, at most: more share one reading of all numbers.
LARGEST_NUMBER = (
    1e15  # A number of an embedding, at most: sums of squares then stay within float32.
)


def squared_norms(embeddings: np.ndarray) -> np.ndarray:
    """Squared norms of [n, d] embeddings, [n] float32.

    >>> squared_norms(np.array([[3.0, 4.0], [0.0, 1.0]], np.float32))
    array([25.,  1.], dtype=float32)
    """
    parts = [embeddings[i : i + _ROWS] for i in range(0, len(embeddings), _ROWS)]
    squares = [np.einsum("ij,ij->i", part, part, dtype=np.float64) for part in parts]
    return np.concatenate([np.zeros(0), *squares]).astype(np.float32)


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    *,
    squares: np.ndarray,
    rows: np.ndarray | None = None,
    narrowed: Narrow | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The k nearest items of each query, nearest first.

    Args:
        queries: [q, d] float32.
        gallery: [n, d] float32.
        k: at least 1.
        squares: ``squared_norms(gallery)``.
        rows: ascending positions of the items that may be found; None: all.
        narrowed: what `narrow` made of the gallery, which saves time for few queries and changes
            nothing.

    Returns:
        Of each query the Euclidean distances, float32, and the positions, int64: k of them, or as
        many as there are. Equal distances come by position.

    Example:
        >>> gallery = np.array([[0.0], [2.0], [3.0], [2.0]], np.float32)
        >>> squares = squared_norms(gallery)
        >>> nearest(np.ones((1, 1), np.float32), gallery, 3, squares=squares)
        [(array([1., 1., 1.], dtype=float32), array([0, 1, 3]))]
    """
    places = np.arange(len(gallery)) if rows is None else rows
    if not len(places):
        return [(np.zeros(0, np.float32), places) for _ in queries]
    large = len(places) * gallery.shape[1] > _FEW and k <= len(places) // 64
    if narrowed is not None and large and len(queries) <= _NARROWED:
        return _nearest_narrowed(queries, gallery, k, squares, places, rows, narrowed)
    size = max(1, _PRODUCTS // len(places))
    found = []
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        products = _products(block, gallery, rows)
        for query, product in zip(block, products, strict=True):
            candidates = places[_candidates(query, product, squares[places], k)]
            found.append(_measured(query, gallery, candidates, k))
    return found


def _nearest_narrowed(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    squares: np.ndarray,
    places: np.ndarray,
    rows: np.ndarray | None,
    narrowed: Narrow,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`nearest`, each query among those items alone that bounds leave it."""
    own = np.einsum("ij,ij->i", queries, queries, dtype=np.float64)
    sides = projected(queries, own, narrowed.directions)
    size, found = max(1, _PRODUCTS // len(places)), []
    for start in range(0, len(queries), size):
        some = slice(start, start + size)
        products = _products(sides[some], narrowed.along, rows)
        for query, length, product in zip(queries[some], own[some], products, strict=True):
            lower = lower_bounds(product, length, squares[places], narrowed.directions)
            left = may_be_nearest(query, lower, gallery, places, k)
            found += nearest(query[None], gallery, k, squares=squares, rows=left)
    return found


def _products(queries: np.ndarray, gallery: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """Inner products [q, n], float32."""
    if rows is None:
        return _product(queries, gallery)
    parts = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
    return np.concatenate([_product(queries, gallery[part]) for part in parts], axis=1)


def _product(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The inner products, few of them by one thread.

    Where the cores are busy, as those of a server are, the threads of a product of matrices wait
    for each other a hundred times as long as the product of a small catalogue takes.
    """
    if len(queries) * gallery.size <= _FEW:
        return np.vecdot(queries[:, None], gallery[None])
    return queries @ gallery.T


def _candidates(query: np.ndarray, product: np.ndarray, squares: np.ndarray, k: int) -> np.ndarray:
    """Which of the items may be among the k nearest, in any rounding of ties."""
    norms = np.float32(np.dot(query.astype(np.float64), query.astype(np.float64))) + squares
    # A sum of d products of float32, in whatever order, is wrong by d 2^-24 of the sum of their
    # magnitudes at most, which is at most half the sum of the squared norms.
    error = norms * np.float32((len(query) + 16) * 2.0**-24) + np.float32(1e-30)
    distances = norms - 2 * product
    lower, upper = distances - error, distances + error
    kth = np.partition(upper, k - 1)[k - 1] if k < len(upper) else np.float32(np.inf)
    # Distances that float32 rounds to one number are ties, which the position decides.
    return np.flatnonzero(lower <= kth + abs(kth) * np.float32(2.0**-21))


def _measured(
    query: np.ndarray, gallery: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    distances = np.empty(len(candidates), np.float32)
    for i in range(0, len(candidates), _ROWS):
        difference = gallery[candidates[i : i + _ROWS]].astype(np.float64) - query
        distances[i : i + _ROWS] = np.sqrt(np.sum(difference**2, axis=1))
    order = np.argsort(distances, kind="stable")[:k]
    return distances[order], candidates[order]
