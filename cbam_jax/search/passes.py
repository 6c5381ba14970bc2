"""`search`, pass by pass: lower bounds, candidates, proof, and again what was not proven."""

import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.search import arguments, few
from cbam_jax.search.arguments import FIRST_PASSES
from cbam_jax.search.bounds import (
    Preparation,
    bound_distances,
    preparation_of,
    usual_size,
)
from cbam_jax.search.candidates import candidate_keys
from cbam_jax.search.clusters import Leaders, cluster_pass, leaders_of
from cbam_jax.search.exhaustive import exhaustive_search
from cbam_jax.search.groups import group_size, lowest_bounds
from cbam_jax.search.order import INFINITE, unpacked
from cbam_jax.search.prepared import Prepared
from cbam_jax.search.shards import measured, padded_size, parts_of, squared_norms
from cbam_jax.search.spread import cluster_radius, first_useful
from cbam_jax.search.types import Labels, Lowest, Queries, Shard

_log = logging.getLogger(__name__)

_SLACK = 8  # Candidates beyond k, so that the bounds seldom leave a query unproven.
_PROBE = 64  # Queries that show whether the projected gallery proves most.
_FEWEST, _MORE = 16, 8  # Queries that are given more candidates, at least, and times how many.
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

    Memory beyond the arguments is O(q (k + d) + query_block gallery_block). A gallery that does not
    fit the device, or the memory, is given as a NumPy array or ``np.memmap``: arrays of at most
    1 GiB are copied to the device, others read block by block, twice, the first time to check them;
    for few queries (up to 4, and up to 64 of most embeddings that are not normal) once.
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
            found = _few_search(prepared, shards, k, metric, items, gallery_block)
            if found is not None:
                return found
        shards = measured(shards)
    blocks = block_sizes(shards[0].device, rows.shape, query_block, gallery_block)
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
    if kept is not None and not usual_size(queries, shards):
        kept = None  # Which is not scaled.
    if kept is None:
        preparation = preparation_of(queries, shards, metric, first_pass)
    else:
        preparation = kept.preparation._replace(metric=metric, directions=None)
    leaders = _leaders(queries, shards, k, preparation)
    rest, readable = np.arange(q), _worth_compiling(shards)
    # Every pair of few queries and a small gallery is soon looked at, and nothing compiled for it.
    small = shards[0].device.platform == "cpu" and not readable
    for number, name in enumerate(_names(queries, preparation, leaders, kept, k)):
        part = rest if len(rest) < q else slice(None)  # A slice copies nothing.
        some = queries.taken(part)
        if number and len(rest) <= few.MOST and readable:
            found = _few_search(some, shards, k, metric, items)
            if found is not None:
                distances[part], indices[part] = found
                return distances, indices
            readable = False
        if name == "bfloat16" and len(rest) <= few.MOST and kept is not None and kept.candidates:
            continue  # It would round the gallery, see `fastest_pass`.
        if len(rest) <= few.MOST and (name == "float64" or (number and small)):
            break
        if name == "clusters":
            assert leaders is not None
            found = cluster_pass(some, leaders, shards, k, preparation, items, blocks)
        elif name == "projected":
            assert kept is not None
            found = _projected_pass(some, kept, k, metric, items, blocks)
        else:
            sides = None if kept is None else kept.sides_of(name)
            settings = preparation._replace(dtype=name)
            found = _pass(some, shards, k, settings, items, blocks, _candidates(k, name), sides)
        distances[part], indices[part], proven = found
        _log.debug("%s: proven for %d of %d queries", name, np.sum(proven), len(proven))
        rest = rest[~proven]
        if not len(rest):
            return distances, indices
    left = queries.taken(rest)
    distances[rest], indices[rest] = exhaustive_search(left, shards, k, metric, items)
    _log.debug("%s: proven for %d of %d queries", "every pair", len(rest), len(rest))
    return distances, indices


