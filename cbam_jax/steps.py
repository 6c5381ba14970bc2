"""The jitted steps of training and embedding, over a device mesh.

The only jit boundaries of training. A model is split once into a graph definition and its state;
the state is donated to the step and merged inside, which costs a sixth of ``nnx.jit``'s Python
time a call. The batch is sharded over the mesh's axis ``data`` (its first, where none is called so)
and everything else is replicated, so that mining and BatchNorm see the global batch: n devices give
the loss of one. With ``shard_state`` the devices share the parameters and what the optimizer keeps
too, and the step gathers them (ZeRO: Rajbhandari et al. 2020). The mesh may be `data_mesh` or one's
own, its axes Auto or Explicit. What a step changes is in ``train_state``.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cbam_jax import model_state
from cbam_jax.compiler_options import compiler_options
from cbam_jax.optimizers import OPTIMIZERS, SCHEDULES, create_optimizer, learning_rate_schedule
from cbam_jax.remat import gathered_outside, recomputed
from cbam_jax.sharding import (
    batch_spec,
    constrain,
    gathered,
    place,
    replicate,
    shareable,
    shared,
    with_auto_axes,
)
from cbam_jax.train_state import (
    Memory,
    TrainState,
    create_train_state,
    evaluation_arrays,
    evaluation_params,
    state_shardings,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Batch",
    "Memory",
    "Step",
    "TrainState",
    "create_optimizer",
    "create_train_state",
    "data_mesh",
    "embed_batches",
    "evaluation_arrays",
    "evaluation_params",
    "learning_rate_schedule",
    "loss_arguments",
    "make_embed_step",
    "make_train_step",
    "place",
    "replicate",
    "state_shardings",
    "to_devices",
]

Batch = dict[str, Any]


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices, by default all of all processes, along one axis, ``data``."""
    size = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def to_devices(batches: Iterable[Batch], mesh: Mesh, depth: int = 2) -> Iterator[Batch]:
    """Shard host batches over the mesh, ``depth`` of them ahead of the one in use.

    Transfers are asynchronous, so that they overlap with the step that is running.
    """
    sharding = NamedSharding(mesh, batch_spec(mesh))
    queue: deque[Batch] = deque()
    for batch in batches:
        queue.append(
            {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
        )
        if len(queue) >= depth:
            yield queue.popleft()
    yield from queue


def _remember(memory: Memory, embeddings: jax.Array, labels: jax.Array, enters: Any) -> Memory:
    """Put a batch behind what is in the memory, and drop as many of the oldest.

    Where ``enters`` is False, its rows count as empty.
    """
    expected = (*labels.shape, memory.embeddings.shape[1])
    if getattr(embeddings, "shape", None) != expected:
        raise ValueError(
            f"a memory is of embeddings {expected}, and forward gives "
            f"{jax.tree.map(jnp.shape, embeddings)}: let it give these alone, or start the state "
            "without a memory"
        )
    new = Memory(embeddings, labels, jnp.full(labels.shape, enters))
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new])[len(new) :], memory, new)


