"""The search that always proves its answer: float64 bounds of every pair."""

from collections.abc import Sequence

import numpy as np

from cbam_jax.search.order import NOBODY, packed, unpacked
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import blocks_of, equal_blocks
from cbam_jax.search.types import Labels, Queries, Shard, ignores

_DOUBLE_BLOCK = (64, 4096)  # Queries and gallery items at a time in the float64 search.


def exhaustive_search(
    queries: Queries, shards: Sequence[Shard], k: int, metric: str, items: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """The search for queries with many near ties: float64 bounds, any number of candidates."""
    x = queries.rows
    keys = np.full((len(x), k), NOBODY)
    for shard in shards:
        there = on_device(x, shard.device)
        for first, fresh, rows, _ in blocks_of(
            shard, equal_blocks(len(shard.rows), _DOUBLE_BLOCK[1])
        ):
            y = np.asarray(rows).astype(np.float32)
            labels = items.taken(slice(first, first + len(y))).row()
            for i in range(0, len(x), _DOUBLE_BLOCK[0]):
                t = slice(i, i + _DOUBLE_BLOCK[0])
                ignored = ignores(queries.labels.taken(t).column(), labels)
                ignored = np.broadcast_to(ignored, (len(x[t]), len(y))).copy()
                ignored[:, :fresh] = True
                low, high = double_bounds(x[t], y, metric)
                # A later item wins against the k-th so far only if it is strictly nearer.
                limit = np.partition(np.where(ignored, np.inf, high), min(k, len(y)) - 1, axis=1)
                limit = limit[:, min(k, len(y)) - 1, None]
                # Infinitely far is nearer than nobody: float32 may not hold a distance.
                kth, few = unpacked(keys[t])[0][:, -1:], keys[t][:, -1:] == NOBODY
                near, at = np.nonzero(~ignored & (low <= limit) & ((low < kth) | few))
                if not len(near):
                    continue
                row, found = (near + i).astype(np.int32), (at + first).astype(np.int32)[:, None]
                new = packed(pair_distances(there, shard, row, found, metric), found)[:, 0]
                for row in np.unique(near):
                    merged = np.concatenate([keys[i + row], new[near == row]])
                    keys[i + row] = np.sort(merged)[:k]
    return unpacked(keys)


def double_bounds(x: np.ndarray, y: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of the float32 distances, [q, n], from a float64 product."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    error = (x.shape[1] + 32) * float(np.finfo(np.float64).eps)
    xx, yy = np.sum(x * x, axis=1)[:, None], np.sum(y * y, axis=1)[None, :]
    values = x @ y.T
    if metric == "cosine":
        lengths = np.sqrt(xx * yy)
        values = 1 - np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
        slack = np.full_like(values, 2 * error)
    elif metric == "inner_product":
        values, slack = -values, error * (xx + yy)
    else:
        values, slack = xx + yy - 2 * values, 2 * error * (xx + yy)
    low, high = values - slack, values + slack
    if metric == "euclidean":
        low, high = np.sqrt(np.maximum(low, 0.0)), np.sqrt(np.maximum(high, 0.0))
    with np.errstate(over="ignore"):
        return low.astype(np.float32), high.astype(np.float32)
