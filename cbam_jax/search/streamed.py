"""The search of `top_k`: bounds by blocks, candidates, proof, and again what was not proven."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.bounds import Preparation, prepared
from cbam_jax.search.compensated import (
    compensated_distances,
    exponent_of,
    power_of_two,
    scaled,
)
from cbam_jax.search.types import Labels, ignores

_SLACK = 8  # Candidates beyond k, so that the bounds seldom leave a query unproven.
_NUMBERS = 2**14  # Of the gallery rows that are measured at a time, in a CPU's cache.
_NEAR = 256  # Items measured at a time for a query that is not proven.
_SAMPLE = 256  # Gallery rows whose mean is the centre.
_UNUSED = np.zeros(1, np.float32)  # In place of squared norms, which the scaled rows have anew.


class Found(NamedTuple):
    """Distances [..., k] and gallery rows [..., k] int32, -1 where there is none, nearest first."""

    distance: jax.Array
    row: jax.Array


class Queries(NamedTuple):
    """Of queries, [q, ...], or of one: rows, rows times -2 or -1 as the product takes them.

    And their share of the bounds, and labels.
    """

    rows: jax.Array
    factors: jax.Array
    share: jax.Array
    labels: Labels


class Gallery(NamedTuple):
    """Rows [n, d] as they were given, their labels, and how they are prepared, block by block."""

    rows: jax.Array
    labels: Labels
    preparation: Preparation
    block: int


def nearest_rows(
    x: jax.Array, y: jax.Array, labels: Labels, items: Labels, k: int, metric: str, size: int
) -> Found:
    """The k nearest rows of ``y`` to each row of ``x``: bounds, candidates, proof."""
    gallery = Gallery(y, items, _preparation(x, y, items, metric, size), size)
    products, share = prepared(x, _UNUSED, gallery.preparation)
    factor = -2 if metric.endswith("euclidean") else -1
    queries = Queries(x, factor * products, jnp.asarray(share), labels)
    count = min(k + _SLACK, len(y))
    bound, row = _lowest(queries, gallery, count)
    found = _ranked(_distances(queries, gallery, row), row, k)
    if count == len(y):
        return found
    kth = found.distance[:, -1]
    # Without a bound that is left there are no other items; NaN comes before all others.
    complete = (bound[:, -1] == jnp.inf) | jnp.isnan(kth)
    proven = _distance_bound(bound[:, -1] + share, gallery.preparation) > sort_value(kth)
    return _searched_again(queries, gallery, found, complete | proven)


def _preparation(x: jax.Array, y: jax.Array, items: Labels, metric: str, size: int) -> Preparation:
    """A scale that leaves no number above 2, and the mean of some rows as the centre.

    Any centre would be right: the nearer, the shorter the norms, and the rounding errors with them.
    """

    def step(largest, number):
        _, _, (rows, valid) = _block((y, items.index >= 0), number, size)
        return jnp.maximum(largest, _largest(rows, valid)), None

    # By blocks as well: a compiler may write what is compared to memory.
    largest = _largest(x, jnp.ones(len(x), bool))
    exponent = exponent_of(_over_blocks(step, largest, y, size, (x, y, items)))
    exponent = jnp.maximum(exponent, -100)
    center = jnp.zeros(x.shape[1], jnp.float32)
    if metric.endswith("euclidean"):
        some = slice(None, None, -(-len(y) // _SAMPLE))
        sample, used = _used(y[some], items.index[some] >= 0)
        count = jnp.maximum(jnp.sum(used.astype(jnp.float32), axis=0), 1.0)
        center = scaled(jnp.sum(scaled(sample, -exponent), axis=0) / count, exponent)
    return Preparation(center, power_of_two(-exponent), metric, "float32")


def _used(rows: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 rows, with 0 for what is no number of an item; and what is."""
    used = jnp.isfinite(rows) & valid[:, None]
    return jnp.where(used, rows, 0).astype(jnp.float32), used


