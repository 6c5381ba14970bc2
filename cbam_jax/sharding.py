"""Arrays over any mesh: axes of type Auto or Explicit, and whatever they are called.

``shared`` places a training state so that each device holds its share of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Elements from which on an array is worth being gathered from the devices for each step.
_WORTH_SHARING = 2**13


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


def batch_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return how a batch is split over a mesh: along its axis ``data``, else along its first."""
    return PartitionSpec("data" if "data" in mesh.axis_names else mesh.axis_names[0])


def shared_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return how an array of a training state is shared among the devices that share a batch.

    Along its largest axis that they divide evenly; whole on each where there is none, or where it
    is small, as biases are: gathering it would take longer than it saves memory.

    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> shared_spec((3, 3, 64, 128), mesh), shared_spec((128,), mesh), shared_spec((7, 5000), mesh)
    (P(None, None, None, 'data'), P(), P(None, 'data'))
    """
    axis = batch_spec(mesh)[0]
    fitting = [i for i, size in enumerate(shape) if size % mesh.shape[axis] == 0]
    if not fitting or np.prod(shape) < _WORTH_SHARING:
        return PartitionSpec()
    largest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*[None] * largest, axis)


def shared(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a pytree by ``shared_spec``."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, shared_spec(np.shape(leaf), mesh)), tree)


def whole(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a pytree that is whole on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def place(tree: Any, shardings: Any) -> Any:
    """Put each array of a pytree where its sharding says; every process holds all of them whole."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__)

    return jax.tree.map(put, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put every array of a pytree whole on every device of the mesh."""
    return place(tree, whole(tree, mesh))


def constrain(tree: Any, shardings: Any) -> Any:
    """Have XLA place each array of a traced pytree; it inserts what gathers or reduces them."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Have XLA make each array of a traced pytree whole; over axes of type Explicit all are."""
    return constrain(tree, whole(tree, mesh)) if mesh is not None and _is_auto(mesh) else tree


def shareable(mesh: Mesh | None) -> Mesh:
    """Return a mesh over which a state can be shared; ValueError for any other."""
    if mesh is None or not _is_auto(mesh):
        raise ValueError(
            "shard_state=True needs a mesh whose axes are of type Auto, such as steps.data_mesh()"
        )
    return mesh


def _is_auto(mesh: Mesh) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def on_host(leaf: Any) -> np.ndarray:
    """Copy an array to the host, whole; one whose parts other processes hold, in all of them."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils  # Here: who computes alone needs none of it.

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def as_varying(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return ``x`` marked as varying over the axes of ``jax.shard_map`` that ``like`` varies over.

    A custom derivative rule has to return gradients of its arguments' own type; marked so, JAX adds
    up the shards' gradients where ``x`` is the same on all of them.
    """
    axes = tuple(jax.typeof(like).mat.varying - jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
