"""Exact nearest neighbours, streamed over blocks of the gallery.

A search has two steps. The first computes, by one product a block, a *lower bound* of each distance
(the product less its largest possible error), and of each group of gallery items (16, or fewer
where k is large beside n) keeps the lowest, whose it is, and the second lowest; then, of each
query, the few groups with the lowest. The second step computes those few distances from x - y in
float64, and those of a group's other items where its second lowest bound asks for it. Where the
k-th distance is below every bound that was not kept, the answer is proven. Products of embeddings
rounded to bfloat16 take half the time, and the rounding errors, whose norms are known, widen the
bounds little: they prove nearly all queries. The others are searched by float32 products, and those
with many near ties once more in float64. So neither the first pass, nor block sizes, nor devices,
nor the batching of queries show in the result: the k lowest by (float32 distance, gallery index).
"""

import functools
import mmap
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from numpy.typing import ArrayLike

from cbam_jax.compiler_options import compiler_options
from cbam_jax.distances import l2_normalize

METRICS = ("euclidean", "squared_euclidean", "cosine", "inner_product")
FIRST_PASSES = ("bfloat16", "float32")

_GROUP = 16  # Gallery items whose lowest bound stands for them, at most; a power of two.
_KEPT = 2**23  # Lowest bounds that are kept before a selection, 64 MiB with the second lowest.
_SLACK = 8  # Candidates beyond k, so that the bounds seldom leave a query unproven.
_BALANCE = 512.0  # About the norm of an embedding over that of its rounding error in bfloat16.
_OTHERS = 4  # Candidates of a query beyond the first k, computed at a time.
_ROUNDING = float(np.finfo(np.float32).eps) / 2
_CHUNK, _STEPS = 2**20, 16  # Numbers in a step of the second pass, 4 MiB; steps in a call.
_NO_BOUND, _INFINITE = 2**31 - 1, 0x7F800000  # Of bounds as integers.
# Products, queries and gallery items at a time, at most, where memory is fast: 1 GiB of products.
_ON_ACCELERATOR = 2**28, 4096, 2**18
_NOBODY = np.array([np.inf], np.float32), np.array([-1], np.int32)
_SMALLEST, _LARGEST = 2.0**-60, 2.0**80  # Squared norms that need no scaling.
_DOUBLE_BLOCK = (64, 4096)  # Queries and gallery items at a time in the float64 search.
_RESIDENT = 2**30  # Bytes up to which a NumPy gallery is copied to the device once.


class _Shard(NamedTuple):
    """Rows ``first`` to ``first + len(rows)`` of the gallery, to be searched by ``device``.

    ``squares`` [rows] are their squared norms, float32.
    """

    device: Any
    first: int
    rows: np.ndarray | jax.Array
    squares: np.ndarray


class _Lowest(NamedTuple):
    """Of each query, [q, count]: the lowest bounds, whose they are, and the next in their group.

    In the first pass bounds are integers of the same order, `_NO_BOUND` where there is none.
    """

    bound: Any
    index: Any
    second: Any


class _Labels(NamedTuple):
    """What decides who is ignored, of queries or of items."""

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
    first_pass: str | None = None,
    devices: Sequence[Any] | None = None,
    query_block: int | None = None,
    gallery_block: int | None = None,
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
      first_pass: The dtype of the first products, ``"bfloat16"`` or ``"float32"``, which decides
        the speed, never the result; None: bfloat16 where the device has instructions for it.
        float32 is the faster where many more than k items are nearly as near as the k-th.
      devices: Devices to split the gallery over; by default one, or those that hold the gallery.
      query_block: Queries at a time; None: what suits the device.
      gallery_block: Gallery items at a time; None: likewise.

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
    queries = np.asarray(queries).astype(np.float32, copy=False)
    own_squares = _squares(queries, "queries")
    blocks = _block_sizes(shards[0].device, queries.shape, query_block, gallery_block)
    distances, indices = np.empty((q, k), np.float32), np.empty((q, k), np.int32)
    prepare = _preparation(queries, own_squares, shards, metric)
    rest = np.arange(q)
    first_pass = first_pass or _fastest_pass(shards[0].device)
    for dtype in FIRST_PASSES[FIRST_PASSES.index(first_pass) :]:
        part = rest if len(rest) < q else slice(None)  # A slice copies nothing.
        sides, labels = (queries[part], own_squares[part]), (_taken(query, part), items)
        now = functools.partial(prepare, dtype=dtype)
        distances[part], indices[part], proven = _pass(*sides, shards, k, now, labels, blocks)
        rest = rest[~proven]
        if not len(rest):
            return distances, indices
    labels = _taken(query, rest), items
    distances[rest], indices[rest] = _exhaustive(queries[rest], shards, k, metric, *labels)
    return distances, indices


