"""What a training step asks of each of 1, 2, 4 and 8 devices, and what they say to each other.

export XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
JAX_PLATFORMS=cpu python benchmarks/step_devices.py --out=benchmarks/results/step_devices_cpu.json

The step of train.py, compiled for shapes alone: nothing runs. The level of optimisation is that of
machine code, of which there is less to wait for; operations, memory and collectives are settled
before.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import jax
from flax import nnx
from state_memory import abstract_batch, abstract_state

from cbam_jax import steps
from cbam_jax.benchmark import compile_cold, machine
from cbam_jax.benchmark.compiled import collectives
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model


def purpose(line):
    """What a collective of a ResNet's step is for, by its arrays and where it comes from.

    >>> purpose("%x = (f32[64]{0}) all-reduce(%y), metadata={op_name='jit(step)/jvp()/reduce_sum'}")
    "BatchNorm's statistics"
    """
    result, _, source = line.partition("op_name=")
    if re.search(r"\[\d+,\d+,\d+,\d+\].* all-reduce", result):  # A kernel among them.
        return "gradients"
    if "_triplet_loss" in source:
        return "the loss"
    return "BatchNorm's gradients" if "transpose(" in source else "BatchNorm's statistics"


def by_purpose(text):
    """Collectives of a compiled program's text by what they are for, each as ``collectives``."""
    lines = {}
    for line in text.splitlines():
        if collectives(line):
            lines.setdefault(purpose(line), []).append(line)
    return {name: collectives("\n".join(found)) for name, found in lines.items()}


def row(name, pixels, batch, devices):
    """What the compiled step asks of each device."""
    mesh = steps.data_mesh(jax.devices()[:devices])
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))
    optimizer = steps.create_optimizer("adamw", 1e-3, weight_decay=1e-4)
    loss = partial(triplet_loss, mining="batch_hard")
    step = steps.make_train_step(model, optimizer, loss, mesh=mesh)
    state = abstract_state(model, optimizer, mesh, shard_state=False)
    compiled, cost = compile_cold(step, state, abstract_batch(batch, pixels, mesh))
    return {"devices": devices, **cost, "purposes": by_purpose(compiled.as_text())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50_cbam")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("model", "image_size", "batch_size")}
    found = {**asked, "rows": [], **machine()}
    for devices in (1, 2, 4, 8):
        found["rows"].append(row(*asked.values(), devices))
        print(json.dumps(found["rows"][-1]), flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
