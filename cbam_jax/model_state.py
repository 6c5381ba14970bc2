"""A model as arrays, by what becomes of them, and back: what steps, runs and exports share.

Parameters are trained; statistics (of BatchNorm) are written by the model as it trains; random
state (of dropout, drop path) moves on with every use. A model may have any or none of the last two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Parts(NamedTuple):
    """``nnx.split`` of a model. ``rngs`` has keys as their uint32 data, so that all are arrays."""

    graphdef: Any
    params: Any
    batch_stats: Any
    rngs: Any


def split(model: nnx.Module) -> Parts:
    """Split a model into its structure, parameters, statistics and random state.

    Raises:
        ValueError: the model holds arrays of another kind; they are named.

    >>> dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    >>> split(dropout).rngs["rngs"]["key"][...].shape
    (2,)
    """
    parts = _split(model)
    return parts._replace(rngs=random_state(model))


def _split(model: nnx.Module) -> Parts:
    *parts, rest = nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    others = nnx.to_flat_state(rest)
    if others:
        path, variable = next(iter(others))
        raise ValueError(
            f"the model's {'.'.join(map(str, path))} is an nnx.{type(variable).__name__}: what is "
            "trained is an nnx.Param, what the model writes in training an nnx.BatchStat"
        )
    return Parts(*parts)


def random_state(model: nnx.Module) -> Any:
    """Return the state of a model's random numbers, keys as their data."""

    def data(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.key_data, leaf)
        return jax.random.key_data(leaf)

    return jax.tree.map(data, nnx.state(model, nnx.RngState))


def merger(model: nnx.Module) -> Callable[..., Any]:
    """Return ``merge(params, batch_stats, rngs=None, copy=False)``: a model of this structure.

    Without ``rngs`` every key is zero: in evaluation nothing is random. The model's own arrays are
    not kept, and may be abstract.
    """
    graphdef, _, _, rngs = _split(model)
    kinds = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rngs)

    def merge(params: Any, batch_stats: Any, rngs: Any = None, copy: bool = False) -> Any:
        if rngs is None:
            keys = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds)
        else:
            keys = jax.tree.map(_key, kinds, rngs)
        return nnx.merge(graphdef, params, batch_stats, keys, copy=copy)

    return merge


def _key(kind: Any, data: Any) -> Any:
    if not _is_key(kind):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(jnp.zeros((), kind.dtype)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def training_view(model: nnx.Module, *, freeze_batch_norm: bool = False) -> Any:
    """Return the model as it trains: dropout drops, BatchNorm uses the batch's statistics."""
    return _view(model, use_running_average=freeze_batch_norm, deterministic=False)


def evaluation_view(model: nnx.Module) -> Any:
    """Return the model as it embeds: nothing is random, BatchNorm uses its running statistics."""
    return _view(model, use_running_average=True, deterministic=True)


def _view(model: nnx.Module, **attributes: bool) -> Any:
    # A model may have no layer that takes one of them.
    return nnx.view(model, raise_if_not_found=False, **attributes)