def _names(
    queries: Queries,
    preparation: Preparation,
    leaders: Leaders | None,
    kept: Prepared | None,
    k: int,
) -> Iterator[str]:
    """The passes in their order; with which product to begin is asked where one is needed."""
    if leaders is not None:
        yield "clusters"
    dtypes = (*FIRST_PASSES[FIRST_PASSES.index(preparation.dtype) :], "float64")
    first = first_useful(dtypes, queries, preparation)
    if kept is not None and kept.candidates_of(k) and first == preparation.dtype:
        yield "projected"
    yield from dtypes[dtypes.index(first) :]


def _leaders(
    queries: Queries, shards: Sequence[Shard], k: int, preparation: Preparation
) -> Leaders | None:
    """Leaders of the queries' clusters; None where each cluster alone would not be the faster."""
    if not _separable(shards, preparation):
        return None
    metric, device = preparation.metric, shards[0].device
    within = cluster_radius(queries, metric)
    n = sum(len(shard.rows) for shard in shards)
    most = min(len(queries.rows) // 4, n // (4 * k))
    return None if within is None else leaders_of(queries, within, metric, device, most)


def _separable(shards: Sequence[Shard], preparation: Preparation) -> bool:
    """Whether clusters can be searched alone: by lengths, of usual size, and small products."""
    lengths = preparation.metric != "inner_product" and float(preparation.scale) == 1
    return lengths and shards[0].device.platform == "cpu"


def _worth_compiling(shards: Sequence[Shard]) -> bool:
    """Whether the gallery is read for few queries, before they are searched by every pair."""
    return shards[0].device.platform == "cpu" and sum(s.rows.size for s in shards) > _MANY


def _few_search(queries: Queries, *arguments: Any) -> tuple[np.ndarray, np.ndarray] | None:
    found = few.few_search(queries, *arguments)
    if found is not None:
        _log.debug("%s: proven for %d of %d queries", "few", len(found[0]), len(found[0]))
    return found


def _projected_pass(
    queries: Queries,
    kept: Prepared,
    k: int,
    metric: str,
    items: Labels,
    blocks: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_pass` with the projected gallery; of some queries alone, where it proves few of them.

    Where few are left, they are searched once more, with many candidates.
    """
    q, preparation = len(queries.rows), kept.preparation._replace(metric=metric)
    distances, indices = np.empty((q, k), np.float32), np.empty((q, k), np.int32)
    proven, every = np.zeros(q, bool), np.arange(q)

    def search_part(part, candidates):
        some, count = queries.taken(part), k + candidates
        found = _pass(some, kept.shards, k, preparation, items, blocks, count, kept.sides)
        distances[part], indices[part], proven[part] = found

    candidates = kept.candidates_of(k)
    some = every if q <= 4 * _PROBE else np.linspace(0, q - 1, _PROBE).astype(int)
    search_part(some, candidates)
    if len(some) < q and proven[some].mean() >= 0.5:
        search_part(np.delete(every, some), candidates)
    left = np.flatnonzero(~proven)
    if 0 < len(left) <= max(_FEWEST, q // 4) and _MORE * candidates <= kept.shape[0]:
        search_part(left, _MORE * candidates)
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
    sides: Sequence[Shard] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest among ``count`` candidates, and whether it is proven.

    ``sides`` are the shards as the product takes them, where they have been kept.
    """
    metric, dtype = preparation.metric, preparation.dtype
    n = sum(len(shard.rows) for shard in shards)
    size = group_size(max(k, count // 4), n)
    with jax.enable_x64(dtype == "float64"):
        lowest, own_share = lowest_bounds(
            queries, sides or shards, count, preparation, items, blocks, size, sides is not None
        )
    keys, unseen, complete = [], [], []
    for shard, (bound, index, second) in zip(shards, lowest, strict=True):
        bounds = [bound_distances(b & -size, own_share, preparation) for b in (bound, second)]
        found = Lowest(bounds[0], index, bounds[1])
        keys.append(candidate_keys(queries, shard, found, k, metric, items, blocks[1], size))
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
