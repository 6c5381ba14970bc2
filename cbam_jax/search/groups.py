"""The first pass over the gallery: of each group of items the lowest bounds, the lowest kept."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from numpy.typing import ArrayLike

from cbam_jax.compiler_options import compiler_options
from cbam_jax.search.bounds import Preparation, prepared, rounded_down
from cbam_jax.search.order import INFINITE, NO_BOUND, ordered, reordered
from cbam_jax.search.shards import GROUP, blocks_of, pass_blocks, placed, query_tiles
from cbam_jax.search.types import Labels, Lowest, Queries, Shard, ignores

_KEPT = 2**24  # Lowest bounds that are kept on a CPU, 128 MiB with the second lowest.
# The same of all tiles together, 3 GiB, and blocks, at most, where a product takes less time than a
# selection, which sorts as much whatever the number of blocks.
_KEPT_ON_ACCELERATOR = 3 * 2**27, 16


def group_size(k: int, n: int) -> int:
    """Items in a group: a power of two, so few that seldom two of the k nearest share one."""
    # Two where k is larger: then sorting half as many is worth looking at more.
    return min(GROUP, 2 ** max(int(n >= 8 * k), int(np.log2(n / (32 * k)))))


class Settings(NamedTuple):
    """How bounds were computed, for which items, in which groups, and how many pairs are measured.

    Of ``gallery_block`` items at a time, ``size`` a group; ``most`` pairs a query, in the mean.
    """

    preparation: Preparation
    items: Labels
    gallery_block: int
    size: int
    most: int


class Tiles(NamedTuple):
    """Queries as products take them: which are in each tile, the tiles, their share of bounds."""

    parts: list[np.ndarray]
    sides: list[tuple]
    shares: list


def query_sides(queries: Queries, preparation: Preparation, size: int) -> Tiles:
    """The queries, ``size`` at a time, prepared and with their labels."""
    parts = query_tiles(len(queries.rows), size)
    some = [queries.taken(rows) for rows in parts]
    sides = [prepared(part.rows, part.squares, preparation) for part in some]
    factor = -2 if preparation.metric.endswith("euclidean") else -1
    tiles = [(factor * x, own, part.labels) for (x, own), part in zip(sides, some, strict=True)]
    shares = [share for _, share in sides]
    if preparation.dtype == "float64":
        shares = [np.zeros(len(rows)) for rows in parts]  # They are in the bounds.
    return Tiles(parts, tiles, shares)


def minima_by_turns(
    tiles: Tiles,
    shards: Sequence[Shard],
    settings: Settings,
    ready: bool = False,
) -> Iterator[list[list[list]]]:
    """What `_group_minima` finds in some blocks after another: of each shard and tile, of each.

    With the first row of the block. If ``ready``, the shards are as `prepared` returns them.
    """
    preparation, items, gallery_block, size, _ = settings
    platform = shards[0].device.platform
    sides = [jax.device_put(tiles.sides, s.device) for s in shards]
    kept = [[[] for _ in tiles.parts] for _ in shards]
    minima = _minima_program(preparation.dtype)
    most = _blocks_kept(platform, tiles.parts, gallery_block, size)
    # Devices run at the same time: each is given its next block before any result is waited for.
    waiting = []
    fresh = [blocks_of(s, pass_blocks(s, gallery_block)) for s in shards]
    for number, step in enumerate(zip_longest(*fresh), 1):
        # No more than two blocks wait in line, or all of the gallery would soon be in memory.
        jax.block_until_ready(waiting)
        waiting = [t[-1:] for states in kept for t in states]
        for i, block in enumerate(step):
            if block is None:
                continue
            first, block = _on_device(
                block, items, None if ready else preparation, shards[i].device
            )
            for t, side in enumerate(sides[i]):
                kept[i][t].append((first, *minima(*side, *block, size=size)))
        if number % most == 0:
            yield kept
            kept = [[[] for _ in tiles.parts] for _ in shards]
    if any(of_tiles[0] for of_tiles in kept):
        yield kept


def lowest_bounds(
    queries: Queries,
    shards: Sequence[Shard],
    settings: Settings,
    query_block: int,
    sides: Sequence[Shard] | None = None,
) -> tuple[list[Lowest], np.ndarray]:
    """Of each shard, for each query the ``most`` groups with the lowest bounds, by programs.

    And the queries' own share of them. ``sides`` are the shards as products take them, if kept.
    """
    tiles = query_sides(queries, settings.preparation, query_block)
    q, parts, size = len(queries.rows), tiles.parts, settings.size
    nothing = [_nothing(len(rows), settings.most) for rows in parts]
    best = [jax.device_put(nothing, s.device) for s in shards]
    for kept in minima_by_turns(tiles, sides or shards, settings, ready=sides is not None):
        best = [
            [_select(*both, size=size) for both in zip(*of_shard, strict=True)]
            for of_shard in zip(best, kept, strict=True)
        ]
    lowest = [Lowest(*(untiled(part, parts, q) for part in zip(*s, strict=True))) for s in best]
    return lowest, untiled(tiles.shares, parts, q)


def _blocks_kept(platform: str, parts: list[np.ndarray], rows: int, size: int) -> int:
    """Blocks of ``rows`` items of which the bounds are kept, of each tile, between selections."""
    if platform == "cpu":
        return max(1, _KEPT * size // (sum(map(len, parts)) * rows))
    kept, most = _KEPT_ON_ACCELERATOR
    return max(1, min(kept * size // (sum(map(len, parts)) * rows), most))


def _on_device(
    block: tuple, items: Labels, preparation: Preparation | None, device: Any
) -> tuple[np.int32, tuple]:
    """A block's first gallery index, and the block as `_group_minima` takes it."""
    first, fresh, rows, squares = block
    labels = items.taken(np.maximum(np.arange(first, first + len(rows)), 0))
    side = (rows, squares) if preparation is None else prepared(rows, squares, preparation)
    block = (*side, np.int32(fresh), labels)
    return np.int32(first), placed(block, device)