def _fastest_pass(device: Any) -> str:
    """bfloat16 where the device has instructions for it: accelerators, some CPUs under Linux."""
    if device.platform != "cpu":
        return "bfloat16"
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _pass(
    queries: np.ndarray,
    own_squares: np.ndarray,
    shards: Sequence[_Shard],
    k: int,
    prepare: Callable,
    labels: tuple[_Labels, _Labels],
    blocks: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest among the candidates, and whether that is proven."""
    metric, dtype = prepare.keywords["metric"], prepare.keywords["dtype"]
    # bfloat16's bounds are wider: normally distributed embeddings of 2,048 dimensions have half as
    # many candidates more where k is 20, a quarter where k is 350.
    count = k + (_SLACK if dtype == "float32" else int(_SLACK * np.sqrt(k)))
    size = _group_size(k, sum(len(shard.rows) for shard in shards))
    sides = queries, own_squares
    lowest, own_share = _lowest_bounds(*sides, shards, count, prepare, *labels, blocks, size)
    keys, unseen, complete = [], [], []
    for shard, (bound, index, second) in zip(shards, lowest, strict=True):
        bounds = [_bound_distances(b & -size, own_share, prepare) for b in (bound, second)]
        found = _Lowest(bounds[0], index, bounds[1])
        x = jax.device_put(queries, shard.device)
        keys.append(_candidate_keys(x, shard, found, k, metric, labels, blocks[1], size))
        unseen.append(found.bound[:, -1])
        complete.append(bound[:, -1] >= _INFINITE)
    distances, indices = _unpacked(np.sort(np.concatenate(keys, axis=1), axis=1)[:, :k])
    return distances, indices, _proven(distances[:, -1], np.array(unseen), np.array(complete))


def _proven(kth: np.ndarray, unseen: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """Whether every item that is no candidate is farther than the k-th distance, [q].

    ``unseen`` [shards, q] is the bound up to which a shard has seen all, ``complete`` whether it
    has no more. Rounding to float32 keeps the order, so bounds hold for rounded distances as well.
    """
    return np.all(complete | (unseen > kth), axis=0)


def _group_size(k: int, n: int) -> int:
    """Items in a group: a power of two, so few that seldom two of the k nearest share one."""
    # Two where k is larger: then sorting half as many is worth looking at more.
    return min(_GROUP, 2 ** max(int(n >= 8 * k), int(np.log2(n / (32 * k)))))


def _block_sizes(
    device: Any, shape: tuple[int, ...], query_block: int | None, gallery_block: int | None
) -> tuple[int, int]:
    """Queries and gallery items at a time: 16 MiB of products, which stay in a CPU's cache."""
    products, most_queries, most_items = _ON_ACCELERATOR
    if device.platform == "cpu":
        products, most_queries, most_items = 2**22, 512 if shape[1] < 1024 else 1024, 2**15
    query_block = query_block or min(most_queries, shape[0])
    return query_block, gallery_block or min(products // query_block, most_items)


def _lowest_bounds(
    queries: np.ndarray,
    own_squares: np.ndarray,
    shards: Sequence[_Shard],
    count: int,
    prepare: Callable,
    query: _Labels,
    items: _Labels,
    blocks: tuple[int, int],
    size: int,
) -> tuple[list[_Lowest], np.ndarray]:
    """Of each shard, for each query the ``count`` groups with the lowest bounds.

    And the queries' own share of them.
    """
    q = len(queries)
    tile = _block_rows(q, blocks[0])  # Multiples of 16: rows of products begin cache lines.
    starts = [min(i, q - tile) for i in range(0, q, tile)]
    parts = [slice(t, t + tile) for t in starts]
    prepared = [prepare(queries[t], own_squares[t]) for t in parts]
    factor = -2 if prepare.keywords["metric"].endswith("euclidean") else -1
    tiles = [(factor * x, _taken(query, t)) for (x, _), t in zip(prepared, parts, strict=True)]
    sides = [jax.device_put(tiles, s.device) for s in shards]
    nothing = _nothing(tile, count)
    best = [[jax.device_put(nothing, s.device) for _ in starts] for s in shards]
    kept = [[[] for _ in starts] for _ in shards]
    minima = _minima_program(prepare.keywords["dtype"])
    most = max(1, min(_KEPT * size // (tile * blocks[1]), 64 // len(starts)))
    # Devices run at the same time: each is given its next block before any result is waited for.
    waiting = []
    for number, step in enumerate(zip_longest(*(_blocks(shard, blocks[1]) for shard in shards)), 1):
        # No more than two blocks wait in line, or all of the gallery would soon be in memory.
        jax.block_until_ready(waiting)
        waiting = [[list(states) for states in best], [t[-1:] for states in kept for t in states]]
        for i, block in enumerate(step):
            if block is None:
                continue
            first, fresh, rows, squares = block
            labels = _taken(items, slice(first, first + len(rows)))
            block = (*prepare(rows, squares), np.int32(fresh), labels)
            block = jax.device_put(block, shards[i].device)
            for t, side in enumerate(sides[i]):
                kept[i][t].append((np.int32(first), *minima(*side, *block, size=size)))
        if number % most == 0:
            best = _selected(best, kept, size)
            kept = [[[] for _ in starts] for _ in shards]
    best = _selected(best, kept, size)
    lowest = [_Lowest(*(_untiled(part, starts, q) for part in zip(*s, strict=True))) for s in best]
    return lowest, _untiled([share for _, share in prepared], starts, q)


def _preparation(
    queries: np.ndarray, own_squares: np.ndarray, shards: Sequence[_Shard], metric: str
) -> Callable:
    """`_prepare` with a centre near the gallery's mean, and a scale that leaves no number above 2.

    The centre shortens the norms, and the rounding errors with them; any would be right. Where it
    would shorten them little and no square leaves float32's range, embeddings stay as they are.
    """
    center, scale = None, np.float32(1)
    largest = max(float(np.max(s)) for s in (own_squares, *(s.squares for s in shards)))
    if metric in ("euclidean", "squared_euclidean"):
        # Runs of rows from all over: single rows would bring a whole file into memory.
        starts = [(s, i) for s in shards for i in range(0, len(s.rows), -(-len(s.rows) // 16))]
        runs = [np.asarray(_view(s)[i : i + 16], np.float64) for s, i in starts]
        sample = np.concatenate(runs)
        mean = sample.mean(axis=0)
        if np.sum(mean**2) > 0.25 * np.mean(np.sum(sample**2, axis=1)):
            center = mean.astype(np.float32)
    if not _SMALLEST < largest < _LARGEST:
        peak = max(_peak(queries), *(_peak(s.rows) for s in shards))
        # A power of two scales exactly.
        scale = np.float32(2.0 ** -float(np.clip(np.frexp(peak)[1], -100, 127)))
        center = np.zeros(queries.shape[1], np.float32) if center is None else center
    return functools.partial(_prepare, center=center, scale=scale, metric=metric)


def _prepare(
    x: np.ndarray | jax.Array,
    squares: np.ndarray,
    *,
    center: np.ndarray | None,
    scale: np.float32,
    metric: str,
    dtype: str,
) -> tuple[Any, Any]:
    """Embeddings as the product takes them, [m, d], and their share of the lower bounds, [m].

    A bound is the product, times -2 or -1, plus the shares of both sides. A float32 dot product of
    width d is off by at most (d u) |x| |y| with u = 2^-24, in whatever order it is summed (Higham
    2002, section 3.1), and |x| |y| <= (|x|^2 + |y|^2) / 2 splits that between both sides. Squares
    are off by as much again; 32 u more cover the roundings of centring and adding up. Products of
    bfloat16 are off by more, see `_rounded`, and accelerators add them up less strictly.
    """
    error = (2 * x.shape[1] + 32) * (1 if dtype == "float32" else 2) * _ROUNDING
    if metric == "cosine":
        # Normalising is off by up to (d / 2) u in itself, on both sides.
        x, squares = _normalized(x), np.ones(len(x), np.float32)
        share = np.float32(0.5 - error) * squares
    else:
        if center is not None:
            x, squares = _moved(x, center, scale)
        share = squares * np.float32(-error / 2 if metric == "inner_product" else 1 - error)
    if dtype == "bfloat16":
        x, lost = _rounded(x, squares)
        share = share - lost * np.float32(2 if metric.endswith("euclidean") else 1)
    return x, share


@jax.jit
def _rounded(x: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as bfloat16, and its share of what the inner products with others may lose by that.

    <x, y> - <x', y'> = <x - x', y> + <x', y - y'>, at most |x - x'| |y| + |x'| |y - y'|. And
    |x - x'| |y| <= (b |x - x'|^2 + |y|^2 / b) / 2, tight where b is |y| / |x - x'|, holds for any b
    and splits it between both sides. 0.505 in place of 1/2 covers roundings, that of x' included.
    """
    x = x.astype(jnp.float32)
    near = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)
    # The barrier keeps XLA from leaving out the conversion to bfloat16 and back, and on a CPU from
    # writing the differences to memory.
    near = jax.lax.optimization_barrier(near)
    lost = _BALANCE * _sum(jnp.square(x - near.astype(jnp.float32))) + squares / _BALANCE
    return near, 0.505 * lost


@jax.jit
def _normalized(x: jax.Array) -> jax.Array:
    return l2_normalize(x, eps=float(np.finfo(np.float32).tiny))


@jax.jit
def _moved(x: jax.Array, center: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Scaled first: a difference of two numbers near float32's end would overflow.
    x = x.astype(jnp.float32) * scale - (center * scale)[None, :]
    return x, _sum(x * x)


@functools.cache
def _minima_program(dtype: str) -> Callable:
    """`_group_minima`, jitted; late, since its options depend on the backend."""
    # On a CPU, products of bfloat16 are faster without the options, those of float32 with them.
    options = compiler_options() if dtype == "float32" else {}
    return jax.jit(_group_minima, static_argnames="size", compiler_options=options)


def _group_minima(x, query, y, share, fresh, items, size):
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
        preferred_element_type=jnp.float32,
    )
    # Rows before ``fresh`` were in the block before.
    share = jnp.where(jnp.arange(len(y), dtype=jnp.int32) < fresh, jnp.inf, share)
    groups = -(-len(y) // size)
    lowest = second = jnp.full((groups, len(x)), _NO_BOUND, jnp.int32)
    for slab in range(size):
        rows = slice(slab * groups, (slab + 1) * groups)
        bound = product[rows] + share[rows, None]
        if any(label is not None for label in query):
            ignored = _ignored(_row(query), _column(_taken(items, rows)))
            bound = jnp.where(ignored, jnp.inf, bound)
        missing = (0, groups - len(bound)), (0, 0)
        bound = jnp.pad((_ordered(bound) & -size) | slab, missing, constant_values=_NO_BOUND)
        second = jnp.minimum(second, jnp.maximum(lowest, bound))
        lowest = jnp.minimum(lowest, bound)
    return lowest, second


def _selected(best: list, kept: list, size: int) -> list:
    """`_select` of each shard and tile; in threads, since on a CPU a top_k keeps one core busy."""
    select = functools.partial(_select, size=size)
    with ThreadPoolExecutor() as pool:
        rows = [pool.map(select, *both) for both in zip(best, kept, strict=True)]
        return [list(row) for row in rows]


@functools.partial(jax.jit, static_argnames="size")
def _select(best: _Lowest, kept: list, size: int) -> _Lowest:
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
        return _Lowest(bound, first + row + (bound & (size - 1)) * groups, second)

    parts = zip(best, *(of_block(*block) for block in kept), strict=True)
    every = _Lowest(*(jnp.concatenate(part, axis=1) for part in parts))
    place = _lowest_places(every.bound, count)
    return _Lowest(*(jnp.take_along_axis(a, place, axis=1) for a in every))


def _by_rows(x: jax.Array) -> jax.Array:
    """Keep a matrix in memory by rows.

    To save its transposition, XLA would make it by columns, in large steps over memory: ten times
    as slow.
    """
    return with_layout_constraint(x, Layout((0, 1)))


def _lowest_places(x: jax.Array, count: int) -> jax.Array:
    """Where the ``count`` lowest of each row of [t, n] int32 are; by floats, the faster top_k."""
    finite = jnp.minimum(x, _INFINITE - 1)
    floats = jax.lax.bitcast_convert_type(_reordered(finite), jnp.float32)
    return jax.lax.top_k(-floats, count)[1]


def _ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 of the same order."""
    return _reordered(jax.lax.bitcast_convert_type(x, jnp.int32))


def _reordered(bits: Any) -> Any:
    """float32's bits as int32 of the same order, and back; for NumPy and JAX."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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


def _bound_distances(bounds: np.ndarray, own_share: np.ndarray, prepare: Callable) -> np.ndarray:
    """Lower bounds [q, m], from integers, in the unit of the distances, as float32."""
    metric, scale = prepare.keywords["metric"], float(prepare.keywords["scale"])
    values = _reordered(bounds).view(np.float32).astype(np.float64)
    values[bounds >= _INFINITE] = np.inf
    # The last term covers what underflows once the scale is applied.
    values = values + own_share[:, None] - 1e-30
    if metric != "cosine":
        values /= scale**2
    if metric == "euclidean":
        values = np.sqrt(np.maximum(values, 0.0))
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _candidate_keys(
    queries: jax.Array,
    shard: _Shard,
    found: _Lowest,
    k: int,
    metric: str,
    labels: tuple[_Labels, _Labels],
    gallery_block: int,
    size: int,
) -> np.ndarray:
    """Keys of the candidates of each query, [q, at least count], by their distances in float64.

    First of those with the k lowest bounds, then a few at a time of the others that may be as near
    as the k-th so far: with a lower bound, or in a group whose second lowest bound is.
    """
    distances = np.full(found.index.shape, np.inf, np.float32)
    there = found.bound < np.inf
    row = np.arange(len(distances), dtype=np.int32)
    kth = np.full((len(distances), 1), np.inf, np.float32)
    for start in [0, *range(k, found.index.shape[1], _OTHERS)]:
        # Bounds ascend.
        row = row[(found.bound[row, start] <= kth[row, 0]) & there[row, start]]
        if not len(row):
            break
        columns = slice(start, start + _OTHERS) if start else slice(0, k)
        some = _pair_distances(queries, shard, row, found.index[row, columns], metric)
        distances[row, columns] = np.where(there[row, columns], some, np.inf)
        kth[row, 0] = np.partition(distances[row, : columns.stop], k - 1, axis=1)[:, k - 1]
    keys = _keys(distances, np.where(there, found.index, -1))
    row, column = np.nonzero((found.second <= kth) & there)
    if not len(row):
        return keys
    members = _group_members(found.index[row, column], shard, gallery_block, size)
    ignored = _ignored(_column(_taken(labels[0], row)), _taken(labels[1], members))
    members = np.where(ignored, -1, members)
    more = _pair_distances(queries, shard, row.astype(np.int32), members, metric)
    more[members < 0] = np.inf
    return np.concatenate([keys, _rows_of_keys(_keys(more, members), row, len(keys))], axis=1)


def _group_members(index: np.ndarray, shard: _Shard, gallery_block: int, size: int) -> np.ndarray:
    """The others in the groups that hold ``index`` [p]; [p, size - 1], -1 where there is none."""
    n = len(shard.rows)
    rows = _block_rows(n, gallery_block)
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
    gathered = np.full((q, int(place.max()) + 1, keys.shape[-1]), _keys(*_NOBODY), np.uint64)
    gathered[row, place] = keys
    return gathered.reshape(q, -1)


def _pair_distances(
    queries: np.ndarray | jax.Array, shard: _Shard, rows: np.ndarray, found: np.ndarray, metric: str
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
    shape = (-1, _STEPS, min(max(16, 1024 // found.shape[1]), wide // found.shape[1]))
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
        near = y.at[indices[1]].get(mode="promise_in_bounds")
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
    squares = _sum(_halved(jnp.square(x - y)))
    return (squares if metric == "squared_euclidean" else jnp.sqrt(squares)).astype(jnp.float32)


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, in an order that compilers turn into vector instructions."""
    whole = x.shape[-1] // 128 * 128
    lanes = x[..., :whole].reshape(*x.shape[:-1], -1, 128)
    return jnp.sum(jnp.sum(lanes, axis=-2), axis=-1) + jnp.sum(x[..., whole:], axis=-1)


def _halved(x: jax.Array) -> jax.Array:
    """Sums of numbers of the last axis, whose sum is that of x.

    Additions of slices are fused with what makes x, which a sum would have in memory first.
    """
    while x.shape[-1] > 128 and x.shape[-1] % 2 == 0:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


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
        for first, fresh, rows, _ in _blocks(shard, _DOUBLE_BLOCK[1]):
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


def _nothing(q: int, count: int) -> _Lowest:
    none = np.full((q, count), _NO_BOUND, np.int32)
    return _Lowest(none, np.full((q, count), -1, np.int32), none.copy())


def _untiled(parts: Sequence[ArrayLike], starts: list[int], q: int) -> np.ndarray:
    """What all tiles have, as one array of all queries; the last overlaps the one before."""
    parts = [np.asarray(part) for part in parts]
    whole = np.empty((q, *parts[0].shape[1:]), parts[0].dtype)
    for start, part in zip(starts, parts, strict=True):
        whole[start : start + len(part)] = part
    return whole


def _taken(labels: _Labels, rows: slice | np.ndarray) -> _Labels:
    return _Labels(*(None if a is None else a[rows] for a in labels))


def _column(labels: _Labels) -> _Labels:
    return _Labels(*(None if a is None else a[:, None] for a in labels))


def _row(labels: _Labels) -> _Labels:
    return _Labels(*(None if a is None else a[None, :] for a in labels))


def _blocks(shard: _Shard, size: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Blocks of one size: gallery index of the first row, rows that the last block had, rows.

    And the squares of the rows.
    """
    n = len(shard.rows)
    rows = _block_rows(n, size)
    source = _view(shard)
    for start in range(0, n, rows):
        begin = min(start, n - rows)
        block = source[begin : begin + rows]
        if source is not shard.rows:
            block = jax.device_put(block, shard.device)
        elif isinstance(block, np.ndarray):
            block = jax.block_until_ready(jax.device_put(np.array(block), shard.device))
            _release(shard.rows)
        yield shard.first + begin, start - begin, block, shard.squares[begin : begin + rows]


def _view(shard: _Shard) -> np.ndarray | jax.Array:
    """The rows to take blocks from: NumPy's view on a CPU, since slices of jnp are copies."""
    on_cpu = isinstance(shard.rows, jax.Array) and shard.device.platform == "cpu"
    return np.asarray(shard.rows) if on_cpu else shard.rows


def _block_rows(n: int, size: int) -> int:
    """Rows of each block: about equally many, whole groups where there are several blocks."""
    rows = -(-n // -(-n // size))
    return rows if rows == n else min(n, -(-rows // _GROUP) * _GROUP)


def _shards(gallery: np.ndarray | jax.Array, devices: Sequence[Any] | None) -> list[_Shard]:
    """The gallery in contiguous parts, one a device."""
    n = len(gallery)
    if isinstance(gallery, jax.Array) and devices is None:
        parts = {s.index[0].start or 0: s for s in gallery.addressable_shards}
        if sum(len(s.data) for s in parts.values()) != n or any(
            s.data.shape[1] != gallery.shape[1] for s in parts.values()
        ):
            raise ValueError("the gallery is to be sharded over its rows only, on local devices")
        return [_shard(parts[i].device, i, parts[i].data) for i in sorted(parts)]
    if devices is None:
        devices = jax.local_devices()[:1]
    # Copying once is faster than twice block by block, where there is room.
    resident = isinstance(gallery, jax.Array) or (
        not isinstance(gallery, np.memmap) and gallery.nbytes <= _RESIDENT
    )
    edges = np.linspace(0, n, len(devices) + 1).astype(int)
    return [
        _shard(d, int(i), jax.device_put(gallery[i:j], d) if resident else gallery[i:j])
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


def _shard(device: Any, first: int, rows: np.ndarray | jax.Array) -> _Shard:
    return _Shard(device, first, rows, _squares(rows, "gallery", first))


def _squares(x: np.ndarray | jax.Array, name: str, first: int = 0) -> np.ndarray:
    """Squared norms, [m] float32, infinite if too large; raises where there is NaN or infinity."""
    if isinstance(x, jax.Array):
        squares = np.asarray(_square_sums(x))
    else:
        squares = np.empty(len(x), np.float32)
        for block in _host_blocks(x):
            rows = np.asarray(x[block], np.float32)
            with np.errstate(over="ignore"):
                squares[block] = np.einsum("ij,ij->i", rows, rows)
    if not np.isfinite(np.sum(squares, dtype=np.float64)):
        _refuse_not_finite(x, name, first)
    return squares


@jax.jit
def _square_sums(x: jax.Array) -> jax.Array:
    return _sum(jnp.square(x.astype(jnp.float32)))


def _refuse_not_finite(x: np.ndarray | jax.Array, name: str, first: int) -> None:
    wrong = np.concatenate([~np.isfinite(np.asarray(x[b])).all(axis=1) for b in _host_blocks(x)])
    if wrong.any():
        row = first + int(np.argmax(wrong))
        raise ValueError(f"{name}: NaN or infinity in {wrong.sum()} rows, the first is row {row}")


def _peak(x: np.ndarray | jax.Array) -> float:
    """The largest magnitude."""
    return float(max(np.max(np.abs(np.asarray(x[block]))) for block in _host_blocks(x)))


def _host_blocks(x: np.ndarray | jax.Array) -> Iterator[slice]:
    """Blocks of rows to look at one after another; of a file, not kept in memory."""
    for i in range(0, len(x), 4096):
        yield slice(i, i + 4096)
        _release(x)


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
    first_pass: str | None,
    query_block: int | None,
    gallery_block: int | None,
) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, the gallery {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}, but the gallery has {len(gallery)} items; k is from 1 to that")
    if len(gallery) >= 2**31:
        raise ValueError(f"the gallery has {len(gallery)} items, indices are int32")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if first_pass is not None and first_pass not in FIRST_PASSES:
        raise ValueError(f"unknown first_pass {first_pass!r}; choose {' or '.join(FIRST_PASSES)}")
    if min(query_block or 1, gallery_block or 1) < 1:
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
