"""Rematerialisation: blocks that keep their input alone for the backward pass.

What a block computes inside is computed again when its gradient is due (Chen et al.: Training Deep
Nets with Sublinear Memory Cost, 2016): less memory, for up to a forward pass more. Numbers stay as
they are, but for rounding; BatchNorm's statistics are written once. Where devices share the
parameters, a block's are whole only while it is computed, there and back.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from cbam_jax.sharding import gathered


def recomputable(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a block's ``__call__(self, x, ...)``, so that ``recomputed`` has a say in it."""

    @functools.wraps(call)
    def called(block: nnx.Module, x: Any, *rest: Any) -> Any:
        if not getattr(block, "is_recomputed", False):
            return call(block, x, *rest)
        # The rest is not differentiated: constants, functions.
        return nnx.remat(lambda block, x: _with_whole_arrays(call, block, x, *rest))(block, x)

    vars(called)["recomputable"] = True
    return called


def _with_whole_arrays(call: Callable[..., Any], block: Any, x: Any, *rest: Any) -> Any:
    """Call a block; of parameters that devices share, it sees the whole and keeps the shares."""
    if block.gathered_over is None:
        return call(block, x, *rest)
    kept = nnx.state(block, nnx.Param)
    nnx.update(block, gathered(kept, block.gathered_over))
    result = call(block, x, *rest)
    nnx.update(block, kept)
    return result


def recomputed(model: Any, gathered_over: Mesh | None = None) -> Any:
    """Have a model's blocks computed again in the backward pass; ``model`` is changed.

    Args:
        model: whose blocks' calls are ``recomputable``.
        gathered_over: whose devices share the parameters; None: each has all of them.

    Raises:
        ValueError: the model has no such block.
    """
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"remat: {type(model).__name__} has no blocks that can be computed again; embed the "
            "batch in chunks instead, by chunk_size"
        )
    for block in blocks.values():
        block.is_recomputed, block.gathered_over = True, gathered_over
    return model


def gathered_outside(model: Any, params: Any, mesh: Mesh | None) -> Any:
    """Gather the parameters that no recomputed block of the model gathers for itself."""
    blocks = [path for path, block in _blocks(model).items() if hasattr(block, "is_recomputed")]

    def whole(path: tuple, leaf: Any) -> Any:
        inside = any(path[: len(block)] == block for block in blocks)
        return leaf if inside else gathered(leaf, mesh)

    return nnx.map_state(whole, params)


def _blocks(model: Any) -> dict[tuple, Any]:
    """The modules whose call is ``recomputable``, by their paths."""
    modules = dict(nnx.iter_modules(model))
    return {
        path: module
        for path, module in modules.items()
        if getattr(type(module).__call__, "recomputable", False)
    }
