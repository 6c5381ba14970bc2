"""Exact nearest neighbours, streamed over blocks of the gallery.

A search has two steps. The first computes, by one float32 product a block, a *lower bound* of each
distance (the product less its largest possible rounding error), and keeps the few lowest of each
query: of each group of 16 gallery items first the minimum, then the items of the groups that
can still hold one of the lowest. The second computes those few distances from x - y in float64.
Where the k-th of them is below every bound that was not kept, the answer is proven; the rare other
queries (many near ties) are searched again in float64. So neither block sizes, nor devices, nor the
batching of queries show in the result: the k lowest by (float32 distance, gallery index).
"""

import functools
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.distances import l2_normalize

METRICS = ("euclidean", "squared_euclidean", "cosine", "inner_product")
FIRST_PASSES = ("float32", "bfloat16")

_GROUP = 16  # Gallery items whose minimum stands for them in the selection.
_ALIGNED = 16 * _GROUP  # Columns that make groups of whole cache lines.
_SLACK = 8  # Candidates beyond k, so that the bounds seldom leave a query unproven.
_ROUNDING = float(np.finfo(np.float32).eps) / 2
_CHUNK, _STEPS = 2**19, 16  # Numbers in a step of the second pass, 2 MiB; steps in a call.
_DOUBLE_BLOCK = (64, 4096)  # Queries and gallery items at a time in the float64 search.
_RESIDENT = 2**30  # Bytes up to which a NumPy gallery is copied to the device once.


class _Shard(NamedTuple):
    """Rows ``first`` to ``first + len(rows)`` of the gallery, to be searched by ``device``."""

    device: Any
    first: int
    rows: np.ndarray | jax.Array


class _Labels(NamedTuple):
    """What decides who is ignored: of queries ([q] or [q, 1]) or of items ([n] or [1, n])."""

    index: np.ndarray | None  # Of an item; of a query: the item that it is.
    group: np.ndarray | None
    category: np.ndarray | None


