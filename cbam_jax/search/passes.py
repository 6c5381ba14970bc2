"""`search`, pass by pass: lower bounds, what is near by them, and again what was left."""

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.search import arguments, few
from cbam_jax.search.arguments import FIRST_PASSES
from cbam_jax.search.bounds import (
    Preparation,
    preparation_of,
    usual_size,
)
from cbam_jax.search.candidates import candidate_pass
from cbam_jax.search.clusters import Leaders, cluster_pass, leaders_of
from cbam_jax.search.exhaustive import exhaustive_search
from cbam_jax.search.groups import Settings, group_size
from cbam_jax.search.near import near_pass
from cbam_jax.search.prepared import Prepared
from cbam_jax.search.shards import measured, padded_size, parts_of, squared_norms
from cbam_jax.search.spread import cluster_radius, first_useful, spread_of
from cbam_jax.search.types import Labels, Queries, Shard

_log = logging.getLogger(__name__)

_SLACK = 8  # Candidates beyond k, so that the bounds seldom leave a query unproven.
_PROBE = 512  # Queries that show whether the projected gallery proves most.
_MANY = 2**22  # Numbers of a gallery from which a program for few queries is worth compiling.
# Products, queries and gallery items at a time, at most, where memory is fast: 1 GiB of products.
_ON_ACCELERATOR = 2**28, 4096, 2**18


