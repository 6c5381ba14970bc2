"""A catalogue beside faiss: ``python benchmarks/catalogue.py --items=100000 --dim=1280``.

Needs ``pip install faiss-cpu``. A catalogue of that many embeddings is written and opened twice:
from the database, and from the copy of its embeddings beside it. Then a ready embedding, and 64 at
once, are searched by the catalogue and by IndexFlatL2, which take turns in one process with one
thread a core each, after a warm-up. The last line on stdout is JSON.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from cbam_jax.benchmark import embeddings, machine, seconds
from cbam_jax.catalogue import Catalogue


def fill(path: Path, rows: np.ndarray) -> None:
    """A catalogue of embeddings whose photos are nowhere."""
    with Catalogue.open(path) as shop, shop.store.transaction():
        shop.store.tell(fingerprint="0" * 64, dimension=rows.shape[1])
        for number, row in enumerate(rows):
            values = [f"/nowhere/{number}.jpg", row.tobytes()]
            shop.store.run("INSERT INTO item (path, embedding) VALUES (?, ?)", values)


def opened(path: Path) -> float:
    """Seconds until the embeddings can be searched."""
    started = time.monotonic()
    with Catalogue.open(path, create=False) as shop:
        assert len(shop.gallery.squares)
        return time.monotonic() - started


def compare(items: int, dim: int, k: int, repeats: int) -> dict:
    rows = embeddings(items, dim, seed=2)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = embeddings(64, dim, seed=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shop.db"
        fill(path, rows)
        result = {"first_open": opened(path), "open": opened(path)}
        index = faiss.IndexFlatL2(dim)
        index.add(rows)
        with Catalogue.open(path, create=False) as shop:
            result |= turns(shop, index, queries, k, repeats)
    return {"benchmark": "catalogue", "items": items, "dim": dim, "k": k, "repeats": repeats,
            **result, **machine(), "faiss_version": faiss.__version__}  # fmt: skip


def turns(shop: Catalogue, index, queries: np.ndarray, k: int, repeats: int) -> dict:
    """Seconds of both for one query and for 64, and whether they found the same."""
    result = {}
    for count in (1, 64):
        asked = [[query] for query in queries[:count]]
        functions = {
            f"find_{count}": functools.partial(shop.find_all, asked, k),
            f"faiss_{count}": functools.partial(index.search, queries[:count], k),
        }
        ours, theirs = (function() for function in functions.values())
        ids = np.array([[n.id - 1 for n in found] for found in ours])
        result[f"same_ids_{count}"] = float(np.mean(ids == theirs[1]))
        times = seconds(functions, repeats)
        medians = [times[name]["median"] for name in functions]
        result |= {**times, f"find_to_faiss_{count}": medians[0] / medians[1]}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(json.dumps(compare(options.items, options.dim, options.k, options.repeats)))