def _nothing(q: int, count: int) -> Lowest:
    none = np.full((q, count), NO_BOUND, np.int32)
    return Lowest(none, np.full((q, count), -1, np.int32), none.copy())


def untiled(parts: Sequence[ArrayLike], rows: list[np.ndarray], q: int) -> np.ndarray:
    """What all tiles have, as one array of all queries; the last overlaps the one before."""
    parts = [np.asarray(part) for part in parts]
    whole = np.empty((q, *parts[0].shape[1:]), parts[0].dtype)
    for of_tile, part in zip(rows, parts, strict=True):
        whole[of_tile] = part
    return whole


@functools.cache
def _minima_program(dtype: str) -> Callable:
    """`_group_minima`, jitted; late, since its options depend on the backend."""
    # On a CPU, products of bfloat16 are faster without the options, those of float32 with them.
    options = {} if dtype == "bfloat16" else compiler_options()
    return jax.jit(_group_minima, static_argnames="size", compiler_options=options)


def _group_minima(x, own, query, y, share, fresh, items, size):
    """Lowest and second lowest bound of each group of ``size`` items of a block, [groups, t].

    ``x`` [t, d], ``y`` [m, d] and ``share`` [m] are prepared; the labels are [t] and [m]. Group i
    has the rows i, i + groups, i + 2 groups, ...: the minimum is taken over contiguous slabs, with
    full vectors. Bounds are integers of their order, whose last bits are the slab: rounded down,
    so that they stay lower bounds.
    """
    # Gallery items are the rows: XLA's CPU backend takes up to twice as long for x y^T.
    # Not jnp.matmul, which would convert bfloat16 to float32 before the product.
    product = jax.lax.dot_general(
        y.astype(x.dtype),
        x,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float64 if x.dtype == jnp.float64 else jnp.float32,
    )
    if product.dtype == jnp.float64:
        # Added up before they are rounded: the distance may be much shorter than the embeddings.
        product = rounded_down(product + (share[:, None] + own[None, :]))
        share = jnp.zeros(len(y), jnp.float32)
    # Rows before ``fresh`` were in the block before.
    share = jnp.where(jnp.arange(len(y), dtype=jnp.int32) < fresh, jnp.inf, share)
    groups = -(-len(y) // size)
    lowest = second = jnp.full((groups, len(x)), NO_BOUND, jnp.int32)
    for slab in range(size):
        rows = slice(slab * groups, (slab + 1) * groups)
        bound = product[rows] + share[rows, None]
        if any(label is not None for label in query):
            ignored = ignores(query.row(), items.taken(rows).column())
            bound = jnp.where(ignored, jnp.inf, bound)
        missing = (0, groups - len(bound)), (0, 0)
        bound = jnp.pad((ordered(bound) & -size) | slab, missing, constant_values=NO_BOUND)
        second = jnp.minimum(second, jnp.maximum(lowest, bound))
        lowest = jnp.minimum(lowest, bound)
    return lowest, second


@functools.partial(jax.jit, static_argnames="size")
def _select(best: Lowest, kept: list, size: int) -> Lowest:
    """The lowest of ``best`` and of the groups of some blocks.

    ``kept`` are (first row, lowest, second) of `_group_minima`.
    """
    if not kept:
        return best
    count, (groups, t) = best.bound.shape[1], kept[0][1].shape
    # The lowest bounds are in the rows whose minimum over the blocks is among the lowest.
    minima = _by_rows(functools.reduce(jnp.minimum, [lowest for _, lowest, _ in kept]))
    row = _lowest_places(minima.T, min(count, groups))
    column = jnp.arange(t, dtype=jnp.int32)[:, None]

    def of_block(first, *bounds):
        bound, second = (b.at[row, column].get(mode="promise_in_bounds") for b in bounds)
        return Lowest(bound, first + row + (bound & (size - 1)) * groups, second)

    parts = zip(best, *(of_block(*block) for block in kept), strict=True)
    every = Lowest(*(jnp.concatenate(part, axis=1) for part in parts))
    place = _lowest_places(every.bound, count)
    return Lowest(*(jnp.take_along_axis(a, place, axis=1) for a in every))


def _by_rows(x: jax.Array) -> jax.Array:
    """Keep a matrix in memory by rows.

    To save its transposition, XLA would make it by columns, in large steps over memory: ten times
    as slow.
    """
    return with_layout_constraint(x, Layout((0, 1)))


def _lowest_places(x: jax.Array, count: int) -> jax.Array:
    """Where the ``count`` lowest of each row of [t, n] int32 are; by floats, the faster top_k."""
    finite = jnp.minimum(x, INFINITE - 1)
    floats = jax.lax.bitcast_convert_type(reordered(finite), jnp.float32)
    return jax.lax.top_k(-floats, count)[1]
