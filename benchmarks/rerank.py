"""Seconds and memory of k-reciprocal re-ranking, beside the form with matrices of all pairs.

python benchmarks/rerank.py [--images=20000 --dim=512 --each=8 --form=sparse|dense]

Every image of --images is searched among the others, --each of them around one direction, as a
trained model has them. ``dense`` is the definition written with NumPy on matrices of all pairs, as
it usually is; its memory grows with the square of the images, so try it with few. The peak is that
of the process, the imports and the embeddings included: one form a process. The last line is one
JSON document.
"""

import argparse
import json
import time

import numpy as np

from cbam_jax.benchmark import machine, peak_memory
from cbam_jax.rerank import k_reciprocal

_K1, _K2, _LAMBDA, _FOUND = 20, 6, 0.3, 100


def embeddings(images: int, dim: int, each: int) -> np.ndarray:
    """Unit vectors around random directions, [images, dim] float32."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(-(-images // each), dim))
    x = np.repeat(centre, each, axis=0)[:images] + rng.normal(size=(images, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def sparse_form(x: np.ndarray) -> np.ndarray:
    """The library's."""
    found = k_reciprocal(x, x, _FOUND, k1=_K1, k2=_K2, lambda_=_LAMBDA, exclude_self=True)
    return found[0]


def dense_form(x: np.ndarray) -> np.ndarray:
    """The definition, with float32 matrices [images, images] for distances, ranks and weights."""
    squares = np.einsum("md,md->m", x, x)
    scaled = np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)
    scaled /= scaled.max(axis=1, keepdims=True)
    rank = np.argsort(scaled, axis=1, kind="stable").astype(np.int32)
    weights = np.zeros_like(scaled)
    for i in range(len(x)):
        near = reciprocal(rank, i, _K1)
        members = [near]
        for j in near:
            theirs = reciprocal(rank, j, round(_K1 / 2))
            if len(np.intersect1d(theirs, near)) > 2 / 3 * len(theirs):
                members.append(theirs)
        joined = np.unique(np.concatenate(members))
        weight = np.exp(-scaled[i, joined])
        weights[i, joined] = weight / weight.sum()
    weights = np.stack([weights[row[:_K2]].mean(axis=0) for row in rank])
    columns = [np.flatnonzero(column) for column in weights.T]
    for i, row in enumerate(weights):
        shared = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(row):
            shared[columns[j]] += np.minimum(row[j], weights[columns[j], j])
        scaled[i] = _LAMBDA * scaled[i] + (1 - _LAMBDA) * (1 - shared / (2 - shared))
    np.fill_diagonal(scaled, np.inf)
    return np.sort(scaled, axis=1)[:, :_FOUND]


def reciprocal(rank: np.ndarray, i: int, k: int) -> np.ndarray:
    """The neighbours of i that have it among theirs."""
    near = rank[i, : k + 1]
    return near[(rank[near, : k + 1] == i).any(axis=1)]


def main() -> None:
    """Run one form once, with the clock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--form", choices=("sparse", "dense"), default="sparse")
    flags = parser.parse_args()
    x = embeddings(flags.images, flags.dim, flags.each)
    begun, worked = time.perf_counter(), time.process_time()
    distances = (sparse_form if flags.form == "sparse" else dense_form)(x)
    result = {
        **vars(flags),
        "seconds": round(time.perf_counter() - begun, 2),
        "processor_seconds": round(time.process_time() - worked, 2),
        "peak_bytes": peak_memory(),
        "mean_distance": float(distances.mean()),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
