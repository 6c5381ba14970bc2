"""Seconds of the triplet loss over all triplets, with its gradient, beside the obvious programs.

python benchmarks/batch_all.py [--batches 64 128 256 512 --repeats=15]

Value and gradient of ``triplet_loss(mining="batch_all")`` for embeddings [b, 128] of eight images a
class, hinge and soft; beside it the naive jnp form, which writes all b^3 costs, and PyTorch Metric
Learning's TripletMarginLoss over all triplets, where it is installed. All take turns, after one
call each that compiles and is not counted; the middle of a case's seconds is told with the least
and the most. Memory is what XLA plans for the two programs of JAX beside their arguments. The last
line is one JSON document.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.benchmark import machine, seconds
from cbam_jax.losses import triplet_loss

_DIM, _IMAGES_PER_CLASS, _MARGIN = 128, 8, 0.2


def naive(embeddings: jax.Array, labels: jax.Array, *, soft: bool) -> jax.Array:
    """The mean cost of all triplets that cost something, as it stands in a paper."""
    squares = jnp.sum(embeddings**2, axis=1)
    squares = squares[:, None] + squares[None, :] - 2 * embeddings @ embeddings.T
    zero = squares <= 1e-12
    distances = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))
    same = labels[:, None] == labels[None, :]
    positive = same & ~jnp.eye(len(labels), dtype=bool)
    triplets = positive[:, :, None] & ~same[:, None, :]
    gap = distances[:, :, None] - distances[:, None, :]
    costs = jnp.where(triplets, jax.nn.softplus(gap) if soft else jax.nn.relu(_MARGIN + gap), 0.0)
    return jnp.sum(costs) / jnp.maximum(jnp.sum(costs > 0), 1)


def ours(embeddings: jax.Array, labels: jax.Array, *, soft: bool) -> jax.Array:
    """The same by the library."""
    return triplet_loss(embeddings, labels, _MARGIN, mining="batch_all", soft=soft)[0]


def jax_program(function: Callable[..., jax.Array], arrays: Any) -> tuple[Callable[[], Any], int]:
    """What computes loss and gradient once, and the bytes that it needs to."""
    program = jax.jit(jax.value_and_grad(function)).lower(*arrays).compile()
    memory: Any = program.memory_analysis()
    return lambda: jax.device_get(program(*arrays)), memory.temp_size_in_bytes


def torch_program(arrays: Any, *, soft: bool) -> Callable[[], Any] | None:
    """The same of PyTorch Metric Learning; None where it is not installed."""
    try:
        import torch
        from pytorch_metric_learning import distances, losses
    except ImportError:
        return None
    distance = distances.LpDistance(normalize_embeddings=False)
    # Its smooth cost is softplus of the margin plus the gap.
    options = {"margin": 0.0 if soft else _MARGIN, "smooth_loss": soft}
    loss = losses.TripletMarginLoss(distance=distance, triplets_per_anchor="all", **options)
    embeddings, labels = (torch.from_numpy(array) for array in arrays)
    embeddings.requires_grad_()

    def run() -> tuple[Any, Any]:
        value = loss(embeddings, labels)
        (gradient,) = torch.autograd.grad(value, embeddings)
        return value.detach().numpy(), gradient.numpy()

    return run


def measure(batch: int, soft: bool, repeats: int) -> dict[str, Any]:
    """Time one batch size and one cost."""
    rng = np.random.default_rng(batch)
    embeddings = rng.normal(size=(batch, _DIM)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    arrays = embeddings, np.arange(batch, dtype=np.int32) // _IMAGES_PER_CLASS
    programs, memory = {}, {}
    for name, function in (("cbam_jax", ours), ("naive jnp", naive)):
        function = functools.partial(function, soft=soft)
        programs[name], memory[name] = jax_program(function, arrays)
    peer = torch_program(arrays, soft=soft)
    if peer is not None:
        programs["PyTorch Metric Learning"] = peer
    results = {name: program() for name, program in programs.items()}
    value, gradient = results["cbam_jax"]
    for other, other_gradient in results.values():
        np.testing.assert_allclose(other, value, rtol=1e-4)
        np.testing.assert_allclose(other_gradient, gradient, rtol=1e-2, atol=1e-5)
    times = seconds(programs, repeats)
    return {"batch": batch, "cost": "soft" if soft else "hinge", "seconds": times, "memory": memory}


def row(record: dict[str, Any]) -> str:
    """One case as a row of a table: milliseconds, least to most, and megabytes."""
    cells = [f"{record['batch']}, {record['cost']}"]
    for spread in record["seconds"].values():
        median, least, most = (spread[key] * 1e3 for key in ("median", "min", "max"))
        cells.append(f"{median:.3g} ({least:.3g} to {most:.3g})")
    megabytes = (f"{record['memory'][name] / 1e6:.3g}" for name in ("cbam_jax", "naive jnp"))
    return f"| {' | '.join(cells)} | {' / '.join(megabytes)} |"


def main() -> None:
    """Print a table, and JSON."""
    parser = argparse.ArgumentParser(description="Seconds of the loss over all triplets.")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=15, help="turns, for each case")
    flags = parser.parse_args()
    records = []
    for batch in flags.batches:
        for soft in (False, True):
            records.append(measure(batch, soft, flags.repeats))
            if len(records) == 1:
                names = " | ".join(records[0]["seconds"])
                print(f"| b, cost | {names} | MB |\n|{'---|' * (2 + len(records[0]['seconds']))}")
            print(row(records[-1]), flush=True)
    print(json.dumps({**machine(), "cases": records}))


if __name__ == "__main__":
    main()
