"""What a benchmark runs: the steps of training and embedding, and the machine's own limits.

Each is a function of n: n in a row, then a wait for the last, so that dispatch overlaps with the
device's work as it does in training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import model_state, steps
from cbam_jax.benchmark.compiled import compile_cold
from cbam_jax.losses import triplet_loss

_COPIED = 2**26  # float32 entries, more than any cache holds


class Step(NamedTuple):
    """``run(n)`` takes n steps; ``cost`` is what ``compile_cold`` says of one."""

    run: Callable[[int], None]
    cost: dict[str, Any]


class Limit(NamedTuple):
    """``run(n)`` does it n times; ``amount`` is the operations, or the bytes, of one."""

    run: Callable[[int], None]
    amount: float


def random_batch(batch_size: int, image_size: int, images_per_class: int = 1) -> dict[str, Any]:
    """Random uint8 images [b, h, w, 3] and labels [b], each ``images_per_class`` times, shuffled.

    Example:
      >>> batch = random_batch(6, image_size=32, images_per_class=2)
      >>> batch["image"].shape, np.bincount(batch["label"]).tolist()
      ((6, 32, 32, 3), [2, 2, 2])
    """
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, 3)
    labels = rng.permutation(np.arange(batch_size) // images_per_class)
    return {"image": rng.integers(0, 256, shape, np.uint8), "label": labels.astype(np.int32)}


def train_step(
    model: nnx.Module, batch: steps.Batch, devices: int = 1, mining: str = "batch_hard"
) -> Step:
    """The step of ``train.py`` on a batch that is on the devices: triplet loss, AdamW.

    The state is donated, and each step gets that of the one before.
    """
    mesh = steps.data_mesh(jax.local_devices()[:devices])
    optimizer = steps.create_optimizer("adamw", 1e-3, weight_decay=1e-4)
    state = steps.create_train_state(model, optimizer, mesh)
    (batch,) = steps.to_devices([batch], mesh)
    jitted = steps.make_train_step(model, optimizer, partial(triplet_loss, mining=mining))
    step, cost = compile_cold(jitted, state, batch)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return Step(run, cost)


def embed_step(model: nnx.Module, batch: steps.Batch, devices: int = 1) -> Step:
    """The embedding step of ``evaluate.py`` on images that are on the devices."""
    mesh = steps.data_mesh(jax.local_devices()[:devices])
    _, *arrays, _ = model_state.split(model)
    arrays = steps.replicate(arrays, mesh)
    (batch,) = steps.to_devices([{"image": batch["image"]}], mesh)
    step, cost = compile_cold(steps.make_embed_step(model, mesh), *arrays, batch)
    return Step(_repeated(lambda: step(*arrays, batch)), cost)


def matrix_product(dtype: str) -> Limit:
    """A large product on the first device: what its arithmetic can do at most.

    On a CPU it is in float32, its fastest, whatever the dtype.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    kind = jnp.float32 if on_cpu else jnp.dtype(dtype)
    x = jax.random.normal(jax.random.key(0), (size, size), kind)
    product = jax.jit(lambda x: x @ x)
    return Limit(_repeated(lambda: product(x)), 2.0 * size**3)


def copy() -> Limit:
    """A large array read and written, on the first device: what its memory can do at most."""
    x = jnp.ones(_COPIED, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(count: int) -> None:
        nonlocal x
        for _ in range(count):
            x = add(x)  # In place: a fresh array would be paid for in page faults.
        jax.block_until_ready(x)

    return Limit(run, 8.0 * _COPIED)


def _repeated(function: Callable[[], Any]) -> Callable[[int], None]:
    def run(count: int) -> None:
        output = None
        for _ in range(count):
            output = function()
        jax.block_until_ready(output)

    return run
