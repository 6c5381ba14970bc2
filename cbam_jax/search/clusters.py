"""Each cluster searched alone, where embeddings lie in tight ones, as a well trained model's do.

The errors of a product are a share of the embeddings' norms, and within a tight cluster distances
are shorter than that. But its other items are few, and products of few in float64 cost little.

Queries gather around a few of them, their *leaders*. Around each leader l all items within a radius
R are found, by float32 lower bounds: a product with the leaders alone. A query q of that leader is
compared with those items and no others, by float64 products, and the distances of the lowest are
computed as in every pass. By the triangle inequality all other items are farther than R - |q - l|:
a k-th distance below that is proven. As R is l's own k-th distance, twice the largest |q - l| and a
little, it is, unless a query ignores many of its neighbours, and is then left to other passes.

Where the clusters are too many, or too near each other for R to tell them apart, the pass ends
before it has cost much, with nothing proven.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.bounds import Preparation, faint, prepared
from cbam_jax.search.groups import Settings, group_size
from cbam_jax.search.near import near_pass
from cbam_jax.search.order import NOBODY, packed, unpacked
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import blocks_of, equal_blocks, padded_size
from cbam_jax.search.sums import lane_sum
from cbam_jax.search.types import Labels, Queries, Shard, ignores

_LEADERS = 512  # At most; and queries that are looked at for more of them at a time.
_SLACK = 8  # Candidates beyond k, and neighbours that a query may ignore.
_SEATS, _ITEMS = 32, 256  # Queries of one leader, and items near it, that a product compares.
_TILES = 16  # Such products in a call.
_BLOCK, _ROWS = 2**23, 2**16  # Numbers and rows of a block of the gallery, at most: 32 MiB.
_SHARE = 8  # More than this part of all pairs are compared as fast by other passes.


class Leaders(NamedTuple):
    """Which queries lead, [leaders]; the number of each query's leader, and how far it is, [q]."""

    rows: np.ndarray
    number: np.ndarray
    apart: np.ndarray


