"""ViT-B/16 embedding, ours beside transformers': images/s and processor seconds, by turns.

python benchmarks/vit_peer.py --out=benchmarks/results/vit_embed_cpu.json

SigLIP B/16 at 224 px with random weights, float32; both in one process, one after the other in each
round, warm-up apart. On a shared machine compare the processor seconds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from torchvision_stubs import import_torchvision

from cbam_jax.benchmark.environment import machine
from cbam_jax.models import create_model


def ours():
    # Drawn by NumPy: drawing each parameter on its own would compile for longer than the run.
    model = nnx.eval_shape(lambda: create_model("siglip_b16_224", rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.asarray(0.02 * rng.normal(size=variable.shape), jnp.float32))
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    return lambda images: np.asarray(run(state, images))


def theirs():
    import_torchvision()
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig()).eval()

    def run(images):
        with torch.inference_mode():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            return model(pixels).pooler_output.numpy()

    return run


def measured(run, images):
    wall, processor = time.perf_counter(), time.process_time()
    run(images)
    return time.perf_counter() - wall, time.process_time() - processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    images = np.random.default_rng(0).normal(size=(flags.batch_size, 224, 224, 3))
    images = images.astype(np.float32)
    sides = {"cbam_jax": ours(), "transformers": theirs()}
    for name, run in sides.items():
        print(f"warm-up: {name}", file=sys.stderr, flush=True)
        run(images)
    seconds = {name: [] for name in sides}
    for _ in range(flags.rounds):
        for name, run in sides.items():
            seconds[name].append(measured(run, images))
    found = {
        name: {
            "images_per_second": flags.batch_size / statistics.median(w for w, _ in times),
            "processor_seconds": statistics.median(p for _, p in times),
            "rounds": [{"wall": round(w, 3), "processor": round(p, 3)} for w, p in times],
        }
        for name, times in seconds.items()
    }
    ratio = found["transformers"]["processor_seconds"] / found["cbam_jax"]["processor_seconds"]
    wall = found["cbam_jax"]["images_per_second"] / found["transformers"]["images_per_second"]
    document = {
        "model": "siglip_b16_224", "batch_size": flags.batch_size, **found,
        "ratio_by_wall": wall, "ratio_by_processor_seconds": ratio,
        "machine": machine(),
    }  # fmt: skip
    text = json.dumps(document, indent=2, default=str)
    print(text)
    if flags.out:
        flags.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
