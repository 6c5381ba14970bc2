"""What a training step changes: parameters, statistics, the optimizer's state, averages, a memory.

``create_train_state`` starts it from a model and places it on a mesh; ``steps`` moves it on.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from cbam_jax import model_state
from cbam_jax.sharding import place, shareable, shared, whole


class Memory(NamedTuple):
    """The last embeddings of earlier batches, the oldest first, as the loss takes them.

    ``embeddings`` [n, d] float32, ``labels`` [n] int32, ``filled`` [n] bool: where one has entered.
    """

    embeddings: Any
    labels: Any
    filled: Any


class TrainState(NamedTuple):
    """All that a step changes.

    ``ema`` is None, or a moving average of ``params``; ``memory`` is None, or a ``Memory``.
    ``rngs`` is None, or the random state of a model that has one (dropout, drop path), keys as
    their uint32 data. ``ema_batch_stats`` is None, or a moving average of ``batch_stats``.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    memory: Memory | None = None
    rngs: Any = None
    ema_batch_stats: Any = None


# What of a state is as large as the model, so that sharing it counts.
_SHARED = ("params", "opt_state", "ema")


def state_shardings(state: TrainState, mesh: Mesh, *, shard_state: bool = False) -> TrainState:
    """Return where each array of a state is: whole on every device, or its large ones shared."""
    shared_parts = _SHARED if shard_state else ()
    return TrainState(
        **{
            name: (shared if name in shared_parts else whole)(part, mesh)
            for name, part in state._asdict().items()
        }
    )


def create_train_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
    ema_batch_stats: bool = False,
    memory_shape: tuple[int, int] = (0, 0),
    shard_state: bool = False,
) -> TrainState:
    """Split a model into its arrays, start the optimizer's, and place all on the mesh.

    ``ema`` starts a moving average of the parameters, ``ema_batch_stats`` beside it one of
    BatchNorm's statistics: at the values that the model has, so that nothing is debiased; it moves
    once a batch, also where several make an update. ``memory_shape`` is [n, d] of a memory of
    embeddings, which starts empty; n = 0: none. ``shard_state`` shares the large arrays of
    parameters, optimizer and moving average among the devices; all others are whole on each.

    Raises:
        ValueError: ``ema_batch_stats`` without ``ema``: nothing would be evaluated by them;
            ``shard_state`` over axes of another type than Auto.
    """
    if shard_state:
        shareable(mesh)
    if ema_batch_stats and not ema:
        raise ValueError("ema_batch_stats=True is of a moving average: give ema=True too")
    _, params, batch_stats, rngs = model_state.split(model)
    # Donation gives each buffer away once: the average must own its copy.
    average = jax.tree.map(np.array, params) if ema else None
    average_stats = jax.tree.map(np.array, batch_stats) if ema_batch_stats else None
    step, opt_state = np.zeros((), np.int32), _start(optimizer, params, mesh, shard_state)
    memory = _empty_memory(*memory_shape) if memory_shape[0] else None
    # Split from the model's own, whose buffers a donation would take with it.
    rngs = jax.tree.map(np.array, rngs) if jax.tree.leaves(rngs) else None
    model_arrays = step, params, batch_stats
    state = TrainState(*model_arrays, opt_state, average, memory, rngs, average_stats)
    return place(state, state_shardings(state, mesh, shard_state=shard_state))


def _start(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, shard_state: bool
) -> Any:
    """The optimizer's first state; where it is to be shared, never whole on one device."""
    if not shard_state:
        return optimizer.init(params)
    placed = shared(jax.eval_shape(optimizer.init, params), mesh)
    return jax.jit(optimizer.init, out_shardings=placed)(place(params, shared(params, mesh)))


def _empty_memory(size: int, dim: int) -> Memory:
    rows = np.zeros((size, dim), np.float32)
    return Memory(rows, np.zeros(size, np.int32), np.zeros(size, bool))


def evaluation_params(state: TrainState) -> Any:
    """Return the moving average where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema


def evaluation_arrays(state: TrainState) -> tuple[Any, Any]:
    """Return what ``embed_step`` takes: the parameters and statistics, or what averages them."""
    averaged = state.ema_batch_stats is not None
    return evaluation_params(state), state.ema_batch_stats if averaged else state.batch_stats
