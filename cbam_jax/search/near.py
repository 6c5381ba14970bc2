"""A pass on a CPU: of each query all items whose bounds are within a limit, and the k nearest.

The limit is the k-th distance so far: at first that of the items with the lowest bounds, which are
measured for it. As everything within it is measured, nothing is left to prove. Queries with too
much within theirs are left to another pass.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np

from cbam_jax.search.bounds import distance_bounds
from cbam_jax.search.candidates import group_members
from cbam_jax.search.groups import Settings, minima_by_turns, query_sides, untiled
from cbam_jax.search.nearest import nearest_keys
from cbam_jax.search.order import INFINITE, NO_BOUND, NOBODY, unpacked
from cbam_jax.search.types import Labels, Queries, Shard, ignores

_CORES = os.cpu_count() or 1
_CHEAP = 4  # A part of a shard that costs no more to measure than reading it whole once more.
_SLAB = 2048  # Groups of which the k lowest are chosen at once, if a block has as many;
_ROWS = 8  # at least so many times k, or two of the lowest would often be in one row.


class Near(NamedTuple):
    """Of each query the k nearest so far, in no order, and what is known of all others."""

    keys: np.ndarray  # [q, k] of `packed`.
    limits: np.ndarray  # [q] float64: farther items are not among the nearest.
    left: np.ndarray  # [q] bool: too much was within the limit to be measured.

    def taken(self, part: slice) -> Self:
        """Views of some queries'."""
        return self._make(a[part] for a in self)

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances and indices of the nearest, and whether it is proven."""
        return *unpacked(np.sort(self.keys, axis=1)), ~self.left


def near_pass(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    settings: Settings,
    query_block: int,
    sides: Sequence[Shard] | None = None,
) -> Near:
    """The k nearest of each query; ``sides`` are the shards as products take them, if kept."""
    tiles = query_sides(queries, settings.preparation, query_block)
    share = untiled(tiles.shares, tiles.parts, len(queries.rows))
    turns = minima_by_turns(tiles, sides or shards, settings, ready=sides is not None)
    return near_of_turns(turns, tiles.parts, queries, share, shards, k, settings)


def near_of_turns(
    turns: Iterable[list[list[list]]],
    parts: list[np.ndarray],
    queries: Queries,
    share: np.ndarray,
    shards: Sequence[Shard],
    k: int,
    settings: Settings,
) -> Near:
    """The k nearest, by what `minima_by_turns` yields for the tiles that have ``parts``.

    ``share`` [q] is the queries' own of the bounds.
    """
    q = len(queries.rows)
    near = Near(np.full((q, k), NOBODY), np.full(q, np.inf), np.zeros(q, bool))
    places = _places(parts)

    def look(shard, of_tiles, tile, columns, rows):
        minima = [(first, *(np.asarray(a)[:, columns] for a in b)) for first, *b in of_tiles[tile]]
        _look(queries.taken(rows), share[rows], shard, minima, settings, near.taken(rows))

    with ThreadPoolExecutor(_CORES) as pool:
        for turn in turns:
            for shard, of_tiles in zip(shards, turn, strict=True):
                of_shard = functools.partial(look, shard, of_tiles)
                list(pool.map(of_shard, *zip(*places, strict=True)))
    return near


def _places(parts: list[np.ndarray]) -> list[tuple[int, slice, slice]]:
    """Tiles' columns that are looked at by a thread, and their queries; each query once."""
    places, done = [], 0
    for tile, rows in enumerate(parts):
        start = int(np.searchsorted(rows, done))
        width = int(rows[-1]) + 1 - done
        threads = min(width, -(-_CORES // len(parts)))
        edges = np.linspace(0, width, threads + 1).astype(int).tolist()
        for i, j in itertools.pairwise(edges):
            places.append((tile, slice(start + i, start + j), slice(done + i, done + j)))
        done += width
    return places


def _look(
    queries: Queries,
    share: np.ndarray,
    shard: Shard,
    minima: list[tuple],
    settings: Settings,
    near: Near,
) -> None:
    """Takes what is near in some blocks of a shard into ``near``."""
    if not minima:
        return
    preparation = settings.preparation
    measured = queries, shard, preparation.metric, float(preparation.scale) != 1
    most = max(settings.most * len(share), len(shard.rows) // _CHEAP)
    known = np.isfinite(near.limits).all() and not near.left.any()
    pairs = _within(minima, near.limits, share, settings) if known else None
    done = np.empty(0, np.int64)
    if pairs is None or pairs.count.sum() > most:
        lowest = _lowest(minima, near.keys.shape[1], settings.size)
        _measure(near, *lowest, *measured)
        done = _numbers(*lowest)
        pairs = _within(minima, near.limits, share, settings)
    _give_up(near.left, pairs.count, most)
    taken = np.flatnonzero(~near.left[pairs.row])
    row, index, shared = (a[taken] for a in pairs[:3])
    others = _others(queries.labels, row[shared], index[shared], shard, settings)
    row, index = (np.concatenate(both) for both in zip((row, index), others, strict=True))
    fresh = np.flatnonzero(~np.isin(_numbers(row, index), done))
    order = fresh[np.argsort(row[fresh], kind="stable")]
    _measure(near, row[order], index[order], *measured)


def _measure(near: Near, row: np.ndarray, index: np.ndarray, *measured) -> None:
    """Takes pairs [p], by query, into the nearest; and lowers the limits to the k-th of them."""
    near.keys[:] = nearest_keys(near.keys, row, index, *measured)
    near.limits[:] = np.minimum(near.limits, unpacked(near.keys.max(axis=1))[0])


def _numbers(row: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Each pair as one number."""
    return row.astype(np.int64) << 32 | index


def _give_up(left: np.ndarray, pairs: np.ndarray, most: int) -> None:
    """Leaves the queries with the most pairs [q], until ``most`` pairs are left in all."""
    order = np.argsort(pairs)
    left[order[np.cumsum(pairs[order]) > most]] = True


def _others(
    labels: Labels, row: np.ndarray, index: np.ndarray, shard: Shard, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and items [p]: of the groups that hold ``index``, all others not ignored."""
    members = group_members(index, shard, settings)
    ignored = ignores(labels.taken(row).column(), settings.items.taken(members))
    at, place = np.nonzero(~ignored & (members >= 0))
    return row[at], members[at, place]


def _lowest(minima: list[tuple], k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and items [p], by query: of each about the k lowest bounds."""
    find = _in_some_rows if _ROWS * k <= len(minima[0][1]) else _in_all
    block, group, bound = find(minima, k)
    first, groups = (np.array(a) for a in zip(*((b[0], len(b[1])) for b in minima), strict=True))
    index = first[block] + group + (bound & (size - 1)) * groups[block]
    row, column = np.nonzero((bound < INFINITE).T)
    return row.astype(np.int32), index[column, row].astype(np.int32)


def _in_some_rows(minima: list[tuple], k: int) -> tuple[np.ndarray, ...]:
    """Block, group and bound of about the k lowest, [k, t], in any order.

    Of slabs of as many groups each: the lowest bounds are in the rows whose minimum over the slabs
    is lowest, of each row one. Groups at a block's end that fill no slab are not looked at.
    """
    height = min(max(_ROWS * k, _SLAB), len(minima[0][1]))
    slabs = [
        (number, start, lowest[start : start + height])
        for number, (_, lowest, _) in enumerate(minima)
        for start in range(0, len(lowest) - height + 1, height)
    ]
    row = np.argpartition(functools.reduce(np.minimum, [a for *_, a in slabs]), k - 1, axis=0)[:k]
    bound, column = np.full(row.shape, NO_BOUND, np.int32), np.arange(row.shape[1])
    block, group = np.zeros_like(row), row.copy()
    for number, start, lowest in slabs:  # np.argmin along the slabs takes ten times as long.
        there = lowest[row, column]
        nearer = there < bound
        bound[nearer], block[nearer], group[nearer] = there[nearer], number, start + row[nearer]
    return block, group, bound


def _in_all(minima: list[tuple], k: int) -> tuple[np.ndarray, ...]:
    """The same of all groups, where a block has few for so many."""
    lowest = np.concatenate([block[1] for block in minima])
    starts = np.cumsum([0, *(len(block[1]) for block in minima)])
    row = np.argpartition(lowest, min(k, len(lowest)) - 1, axis=0)[:k]
    block = np.searchsorted(starts, row, side="right") - 1
    return block, row - starts[block], np.take_along_axis(lowest, row, axis=0)


class _Pairs(NamedTuple):
    """Queries and the items of the lowest bounds, [p]; and how many of each query are measured."""

    row: np.ndarray
    index: np.ndarray
    shared: np.ndarray  # Whether others of its group may be near as well.
    count: np.ndarray  # [t], those others included.


def _within(
    minima: list[tuple], limits: np.ndarray, share: np.ndarray, settings: Settings
) -> _Pairs:
    """The groups whose lowest bound is within the limit."""
    size, found = settings.size, []
    limits = distance_bounds(limits, share, settings.preparation) | (size - 1)
    for first, lowest, second in minima:
        group, row = np.divmod(np.flatnonzero(lowest <= limits), len(limits))
        index = first + group + (lowest[group, row] & (size - 1)) * len(lowest)
        found.append((row.astype(np.int32), index.astype(np.int32), second[group, row]))
    row, index, second = (np.concatenate(part) for part in zip(*found, strict=True))
    shared = second <= limits[row]
    return _Pairs(row, index, shared, np.bincount(row, 1 + (size - 1) * shared, len(limits)))