def leaders_of(
    queries: Queries, within: float, metric: str, device: Any, most: int
) -> Leaders | None:
    """Queries such that each other is within a squared distance of one; None if ``most`` won't do.

    Of unit vectors where the metric is cosine.
    """
    q, x, most = len(queries.rows), queries.rows, min(most, _LEADERS)
    if metric == "cosine":
        x = x / np.sqrt(np.maximum(queries.squares, np.finfo(np.float32).tiny))[:, None]
    x = on_device(x, device)
    far, leaders = np.arange(q), np.empty(0, np.int32)
    while len(far):
        sample = far[:: -(-len(far) // _LEADERS)].astype(np.int32)
        near = _squares_apart(x, sample)[sample] < within
        leaders = np.concatenate([leaders, sample[_first_of_each(near, most + 1)]])
        if len(leaders) > most:
            return None
        apart = _squares_apart(x, leaders)[:q]
        far = np.flatnonzero(apart.min(axis=1) > within)
    number = apart.argmin(axis=1)
    x = on_device(queries.rows, device)
    itself = Shard(device, 0, x, queries.squares)
    every = np.arange(q, dtype=np.int32)
    distances = pair_distances(x, itself, every, leaders[number][:, None], metric)[:, 0]
    return Leaders(leaders, number, _length(distances, metric))


def _first_of_each(near: np.ndarray, most: int) -> list[int]:
    """Of rows that are near each other or not, [m, m], one after another that is near none yet."""
    left, chosen = np.ones(len(near), bool), []
    while left.any() and len(chosen) < most:
        chosen.append(int(left.argmax()))
        left &= ~near[chosen[-1]]
        left[chosen[-1]] = False
    return chosen


def _squares_apart(x: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Squared distances to some of the rows, about; [rows of x, rows]."""
    padding = padded_size(len(rows)) - len(rows)
    return np.asarray(_squares(x, np.pad(rows, (0, padding))))[:, : len(rows)]


@jax.jit
def _squares(x, rows):
    y = x[rows]
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :] - 2 * product


def _length(distances: np.ndarray, metric: str) -> np.ndarray:
    """Distances as lengths, which obey the triangle inequality, rounded up; float64."""
    # What is shorter may have been computed as 0.
    values = np.maximum(distances.astype(np.float64) * (1 + 1e-6), 1e-29)
    if metric == "cosine":
        return np.sqrt(2 * values)
    return np.sqrt(values) if metric == "squared_euclidean" else values


def _distance(lengths: np.ndarray, metric: str) -> np.ndarray:
    """Lengths as distances, rounded down."""
    values = lengths * (1 - 1e-6)
    if metric == "cosine":
        values = values**2 / 2
    return (values**2 if metric == "squared_euclidean" else values).astype(np.float32)


def cluster_pass(
    queries: Queries,
    leaders: Leaders,
    shards: Sequence[Shard],
    k: int,
    preparation: Preparation,
    items: Labels,
    blocks: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest near each query's leader, and whether it is proven."""
    q, metric = len(queries.rows), preparation.metric
    preparation = preparation._replace(dtype="float32")
    radius = _radius(queries, leaders, shards, k, preparation, items, blocks)
    count = k + _SLACK
    lowest = np.full((q, count), NOBODY, np.uint64)
    for shard in shards:
        x = on_device(queries.rows, shard.device)
        for first, rows, near in _near_leaders(queries, leaders, shard, radius, preparation):
            pairs = np.sum(
                np.bincount(leaders.number, minlength=len(near)) * [len(a) for a in near]
            )
            if pairs > q * len(rows) // _SHARE:
                return (*unpacked(lowest[:, :k]), np.zeros(q, bool))
            tiles = _tiles(leaders, near)
            if not len(tiles.leader):
                continue
            fresh = _lowest_in_tiles(x, rows, first, tiles, queries.labels, items, count, metric)
            _merge(lowest, tiles.seats, fresh)
    keys = _measured(queries, lowest, shards, metric)
    kth, unseen = keys[:, k - 1], lowest[:, -1]
    distances, indices = unpacked(keys[:, :k])
    outside = _distance(radius[leaders.number] - leaders.apart, metric)
    return distances, indices, (kth < unseen) & (distances[:, -1] < outside)


def _radius(queries, leaders, shards, k, preparation, items, blocks) -> np.ndarray:
    """How far around each leader the k nearest of all its queries are, at most; and a little."""
    some = queries.taken(leaders.rows)._replace(labels=Labels(None, None, None))
    n = sum(len(shard.rows) for shard in shards)
    k = min(k + _SLACK, n)
    settings = Settings(preparation, items, blocks[1], group_size(k, n), k)
    block = min(blocks[0], padded_size(len(some.rows)))
    kth = near_pass(some, shards, k, settings, block).limits
    widest = np.zeros(len(kth))
    np.maximum.at(widest, leaders.number, leaders.apart)
    norm = np.ones(len(kth)) if preparation.metric == "cosine" else np.sqrt(some.squares)
    return 1.01 * (_length(kth, preparation.metric) + 2 * widest) + 1e-3 * norm


def _near_leaders(
    queries: Queries, leaders: Leaders, shard: Shard, radius: np.ndarray, preparation: Preparation
) -> Iterator[tuple[int, Any, list[np.ndarray]]]:
    """Blocks of the gallery: the first index, the rows, and of each leader those within radius."""
    some = queries.taken(leaders.rows)
    padding = padded_size(len(some.rows)) - len(some.rows)
    some = some.taken(np.pad(np.arange(len(some.rows)), (0, padding), mode="edge"))
    x, own = prepared(some.rows, some.squares, preparation)
    halved = preparation.metric == "cosine"
    limit = np.pad(radius**2 / (2 if halved else 1), (0, padding), mode="edge")
    limit = (limit * (1 + 1e-6) - np.asarray(own, np.float64)).astype(np.float32)
    side = jax.device_put((x * (-1 if halved else -2), np.nextafter(limit, np.inf)), shard.device)
    size = max(1, min(_BLOCK // some.rows.shape[1], _ROWS))
    for first, fresh, rows, squares in blocks_of(shard, equal_blocks(len(shard.rows), size)):
        rows = jax.device_put(rows, shard.device)
        block = prepared(rows, squares, preparation)
        near = np.asarray(_within(*side, *jax.device_put(block, shard.device)))
        near = near[: len(leaders.rows)]
        yield first, rows, [fresh + np.flatnonzero(a[fresh:]).astype(np.int32) for a in near]


@jax.jit
def _within(x, limit, y, share):
    """Whether the lower bound of each leader and item is within the limit, [leaders, m]."""
    product = jax.lax.dot_general(
        y,
        x,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (product + share[:, None] <= limit[None, :]).T


class _Tiles(NamedTuple):
    """Queries and items to compare: the leader [t], the queries [t, seats], the items [t, m]."""

    leader: np.ndarray
    seats: np.ndarray  # Numbers of queries, -1 where a seat is free.
    items: np.ndarray  # Rows of the block, -1 where there is none.


def _tiles(leaders: Leaders, near: list[np.ndarray]) -> _Tiles:
    """The queries of each leader in as many tiles as they and the items near it need."""
    order = np.argsort(leaders.number, kind="stable").astype(np.int32)
    edges = np.searchsorted(leaders.number[order], np.arange(len(near) + 1))
    tiles = []
    for number, found in enumerate(near):
        seats = _in_rows(order[edges[number] : edges[number + 1]], _SEATS)
        found = _in_rows(found, _ITEMS)
        leader = np.full(len(seats) * len(found), leaders.rows[number], np.int32)
        tiles.append((leader, np.repeat(seats, len(found), 0), np.tile(found, (len(seats), 1))))
    return _Tiles(*(np.concatenate(part) for part in zip(*tiles, strict=True)))


def _in_rows(x: np.ndarray, width: int) -> np.ndarray:
    """Numbers in rows of one width, the last filled with -1."""
    return np.pad(x, (0, -len(x) % width), constant_values=-1).reshape(-1, width)


def _lowest_in_tiles(
    x: jax.Array,
    rows: jax.Array,
    first: int,
    tiles: _Tiles,
    labels: Labels,
    items: Labels,
    count: int,
    metric: str,
) -> np.ndarray:
    """Keys of the lowest bounds of each tile, [t, seats, count], by bound and index."""

    def lowest(part):
        part = _Tiles(*(_filled(a[part : part + _TILES]) for a in tiles))
        there = items.taken(first + part.items)
        there = there._replace(index=np.where(part.items < 0, -1, there.index))
        query = labels.taken(part.seats)
        with jax.enable_x64(True):
            found = _compared(x, rows, part, query, there, count=count, metric=metric)
        bound, place = (np.asarray(a) for a in found)
        return packed(bound, np.where(bound < np.inf, place + np.int32(first), -1).astype(np.int32))

    with ThreadPoolExecutor() as pool:
        return np.concatenate([*pool.map(lowest, range(0, len(tiles.leader), _TILES))])


def _filled(x: np.ndarray) -> np.ndarray:
    """As many as a call takes; what is filled in compares nothing."""
    missing = [(0, _TILES - len(x))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, missing, constant_values=0 if x.ndim == 1 else -1)


@functools.partial(jax.jit, static_argnames=("count", "metric"))
def _compared(x, y, tiles, query, items, *, count, metric):
    """The lowest bounds of each seat of each tile, and whose they are."""

    def one(tile):
        (leader, seats, rows), query, items = tile
        low = _bounds(x[seats], y[rows], x[leader], metric)
        low = jnp.where(ignores(query.column(), items.row()), jnp.inf, low)
        # Of equal ones the first: rows ascend.
        low, place = jax.lax.top_k(-low, min(count, len(rows)))
        return -low, rows[place]

    return jax.lax.map(one, (tiles, query, items))


def _bounds(x, y, leader, metric):
    """Lower bounds of distances [t, m], in float64, rounded to float32 as distances are."""
    x, y, leader = (a.astype(jnp.float32).astype(jnp.float64) for a in (x, y, leader))
    error = (2 * x.shape[1] + 64) * float(np.finfo(np.float64).eps)
    if metric == "cosine":
        unknown = faint(x)[:, None] | faint(y)[None, :]
        x, y = (a / _root(lane_sum(a * a))[:, None] for a in (x, y))
        low = jnp.where(unknown, 0.0, jnp.maximum(1 - x @ y.T - 2 * error, 0.0))
        return low.astype(jnp.float32)
    # Less the leader, the numbers are as short as the distances.
    x, y = x - leader[None, :], y - leader[None, :]
    squares = lane_sum(x * x)[:, None] + lane_sum(y * y)[None, :]
    # The last term covers float32's smallest numbers, which may be computed as 0.
    low = jnp.maximum(squares * (1 - error) - 2 * (x @ y.T) - 2.0**-180, 0.0)
    return (jnp.sqrt(low) if metric == "euclidean" else low).astype(jnp.float32)


def _root(squares):
    return jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


def _merge(lowest: np.ndarray, seats: np.ndarray, fresh: np.ndarray) -> None:
    """Takes the lowest keys of tiles, [t, seats, count], into those of the queries, [q, count]."""
    count = lowest.shape[1]
    edges = np.flatnonzero(np.diff(seats[:, 0], prepend=-1, append=-1))
    for start, end in itertools.pairwise(edges):
        taken = seats[start] >= 0
        rows = seats[start][taken]
        keys = np.moveaxis(fresh[start:end, taken], 1, 0).reshape(len(rows), -1)
        keys = np.concatenate([lowest[rows], keys], axis=1)
        lowest[rows] = np.sort(np.partition(keys, count - 1, axis=1)[:, :count], axis=1)


def _measured(
    queries: Queries, lowest: np.ndarray, shards: Sequence[Shard], metric: str
) -> np.ndarray:
    """Keys of the same items by their distances, in order."""
    index = unpacked(lowest)[1]
    distances = np.full(index.shape, np.inf, np.float32)
    every = np.arange(len(index), dtype=np.int32)
    for shard in shards:
        here = (index >= shard.first) & (index < shard.first + len(shard.rows))
        x = on_device(queries.rows, shard.device)
        found = np.where(here, index, shard.first).astype(np.int32)
        distances = np.where(here, pair_distances(x, shard, every, found, metric), distances)
    return np.sort(packed(distances, index), axis=1)
