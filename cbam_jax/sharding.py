"""Arrays over any mesh: axes of type Auto or Explicit, and whatever they are called."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def with_auto_axes(
    function: Callable[..., Any], arrays: Any, spec: PartitionSpec | None = None
) -> Callable[..., Any]:
    """Return ``function`` so that XLA places what it computes, also over axes of type Explicit.

    There JAX asks how each intermediate result is placed, and refuses what it can't tell; results
    are then placed by ``spec``, None: whole on every device. Over axes of type Auto, JAX's
    default until 0.7, and without a mesh it is ``function`` itself.

    Args:
        function: of arrays.
        arrays: a pytree of what it will be called with.
        spec: how its results are placed where axes are Explicit.
    """
    for leaf in jax.tree.leaves(arrays):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            placed = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
            return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=placed)
    return function


def rows_spec(*arrays: jax.Array) -> PartitionSpec:
    """Return how the first axes of arrays share a mesh's axes: an entry each, none twice.

    >>> rows_spec(jax.numpy.ones((4, 2)))
    P(None,)
    """
    entries, seen = [], set()
    for array in arrays:
        axis = next(iter(jax.typeof(array).sharding.spec), None)
        names = set(axis) if isinstance(axis, tuple) else {axis}
        entries.append(None if names & seen else axis)
        seen |= names - {None}
    return PartitionSpec(*entries)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Return how a batch is split over a mesh: along its axis ``data``, else along its first."""
    return PartitionSpec("data" if "data" in mesh.axis_names else mesh.axis_names[0])


def as_varying(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return ``x`` marked as varying over the axes of ``jax.shard_map`` that ``like`` varies over.

    A custom derivative rule has to return gradients of its arguments' own type; marked so, JAX adds
    up the shards' gradients where ``x`` is the same on all of them.
    """
    axes = tuple(jax.typeof(like).mat.varying - jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
