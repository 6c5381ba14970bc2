"""Exact search beside faiss: ``python benchmarks/faiss_peer.py --case a``.

Of normally distributed embeddings; with ``--embeddings=clusters:0.05`` of 40 clusters on the
sphere, as a triplet loss makes them; with ``--embeddings=FILE`` of those of a file, see
``python -m cbam_jax.benchmark search --help``. Queries are then gallery items.

Needs ``pip install faiss-cpu``. IndexFlatL2 as it is and in the fastest of a few settings of its
blocks, our search of the gallery, of a prepared gallery, and its bare product take turns on the
same arrays in one process, with one thread a core each, after a warm-up. The index and our gallery
are in memory before the clock starts. ``proven`` is the share of the queries that each pass of our
search proved. The last line on stdout is JSON.
"""

import argparse
import functools
import itertools
import json
import os
import time

import faiss
import jax
import numpy as np
from search_cases import CASES

from cbam_jax import InputError
from cbam_jax.benchmark import bare_product, machine, queries_and_gallery, seconds, told
from cbam_jax.search import prepare, search

# Queries from which faiss calls a BLAS, and items that it gives to it at a time; the first is its
# own choice. One query alone is searched by one thread otherwise.
SETTINGS = [*itertools.product((20, 1), (1024, 8192))]


def faiss_search(index: faiss.IndexFlatL2, x: np.ndarray, k: int, setting: tuple[int, int]):
    faiss.cvar.distance_compute_blas_threshold = setting[0]
    faiss.cvar.distance_compute_blas_database_bs = setting[1]
    return index.search(x, k)


def compare(x: np.ndarray, y: np.ndarray, k: int, repeats: int, first_pass: str | None) -> dict:
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    index = faiss.IndexFlatL2(y.shape[1])
    index.add(y)
    on_device = jax.block_until_ready(jax.device_put(y, jax.local_devices()[0]))
    start = time.perf_counter()
    kept = prepare(on_device, k=k, first_pass=first_pass)
    prepare_seconds = time.perf_counter() - start
    with_setting = functools.partial(faiss_search, index, x, k)
    tried = seconds({str(s): functools.partial(with_setting, s) for s in SETTINGS}, 1)
    fastest = min(SETTINGS, key=lambda setting: tried[str(setting)]["median"])
    functions = {
        "search": functools.partial(search, x, on_device, k, first_pass=first_pass),
        "prepared": functools.partial(search, x, kept, k),
        "faiss": functools.partial(with_setting, SETTINGS[0]),
        "faiss_fastest": functools.partial(with_setting, fastest),
        "product": functools.partial(bare_product, x, on_device),
        "product_bfloat16": functools.partial(bare_product, x, on_device, "bfloat16"),
    }
    (ours, proven), (again, proven_prepared) = (told(functions[n]) for n in ("search", "prepared"))
    theirs = functions["faiss"]()
    assert all(np.array_equal(a, b) for a, b in zip(ours, again, strict=True))
    times = seconds(functions, repeats)
    medians = {name: one["median"] for name, one in times.items()}
    return {
        **times,
        "proven": proven,
        "proven_prepared": proven_prepared,
        "prepare_seconds": prepare_seconds,
        "prepared_width": kept.width,
        "prepared_bytes": kept.extra_bytes,
        "faiss_fastest_setting": fastest,
        "speed_over_faiss": medians["faiss"] / medians["search"],
        "prepared_over_faiss": medians["faiss"] / medians["prepared"],
        "prepared_over_faiss_fastest": medians["faiss_fastest"] / medians["prepared"],
        "search_to_product": medians["search"] / medians["product"],
        "search_to_product_bfloat16": medians["search"] / medians["product_bfloat16"],
        # faiss rounds its distances, so that neighbours at nearly one distance may change places.
        "same_indices": float(np.mean(ours[1] == theirs[1])),
        "largest_distance_difference": float(np.abs(ours[0] - np.sqrt(theirs[0])).max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="a")
    parser.add_argument("--embeddings", metavar="FILE|clusters:0.05")
    parser.add_argument("--queries", type=int, help="default: the case's")
    parser.add_argument("--gallery", type=int, help="default: the case's, or those of the file")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--first_pass", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    queries, gallery, dim = CASES[options.case]
    in_file = options.embeddings and not options.embeddings.startswith("clusters:")
    gallery = options.gallery or (None if in_file else gallery)
    try:
        x, y = queries_and_gallery(options.embeddings, options.queries or queries, gallery, dim)
    except InputError as error:
        parser.error(str(error))
    if not 1 <= options.k <= len(y):
        parser.error(f"--k is {options.k}, expected from 1 to the gallery's {len(y)}")
    about = vars(options) | {"queries": len(x), "gallery": len(y), "dim": y.shape[1]}
    result = compare(x, y, options.k, options.repeats, options.first_pass)
    print(
        json.dumps(
            {
                "benchmark": "faiss_peer",
                **about,
                **result,
                **machine(),
                "faiss_version": faiss.__version__,
            }
        )
    )
