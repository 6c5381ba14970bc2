"""Few queries: one reading of the gallery, and no pass after it.

The product of a gallery and few queries takes about as long as reading it does, and making it ready
would take longer. So norms and products are computed block by block of the gallery as it is; they
bound each distance from below and from above, and kept are all items whose lower bound is not above
the k-th lowest of the upper bounds so far. Their distances are computed in float64. As everything
is kept that may be near, nothing is left to prove. In tight clusters that is the whole cluster,
which is small beside the gallery.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.bounds import (
    Preparation,
    center_of,
    looseness,
    prepared,
    sampled_rows,
    usual,
)
from cbam_jax.search.candidates import by_row, rows_of_keys
from cbam_jax.search.order import NOBODY, packed, unpacked
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import blocks_of, fixed_blocks, padded_size
from cbam_jax.search.spread import distances_if_clustered
from cbam_jax.search.sums import lane_sum
from cbam_jax.search.types import Labels, Queries, Shard, ignores

MOST = 64  # Queries that are few.
_LEAST = 4  # Queries of which the product takes less than reading the gallery.
_LOOKED_AT = 64  # Rows that show whether there are clusters: a millisecond.
_BLOCK, _ROWS = 2**22, 2**15  # Numbers and rows of a block of the gallery, at most.
_LARGE = 2.0**80  # Squared norms from which numbers need to be scaled.
_FIRST = 2**10  # Rows by which it is first told what may be near.
_PAIRS = 2**22  # Pairs of a query and an item that are kept, at most: 64 MiB.
_CENTERED = 0.9  # The mean's share of the squared norms from which it is worth taking off.
_ROUNDING = 16 * 2.0**-24  # Distances this near may be the same in float32.


class _Pairs(NamedTuple):
    """Queries and items that may be near, [p], and bounds of their distances, as a `_Block`'s."""

    row: np.ndarray
    index: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def taken(self, part: np.ndarray) -> Self:
        return self._make(a[part] for a in self)


