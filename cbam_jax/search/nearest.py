"""Of chosen pairs the nearest, on a CPU: by float32 bounds, and distances of those that are left.

The difference of two float32 numbers is rounded once, and the sum of d squares is off by some d
roundings of itself: however near two embeddings are, |x - y| is known to a share of 1e-4. That
tells most pairs from the k nearest, at half the cost of float64.
"""

import numpy as np

from cbam_jax.search.bounds import as_near, product_error
from cbam_jax.search.candidates import by_row, rows_of_keys
from cbam_jax.search.order import packed, unpacked
from cbam_jax.search.pairs import pair_distances
from cbam_jax.search.shards import gathered_rows, view_of
from cbam_jax.search.types import Queries, Shard

_PART = 2**17  # Numbers that are compared at a time: what they need stays in a core's cache.
_MANY = 1.5  # Times k pairs a query, from which bounds cost less than they spare.
_ITEMS = 8  # Distances of one query that are computed together.
_UNEVEN = 8  # Times the mean, at which rows are too long to be padded to.
_SMALL = 2.0**-60  # Squared norms below which float32 may not know a direction.


def nearest_keys(
    keys: np.ndarray,
    row: np.ndarray,
    index: np.ndarray,
    queries: Queries,
    shard: Shard,
    metric: str,
    exact: bool = False,
) -> np.ndarray:
    """The lowest of ``keys`` [q, k] and of those of pairs, row by row and in no order.

    Pairs [p] are rows of the queries, which ascend, and gallery indices, all in the shard.
    """
    if not len(row):
        return keys
    q, k = keys.shape
    if len(row) > _MANY * k * q:
        low, high = pair_bounds(row, index, queries, shard, metric, exact)
        kth = kth_lowest(high, row, as_near(unpacked(keys)[0]))
        near = np.flatnonzero(low <= as_near(kth)[row])
        row, index = row[near], index[near]
    fresh = packed(_distances(row, index, queries.rows, shard, metric), index)
    keys = np.concatenate([keys, rows_of_keys(fresh[:, None], row, q)], axis=1)
    return np.partition(keys, k - 1, axis=1)[:, :k]


def _distances(
    row: np.ndarray, index: np.ndarray, x: np.ndarray, shard: Shard, metric: str
) -> np.ndarray:
    """Distances of pairs [p]; some of a query's at a time, for which it is converted once."""
    counts = np.bincount(row, minlength=len(x))
    parts = -(-counts // _ITEMS)
    free = parts * _ITEMS - counts
    place = np.arange(len(row)) + (free.cumsum() - free)[row]
    items = np.full(parts.sum() * _ITEMS, -1, np.int32)
    items[place] = index
    rows = np.repeat(np.arange(len(x), dtype=np.int32), parts)
    return pair_distances(x, shard, rows, items.reshape(-1, _ITEMS), metric).reshape(-1)[place]


def kth_lowest(values: np.ndarray, row: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The k-th lowest [q] of the k others [q, k] and the values [p] of each row, which ascends."""
    q, k = others.shape
    if len(values) and np.bincount(row).max() * q > _UNEVEN * len(values):  # Of each k will do.
        order = np.lexsort((values, row))
        order = order[np.arange(len(row)) - np.searchsorted(row, row) < k]
        values, row = values[order], row[order]
    every = np.concatenate([others, by_row(values[:, None], row, q, np.inf)], axis=1)
    return np.partition(every, k - 1, axis=1)[:, k - 1]


def pair_bounds(
    row: np.ndarray,
    index: np.ndarray,
    queries: Queries,
    shard: Shard,
    metric: str,
    exact: bool = False,
) -> np.ndarray:
    """Bounds of the distances of queries and gallery items from both sides, [2, p] float64.

    The distances themselves if ``exact``, as where float32 does not hold their squares.
    """
    x = queries.rows
    if exact:
        return np.stack([_distances(row, index, x, shard, metric)] * 2)
    y, item = np.asarray(view_of(shard)), index - shard.first
    size = max(1, _PART // x.shape[1])
    memory = [np.empty((min(size, len(row)), x.shape[1]), np.float32) for _ in range(2)]
    bounds = np.empty((2, len(row)))
    for start in range(0, len(row), size):
        part = slice(start, start + size)
        near = gathered_rows(y, item[part], memory[0])
        bounds[:, part] = _bounds(gathered_rows(x, row[part], memory[1]), near, metric)
    return bounds


def _bounds(x: np.ndarray, y: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """`pair_bounds` of rows; y is overwritten."""
    d = x.shape[1]
    if metric.endswith("euclidean"):
        y -= x
        squares, error = np.vecdot(y, y).astype(np.float64), (d + 16) * 2.0**-24
        # The last term covers what underflows.
        low, high = squares * (1 - error) - 1e-30, squares * (1 + error) + 1e-30
        return (low, high) if metric == "squared_euclidean" else (_root(low), _root(high))
    product, xx, yy = (np.vecdot(a, b).astype(np.float64) for a, b in ((x, y), (x, x), (y, y)))
    lost = d * 2.0**-126  # Squares that underflow.
    lengths, error = np.sqrt((xx + lost) * (yy + lost)), 1.01 * product_error(d)
    if metric == "inner_product":
        return -product - error * lengths - 1e-30, error * lengths - product + 1e-30
    unknown = np.where(np.minimum(xx, yy) < _SMALL, np.inf, error)
    cosine = product / np.maximum(lengths, _SMALL)
    return 1 - cosine - unknown, 1 - cosine + unknown


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0.0))