class Step:
    """A function of arrays, jitted; inside ``jit``, ``scan`` or ``grad`` it is the function itself.

    (JAX refuses compiler options in a ``jit`` within another.) ``__wrapped__`` is the function,
    ``lower`` that of ``jax.jit``. Results are whole on every device of the mesh, but for a state
    that the function places itself, the first of two results.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh | None,
        *,
        places_state: bool = False,
        remat: bool = False,
        **options: Any,
    ):
        @functools.wraps(function)
        def placed(*arrays: Any) -> Any:
            return with_auto_axes(function, arrays)(*arrays)

        functools.update_wrapper(self, placed)
        self._function = placed
        self._whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._places_state = places_state
        results = (None, self._whole) if places_state else self._whole
        options |= {"out_shardings": results, "compiler_options": compiler_options(remat=remat)}
        self._jitted = jax.jit(placed, **options)

    def __call__(self, *arrays: Any) -> Any:
        """Call the function, compiled unless some array is a tracer."""
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
            return self._jitted(*arrays)
        results = self._function(*arrays)
        if self._whole is None or self._places_state or self._whole.mesh.explicit_axes:
            return results
        return jax.lax.with_sharding_constraint(results, self._whole)

    def lower(self, *arrays: Any) -> Any:
        """Trace for arrays, or their shapes; then ``compile()``."""
        return self._jitted.lower(*arrays)


def _embed(model: Any, images: jax.Array) -> jax.Array:
    return model(images)


def _in_chunks(
    embed: Callable[[Any, jax.Array], tuple[Any, Any]],
    written: Any,
    images: jax.Array,
    chunk_size: int,
) -> tuple[Any, Any]:
    """Call ``embed(written, images)`` chunk by chunk, as if at once: ``make_train_step``."""
    if chunk_size < 1 or images.shape[0] % chunk_size:
        raise ValueError(f"chunk_size {chunk_size} does not divide a batch of {images.shape[0]}")
    # Split so, a device's share of every chunk is among the images that it holds already.
    chunks = images.reshape(chunk_size, -1, *images.shape[1:]).swapaxes(0, 1)
    _check_chunks(embed, written, chunks)
    # Kept for the backward pass are the chunks' images alone; the rest is computed again there.
    body = jax.checkpoint(embed, prevent_cse=False)
    written, outputs = jax.lax.scan(body, written, chunks)
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
    return written, whole


def _check_chunks(embed: Callable[..., tuple[Any, Any]], written: Any, chunks: jax.Array) -> None:
    """Raise ValueError unless each output has a row for each image: only such can be put together.

    Asked of two chunk sizes: a parameter may happen to have as many rows as a chunk has images.
    """
    size, rest = chunks.shape[1], chunks.shape[2:]
    for count in (size, size + 1):
        images = jax.ShapeDtypeStruct((count, *rest), chunks.dtype)
        outputs, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(embed, written, images)[1])
        for path, output in outputs:
            if output.shape[:1] != (count,):
                name = f"forward's output{jax.tree_util.keystr(path)}"
                raise ValueError(
                    f"{name} has shape {output.shape} for a chunk of {count} images: with "
                    "chunk_size each output has a row for each image; parameters of the loss come "
                    "by loss_fn's argument model"
                )


# What a loss may ask for by name, beside what the model returned and the labels.
_LOSS_ARGUMENTS = ("batch", "step", "key", "model")


def loss_arguments(loss_fn: Callable[..., Any]) -> list[str]:
    """Return what a loss asks for beside embeddings and labels.

    That is the names without a default: one with a default may be someone else's.
    """
    parameters = inspect.signature(loss_fn).parameters
    asked = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    return [name for name in _LOSS_ARGUMENTS if name in asked[2:]]


def _check_model(model: nnx.Module) -> None:
    if not callable(getattr(model, "preprocess", None)):
        raise ValueError(
            f"{type(model).__name__} has no method preprocess(images), which makes what the model "
            "takes of a batch's images; one that returns them as they are will do"
        )


def _check_batch(batch: Batch, *names: str) -> None:
    if missing := [name for name in names if name not in batch]:
        raise ValueError(
            f"the batch has no {' or '.join(map(repr, missing))} but {sorted(batch)}: give a dict "
            f"with {' and '.join(map(repr, names))}"
        )


def _check_average(state: TrainState, ema_decay: float) -> None:
    if (state.ema is None) == (ema_decay > 0):
        has = "no moving average" if state.ema is None else "a moving average"
        raise ValueError(
            f"ema_decay is {ema_decay} and the state has {has}: give make_train_step an "
            "ema_decay above 0 and create_train_state ema=True, or neither"
        )


def _with_scalars(scalars: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The step's own scalars and the loss's; raises where one would hide the other."""
    hidden = scalars.keys() & own.keys()
    if hidden:
        raise ValueError(f"loss_fn returns a scalar {min(hidden)!r}, the step's own: rename it")
    return scalars | own


