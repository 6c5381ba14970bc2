"""Bytes that a training step needs on each device: the state whole or shared, blocks kept or not.

python benchmarks/state_memory.py --platform=cuda --dtype=bfloat16 \\
    --models=resnet50_cbam,dinov2_l14 --out=benchmarks/results/state_memory_h100.json

The step is compiled for shapes alone: no weight is made, nothing runs. ``--platform=cuda`` is for
H100s that ``gpu_programs`` describes to XLA's compiler; it needs its packages, and no GPU. There a
product is a call of cuBLAS and a convolution one of cuDNN, with the scratch memory that XLA gives
them before anything is tuned. For a CPU, whose compiler takes minutes for a ViT, JAX is told to
have eight of them:

XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
    python benchmarks/state_memory.py --platform=cpu --models=resnet50_cbam --out=FILE
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_programs
from cbam_jax import model_state, steps
from cbam_jax.benchmark import compile_cold, machine
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model

# Devices, whether they share the state, whether blocks are computed again, batch, and its chunks.
ROWS = (
    (8, False, False, 256, None),
    (8, True, False, 256, None),
    (8, True, True, 256, None),
    (8, True, True, 4096, 256),
    (8, False, True, 256, None),
    (1, False, False, 256, None),
)
# Without them each product is one of Triton's kernels, some of which can't be compiled untuned.
_CUDA_FLAGS = "--xla_gpu_enable_triton_gemm=false"


def mesh_of(platform, devices):
    """Devices to compile for, which may be none of this machine's."""
    if platform == "cuda":
        return gpu_programs.described_mesh(devices)
    return steps.data_mesh(jax.devices()[:devices])


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


def bytes_held(state):
    """Bytes of a state's arrays on one device, by their shardings."""
    leaves = jax.tree.leaves(state)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def row(name, options, devices, shard_state, remat, batch, chunk_size):
    """What the compiled step needs on each device."""
    mesh, dtype = mesh_of(options.platform, devices), jnp.dtype(options.dtype)
    model = nnx.eval_shape(lambda: create_model(name, dtype=dtype, rngs=nnx.Rngs(0)))
    optimizer = steps.create_optimizer("adamw", 1e-4, weight_decay=1e-4)
    loss = partial(triplet_loss, mining="batch_hard")
    asked = {"shard_state": shard_state, "remat": remat, "chunk_size": chunk_size}
    step = steps.make_train_step(model, optimizer, loss, mesh=mesh, **asked)
    state = abstract_state(model, optimizer, mesh, shard_state)
    held = bytes_held(state)
    print(name, devices, asked, f"state: {held / 1e9:.3f} GB a device", flush=True)
    _, cost = compile_cold(step, state, abstract_batch(batch, options.image_size, mesh))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    asked = {"devices": devices, **asked, "batch_size": batch}
    return {"model": name, "parameters": parameters, **asked, "state": held, **cost}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--models", default="resnet50_cbam,dinov2_l14", help="by commas")
    parser.add_argument("--dtype", default="float32", help="of what is computed")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main():
    options = parsed()
    if options.platform == "cuda":
        gpu_programs.without_a_gpu(_CUDA_FLAGS)
    document = {"platform": options.platform, "dtype": options.dtype, **machine(), "rows": []}
    for name in options.models.split(","):
        for fields in ROWS:
            found = row(name, options, *fields)
            document["rows"].append(found)
            memory = {key: round(size / 1e9, 2) for key, size in found["memory"].items()}
            print(memory, found["collectives"], flush=True)
            options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
