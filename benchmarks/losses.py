"""What each loss adds to a training step, and how its memory grows with the batch.

python benchmarks/losses.py [--batch=256 --model=resnet10_cbam --image_size=64 --repeats=9]

The bare step is that of a model whose loss is the mean of its embeddings; beside it stand value and
gradient of each loss for embeddings [b, 128], eight images a class, and as many proxies as classes.
All take turns, after one call each that compiles and is not counted. Seconds are the processor's,
of all threads, so that what else the machine does shows little; ``ratio`` is a step with the loss
to the bare one. Memory is what XLA plans for value and gradient beside their arguments at 2,048 and
4,096 images, which are compiled and not run; in it ``matrices`` counts float32 ones of [b, b], and
``growth`` is what twice the images need to what once does: about 4 by [b, b], since XLA plans each
size anew, and 8 by [b, b, b]. The last line is one JSON document.
"""

import argparse
import functools
import inspect
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import experiment, models, steps
from cbam_jax.benchmark import judged, machine, seconds

_DIM, _IMAGES_PER_CLASS, _CENTERS = 128, 8, 10
_SIZES = (2048, 4096)
_MOST = {"ratio": 1.5, "growth": 5.0}


def arguments(name: str, batch: int) -> dict[str, Any]:
    """What a loss is given: unit vectors, their labels, and what else it asks for."""
    rng = np.random.default_rng(batch)
    rows = rng.normal(size=(batch, _DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.arange(batch, dtype=np.int32) // _IMAGES_PER_CLASS
    classes = batch // _IMAGES_PER_CLASS
    shape = (classes, _CENTERS, _DIM) if name == "soft_triple" else (classes, _DIM)
    given = {"key": jax.random.key(0), "proxies": rng.normal(size=shape).astype(np.float32)}
    taken = inspect.signature(experiment.LOSSES[name]).parameters
    return {"embeddings": rows, "labels": labels} | {k: given[k] for k in given if k in taken}


def lowered(name: str, given: dict[str, Any]) -> Any:
    """Value and gradients of a loss, by embeddings and proxies, to be compiled."""
    trained = {k: given[k] for k in ("embeddings", "proxies") if k in given}
    rest = {k: v for k, v in given.items() if k not in trained}

    def loss(trained: dict[str, Any], rest: dict[str, Any]) -> jax.Array:
        return experiment.LOSSES[name](**trained, **rest)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(trained, rest), (trained, rest)


def loss_program(name: str, batch: int) -> Callable[[], Any]:
    """What computes a loss and its gradients once."""
    program, arrays = lowered(name, arguments(name, batch))
    return functools.partial(_called, program.compile(), jax.device_put(arrays))


def _called(program: Any, arrays: Any) -> Any:
    return jax.block_until_ready(program(*arrays))


def bare_step(model_name: str, batch: int, image_size: int) -> Callable[[], None]:
    """What takes one step of a model whose loss is next to nothing."""
    model = models.create_model(model_name, embedding_dim=_DIM, rngs=nnx.Rngs(0))
    optimizer, mesh = steps.create_optimizer("adamw", 1e-4), steps.data_mesh(jax.devices()[:1])
    mean = lambda embeddings, labels: (jnp.mean(embeddings), {})  # noqa: E731
    step = steps.make_train_step(model, optimizer, mean, mesh=mesh)
    shape = (batch, image_size, image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    [data] = steps.to_devices([{"image": images, "label": np.zeros(batch, np.int32)}], mesh)
    state = [steps.create_train_state(model, optimizer, mesh)]

    def run() -> None:
        state[0], scalars = step(state[0], data)
        jax.block_until_ready(scalars)

    return run


def memory(name: str) -> dict[str, float]:
    """Bytes that value and gradient need beside their arguments, and how they grow."""
    needed = []
    for batch in _SIZES:
        analysis: Any = lowered(name, arguments(name, batch))[0].compile().memory_analysis()
        needed.append(analysis.temp_size_in_bytes)
    matrices = needed[-1] / (4 * _SIZES[-1] ** 2)
    return {"bytes": needed[-1], "matrices": round(matrices, 2), "growth": needed[-1] / needed[0]}


def main() -> None:
    """Print a table, and JSON."""
    parser = argparse.ArgumentParser(description="What each loss adds to a training step.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--model", default="resnet10_cbam")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    flags = parser.parse_args()
    programs = {"bare step": bare_step(flags.model, flags.batch, flags.image_size)}
    programs |= {name: loss_program(name, flags.batch) for name in experiment.LOSSES}
    times = seconds(programs, flags.repeats, time.process_time)
    step = times["bare step"]["median"]
    print(f"bare step: {step:.3g} s")
    print(f"| loss | ms | ratio | matrices of [b, b] | growth |\n{'|---' * 5}|")
    records = {}
    for name in experiment.LOSSES:
        ratio = 1 + times[name]["median"] / step
        records[name] = {"seconds": times[name], "ratio": ratio, "memory": memory(name)}
        needed = records[name]["memory"]
        row = f"{ratio:.3f} | {needed['matrices']} | {needed['growth']:.2f}"
        print(f"| {name} | {times[name]['median'] * 1e3:.3g} | {row} |", flush=True)
    most = {
        "ratio": max(record["ratio"] for record in records.values()),
        "growth": max(record["memory"]["growth"] for record in records.values()),
    }
    document = {**machine(), **vars(flags), "bare_step": times["bare step"], "losses": records}
    print(json.dumps({**document, "bars": judged(most, _MOST)}))


if __name__ == "__main__":
    main()
