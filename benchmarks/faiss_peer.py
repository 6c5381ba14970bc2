"""Exact search beside faiss: ``python benchmarks/faiss_peer.py --case a``.

Of normally distributed embeddings, or, with ``--clusters=0.05``, of 40 clusters on the sphere, as a
triplet loss makes them: their spread over that of their centres; queries are then gallery items.

Needs ``pip install faiss-cpu``. IndexFlatL2, our search and its bare product take turns on the
same arrays in one process, with one thread a core each, after a warm-up. The index and our gallery
are in memory before the clock starts. The last line on stdout is JSON.
"""

import argparse
import functools
import json
import os

import faiss
import jax
import numpy as np
from search_cases import CASES

from cbam_jax.benchmark import bare_product, embeddings, machine, seconds
from cbam_jax.search import search


def clustered(queries: int, gallery: int, dim: int, spread: float) -> tuple:
    """Unit vectors around 40 directions, and some of them as queries."""
    generator = np.random.default_rng(2)
    centers = embeddings(40, dim, seed=1)[generator.integers(0, 40, gallery)]
    y = centers + np.float32(spread) * embeddings(gallery, dim, seed=3)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return y[generator.choice(gallery, queries, replace=False)], y


def compare(
    queries: int, gallery: int, dim: int, k: int, repeats: int, spread: float | None
) -> dict:
    x, y = embeddings(queries, dim, seed=1), embeddings(gallery, dim, seed=2)
    if spread is not None:
        x, y = clustered(queries, gallery, dim, spread)
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    index = faiss.IndexFlatL2(dim)
    index.add(y)
    on_device = jax.block_until_ready(jax.device_put(y, jax.local_devices()[0]))
    ours, theirs = search(x, on_device, k), index.search(x, k)
    functions = {
        "search": functools.partial(search, x, on_device, k),
        "faiss": functools.partial(index.search, x, k),
        "product": functools.partial(bare_product, x, on_device),
        "product_bfloat16": functools.partial(bare_product, x, on_device, "bfloat16"),
    }
    times = seconds(functions, repeats)
    medians = {name: time["median"] for name, time in times.items()}
    return {
        "benchmark": "faiss_peer",
        "queries": queries,
        "gallery": gallery,
        "dim": dim,
        "k": k,
        "clusters": spread,
        "repeats": repeats,
        **times,
        "speed_over_faiss": medians["faiss"] / medians["search"],
        "search_to_product": medians["search"] / medians["product"],
        "search_to_product_bfloat16": medians["search"] / medians["product_bfloat16"],
        # faiss rounds its distances, so that neighbours at nearly one distance may change places.
        "same_indices": float(np.mean(ours[1] == theirs[1])),
        "largest_distance_difference": float(np.abs(ours[0] - np.sqrt(theirs[0])).max()),
        **machine(),
        "faiss_version": faiss.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="a")
    parser.add_argument("--clusters", type=float, metavar="SPREAD")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    case = CASES[options.case]
    print(json.dumps(compare(*case, options.k, options.repeats, options.clusters)))
