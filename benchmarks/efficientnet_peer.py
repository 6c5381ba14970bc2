"""EfficientNet-Lite0 beside the PyTorch package: ``python benchmarks/efficientnet_peer.py``.

Needs ``pip install torch efficientnet-lite-pytorch``. Both take turns in one process on the same
images, float32, PyTorch with channels_last: the pooled features, and the gradient of their squares
in training mode. Processor seconds count, which other programs disturb less than the time of day;
for the time of one core run it under ``taskset -c 0``. The last line on stdout is JSON.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax.models import create_model


def ours(images):
    """Functions without arguments: the features, and a training step's gradient."""
    images = jnp.asarray(images)
    model = create_model("efficientnet_lite0", normalize=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.view(model, use_running_average=True))
    embed = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    training, params, rest = nnx.split(nnx.view(model, use_running_average=False), nnx.Param, ...)

    def loss(params, rest, images):
        model = nnx.merge(training, params, rest, copy=True)
        return jnp.sum(jnp.square(model(images))), nnx.state(model, nnx.BatchStat)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return {
        "embed": lambda: jax.block_until_ready(embed(state, images)),
        "train": lambda: jax.block_until_ready(step(params, rest, images)),
    }


def theirs(images):
    """The same of PyTorch; dropped paths are switched off, which ours has none of."""
    model = EfficientNet.from_name("efficientnet-lite0", image_size=None, drop_connect_rate=0.0)
    model = model.to(memory_format=torch.channels_last)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    images = images.to(memory_format=torch.channels_last)

    def embed():
        model.eval()
        with torch.no_grad():
            model.extract_features(images).mean((2, 3))

    def train():
        model.train()
        model.zero_grad()
        (model.extract_features(images).mean((2, 3)) ** 2).sum().backward()

    return {"embed": embed, "train": train}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--repeats", type=int, default=6)
    flags = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = (flags.batch_size, flags.image_size, flags.image_size, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    peers = {"ours": ours(images), "torch": theirs(images)}
    document = {"batch_size": flags.batch_size, "image_size": flags.image_size}
    for what in ("embed", "train"):
        seconds = {name: [] for name in peers}
        for turn in range(flags.repeats + 1):
            for name, functions in peers.items():
                start = time.process_time()
                functions[what]()
                if turn:  # The first compiles.
                    seconds[name].append(time.process_time() - start)
        found = {name: [min(s), float(np.median(s))] for name, s in seconds.items()}
        document[what] = {"processor_seconds_least_and_median": found}
        document[what]["torch_over_ours"] = found["torch"][1] / found["ours"][1]
        print(what, document[what], flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
