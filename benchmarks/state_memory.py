"""Bytes that a training step needs on each device: the state whole or shared, blocks kept or not.

XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
    python benchmarks/state_memory.py --out=benchmarks/results/state_memory_cpu.json

The step is compiled for shapes alone: no weight is made, nothing runs, so that a ViT-L takes the
memory of its compilation. The figures are the compiler's for the devices that there are.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from cbam_jax import model_state, steps
from cbam_jax.benchmark import compile_cold, machine
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model

# Devices, whether they share the state, whether blocks are computed again, batch, and its chunks.
ROWS = (
    (1, False, False, 64, None),
    (8, False, False, 64, None),
    (8, True, False, 64, None),
    (8, True, True, 64, None),
    (8, True, True, 4096, 512),
)


def abstract_state(model, optimizer, mesh, shard_state):
    """The state's shapes, placed as ``create_train_state`` would place its arrays."""
    _, params, batch_stats, _ = model_state.split(model)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = steps.TrainState(
        step, params, batch_stats, jax.eval_shape(optimizer.init, params), None
    )  # fmt: skip
    placed = steps.state_shardings(state, mesh, shard_state=shard_state)
    return jax.tree.map(_shape, state, placed)


def _shape(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_batch(size, pixels, mesh):
    """A batch's shapes, split over the mesh."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "image": jax.ShapeDtypeStruct((size, pixels, pixels, 3), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


def row(name, pixels, devices, shard_state, remat, batch, chunk_size):
    """What the compiled step needs on each device."""
    mesh = steps.data_mesh(jax.devices()[:devices])
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))
    optimizer = steps.create_optimizer("adamw", 1e-4, weight_decay=1e-4)
    step = steps.make_train_step(
        model,
        optimizer,
        partial(triplet_loss, mining="batch_hard"),
        chunk_size=chunk_size,
        mesh=mesh,
        shard_state=shard_state,
        remat=remat,
    )
    state = abstract_state(model, optimizer, mesh, shard_state)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    print(name, devices, shard_state, f"state: {held / 1e9:.3f} GB a device", flush=True)
    _, cost = compile_cold(step, state, abstract_batch(batch, pixels, mesh))
    asked = {"devices": devices, "shard_state": shard_state, "remat": remat, "batch_size": batch}
    asked["state_bytes_per_device"] = held
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"model": name, "parameters": parameters, **asked, "chunk_size": chunk_size, **cost}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2_l14")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for fields in ROWS:
        rows.append(row(options.model, options.image_size, *fields))
        memory = {name: round(size / 1e9, 2) for name, size in rows[-1]["memory"].items()}
        print(fields, memory, rows[-1]["collectives"], flush=True)
        options.out.write_text(json.dumps({"rows": rows, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
