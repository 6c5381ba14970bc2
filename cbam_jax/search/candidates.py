"""The second step of a pass: the distances of those whose bounds are lowest."""

import numpy as np

from cbam_jax.search.order import packed
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import block_rows
from cbam_jax.search.types import Labels, Lowest, Queries, Shard, ignores

_FEW, _MANY = 4, 32  # Candidates of a query beyond the first k, computed at a time.
_NOBODY = np.array([np.inf], np.float32), np.array([-1], np.int32)


def candidate_keys(
    queries: Queries,
    shard: Shard,
    found: Lowest,
    k: int,
    metric: str,
    items: Labels,
    gallery_block: int,
    size: int,
) -> np.ndarray:
    """Keys of the candidates of each query, [q, at least count], by their distances in float64.

    First of those with the k lowest bounds, then a few at a time of the others that may be as near
    as the k-th so far: with a lower bound, or in a group whose second lowest bound is.
    """
    x = on_device(queries.rows, shard.device)
    distances = np.full(found.index.shape, np.inf, np.float32)
    there = found.bound < np.inf
    row = np.arange(len(distances), dtype=np.int32)
    kth = np.full((len(distances), 1), np.inf, np.float32)
    nearest = np.full((len(distances), k), np.inf, np.float32)
    others = _FEW if found.index.shape[1] <= 2 * k + 2 * _MANY else _MANY
    for start in [0, *range(k, found.index.shape[1], others)]:
        # Bounds ascend.
        row = row[(found.bound[row, start] <= kth[row, 0]) & there[row, start]]
        if not len(row):
            break
        columns = slice(start, start + others) if start else slice(0, k)
        some = pair_distances(x, shard, row, found.index[row, columns], metric)
        some = np.where(there[row, columns], some, np.inf)
        distances[row, columns] = some
        some = np.concatenate([nearest[row], some], axis=1)
        nearest[row] = np.partition(some, k - 1, axis=1)[:, :k]
        kth[row, 0] = nearest[row].max(axis=1)
    keys = packed(distances, np.where(there, found.index, -1))
    row, column = np.nonzero((found.second <= kth) & there)
    if not len(row):
        return keys
    members = _group_members(found.index[row, column], shard, gallery_block, size)
    ignored = ignores(queries.labels.taken(row).column(), items.taken(members))
    members = np.where(ignored, -1, members)
    more = pair_distances(x, shard, row.astype(np.int32), members, metric)
    more[members < 0] = np.inf
    return np.concatenate([keys, _rows_of_keys(packed(more, members), row, len(keys))], axis=1)


def _group_members(index: np.ndarray, shard: Shard, gallery_block: int, size: int) -> np.ndarray:
    """The others in the groups that hold ``index`` [p]; [p, size - 1], -1 where there is none."""
    n = len(shard.rows)
    rows = block_rows(n, gallery_block)
    groups = -(-rows // size)
    start = (index - shard.first) // rows * rows
    first = np.minimum(start, n - rows)
    place = index - shard.first - first
    members = place[:, None] % groups + groups * np.arange(size, dtype=np.int32)
    members = members[members != place[:, None]].reshape(len(index), -1)
    # Rows from before the start are the block's before, which the last block overlaps.
    there = (members < rows) & (members >= (start - first)[:, None])
    return np.where(there, members + (first + shard.first)[:, None], -1).astype(np.int32)


def _rows_of_keys(keys: np.ndarray, row: np.ndarray, q: int) -> np.ndarray:
    """Keys [p, c] gathered by their row: [q, as many as any row has], the rest without an item."""
    place = np.arange(len(row)) - np.searchsorted(row, row)  # ``row`` ascends.
    gathered = np.full((q, int(place.max()) + 1, keys.shape[-1]), packed(*_NOBODY), np.uint64)
    gathered[row, place] = keys
    return gathered.reshape(q, -1)
