"""Exact search beside PyTorch: ``python benchmarks/torch_peer.py --case a``.

Needs ``pip install torch``. Of PyTorch there are its matrix product with topk and its cdist with
topk, both in blocks of the gallery with a running top-k, which is what its users write. They take
turns with our search on the same arrays in one process, after a warm-up, all with one thread a
core. The last line on stdout is JSON.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable

import jax
import numpy as np
import torch
from search_cases import CASES

from cbam_jax.benchmark import embeddings, machine, seconds
from cbam_jax.search import search


def streamed(distances: Callable, x: torch.Tensor, y: torch.Tensor, k: int, block: int = 8192):
    """The k lowest of ``distances`` over blocks of ``y``, and their indices."""
    best, found = torch.full((len(x), k), torch.inf), torch.full((len(x), k), -1)
    for start in range(0, len(y), block):
        new = distances(x, y[start : start + block])
        index = torch.arange(start, start + new.shape[1]).expand(len(x), -1)
        best, order = torch.cat([best, new], 1).topk(k, largest=False)
        found = torch.cat([found, index], 1).gather(1, order)
    return best, found


def product_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :]
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0).sqrt_()


def compare(queries: int, gallery: int, dim: int, k: int, repeats: int) -> dict:
    x, y = embeddings(queries, dim, seed=1), embeddings(gallery, dim, seed=2)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_device = jax.block_until_ready(jax.device_put(y, jax.local_devices()[0]))
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    functions = {
        "search": functools.partial(search, x, on_device, k),
        "torch_product_topk": functools.partial(streamed, product_distances, *tensors, k),
        "torch_cdist_topk": functools.partial(streamed, torch.cdist, *tensors, k),
    }
    ours = functions["search"]()[1]
    times = seconds(functions, repeats)
    peers = [name for name in functions if name != "search"]
    return {
        "benchmark": "torch_peer",
        "queries": queries,
        "gallery": gallery,
        "dim": dim,
        "k": k,
        "repeats": repeats,
        **times,
        "speed_over": {n: times[n]["median"] / times["search"]["median"] for n in peers},
        # float32 distances of neighbours that are nearly equally far may change their order.
        "same_indices": {n: float(np.mean(ours == functions[n]()[1].numpy())) for n in peers},
        **machine(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="a")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(compare(*CASES[options.case], options.k, options.repeats)))