def search(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    metric: str = "euclidean",
    exclude_self: bool | ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
    query_category: ArrayLike | None = None,
    gallery_category: ArrayLike | None = None,
    first_pass: str = "float32",
    devices: Sequence[Any] | None = None,
    query_block: int = 256,
    gallery_block: int = 16128,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery items of each query, exactly.

    Memory beyond the arguments is O(q (k + d) + query_block gallery_block). A gallery that does not
    fit the device, or the memory, is given as a NumPy array or ``np.memmap``: arrays of at most
    1 GiB are copied to the device, others read block by block, twice, the first time to check them.
    A ``jax.Array`` is searched where it is, on all devices that hold a part of it.

    Args:
      queries: ``[q, d]``, any float dtype; rounded to float32 first.
      gallery: ``[n, d]``, likewise.
      k: From 1 to n.
      metric: One of `METRICS`, smaller is nearer: the Euclidean distance or its square, the cosine
        distance 1 - cos (1 for a zero vector), or the negative inner product.
      exclude_self: True where query i is gallery item i and is to be ignored; or ``[q]`` integers,
        the gallery index of each query, -1 for none.
      query_group: ``[q]`` integers; gallery items with the query's group are ignored (for example
        the photos of the same item and series).
      gallery_group: ``[n]`` integers, given with ``query_group``.
      query_category: ``[q]`` integers; gallery items of other categories are ignored.
      gallery_category: ``[n]`` integers, given with ``query_category``.
      first_pass: ``"float32"``, which is exact, or ``"bfloat16"``: products of rounded embeddings
        choose 4 k candidates, which are ranked exactly; neighbours not among them are lost.
      devices: Devices to split the gallery over; by default one, or those that hold the gallery.
      query_block: Queries at a time.
      gallery_block: Gallery items at a time.

    Returns:
      Distances ``[q, k]`` float32, ascending, and indices ``[q, k]`` int32. Ties are broken by the
      gallery index. Where fewer than k items are left the row ends in distance inf, index -1. The
      distances are those of float64, rounded; a query that is in the gallery has distance 0 to
      itself (not as inner product).

    Raises:
      ValueError: Before the search begins: for k out of range, NaN or infinite embeddings, other
        shapes or dtypes, or an unknown metric.

    Example:
      >>> gallery = np.array([[0.0], [2.0], [3.0]], np.float32)
      >>> distances, indices = search(gallery, gallery, k=2, exclude_self=True)
      >>> indices.tolist(), distances.tolist()
      ([[1, 2], [2, 0], [1, 0]], [[2.0, 3.0], [1.0, 2.0], [1.0, 3.0]])
    """
    queries, gallery = _matrix(queries, "queries"), _matrix(gallery, "gallery")
    _check(queries, gallery, k, metric, first_pass, query_block, gallery_block)
    q, n = len(queries), len(gallery)
    group = _labels(query_group, gallery_group, q, n, "group")
    category = _labels(query_category, gallery_category, q, n, "category")
    query = _Labels(_own_indices(exclude_self, q, n), group[0], category[0])
    items = _Labels(np.arange(n, dtype=np.int32), group[1], category[1])

    shards = _shards(gallery, devices)
    queries = np.asarray(queries).astype(np.float32)
    peak = max(_peak(queries, "queries"), *(_peak(s.rows, "gallery", s.first) for s in shards))
    prepare = _preparation(shards, peak, metric)
    exact = first_pass == "float32"
    count = min(k + _SLACK if exact else 4 * k, n)
    blocks = (query_block, gallery_block)
    lowest = _lowest_bounds(queries, shards, count, prepare, query, items, first_pass, blocks)

    own_share = np.asarray(prepare(queries)[1])
    bounds = [_bound_distances(b, own_share, prepare) for b, _ in lowest]
    keys = [
        _candidate_keys(queries, s, b, f, k, metric)
        for s, b, (_, f) in zip(shards, bounds, lowest, strict=True)
    ]
    distances, indices = _unpacked(np.sort(np.concatenate(keys, axis=1), axis=1)[:, :k])
    if exact and count < n:
        unseen = np.min([b[:, -1] for b in bounds], axis=0)
        rest = np.flatnonzero(~_proven(distances[:, -1], unseen))
        if len(rest):
            labels = _taken(query, rest), items
            distances[rest], indices[rest] = _exhaustive(queries[rest], shards, k, metric, *labels)
    return distances, indices


def _lowest_bounds(
    queries: np.ndarray,
    shards: Sequence[_Shard],
    count: int,
    prepare: Callable,
    query: _Labels,
    items: _Labels,
    first_pass: str,
    blocks: tuple[int, int],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each shard, the ``count`` lowest bounds of each query and whose they are, [q, count]."""
    tile = -(-len(queries) // -(-len(queries) // blocks[0]))
    starts = [min(i, len(queries) - tile) for i in range(0, len(queries), tile)]
    factor = np.float32(
        -2 if prepare.keywords["metric"] in ("euclidean", "squared_euclidean") else -1
    )
    x = factor * np.asarray(prepare(queries)[0])
    sides = [
        [
            jax.device_put((x[t : t + tile], _column(_taken(query, slice(t, t + tile)))), s.device)
            for t in starts
        ]
        for s in shards
    ]
    empty = np.full((tile, count), np.inf, np.float32), np.full((tile, count), -1, np.int32)
    best = [[jax.device_put(empty, shard.device) for _ in starts] for shard in shards]
    # Devices run at the same time: each is given its next block before any result is waited for.
    waiting = best
    for step in itertools.zip_longest(*(_blocks(shard, blocks[1]) for shard in shards)):
        # No more than two blocks wait in line, or all of the gallery would soon be in memory.
        jax.block_until_ready(waiting)
        waiting = list(best)
        for i, block in enumerate(step):
            if block is None:
                continue
            first, fresh, rows = block
            y, share = prepare(rows)
            if fresh:
                share = jnp.where(np.arange(len(rows)) < fresh, jnp.inf, share)
            labels = jax.device_put(
                _row(_taken(items, slice(first, first + len(rows)))), shards[i].device
            )
            best[i] = [
                _update(state, *side, y, share[None, :], labels, first_pass=first_pass)
                for state, side in zip(best[i], sides[i], strict=True)
            ]
    return [_untiled(states, starts, len(queries)) for states in best]


def _preparation(shards: Sequence[_Shard], peak: float, metric: str) -> Callable:
    """`_prepare` with a centre near the gallery's mean, and a scale that leaves no number above 2.

    The centre shortens the norms, and the rounding errors with them; any would be right.
    """
    center = np.zeros(shards[0].rows.shape[1], np.float32)
    if metric in ("euclidean", "squared_euclidean"):
        # Runs of rows from all over: single rows would bring a whole file into memory.
        runs = [
            s.rows[i : i + 64] for s in shards for i in range(0, len(s.rows), -(-len(s.rows) // 16))
        ]
        sample = np.concatenate([np.asarray(run).astype(np.float64) for run in runs])
        center = sample.mean(axis=0).astype(np.float32)
    # A power of two scales exactly.
    scale = np.float32(2.0 ** -float(np.clip(np.frexp(peak)[1], -100, 127)))
    return functools.partial(_prepare, center=center, scale=scale, metric=metric)


@functools.partial(jax.jit, static_argnames="metric")
def _prepare(
    x: jax.Array, center: jax.Array, scale: jax.Array, metric: str
) -> tuple[jax.Array, jax.Array]:
    """Embeddings as the product takes them, [m, d], and their share of the lower bounds, [m].

    A bound is the product, times -2 or -1, plus the shares of both sides. A float32 dot product of
    width d is off by at most (d u) |x| |y| with u = 2^-24, in whatever order it is summed (Higham
    2002, section 3.1), and |x| |y| <= (|x|^2 + |y|^2) / 2 splits that between both sides; 32 u more
    cover the roundings of centring, squaring and adding up.
    """
    x = x.astype(jnp.float32)
    error = (x.shape[1] + 32) * _ROUNDING
    if metric == "cosine":
        # Normalising is off by up to (d / 2) u in itself, on both sides.
        share = jnp.full(x.shape[:1], 0.5 - error, jnp.float32)
        return l2_normalize(x, eps=float(np.finfo(np.float32).tiny)), share
    # Scaled first: a difference of two numbers near float32's end would overflow.
    x = x * scale - (center * scale)[None, :]
    squares = _sum(x * x)
    return x, squares * (-error / 2 if metric == "inner_product" else 1 - error)


@functools.partial(jax.jit, static_argnames="first_pass")
def _update(best, x, query, y, share, items, first_pass):
    """The lowest bounds of a tile of queries, after one more block of the gallery.

    ``best`` is ([t, count] bounds, ascending; [t, count] indices); ``x`` [t, d], ``y`` [m, d] and
    ``share`` [1, m] are prepared; the labels are [t, 1] and [1, m].
    """
    product = _product(x, y, first_pass)
    # Slices that begin at multiples of 64 bytes are twice as fast.
    count, groups = best[0].shape[1], y.shape[0] // _ALIGNED * _ALIGNED // _GROUP
    if groups <= 2 * count:
        return _merge(best, product, share, query, items)
    # Group i has the columns i, i + groups, i + 2 groups, ...: contiguous slices, so that the
    # minimum is taken with full vectors. The columns left over always go on.
    bounds = _bounds(product, share, query, items)
    minima = functools.reduce(
        jnp.minimum, [bounds[:, i * groups : (i + 1) * groups] for i in range(_GROUP)]
    )
    tail = jnp.arange(groups * _GROUP, y.shape[0], dtype=jnp.int32)

    def merge_groups(number: int):
        """The lowest bounds lie in the groups with the lowest minima."""
        _, group = jax.lax.top_k(-minima, number)
        steps = groups * jnp.arange(_GROUP, dtype=jnp.int32)
        columns = (group[:, :, None] + steps[None, None, :]).reshape(x.shape[0], -1)
        tails = jnp.broadcast_to(tail[None, :], (x.shape[0], tail.shape[0]))
        columns = jnp.concatenate([columns, tails], axis=1)
        picked = jax.tree.map(lambda a: a[0][columns], (share, items))
        values = jnp.take_along_axis(product, columns, axis=1, mode="promise_in_bounds")
        return _merge(best, values, picked[0], query, picked[1])

    # Once good candidates are known, few groups hold a better one, and fewer need sorting.
    numbers = [number for number in (8, 16) if number < count] + [count]
    holding = jnp.max(jnp.sum((minima < best[0][:, -1:]).astype(jnp.int32), axis=1))
    branch = sum((holding > number).astype(jnp.int32) for number in numbers[:-1])
    return jax.lax.switch(branch, [functools.partial(merge_groups, n) for n in numbers])


def _merge(best, product, share, query, items):
    bounds = _bounds(product, share, query, items)
    index = jnp.where(bounds < jnp.inf, jnp.broadcast_to(items.index, bounds.shape), -1)
    bounds = jnp.concatenate([best[0], bounds], axis=1)
    negated, lowest = jax.lax.top_k(-bounds, best[0].shape[1])
    index = jnp.concatenate([best[1], index], axis=1)
    return -negated, jnp.take_along_axis(index, lowest, axis=1)


def _bounds(product, share, query, items):
    return jnp.where(_ignored(query, items), jnp.inf, product + share)


def _ignored(query: _Labels, items: _Labels):
    """Which items a query ignores; for NumPy and JAX, of shapes that broadcast."""
    assert items.index is not None
    ignored = items.index < 0
    if query.index is not None:
        ignored = ignored | (items.index == query.index)
    if query.group is not None:
        ignored = ignored | (items.group == query.group)
    if query.category is not None:
        ignored = ignored | (items.category != query.category)
    return ignored


def _product(x: jax.Array, y: jax.Array, first_pass: str) -> jax.Array:
    if first_pass == "bfloat16":
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.matmul(
        x, y.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _bound_distances(bounds: np.ndarray, own_share: np.ndarray, prepare: Callable) -> np.ndarray:
    """Lower bounds [q, m] in the unit of the distances, rounded to float32 as these are."""
    metric, scale = prepare.keywords["metric"], float(prepare.keywords["scale"])
    # The last term covers what underflows once the scale is applied.
    values = bounds.astype(np.float64) + own_share[:, None] - 1e-30
    if metric != "cosine":
        values /= scale**2
    if metric == "euclidean":
        values = np.sqrt(np.maximum(values, 0.0))
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _candidate_keys(
    queries: np.ndarray, shard: _Shard, bounds: np.ndarray, found: np.ndarray, k: int, metric: str
) -> np.ndarray:
    """Keys of the candidates ``found``, [q, count], by their distances in float64.

    First of those with the k lowest bounds; then of the others that may be as near as these.
    """
    distances = np.full(found.shape, np.inf, np.float32)
    rows = np.arange(len(found), dtype=np.int32)
    distances[:, :k] = _pair_distances(queries, shard, rows, found[:, :k], metric)
    distances[found < 0] = np.inf
    kth = np.max(distances[:, :k], axis=1, keepdims=True)
    row, column = np.nonzero((bounds[:, k:] <= kth) & (found[:, k:] >= 0))
    others = found[row, column + k]
    pairs = _pair_distances(queries, shard, row.astype(np.int32), others[:, None], metric)
    distances[row, column + k] = pairs[:, 0]
    return _keys(distances, found)


def _pair_distances(
    queries: np.ndarray, shard: _Shard, rows: np.ndarray, found: np.ndarray, metric: str
) -> np.ndarray:
    """Distances of queries[rows[i]] and the gallery items found[i, :], [r, c] float32."""
    if not found.size:
        return np.zeros(found.shape, np.float32)
    wide = max(1, _CHUNK // queries.shape[1])
    if found.shape[1] > wide:
        halves = np.array_split(found, 2, axis=1)
        parts = [_pair_distances(queries, shard, rows, half, metric) for half in halves]
        return np.concatenate(parts, axis=1)
    # Always in calls of one shape, [calls, steps, rows, c]: the last one is padded.
    shape = (-1, _STEPS, min(64, wide // found.shape[1]))
    padding = -len(rows) % (shape[1] * shape[2])
    items = np.pad(np.maximum(found - shard.first, 0), ((0, padding), (0, 0)))
    items = items.reshape(*shape, found.shape[1])
    x = jax.device_put(queries, shard.device)
    results = []
    with jax.enable_x64(True):
        for i, j in zip(np.pad(rows, (0, padding)).reshape(shape), items, strict=True):
            y = shard.rows
            if not isinstance(y, jax.Array):
                y = jax.device_put(_gathered(y, j.reshape(-1)), shard.device)
                j = np.arange(j.size, dtype=np.int32).reshape(j.shape)
            results.append(_distances(x, y, i, j, metric=metric))
    return np.concatenate([np.asarray(a) for a in results])[: len(rows)]


@functools.partial(jax.jit, static_argnames="metric")
def _distances(x, y, rows, items, metric):
    """Distances, [steps * rows, c], of ``rows`` [steps, rows] and ``items`` [steps, rows, c]."""

    def step(indices):
        # The barrier keeps the gathering of rows apart: it copies whole rows then, not numbers.
        near = jax.lax.optimization_barrier(y.at[indices[1]].get(mode="promise_in_bounds"))
        return _pair_distance(x[indices[0]][:, None, :], near, metric)

    return jax.lax.map(step, (rows, items)).reshape(-1, items.shape[-1])


def _pair_distance(x, y, metric):
    x, y = x.astype(jnp.float64), y.astype(jnp.float32).astype(jnp.float64)
    if metric == "inner_product":
        return (-_sum(x * y)).astype(jnp.float32)
    if metric == "cosine":
        xx, yy = _sum(x * x), _sum(y * y)
        x, y = (a / jnp.sqrt(jnp.where(s > 0, s, 1.0))[..., None] for a, s in ((x, xx), (y, yy)))
        # |x - y|^2 / 2 = 1 - cos for unit vectors. Those of equal vectors differ by roundings.
        half = _sum(jnp.square(x - y)) / 2
        half = jnp.where(half > 1e-30, half, 0.0)
        return jnp.where((xx > 0) & (yy > 0), half, 1.0).astype(jnp.float32)
    squares = _sum(jnp.square(x - y))
    return (squares if metric == "squared_euclidean" else jnp.sqrt(squares)).astype(jnp.float32)


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, in an order that compilers turn into vector instructions."""
    whole = x.shape[-1] // 128 * 128
    lanes = x[..., :whole].reshape(*x.shape[:-1], -1, 128)
    return jnp.sum(jnp.sum(lanes, axis=-2), axis=-1) + jnp.sum(x[..., whole:], axis=-1)


def _proven(kth: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Whether every item that is no candidate is farther than the k-th distance, [q].

    Rounding to float32 keeps the order, so ``unseen`` bounds the rounded distances as well.
    """
    return unseen > kth


def _exhaustive(
    queries: np.ndarray,
    shards: Sequence[_Shard],
    k: int,
    metric: str,
    query: _Labels,
    items: _Labels,
) -> tuple[np.ndarray, np.ndarray]:
    """The search for queries with many near ties: float64 bounds, any number of candidates."""
    nothing = np.full((len(queries), k), np.inf, np.float32)
    keys = _keys(nothing, np.full(nothing.shape, -1, np.int32))
    for shard in shards:
        for first, fresh, rows in _blocks(shard, _DOUBLE_BLOCK[1]):
            y = np.asarray(rows).astype(np.float32)
            labels = _row(_taken(items, slice(first, first + len(y))))
            for i in range(0, len(queries), _DOUBLE_BLOCK[0]):
                t = slice(i, i + _DOUBLE_BLOCK[0])
                ignored = _ignored(_column(_taken(query, t)), labels)
                ignored = np.broadcast_to(ignored, (len(queries[t]), len(y))).copy()
                ignored[:, :fresh] = True
                low, high = _double_bounds(queries[t], y, metric)
                # A later item wins against the k-th so far only if it is strictly nearer.
                limit = np.partition(np.where(ignored, np.inf, high), min(k, len(y)) - 1, axis=1)
                limit = limit[:, min(k, len(y)) - 1, None]
                kth = _unpacked(keys[t])[0][:, -1:]
                near, at = np.nonzero(~ignored & (low <= limit) & (low < kth))
                if not len(near):
                    continue
                row, found = (near + i).astype(np.int32), (at + first).astype(np.int32)[:, None]
                new = _keys(_pair_distances(queries, shard, row, found, metric), found)[:, 0]
                for row in np.unique(near):
                    merged = np.concatenate([keys[i + row], new[near == row]])
                    keys[i + row] = np.sort(merged)[:k]
    return _unpacked(keys)


def _double_bounds(x: np.ndarray, y: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
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


def _keys(distances: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Integers that sort by (distance, index): uint64, the distance in the upper half."""
    bits = (distances + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return ordered.astype(np.uint64) << 32 | indices.view(np.uint32)


def _unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = (keys >> 32).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered ^ np.uint32(2**31), ~ordered)
    return bits.view(np.float32), (keys & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def _untiled(states: list, starts: list[int], q: int) -> tuple[np.ndarray, np.ndarray]:
    """The states of all tiles as arrays of all queries; the last tile overlaps the one before."""
    count = states[0][0].shape[1]
    bounds, found = np.empty((q, count), np.float32), np.empty((q, count), np.int32)
    for t, state in zip(starts, states, strict=True):
        rows = slice(t, t + len(state[0]))
        bounds[rows], found[rows] = state
    return bounds, found


def _taken(labels: _Labels, rows: slice | np.ndarray) -> _Labels:
    return _Labels(*(None if a is None else a[rows] for a in labels))


def _column(labels: _Labels) -> _Labels:
    return _Labels(*(None if a is None else a[:, None] for a in labels))


def _row(labels: _Labels) -> _Labels:
    return _Labels(*(None if a is None else a[None, :] for a in labels))


def _blocks(shard: _Shard, size: int) -> Iterator[tuple[int, int, np.ndarray | jax.Array]]:
    """Blocks of one size: gallery index of the first row, rows that the last block had, rows."""
    n = len(shard.rows)
    rows = -(-n // -(-n // size))
    if rows < n:
        rows = min(size, -(-rows // _ALIGNED) * _ALIGNED)
    for start in range(0, n, rows):
        begin = min(start, n - rows)
        block = shard.rows[begin : begin + rows]
        if isinstance(block, np.ndarray):
            block = jax.block_until_ready(jax.device_put(np.array(block), shard.device))
            _release(shard.rows)
        yield shard.first + begin, start - begin, block


def _shards(gallery: np.ndarray | jax.Array, devices: Sequence[Any] | None) -> list[_Shard]:
    """The gallery in contiguous parts, one a device."""
    n = len(gallery)
    if isinstance(gallery, jax.Array) and devices is None:
        parts = {s.index[0].start or 0: s for s in gallery.addressable_shards}
        if sum(len(s.data) for s in parts.values()) != n or any(
            s.data.shape[1] != gallery.shape[1] for s in parts.values()
        ):
            raise ValueError("the gallery is to be sharded over its rows only, on local devices")
        return [_Shard(parts[i].device, i, parts[i].data) for i in sorted(parts)]
    if devices is None:
        devices = jax.local_devices()[:1]
    # Copying once is faster than twice block by block, where there is room.
    resident = isinstance(gallery, jax.Array) or (
        not isinstance(gallery, np.memmap) and gallery.nbytes <= _RESIDENT
    )
    edges = np.linspace(0, n, len(devices) + 1).astype(int)
    return [
        _Shard(d, int(i), jax.device_put(gallery[i:j], d) if resident else gallery[i:j])
        for d, i, j in zip(devices, edges[:-1], edges[1:], strict=True)
        if j > i
    ]


def _gathered(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x[rows] as float32; of a file a few at a time, since each brings its neighbours along."""
    result = np.empty((len(rows), x.shape[1]), np.float32)
    for i in range(0, len(rows), 32):
        result[i : i + 32] = x[rows[i : i + 32]]
        _release(x)
    return result


def _release(x: np.ndarray | jax.Array) -> None:
    """Lets go of the pages read from a file, which would count as memory of the process."""
    if isinstance(x, np.memmap) and x.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        x._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]


def _peak(x: np.ndarray | jax.Array, name: str, first: int = 0) -> float:
    """The largest magnitude; raises where there is NaN or infinity."""
    if isinstance(x, jax.Array):
        peak = float(np.max(np.asarray(_column_peaks(x))))
    else:
        peaks = []
        for i in range(0, len(x), 4096):
            block = np.asarray(x[i : i + 4096])
            peaks.append(np.maximum(block.max(), -block.min()))
            _release(x)
        peak = float(np.max(peaks))
    if not np.isfinite(peak):
        blocks = (np.asarray(x[i : i + 4096]) for i in range(0, len(x), 4096))
        wrong = np.concatenate([~np.isfinite(b).all(axis=1) for b in blocks])
        row = first + int(np.argmax(wrong))
        raise ValueError(f"{name}: NaN or infinity in {wrong.sum()} rows, the first is row {row}")
    return peak


@jax.jit
def _column_peaks(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=0)


def _matrix(x: ArrayLike, name: str) -> np.ndarray | jax.Array:
    x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} have shape {x.shape}, expected [count, width], not empty")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} have dtype {x.dtype}, expected floating point")
    return x


def _check(
    queries: np.ndarray | jax.Array,
    gallery: np.ndarray | jax.Array,
    k: int,
    metric: str,
    first_pass: str,
    query_block: int,
    gallery_block: int,
) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, the gallery {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}, but the gallery has {len(gallery)} items; k is from 1 to that")
    if len(gallery) >= 2**31:
        raise ValueError(f"the gallery has {len(gallery)} items, indices are int32")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if first_pass not in FIRST_PASSES:
        raise ValueError(f"unknown first_pass {first_pass!r}; choose {' or '.join(FIRST_PASSES)}")
    if min(query_block, gallery_block) < 1:
        raise ValueError(f"blocks are {query_block} and {gallery_block}, expected at least 1")


def _own_indices(exclude_self: bool | ArrayLike, q: int, n: int) -> np.ndarray | None:
    if np.ndim(exclude_self):
        return _integers(exclude_self, q, "exclude_self")
    if exclude_self and q != n:
        raise ValueError(
            f"exclude_self is True, but there are {q} queries and {n} gallery items: pass the "
            "gallery index of each query instead"
        )
    return np.arange(q, dtype=np.int32) if exclude_self else None


def _labels(
    query: ArrayLike | None, gallery: ArrayLike | None, q: int, n: int, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if query is None and gallery is None:
        return None, None
    if query is None or gallery is None:
        raise ValueError(f"query_{name} and gallery_{name} are given together or not at all")
    return _integers(query, q, f"query_{name}"), _integers(gallery, n, f"gallery_{name}")


def _integers(x: ArrayLike, count: int, name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.shape != (count,) or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name} has shape {x.shape} and dtype {x.dtype}, expected [{count}] ints")
    if x.size and not -(2**31) <= x.min() <= x.max() < 2**31:
        raise ValueError(f"{name} has values from {x.min()} to {x.max()}, expected int32")
    return x.astype(np.int32)
