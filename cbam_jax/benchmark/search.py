"""How fast the exact search is, beside its bare matrix product."""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax import InputError
from cbam_jax.benchmark.environment import machine, peak_memory
from cbam_jax.benchmark.galleries import embeddings as normal
from cbam_jax.benchmark.galleries import queries_and_gallery
from cbam_jax.benchmark.timing import seconds
from cbam_jax.search import prepare, search


def bare_product(queries: np.ndarray, gallery: jax.Array, dtype: str = "float32") -> np.ndarray:
    """The largest inner product of each query, [q]: a search with nothing but its matrix product.

    Streamed over blocks of 16,384 items and 1,024 queries, rounded to ``dtype``, with a maximum in
    place of the selection: XLA's CPU backend fuses the two in float32, so that the products are
    never written to memory.

    Example:
      >>> bare_product(np.eye(2, dtype=np.float32), jnp.array([[1.0, 5.0], [3.0, 2.0]])).tolist()
      [3.0, 5.0]
    """
    device = gallery.devices().pop()
    # NumPy's view on a CPU: blocks of it are no copies, those of a jax.Array are.
    source = np.asarray(gallery) if device.platform == "cpu" else gallery
    tiles = [jax.device_put(queries[i : i + 1024], device) for i in range(0, len(queries), 1024)]
    tiles = [tile.astype(dtype) for tile in tiles]
    best = [jnp.full(len(x), -jnp.inf) for x in tiles]
    # Products of bfloat16 are written to memory: smaller blocks of them stay in a CPU's cache.
    size = 4096 if dtype == "bfloat16" and device.platform == "cpu" else 16384
    for start in range(0, len(source), size):
        y = jax.device_put(source[start : start + size], device).astype(dtype)
        best = [_maximum(b, x, y) for b, x in zip(best, tiles, strict=True)]
    return np.concatenate([np.asarray(b) for b in best])


@jax.jit
def _maximum(best: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    product = jax.lax.dot_general(
        y,
        x,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.maximum(best, jnp.max(product, axis=0))


def benchmark_search(
    *,
    queries: int = 1000,
    gallery: int | None = None,
    dim: int = 512,
    k: int = 20,
    devices: int = 1,
    repeats: int = 5,
    first_pass: str | None = None,
    memmap: str | None = None,
    embeddings: str | None = None,
    prepared: bool = False,
) -> dict:
    """Seconds of `search` and of its bare products, which take turns, and memory.

    Queries and results are in host memory, and their transfer counts. The gallery is on the devices
    before the clock starts, or in a file, ``memmap``, made if it is not there; then there is no
    bare product. ``extra_bytes`` is the peak memory of the first search less that before it,
    ``proven`` the share of the queries that each of its passes proved. ``embeddings`` is what
    `queries_and_gallery` takes, ``prepared`` whether a gallery that was prepared before takes its
    turn as well: how long that took, once, its memory, the width of its product, and what its
    passes proved.

    Example:
      >>> result = benchmark_search(queries=3, gallery=50, dim=4, k=2, repeats=1)
      >>> result["recall"], sum(result["proven"].values()), result["search"]["median"] > 0
      (1.0, 1.0, True)
    """
    arguments = dict(locals())
    if memmap:
        arguments["gallery"] = gallery or 100_000
        x, y = normal(queries, dim, seed=1), _mapped(memmap, arguments["gallery"], dim)
    else:
        x, y = queries_and_gallery(embeddings, queries, gallery, dim)
        arguments |= {"gallery": len(y), "dim": y.shape[1]}
        if k > len(y) or len(y) % devices:
            raise InputError(f"--k={k} --devices={devices}: the gallery has {len(y)} embeddings")
        y = _on_devices(y, devices)
    find = functools.partial(search, x, y, k, first_pass=first_pass)
    before = peak_memory()
    (_, indices), proven = told(find)
    result = {"extra_bytes": peak_memory() - before, "recall": 1.0, "proven": proven}
    if first_pass == "bfloat16":
        result["recall"] = _recall(indices, search(x, y, k, first_pass="float32")[1])
    products: dict[str, Callable] = {}
    if prepared:
        start = time.perf_counter()
        kept = prepare(y, k=k, first_pass=first_pass)
        result["prepare_seconds"] = time.perf_counter() - start
        result |= {"prepared_bytes": kept.extra_bytes, "prepared_width": kept.width}
        products["prepared"] = functools.partial(search, x, kept, k)
        result["proven_prepared"] = told(products["prepared"])[1]
    if isinstance(y, jax.Array) and devices == 1:
        products["product"] = functools.partial(bare_product, x, y)
        products["product_bfloat16"] = functools.partial(bare_product, x, y, "bfloat16")
    result |= seconds({"search": find, **products}, repeats)
    median = result["search"]["median"]
    result |= {f"search_to_{name}": median / result[name]["median"] for name in products}
    return {"benchmark": "search", **arguments, **result, **machine()}


def told(find: Callable) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
    """What a search finds, and the share of its queries that each pass proved, from its log.

    Args:
      find: Searches when it is called, and returns distances ``[q, k]`` and indices ``[q, k]``.

    Returns:
      These, and by the names of the passes the shares, from 0 to 1.

    Example:
      >>> x = np.arange(12, dtype=np.float32).reshape(6, 2)
      >>> told(functools.partial(search, x[:1], x, k=2))[1]
      {'few': 1.0}
    """
    log, proven = logging.getLogger("cbam_jax.search.passes"), {}

    def read(record: logging.LogRecord) -> bool:
        name, number, _ = cast(tuple, record.args)
        proven[name] = proven.get(name, 0.0) + int(number)
        return False  # It goes no further.

    level = log.level
    log.addFilter(read)
    log.setLevel(logging.DEBUG)
    try:
        found = find()
    finally:
        log.setLevel(level)
        log.removeFilter(read)
    return found, {name: number / len(found[0]) for name, number in proven.items()}


def _recall(indices: np.ndarray, exact: np.ndarray) -> float:
    shares = [np.isin(a, b).mean() for a, b in zip(indices, exact, strict=True)]
    return float(np.mean(shares))


def _on_devices(y: np.ndarray, devices: int) -> jax.Array:
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.local_devices()[:devices])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.block_until_ready(jax.device_put(y, sharding if devices > 1 else mesh.devices[0]))


def _mapped(path: str, gallery: int, dim: int, rows: int = 65536) -> np.memmap:
    """A gallery in a file, written in parts so that it is never in memory whole."""
    size = gallery * dim * 4
    if not os.path.exists(path) or os.path.getsize(path) != size:
        with open(path, "wb") as file:
            for i in range(0, gallery, rows):
                normal(min(rows, gallery - i), dim, seed=2 + i).tofile(file)
    return np.memmap(path, np.float32, "r", shape=(gallery, dim))