def _largest(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """The largest magnitude, [1]."""
    return jnp.max(jnp.abs(_used(rows, valid)[0])).reshape(1)


def _lowest(queries: Queries, gallery: Gallery, count: int) -> tuple[jax.Array, jax.Array]:
    """Of each query the ``count`` lowest bounds, ascending, and their rows; [q, count]."""

    def step(best, number):
        start, _, bound = _block_bounds(queries, gallery, number)
        low, place = jax.lax.top_k(-jnp.concatenate([best[0], bound], axis=1), count)
        before = jnp.take_along_axis(best[1], jnp.minimum(place, count - 1), axis=1)
        return (-low, jnp.where(place < count, before, start + place - count)), None

    shape = len(queries.rows), count
    nothing = jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
    bound, row = _over_blocks(step, nothing, gallery.rows, gallery.block, (queries, gallery[:2]))
    return bound, jnp.where(bound == jnp.inf, -1, row)


def _over_blocks(step, state, rows: jax.Array, size: int, like):
    """The state after ``step(state, number)`` for all blocks; it varies by shard as ``like``."""
    blocks = jnp.arange(-(-len(rows) // size), dtype=jnp.int32)
    return jax.lax.scan(step, _varying_as(state, like), blocks)[0]


def _block(arrays, number: jax.Array, size: int):
    """The first row of a block, which of its rows the block before had, and its arrays."""
    n = len(jax.tree.leaves(arrays)[0])
    start = jnp.minimum(number * size, n - size)
    stale = start + jnp.arange(size, dtype=jnp.int32) < number * size
    block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), arrays)
    return start, stale, block


def _block_bounds(
    queries: Queries, gallery: Gallery, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block's first row, its rows, and bounds [q, rows] that lack the queries' share.

    Infinite are those of the ignored alone, and of rows that the block before had.
    """
    start, stale, (rows, labels) = _block(gallery[:2], number, gallery.block)
    labels = labels._replace(index=jnp.where(stale, -1, labels.index))
    products, share = prepared(rows, _UNUSED, gallery.preparation)
    highest = jax.lax.Precision.HIGHEST
    bound = jax.lax.dot_general(
        queries.factors, products, (((1,), (1,)), ((), ())), precision=highest
    )
    bound = bound + share[None, :]
    # What is not finite bounds nothing.
    bound = jnp.where(jnp.isfinite(bound), bound, -jnp.inf)
    return start, rows, jnp.where(ignores(queries.labels.column(), labels.row()), jnp.inf, bound)


def _distance_bound(bound: jax.Array, preparation: Preparation) -> jax.Array:
    """Lower bounds in the unit of the distances."""
    scale, metric = preparation.scale, preparation.metric
    if metric == "cosine":
        return bound
    bound = bound - 1e-30  # Covers what underflows once the scale is applied.
    if metric == "euclidean":
        return jnp.sqrt(jnp.maximum(bound, 0.0)) * (1 - 2.0**-22) / scale
    if metric == "squared_euclidean":
        return jnp.maximum(bound, 0.0) / scale / scale
    return bound / scale / scale - 2.0**-125  # The smallest normal number, twice.


def _distances(queries: Queries, gallery: Gallery, row: jax.Array) -> jax.Array:
    """Of each query to the gallery's rows [q, count], infinite where the row is -1."""
    x, count = queries.rows, row.shape[1]
    few = min(len(x), max(1, _NUMBERS // (count * x.shape[1])))

    def of_few(pair):
        near = gathered(gallery.rows, pair[1]).astype(jnp.float32)
        return compensated_distances(pair[0][:, None, :], near, gallery.preparation.metric)

    # A few queries at a time; the last are filled up, or they would be a program of their own.
    parts = [jnp.pad(a, ((0, -len(x) % few), (0, 0))) for a in (x, row)]
    parts = [a.reshape(-1, few, a.shape[1]) for a in parts]
    distance = jax.lax.map(of_few, tuple(parts)).reshape(-1, count)[: len(x)]
    return jnp.where(row < 0, jnp.inf, distance)


def _searched_again(queries: Queries, gallery: Gallery, found: Found, proven: jax.Array) -> Found:
    """With the queries that are not proven replaced, one after another."""

    def search_one(state):
        found, proven = state
        i = jnp.argmin(proven)
        query, before = jax.tree.map(lambda a: a[i], (queries, found))
        exact = _exhaustive(query, gallery, before)
        found = jax.tree.map(lambda whole, one: whole.at[i].set(one), found, exact)
        return found, proven.at[i].set(True)

    return jax.lax.while_loop(lambda state: ~jnp.all(state[1]), search_one, (found, proven))[0]


def _exhaustive(query: Queries, gallery: Gallery, candidates: Found) -> Found:
    """The nearest to one query, of all rows whose bound is not above the k-th candidate's distance.

    Rows come in ascending order, so that a later one wins only if it is strictly nearer.
    """
    limit, k = sort_value(candidates.distance[-1]), len(candidates.row)
    countdown = jnp.arange(gallery.block, 0, -1, dtype=jnp.float32)
    width = min(_NEAR, gallery.block)
    one = jax.tree.map(lambda a: a[None], query)

    def wins(found, bound):
        return (bound < sort_value(found.distance[-1])) | (found.row[-1] < 0)

    def step(found, number):
        start, rows, bound = _block_bounds(one, gallery, number)
        bound, there = bound[0] + query.share, bound[0] < jnp.inf
        bound = _distance_bound(bound, gallery.preparation)

        def measure(state):
            found, near = state
            # The first of them; jnp.nonzero takes ten times as long to compile.
            left, place = jax.lax.top_k(jnp.where(near, countdown, 0.0), width)
            row = jnp.where(left > 0, place, -1)
            block = gallery._replace(rows=rows)
            distance = _distances(one, block, row[None])[0]
            row = jnp.where(row < 0, -1, start + row)
            distance = jnp.concatenate([found.distance, distance])
            found = _ranked(distance, jnp.concatenate([found.row, row]), k)
            return found, near & (countdown < left[-1]) & wins(found, bound)

        near = there & (bound <= limit) & wins(found, bound)
        return jax.lax.while_loop(lambda state: jnp.any(state[1]), measure, (found, near))[0], None

    nothing = Found(jnp.full(k, jnp.inf, jnp.float32), jnp.full(k, -1, jnp.int32))
    return _over_blocks(step, nothing, gallery.rows, gallery.block, (query, gallery[:2]))


def _ranked(distance: jax.Array, row: jax.Array, k: int) -> Found:
    """The k first by (distance, row), of NaN and -1 the order is told at `sort_value`."""
    unsigned = jax.lax.bitcast_convert_type(row, jnp.uint32)  # -1 is behind all others.
    _, _, *found = jax.lax.sort((sort_value(distance), unsigned, distance, row), num_keys=2)
    return Found(*(a[..., :k] for a in found))


def sort_value(distance: jax.Array) -> jax.Array:
    """What distances are ordered by: NaN comes first."""
    return jnp.where(jnp.isnan(distance), -jnp.inf, distance)


def gathered(y: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of a matrix, the first where there is none."""
    return y.at[jnp.maximum(row, 0)].get(mode="promise_in_bounds")


def _varying_as(state, like):
    """Constants as a loop's first state, for `jax.shard_map`, which tells what differs by shard."""
    axes = set().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(like)))

    def cast(a):
        missing = tuple(axes - jax.typeof(a).mat.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, state)