def _norm(tree: Any) -> jax.Array:
    """The root of the sum of all squares, of arrays that are whole on each device.

    First those of each index of an array's last axis, then those of all arrays at once: where each
    has a sum of its own, as in ``optax.tree.norm``, that is one kernel of a GPU more for each.
    """
    squares = [jnp.square(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]
    columns = [jnp.sum(x, axis=range(x.ndim - 1)).reshape(-1) for x in squares]
    # Behind a barrier: XLA would sum up what is concatenated one by one again.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(columns))))


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[..., tuple[jax.Array, dict[str, Any]]],
    *,
    forward: Callable[[Any, jax.Array], Any] = _embed,
    freeze_batch_norm: bool = False,
    ema_decay: float = 0.0,
    chunk_size: int | None = None,
    memory_start_step: int = 0,
    seed: int = 0,
    mesh: Mesh | None = None,
    shard_state: bool = False,
    remat: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted ``train_step(state, batch) -> state, scalars``; the state is donated.

    It may be traced: ``jax.jit(lambda s, bs: jax.lax.scan(train_step, s, bs))`` takes as many steps
    as ``bs`` holds batches, and gives what they give one by one.

    Args:
        model: whose structure is trained; its arrays are the state's, not its own. It maps what
            its method ``preprocess`` makes of ``batch["image"]`` to embeddings.
        optimizer: from ``create_optimizer``, or any of optax's; one that asks for the loss, as
            ``optax.contrib.reduce_on_plateau`` does, gets it as ``value``.
        loss_fn: maps embeddings [b, d] and labels [b] to a loss and a dict of scalars. Where the
            state has a memory, it also gets it, as ``memory=``. Of ``batch`` (all of it), ``step``
            (steps before this one, int32), ``key`` (a random key, of the seed and the step) and
            ``model`` (for parameters of the loss) it gets what it has an argument for without a
            default.
        forward: maps the model and normalised images to what ``loss_fn`` gets in place of the
            embeddings, such as ``EmbeddingModel.classify_deeply`` for logits.
        freeze_batch_norm: normalise by the running statistics and leave them as they are; scale
            and bias are still trained.
        ema_decay: share of the moving average of the parameters, and of BatchNorm's statistics
            where the state averages these, that a step keeps; above 0 where the state has one.
        chunk_size: images, of the global batch, whose activations are in memory at a time; None:
            all. The loss is still that of the whole batch and its gradient exact (gradient caching:
            Gao et al. 2021), for one more forward pass of each chunk. Chunk i of n holds the images
            i, i + n, i + 2 n and so on. Unless it is frozen, BatchNorm normalises each chunk by the
            chunk's own statistics, so that losses are not those of the batch at once, and updates
            its running statistics once a chunk, in order.
        memory_start_step: steps before the first batch whose embeddings enter the state's memory.
            Its embeddings enter after a step's loss, as they were in it, without a gradient.
        seed: of the loss's ``key``.
        mesh: keeps the state whole on each of its devices. Left out, XLA chooses, and splits a
            memory.
        shard_state: keep the state's large arrays shared among the mesh's devices, as
            ``create_train_state`` does with this; parameters are gathered for the step. What it
            computes is the same, to rounding.
        remat: keep a block's input alone for the backward pass, and compute the block again there:
            memory for up to a forward pass more. BatchNorm still sees the whole batch.

    Raises ValueError where the model has no ``preprocess``, for ``shard_state`` without a mesh of
    axes of type Auto, for ``remat`` where the model has no blocks; the step, where the batch has no
    ``image`` or ``label``, where the state has a moving average and ``ema_decay`` is 0 or the
    other way round, where a scalar of the loss has the name of one of its own (``loss``,
    ``gradient_norm``), and where an output has no row for each image of a chunk.
    """
    _check_model(model)
    view = model_state.training_view(model, freeze_batch_norm=freeze_batch_norm)
    over = shareable(mesh) if shard_state else None
    view = recomputed(view, over) if remat else view
    merge, asked = model_state.merger(view), loss_arguments(loss_fn)
    update = optax.with_extra_args_support(optimizer).update

    def loss_options(params: Any, state: TrainState, batch: Batch) -> dict[str, Any]:
        options = {"batch": batch, "step": state.step}
        if "key" in asked:
            options["key"] = jax.random.fold_in(jax.random.key(seed), state.step)
        if "model" in asked:
            options["model"] = merge(
                gathered_outside(view, params, over), state.batch_stats, state.rngs, copy=True
            )
        memory = {} if state.memory is None else {"memory": state.memory}
        return {name: options[name] for name in asked} | memory

    def compute_loss(params: Any, state: TrainState, batch: Batch):
        def embed(written: Any, images: jax.Array) -> tuple[Any, Any]:
            # A copy: what the model writes to is of the outer trace, and it writes in this.
            model = merge(gathered_outside(view, params, over), *written, copy=True)
            outputs = forward(model, model.preprocess(images))
            rngs = None if state.rngs is None else model_state.random_state(model)
            return (nnx.state(model, nnx.BatchStat), rngs), outputs

        written = state.batch_stats, state.rngs
        if chunk_size is None:
            written, outputs = embed(written, batch["image"])
        else:
            written, outputs = _in_chunks(embed, written, batch["image"], chunk_size)
        options = loss_options(params, state, batch)
        loss, scalars = loss_fn(outputs, batch["label"], **options)
        return loss, (scalars, written, outputs)

    def train_step(state: TrainState, batch: Batch):
        _check_average(state, ema_decay)
        _check_batch(batch, "image", "label")
        gradient = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, aux), grads = gradient(state.params, state, batch)
        scalars, (batch_stats, rngs), outputs = aux
        if over is not None:
            grads = constrain(grads, shared(grads, over))
        updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        ema, average_stats, memory = state.ema, state.ema_batch_stats, state.memory
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
        if average_stats is not None:
            average_stats = optax.incremental_update(batch_stats, average_stats, 1.0 - ema_decay)
        if memory is not None:
            enters = state.step >= memory_start_step
            memory = _remember(memory, outputs, batch["label"], enters)
        norm = _norm(grads) if over is None else optax.tree.norm(grads)
        scalars = _with_scalars({"loss": loss, "gradient_norm": norm}, scalars)
        arrays = state.step + 1, params, batch_stats
        state = TrainState(*arrays, opt_state, ema, memory, rngs, average_stats)
        if over is not None:
            state = constrain(state, state_shardings(state, over, shard_state=True))
        return state, scalars

    return Step(train_step, mesh, places_state=shard_state, remat=remat, donate_argnums=0)


def make_embed_step(
    model: nnx.Module, mesh: Mesh
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """Return the jitted ``embed_step(params, batch_stats, batch)``.

    It gives ``embedding`` [b, d] beside the batch's other entries, whole on every device, so that
    each process holds the global batch.
    """
    _check_model(model)
    merge = model_state.merger(model_state.evaluation_view(model))

    def embed_step(params: Any, batch_stats: Any, batch: Batch) -> dict[str, jax.Array]:
        _check_batch(batch, "image")
        model = merge(gathered(params, mesh), batch_stats)
        rest = {name: value for name, value in batch.items() if name != "image"}
        return {"embedding": model(model.preprocess(batch["image"])), **rest}

    return Step(embed_step, mesh)


def embed_batches(
    embed_step: Callable[[Any, Any, Batch], dict[str, jax.Array]],
    params: Any,
    batch_stats: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    size: int,
) -> np.ndarray:
    """Embed a dataset: batches with ``index`` and ``mask`` to [size, d] float32, by index.

    Raises:
        ValueError: when the batches do not hold every index below ``size`` exactly once.
    """
    embeddings: np.ndarray | None = None
    seen = np.zeros(size, np.int64)
    for batch in to_devices(batches, mesh):
        output = jax.device_get(embed_step(params, batch_stats, batch))
        mask, index = output["mask"], output["index"]
        if embeddings is None:
            embeddings = np.zeros((size, output["embedding"].shape[1]), np.float32)
        embeddings[index[mask]] = output["embedding"][mask]
        np.add.at(seen, index[mask], 1)
    if embeddings is None or not np.all(seen == 1):
        raise ValueError(f"{np.sum(seen != 1)} of {size} images were not embedded exactly once")
    return embeddings
