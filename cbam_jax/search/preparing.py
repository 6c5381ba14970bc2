"""`prepare`: what a search does with the gallery alone, done once."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.search import arguments
from cbam_jax.search.bounds import Preparation, preparation_of, prepared, sampled_rows, usual_size
from cbam_jax.search.passes import block_sizes, fastest_pass, in_passes
from cbam_jax.search.prepared import Prepared
from cbam_jax.search.projection import RUNS, Choice, choose, correlated
from cbam_jax.search.shards import blocks_of, equal_blocks, split_gallery, squared_norms
from cbam_jax.search.types import Labels, Queries, Shard

_TRIED = 64  # Rows by which the width of a projection is chosen.
_BLOCK = 2**23  # Numbers of the gallery that are made ready at a time.


def prepare(
    gallery: ArrayLike,
    *,
    metric: str = "euclidean",
    k: int = 20,
    first_pass: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Prepared:
    """A gallery made ready for many searches, which give the same result as without.

    Each search would otherwise read the gallery whole to compute norms, and round or project it.
    Where embeddings are correlated, as those of photos are, it is projected on so many principal
    directions that it tells most items from the nearest; otherwise it is kept as the first product
    takes it. ``extra_bytes`` of the result is the memory that it holds beyond the gallery: 4 bytes
    an item, and 2 bytes for each of ``width`` numbers in bfloat16, 4 in float32 where they are
    others than the gallery's own. While it is made, a few rows are searched for their neighbours.

    Args:
      gallery: ``[n, d]``, any float dtype, as `search` takes it; not copied if it is in a file.
      metric: One of `METRICS`; Euclidean distances and their squares have one preparation.
      k: About how many neighbours searches will ask for. It decides the speed alone.
      first_pass: The dtype of the first products, see `search`.
      devices: Devices to split the gallery over, likewise.

    Returns:
      What `search` takes in place of the gallery.

    Raises:
      ValueError: For NaN or infinite embeddings, other shapes or dtypes, an unknown metric, or k
        below 1.

    Example:
      >>> from cbam_jax.search import search
      >>> gallery = prepare(np.array([[0.0], [2.0], [3.0]], np.float32))
      >>> gallery.shape, gallery.width
      ((3, 1), 1)
      >>> search(np.ones((1, 1), np.float32), gallery, k=2)[1].tolist()
      [[0, 1]]
    """
    gallery = arguments.matrix(gallery, "gallery")
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k is {k}: give a whole number from 1, about what searches will ask for")
    arguments.check(gallery, gallery.shape, len(gallery), min(k, len(gallery)), metric)
    arguments.check_passes(first_pass, None, None)
    shards = split_gallery(gallery, devices)
    dtype = first_pass or fastest_pass(shards[0].device)
    rows = sampled_rows(shards, max(1, RUNS // len(shards)))[::4].astype(np.float32)
    sample = Queries(rows, squared_norms(rows, "gallery"), Labels(None, None, None))
    settings = preparation_of(sample, shards, metric, dtype)
    if not usual_size(sample, shards):
        return Prepared(shards, shards, settings)  # Each search scales it with its queries.
    choice = _projection(sample, shards, settings, k)
    if choice is not None:
        settings = settings._replace(directions=choice.directions)
    sides = [_side(shard, settings) for shard in shards]
    return Prepared(shards, sides, settings, choice.candidates if choice else ())


def _projection(
    sample: Queries, shards: Sequence[Shard], settings: Preparation, k: int
) -> Choice | None:
    """Directions to project on, by the neighbours of a few rows; None where it would not pay."""
    whole = settings._replace(dtype="float32")
    rows = np.asarray(prepared(sample.rows, sample.squares, whole)[0], np.float64)
    if not correlated(rows):
        return None
    tried = np.unique(np.linspace(0, len(rows) - 1, _TRIED).astype(int))
    some, n = sample.taken(tried), sum(len(s.rows) for s in shards)
    ks = sorted({min(n, count) for count in (max(1, k // 4), k, 2 * k)})
    blocks = block_sizes(shards[0].device, some.rows.shape, None, None)
    items = Labels(np.arange(n, dtype=np.int32), None, None)
    found, _ = in_passes(some, shards, ks[-1], settings.metric, items, blocks, settings.dtype)
    return choose(rows, tried, found[:, np.array(ks) - 1].astype(np.float64), ks, n, settings)


def _side(shard: Shard, settings: Preparation) -> Shard:
    """The rows and their share of the bounds as products take them, on the shard's device."""
    if _as_given(shard, settings):
        rows, share = prepared(shard.rows, shard.squares, settings)
        return shard._replace(rows=rows, squares=np.asarray(share))
    parts = []
    blocks = equal_blocks(len(shard.rows), max(1, _BLOCK // shard.rows.shape[1]))
    for _, fresh, rows, squares in blocks_of(shard, blocks):
        side = prepared(rows, squares, settings)
        parts.append([jax.device_put(a[fresh:], shard.device) for a in side])
    rows, share = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return shard._replace(rows=rows, squares=np.asarray(share))


def _as_given(shard: Shard, settings: Preparation) -> bool:
    """Whether products take the rows as they are, so that they need not be copied."""
    moved = settings.center is not None or settings.metric == "cosine"
    resident = isinstance(shard.rows, jax.Array) and shard.rows.dtype == jnp.float32
    plain = settings.dtype == "float32" and settings.directions is None
    return plain and resident and not moved
