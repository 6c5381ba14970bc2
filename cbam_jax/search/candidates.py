"""A pass on an accelerator: the distances of those whose bounds are lowest, and proof."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cbam_jax.search.bounds import bound_distances
from cbam_jax.search.groups import Settings, lowest_bounds
from cbam_jax.search.order import INFINITE, NOBODY, packed, unpacked
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import pass_blocks
from cbam_jax.search.types import Lowest, Queries, Shard, ignores

_OTHERS = 4  # Candidates of a query beyond the first k, computed at a time,
_MANY = 64  # or, where they are more than this, of each query those that may be near.


def candidate_pass(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    settings: Settings,
    query_block: int,
    sides: Sequence[Shard] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`near_pass` for accelerators: of each shard the ``most`` groups with the lowest bounds.

    Distances and indices of the k nearest, and whether it is proven.
    """
    preparation, size = settings.preparation, settings.size
    lowest, own_share = lowest_bounds(queries, shards, settings, query_block, sides)
    keys, unseen, complete = [], [], []
    for shard, (bound, index, second) in zip(shards, lowest, strict=True):
        bounds = [bound_distances(b & -size, own_share, preparation) for b in (bound, second)]
        # Not by the distance's bound, which is infinite too where float32 does not hold it.
        found = Lowest(bounds[0], np.where(bound < INFINITE, index, -1), bounds[1])
        keys.append(_candidate_keys(queries, shard, found, k, settings))
        unseen.append(found.bound[:, -1])
        complete.append(bound[:, -1] >= INFINITE)
    distances, indices = unpacked(np.sort(np.concatenate(keys, axis=1), axis=1)[:, :k])
    return distances, indices, _proven(distances[:, -1], np.array(unseen), np.array(complete))


def _proven(kth: np.ndarray, unseen: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """Whether every item that is no candidate is farther than the k-th distance, [q].

    ``unseen`` [shards, q] is the bound up to which a shard has seen all, ``complete`` whether it
    has no more. Rounding to float32 keeps the order, so bounds hold for rounded distances as well.
    """
    return np.all(complete | (unseen > kth), axis=0)


def _candidate_keys(
    queries: Queries, shard: Shard, found: Lowest, k: int, settings: Settings
) -> np.ndarray:
    """Keys of the candidates of each query, [q, at least count], by their distances in float64.

    First of those with the k lowest bounds, then a few at a time of the others that may be as near
    as the k-th so far: with a lower bound, or in a group whose second lowest bound is.
    """
    metric, x = settings.preparation.metric, on_device(queries.rows, shard.device)
    distances = np.full(found.index.shape, np.inf, np.float32)
    there = found.index >= 0
    row = np.arange(len(distances), dtype=np.int32)
    kth = np.full((len(distances), 1), np.inf, np.float32)
    nearest = np.full((len(distances), k), np.inf, np.float32)
    many = found.index.shape[1] - k > _MANY
    for columns in _turns(k, found.index.shape[1], many):
        # Bounds ascend.
        row = row[(found.bound[row, columns.start] <= kth[row, 0]) & there[row, columns.start]]
        if not len(row):
            break
        index = found.index[row, columns]
        if columns.start and many:
            index[found.bound[row, columns] > kth[row]] = -1
            some = _of_those(x, shard, row, index, metric)
        else:
            some = pair_distances(x, shard, row, index, metric)
            some[index < 0] = np.inf
        distances[row, columns] = some
        some = np.concatenate([nearest[row], some], axis=1)
        nearest[row] = np.partition(some, k - 1, axis=1)[:, :k]
        kth[row, 0] = nearest[row].max(axis=1)
    keys = packed(distances, found.index)
    row, column = np.nonzero((found.second <= kth) & there)
    if not len(row):
        return keys
    members = group_members(found.index[row, column], shard, settings)
    ignored = ignores(queries.labels.taken(row).column(), settings.items.taken(members))
    members = np.where(ignored, -1, members)
    more = pair_distances(x, shard, row.astype(np.int32), members, metric)
    more[members < 0] = np.inf
    return np.concatenate([keys, rows_of_keys(packed(more, members), row, len(keys))], axis=1)


def _turns(k: int, count: int, many: bool) -> list[slice]:
    """The columns of the first k, and those of the others: a few at a time, or more each time."""
    if not many:
        edges = [0, *range(k, count, _OTHERS), count]
    else:
        edges = [0, k]
        while edges[-1] < count:
            edges.append(min(count, 2 * edges[-1] - k + _MANY))
    return [slice(i, j) for i, j in itertools.pairwise(edges)]


def _of_those(
    x: jax.Array, shard: Shard, row: np.ndarray, index: np.ndarray, metric: str
) -> np.ndarray:
    """Distances of the rows of x to their items, [r, c], infinite where the index is -1."""
    distances = np.full(index.shape, np.inf, np.float32)
    at = np.nonzero(index >= 0)
    distances[at] = pair_distances(x, shard, row[at[0]], index[at][:, None], metric)[:, 0]
    return distances


def group_members(index: np.ndarray, shard: Shard, settings: Settings) -> np.ndarray:
    """The others in the groups that hold ``index`` [p]; [p, size - 1], -1 where there is none."""
    size = settings.size
    starts, lengths = pass_blocks(shard, settings.gallery_block)
    block = np.searchsorted(starts, index - shard.first, side="right") - 1
    start, rows = starts[block], lengths[block]
    first = np.minimum(start, len(shard.rows) - rows)
    groups = -(-rows // size)
    place = index - shard.first - first
    members = (place % groups)[:, None] + groups[:, None] * np.arange(size)
    members = members[members != place[:, None]].reshape(len(index), size - 1)
    # Rows from before the start are the block's before, which the last block overlaps, or padding.
    there = (members < rows[:, None]) & (members >= (start - first)[:, None])
    return np.where(there, members + (first + shard.first)[:, None], -1).astype(np.int32)


def rows_of_keys(keys: np.ndarray, row: np.ndarray, q: int) -> np.ndarray:
    """Keys [p, c] by their row, which ascends: [q, as many as any has], the rest of nobody."""
    return by_row(keys, row, q, NOBODY)


def by_row(values: np.ndarray, row: np.ndarray, q: int, nothing: Any) -> np.ndarray:
    """Values [p, c] by their row, which ascends: [q, as many as any has], the rest of nothing."""
    counts = np.bincount(row, minlength=q)
    place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    gathered = np.full((q, int(counts.max()), values.shape[-1]), nothing, values.dtype)
    gathered[row, place] = values
    return gathered.reshape(q, -1)
