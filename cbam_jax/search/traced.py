"""`top_k`: exact nearest neighbours inside other JAX programs.

As in `search`, one product a block gives lower bounds, the few lowest give candidates, and those
are measured, here by `compensated` float32. Where the k-th distance is below every other bound the
answer is proven; the queries of which that is not so are searched once more, one after another, in
a loop that has no turns where there are none. (A `lax.cond` would go both ways under ``vmap``.)
What is differentiated is the distances to the rows that were found, not how they were found.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cbam_jax.distances import l2_normalize
from cbam_jax.search import arguments
from cbam_jax.search.streamed import gathered, nearest_rows, sort_value
from cbam_jax.search.types import Labels
from cbam_jax.sharding import rows_spec, with_auto_axes

_TINY = float(np.finfo(np.float32).tiny)


def top_k(
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
    valid: ArrayLike | None = None,
    axis_name: Any = None,
    block_size: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """The k nearest gallery items of each query, exactly, inside ``jit``, ``vmap``, ``scan``.

    `search` for programs: the same metrics, masks, distances and order of ties, on arrays that may
    be traced. Distances have a gradient, indices have none. Memory beyond the arguments is
    O(q (block_size + k + d)), with gradients O(q k d + n d) more. Outside of programs, and for
    galleries that do not fit the device, `search` is the faster.

    Distances are those of float64, rounded, but for about one in a million, where the last bit
    differs. (Cosine distances below 1e-10 have that more often, those below 1e-27 are 0.) The
    gradient at distance 0 is 0, and that of a zero vector's cosine distance as well.

    Nothing is known of a traced array but its shape, so numbers are not looked at: NaN in, NaN out.
    A distance that is NaN comes before all others, so that it is seen. Magnitudes below float32's
    normal range (1e-38) may count as 0.

    Args:
      queries: ``[q, d]``, any float dtype; cast to float32.
      gallery: ``[n, d]``, likewise, block by block.
      k: From 1 to n; static.
      metric: One of `METRICS`.
      exclude_self: True where query i is gallery item i and is to be ignored; or ``[q]`` integers,
        the gallery index of each query, -1 for none.
      query_group: ``[q]`` integers; gallery items with the query's group are ignored.
      gallery_group: ``[n]`` integers, given with ``query_group``.
      query_category: ``[q]`` integers; gallery items of other categories are ignored.
      gallery_category: ``[n]`` integers, given with ``query_category``.
      valid: ``[n]`` bool, False where a gallery row is padding, whatever is in it; None: all are
        items.
      axis_name: Inside ``jax.shard_map`` over a gallery in shards of rows, the mesh axis (or axes)
        of the shards. ``gallery``, ``gallery_group``, ``gallery_category`` and ``valid`` are then
        the shard's, of n / shards rows, all else is of all, and the same on every shard: k, the
        gallery indices, the queries, and the result.
      block_size: Gallery items at a time, at most; static. It decides speed and memory, never the
        result.

    Returns:
      Distances ``[q, k]`` float32, ascending, and indices ``[q, k]`` int32. Ties are broken by the
      gallery index. Where fewer than k items are left the row ends in distance inf, index -1.

    Raises:
      ValueError: For k out of range, other shapes or dtypes, or an unknown metric.

    Example:
      >>> gallery = jnp.array([[0.0], [2.0], [3.0]])
      >>> nearest = jax.jit(lambda x: top_k(x, x, k=2, exclude_self=True))
      >>> distances, indices = nearest(gallery)
      >>> indices.tolist(), distances.tolist()
      ([[1, 2], [2, 0], [1, 0]], [[2.0, 3.0], [1.0, 2.0], [1.0, 3.0]])
      >>> jax.grad(lambda x: jnp.sum(nearest(x)[0]))(gallery).ravel().tolist()
      [-4.0, 0.0, 4.0]
    """
    queries = jnp.asarray(arguments.matrix(queries, "queries")).astype(jnp.float32)
    gallery = jnp.asarray(arguments.matrix(gallery, "gallery"))
    k, shards = operator.index(k), 1 if axis_name is None else jax.lax.axis_size(axis_name)
    q, n = len(queries), len(gallery)
    arguments.check(queries, gallery.shape, n * shards, k, metric)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}, expected at least 1")
    group = arguments.label_pair(query_group, gallery_group, q, n, "group")
    category = arguments.label_pair(query_category, gallery_category, q, n, "category")
    own = arguments.own_indices(exclude_self, q, n * shards)
    valid = jnp.ones(n, bool) if valid is None else _flags(valid, n)
    labels = Labels(own, group[0], category[0]), Labels(valid, group[1], category[1])
    arrays = queries, gallery, *jax.tree.map(jnp.asarray, labels)
    static = {"k": k, "metric": metric, "axis_name": axis_name, "block_size": block_size}
    find: Any = functools.partial(_top_k, **static)
    run: Any = with_auto_axes(find, arrays, rows_spec(queries))
    return run(*arrays)


def _flags(valid: ArrayLike, n: int) -> jax.Array:
    valid = jnp.asarray(valid)
    if valid.shape != (n,) or valid.dtype != bool:
        shape, dtype = valid.shape, valid.dtype
        raise ValueError(f"valid has shape {shape} and dtype {dtype}, expected [{n}] bool")
    return valid


def _top_k(queries, gallery, labels, items, *, k, metric, axis_name, block_size):
    """`top_k` of arrays that fit together; the items' index says for now whether they are valid."""
    n, first = len(gallery), 0
    if axis_name is not None:
        first = n * jax.lax.axis_index(axis_name).astype(jnp.int32)
        labels = labels._replace(index=None if labels.index is None else labels.index - first)
    row = jnp.where(items.index, jnp.arange(n, dtype=jnp.int32), -1)
    x, y = jax.lax.stop_gradient((queries, gallery))
    items = items._replace(index=row)
    found = nearest_rows(x, y, labels, items, min(k, n), metric, min(block_size, n))
    distance = _differentiable(metric, queries, gallery, found.distance, found.row)
    index = jnp.where(found.row < 0, -1, found.row + first)
    return (distance, index) if axis_name is None else _of_shards(distance, index, k, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(metric, queries, gallery, distance, row):
    """The distances, as a function of the queries and the gallery."""
    return distance


@_differentiable.defjvp
def _differentiable_jvp(metric, primals, tangents):
    queries, gallery, _, row = primals
    value = _differentiable(metric, *primals)
    there = row >= 0
    x, dx = (a[:, None, :] for a in (queries, tangents[0]))
    y, dy = (gathered(a, row).astype(jnp.float32) for a in (gallery, tangents[1]))
    y = jnp.where(there[..., None], y, 0.0)
    tangent = _tangent(metric, x, y, dx, dy, jnp.where(there, value, 0.0)[..., None])
    return value, jnp.where(there, tangent, 0.0)


def _tangent(metric, x, y, dx, dy, value):
    """The derivative of a distance ``value`` in the direction of dx and dy, over the last axis."""
    if metric == "inner_product":
        return -jnp.sum(x * dy + y * dx, axis=-1)
    if metric == "cosine":
        u, v = l2_normalize(x, _TINY), l2_normalize(y, _TINY)
        of_x, of_y = (_inverse(jnp.sum(a * b, -1, keepdims=True)) for a, b in ((x, u), (y, v)))
        across = u - v  # v - cos u = (u - v) less what lies along u
        both = of_x * (across - value * u) * dx - of_y * (across + value * v) * dy
        return jnp.sum(jnp.where((of_x > 0) & (of_y > 0), both, 0.0), axis=-1)
    z = x - y
    z = 2 * z if metric == "squared_euclidean" else z * _inverse(value)
    return jnp.sum(z * (dx - dy), axis=-1)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, 0 where x is 0."""
    return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)


def _of_shards(
    distance: jax.Array, index: jax.Array, k: int, axis_name: Any
) -> tuple[jax.Array, jax.Array]:
    """The k nearest of those of all shards, the same on each."""
    here, count = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def of_all(a):
        # A sum in which all others are 0: its result is known to be the same on every shard.
        padded = jnp.zeros((count, *a.shape), a.dtype).at[here].set(a)
        return jnp.moveaxis(jax.lax.psum(padded, axis_name), 0, 1).reshape(len(a), -1)

    distance, index = of_all(distance), of_all(index)
    place = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
    order = jax.lax.stop_gradient(sort_value(distance))
    unsigned = jax.lax.bitcast_convert_type(index, jnp.uint32)
    place = jax.lax.sort((order, unsigned, place), num_keys=2)[2][:, :k]
    return jnp.take_along_axis(distance, place, axis=1), jnp.take_along_axis(index, place, axis=1)