def search(
    queries: ArrayLike,
    gallery: ArrayLike | Prepared,
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

    Memory beyond the arguments is O(q (k + d) + query_block gallery_block), and on a CPU 128 MiB
    of bounds at most, with what is near by them. A gallery that does not fit the device, or the
    memory, is given as a NumPy array or ``np.memmap``: arrays of at most 1 GiB are copied to the
    device, others read block by block, twice, the first time to check them; for few queries (up to
    4, and up to 64 of most embeddings that are not normal) once.
    A ``jax.Array`` is searched where it is, on all devices that hold a part of it.
    On a CPU, programs are compiled for each width, for few numbers of queries, to which others are
    padded (1, 4, 16, 32, 64, then four up to each next power of two), and for each power of two,
    from 2 to 16, that n / (32 k) may be; not for a number of gallery items: that is made up of
    blocks of two lengths. An accelerator's programs know the size of the gallery, so do those that
    search tight clusters one by one.

    Args:
      queries: ``[q, d]``, any float dtype; rounded to float32 first.
      gallery: ``[n, d]``, likewise; or what `prepare` made of it, for this metric, which saves
        what each search would do anew. The result is the same.
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
        the speed, never the result; None: bfloat16 where the device has instructions for it,
        but for few queries on a CPU, which one reading of the gallery answers where that is faster.
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
      ValueError: Before the search begins: for k out of range, embeddings with NaN or what is
        infinite in float32, other shapes or dtypes, or an unknown metric.

    Example:
      >>> gallery = np.array([[0.0], [2.0], [3.0]], np.float32)
      >>> distances, indices = search(gallery, gallery, k=2, exclude_self=True)
      >>> indices.tolist(), distances.tolist()
      ([[1, 2], [2, 0], [1, 0]], [[2.0, 3.0], [1.0, 2.0], [1.0, 3.0]])
    """
    queries = arguments.matrix(queries, "queries")
    kept = gallery if isinstance(gallery, Prepared) else None
    if not isinstance(gallery, Prepared):
        gallery = arguments.matrix(gallery, "gallery")
    q, n = len(queries), gallery.shape[0]
    arguments.check(queries, gallery.shape, n, k, metric)
    if kept is not None:
        first_pass = kept.suited(metric, first_pass, devices)
    arguments.check_passes(first_pass, query_block, gallery_block)
    group = arguments.label_pair(query_group, gallery_group, q, n, "group")
    category = arguments.label_pair(query_category, gallery_category, q, n, "category")
    query = Labels(arguments.own_indices(exclude_self, q, n), group[0], category[0])
    items = Labels(np.arange(n, dtype=np.int32), group[1], category[1])

    rows = np.asarray(queries).astype(np.float32, copy=False)
    prepared = Queries(rows, squared_norms(rows, "queries"), query)
    if isinstance(gallery, Prepared):
        shards = gallery.shards
    else:
        shards = parts_of(gallery, devices)
        if first_pass is None and few.pays(shards, q, metric):
            found = few.few_search(prepared, shards, k, metric, items, gallery_block)
            if found is not None and found[2].all():
                _log.debug("%s: proven for %d of %d queries", "few", q, q)
                return found[:2]
        shards = measured(shards)
    width = rows.shape[1] if kept is None else kept.width
    blocks = block_sizes(shards[0].device, (q, width), query_block, gallery_block)
    first_pass = first_pass or fastest_pass(shards[0].device, q)
    return in_passes(prepared, shards, k, metric, items, blocks, first_pass, kept)


def in_passes(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    metric: str,
    items: Labels,
    blocks: tuple[int, int],
    first_pass: str,
    kept: Prepared | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The passes from ``first_pass`` on, each for the queries that the one before left unproven.

    Those that would prove nothing are left out; the last two are in float64. Where few queries are
    left, one more reading of the gallery finds their neighbours. How many queries each pass proves
    is logged, for debugging.
    """
    q = len(queries.rows)
    distances, indices = np.empty((q, k), np.float32), np.empty((q, k), np.int32)
    if kept is not None and not (kept.usual and usual_size(queries, shards)):
        kept = None  # Which is not scaled.
    if kept is None:
        preparation = preparation_of(queries, shards, metric, first_pass)
    else:
        preparation = kept.preparation._replace(metric=metric, directions=None)
    rest, left = np.arange(q), np.ones(q, bool)
    passes = _passes(queries, shards, k, preparation, items, blocks, kept)
    for name, run in _suited(passes, shards, kept, left):
        part = rest if len(rest) < q else slice(None)  # A slice copies nothing.
        some = queries.taken(part)
        found = run(some) if run else few.few_search(some, shards, k, metric, items)
        if found is None:
            continue  # Of numbers that it does not hold.
        distances[part], indices[part], proven = found
        _log.debug("%s: proven for %d of %d queries", name, np.sum(proven), len(proven))
        left[part] = ~proven
        rest = np.flatnonzero(left)
        if not len(rest):
            return distances, indices
    some = queries.taken(rest)
    distances[rest], indices[rest] = exhaustive_search(some, shards, k, metric, items)
    _log.debug("%s: proven for %d of %d queries", "every pair", len(rest), len(rest))
    return distances, indices


def _suited(
    passes: Iterable[tuple[str, Callable]],
    shards: Sequence[Shard],
    kept: Prepared | None,
    left: np.ndarray,
) -> Iterator[tuple[str, Callable | None]]:
    """The passes that suit the queries still ``left`` [q]; of few, one reading comes between."""
    on_cpu = shards[0].device.platform == "cpu"
    # In a small gallery few are soon compared with every item, and nothing is compiled for it.
    readable = on_cpu and sum(s.rows.size for s in shards) > _MANY
    small = on_cpu and not readable
    for number, (name, run) in enumerate(passes):
        if np.count_nonzero(left) <= few.MOST:
            if readable and (number or (kept is not None and few.clustered(shards))):
                yield "few", None
                readable = False
            if name == "float64" or (number and small):
                return
            if name == "bfloat16" and kept is not None and kept.candidates:
                continue  # It would round the gallery, see `fastest_pass`.
        yield name, run


def _passes(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    preparation: Preparation,
    items: Labels,
    blocks: tuple[int, int],
    kept: Prepared | None,
) -> Iterator[tuple[str, Callable]]:
    """All passes by name, in their order, as functions of some queries.

    With which product to begin is asked where one is needed.
    """
    metric, dtypes = preparation.metric, (*FIRST_PASSES, "float64")
    spread = spread_of(queries, metric)
    leaders = _leaders(queries, shards, k, preparation, cluster_radius(spread))
    if leaders is not None:
        rest = leaders, shards, k, preparation, items, blocks
        yield "clusters", lambda some: cluster_pass(some, *rest)
    dtypes = dtypes[dtypes.index(preparation.dtype) :]
    first = first_useful(dtypes, spread, preparation)
    if kept is not None and kept.candidates_of(k) and first == preparation.dtype:
        yield "projected", lambda some: _projected_pass(some, kept, k, metric, items, blocks)

    for dtype in dtypes[dtypes.index(first) :]:
        sides = None if kept is None else kept.sides_of(dtype)
        settings, count = preparation._replace(dtype=dtype), _candidates(k, dtype)
        arguments = shards, k, settings, items, blocks, count, max(k, count // 4), sides
        yield dtype, lambda some, a=arguments: _pass(some, *a)


def _leaders(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    preparation: Preparation,
    within: float | None,
) -> Leaders | None:
    """Leaders of the queries' clusters; None where each cluster alone would not be the faster."""
    if within is None or not _separable(shards, preparation):
        return None
    metric, device = preparation.metric, shards[0].device
    n = sum(len(shard.rows) for shard in shards)
    most = min(len(queries.rows) // 4, n // (4 * k))
    return leaders_of(queries, within, metric, device, most)


def _separable(shards: Sequence[Shard], preparation: Preparation) -> bool:
    """Whether clusters can be searched alone: by lengths, of usual size, and small products."""
    lengths = preparation.metric != "inner_product" and float(preparation.scale) == 1
    return lengths and shards[0].device.platform == "cpu"


def _projected_pass(
    queries: Queries,
    kept: Prepared,
    k: int,
    metric: str,
    items: Labels,
    blocks: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_pass` with the projected gallery, of some queries after another while it proves most."""
    q, preparation = len(queries.rows), kept.preparation._replace(metric=metric)
    distances, indices = np.empty((q, k), np.float32), np.empty((q, k), np.int32)
    proven, count = np.zeros(q, bool), k + kept.candidates_of(k)
    for start in range(0, q, _PROBE):
        part = slice(start, start + _PROBE)
        some = queries.taken(part)
        found = _pass(some, kept.shards, k, preparation, items, blocks, count, count, kept.sides)
        distances[part], indices[part], proven[part] = found
        if proven[part].mean() < 0.5:
            break
    return distances, indices, proven


def _candidates(k: int, dtype: str) -> int:
    """How many candidates a pass has: beyond k, so that it seldom leaves a query unproven."""
    # bfloat16's bounds are wider: normally distributed embeddings of 2,048 dimensions have half as
    # many candidates more where k is 20, a quarter where k is 350.
    return k + (_SLACK if dtype != "bfloat16" else int(_SLACK * np.sqrt(k)))


def _pass(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    preparation: Preparation,
    items: Labels,
    blocks: tuple[int, int],
    count: int,
    near: int,
    sides: Sequence[Shard] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest, and whether it is proven.

    An accelerator has ``count`` candidates, a CPU measures twice as many a query, in the mean;
    about ``near`` are expected, each best in a group of its own. ``sides`` are the shards as the
    product takes them, where they have been kept.
    """
    size = group_size(near, sum(len(shard.rows) for shard in shards))
    settings = Settings(preparation, items, blocks[1], size, count)
    with jax.enable_x64(preparation.dtype == "float64"):
        if shards[0].device.platform == "cpu":
            # What float64 leaves is compared with every item.
            last = few.PAIRS // len(queries.rows) if preparation.dtype == "float64" else 0
            settings = settings._replace(most=max(2 * count, last))
            return near_pass(queries, shards, k, settings, blocks[0], sides).found()
        return candidate_pass(queries, shards, k, settings, blocks[0], sides)


def fastest_pass(device: Any, queries: int | None = None) -> str:
    """bfloat16 where the device has instructions for it: most accelerators, some Linux CPUs.

    Not on a CPU for few queries, whose products take less time than rounding the gallery does.

    Of NVIDIA's, those from compute capability 8.0 (Ampere) on; others, and AMD's ("gfx942"), do not
    say their capability as a number.
    """
    if device.platform != "cpu":
        major = str(getattr(device, "compute_capability", "")).partition(".")[0]
        return "float32" if major.isdecimal() and int(major) < 8 else "bfloat16"
    if queries is not None and queries <= few.MOST:
        return "float32"
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def block_sizes(
    device: Any, shape: tuple[int, ...], query_block: int | None, gallery_block: int | None
) -> tuple[int, int]:
    """Queries and gallery items at a time: 16 MiB of products, which stay in a CPU's cache."""
    products, most_queries, most_items = _ON_ACCELERATOR
    if device.platform == "cpu":
        products, most_queries, most_items = 2**22, 512 if shape[1] < 1024 else 1024, 2**15
    query_block = query_block or min(most_queries, padded_size(shape[0]))
    return query_block, gallery_block or min(products // query_block, most_items)