def pays(shards: Sequence[Shard], queries: int, metric: str) -> bool:
    """Whether `few_search` is likely to be the fastest; of how the gallery lies, by some rows.

    A pass would make a gallery far from the origin ready, and prove nothing in tight clusters.
    """
    if queries > MOST or shards[0].device.platform != "cpu":
        return False
    if queries <= _LEAST or center_of(shards, metric, 0.25) is not None:
        return True
    rows = sampled_rows(shards, _LOOKED_AT // 16)
    return len(rows) > 1 and distances_if_clustered(rows) is not None


def few_search(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    metric: str,
    items: Labels,
    rows: int | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances and indices of the k nearest; the shards' ``squares`` are not looked at.

    None where numbers are not finite or need to be scaled, or where too many items are as near as
    the k-th. ``rows`` of the gallery are taken at a time.
    """
    pairs = _near_pairs(queries, shards, k, metric, items, rows)
    if pairs is None:
        return None
    keys = np.full((len(queries.rows), k), NOBODY, np.uint64)
    if len(pairs.row):
        pairs = _by_query(pairs)
        found = packed(_measured(queries, shards, pairs, metric), pairs.index)
        fresh = rows_of_keys(found[:, None], pairs.row, len(keys))
        keys = np.partition(np.concatenate([keys, fresh], axis=1), k - 1, axis=1)[:, :k]
    return unpacked(np.sort(keys, axis=1))


def _near_pairs(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    metric: str,
    items: Labels,
    rows: int | None,
) -> _Pairs | None:
    """All items of each query that may be among its k nearest."""
    x, own = _side(queries, shards, metric)
    nearest = np.full((len(own), k), np.inf, np.float32)
    limits, kept, largest = np.full(len(own), np.inf), [], float(np.max(queries.squares))
    for block in _blocks(x, shards, metric, limits, rows):
        if not block.square < _LARGE:
            return None
        largest = max(largest, block.square)
        block = _without_ignored(block, queries.labels, items)
        if not np.isfinite(limits).all():
            limits[:] = np.minimum(limits, _limits(_kth_of_block(block, k), own))
        kept.append(_pairs_within(block, limits))
        nearest = _merged(nearest, kept[-1])
        limits[:] = np.minimum(limits, _limits(nearest.max(axis=1), own))
        if sum(len(part.row) for part in kept) > _PAIRS:
            kept = [_within(kept, limits)]
            if len(kept[0].row) > _PAIRS:
                return None
    return _within(kept, limits) if usual(largest) else None


class _Side(NamedTuple):
    """The queries as the product takes them, [seats, d], and the centre [d] that they are less."""

    rows: np.ndarray
    center: np.ndarray | None


def _side(queries: Queries, shards: Sequence[Shard], metric: str) -> tuple[_Side, np.ndarray]:
    """The queries' side; and by how much their upper bounds are above lower ones by itself, [q]."""
    q, d = queries.rows.shape
    center = center_of(shards, metric, _CENTERED)
    preparation = Preparation(center, np.float32(1), metric, "float32")
    x, share = (np.asarray(a) for a in prepared(queries.rows, queries.squares, preparation))
    share = share.astype(np.float64)
    own = looseness(share, d, metric) + _ROUNDING * np.abs(share) + 1e-30
    seats = next((s for s in (1, 4) if q <= s), padded_size(q))
    x = np.pad(x * np.float32(-2 if metric.endswith("euclidean") else -1), ((0, seats - q), (0, 0)))
    return _Side(x, center), own


class _Block(NamedTuple):
    """Items [m] of which some query's bound may be within its limit, and their bounds.

    ``low`` [m, q] are lower bounds, ``loose`` [m] is by how much upper ones are above; both less
    what is the query's. ``square`` is the largest squared norm of the whole block.
    """

    index: np.ndarray
    low: np.ndarray
    loose: np.ndarray
    square: float


def _blocks(
    side: _Side, shards: Sequence[Shard], metric: str, limits: np.ndarray, rows: int | None
) -> Iterator[_Block]:
    """The gallery's blocks. While one is looked at, and lowers the limits, the next is computed."""
    seats, d = side.rows.shape
    size = rows or max(1, min(_BLOCK // d, _ROWS))
    waiting = None
    for shard in shards:
        there = jax.device_put(side, shard.device)
        for first, fresh, y, _ in blocks_of(shard, fixed_blocks(len(shard.rows), size)):
            below = np.full(seats, -np.inf, np.float32)
            below[: len(limits)] = _rounded_up(limits)
            found = _bounds(*there, y, jax.device_put(below, shard.device), metric=metric)
            if waiting is not None:
                yield _read(*waiting, len(limits), d, metric)
            waiting = first, fresh, found
    assert waiting is not None
    yield _read(*waiting, len(limits), d, metric)


def _read(first: int, fresh: int, found: tuple, q: int, d: int, metric: str) -> _Block:
    near, low, share, square = (np.asarray(a) for a in found)
    item = fresh + np.flatnonzero(near[fresh:])
    loose = looseness(share[item].astype(np.float64), d, metric).astype(np.float32)
    return _Block((first + item).astype(np.int32), low[item, :q], loose, float(square))


@functools.partial(jax.jit, static_argnames="metric")
def _bounds(x, center, y, limits, *, metric):
    """Items of which a bound is within the limits [m]; the lower bounds [m, q]; and their share.

    The last is the largest squared norm.
    """
    y = y.astype(jnp.float32)
    squares = lane_sum(y * y)
    y, share = prepared(y, squares, Preparation(center, np.float32(1), metric, "float32"))
    # With so few columns the compiler's options for large products would make it slower.
    product = jax.lax.dot_general(
        y,
        x,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    low = product + share[:, None]
    return jnp.any(low <= limits[None, :], axis=1), low, share, jnp.max(squares)


def _without_ignored(block: _Block, query: Labels, items: Labels) -> _Block:
    if all(label is None for label in query):
        return block
    ignored = ignores(query.row(), items.taken(block.index).column())
    return block._replace(low=np.where(ignored, np.float32(np.inf), block.low))


def _kth_of_block(block: _Block, k: int) -> np.ndarray:
    """Upper bounds of the k-th distances, [q], by some items of a block."""
    some = slice(0, max(k, _FIRST))  # A few tell nearly as much as many.
    low, loose = block.low[some], block.loose[some]
    if k > len(low):
        return np.full(low.shape[1], np.inf)
    lowest = np.argpartition(low, k - 1, axis=0)[:k]
    return np.max(np.take_along_axis(low, lowest, axis=0) + loose[lowest], axis=0)


def _limits(kth: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Lower bounds up to which an item may be among the nearest, by the k-th upper bounds [q]."""
    kth = kth.astype(np.float64)
    return kth + own + _ROUNDING * np.abs(kth)


def _rounded_up(limits: np.ndarray) -> np.ndarray:
    return np.nextafter(limits.astype(np.float32), np.float32(np.inf))


def _pairs_within(block: _Block, limits: np.ndarray) -> _Pairs:
    """The pairs whose lower bounds are within the limits and finite."""
    below = np.minimum(_rounded_up(limits), np.finfo(np.float32).max)
    # np.nonzero takes ten times as long.
    item, row = np.divmod(np.flatnonzero(block.low <= below), len(limits))
    low = block.low[item, row]
    return _Pairs(row.astype(np.uint8), block.index[item], low, low + block.loose[item])


def _within(pairs: list[_Pairs], limits: np.ndarray) -> _Pairs:
    """The pairs of all blocks within the limits that are known by now."""
    every = _Pairs(*(np.concatenate(part) for part in zip(*pairs, strict=True)))
    return every.taken(np.flatnonzero(every.low <= limits[every.row]))


def _by_query(pairs: _Pairs) -> _Pairs:
    """The pairs of each query together, in their order."""
    return pairs.taken(np.argsort(pairs.row, kind="stable"))


def _merged(nearest: np.ndarray, pairs: _Pairs) -> np.ndarray:
    """The lowest upper bounds of each query, [q, k], those of more pairs among them."""
    if not len(pairs.row):
        return nearest
    pairs, k = _by_query(pairs), nearest.shape[1]
    fresh = by_row(pairs.high[:, None], pairs.row, len(nearest), np.inf)
    return np.partition(np.concatenate([nearest, fresh], axis=1), k - 1, axis=1)[:, :k]


def _measured(queries: Queries, shards: Sequence[Shard], pairs: _Pairs, metric: str) -> np.ndarray:
    """The pairs' distances, [p] float32."""
    distances = np.empty(len(pairs.row), np.float32)
    for shard in shards:
        last = shard.first + len(shard.rows)
        here = np.flatnonzero((pairs.index >= shard.first) & (pairs.index < last))
        x, row = on_device(queries.rows, shard.device), pairs.row[here].astype(np.int32)
        distances[here] = pair_distances(x, shard, row, pairs.index[here, None], metric)[:, 0]
    return distances
