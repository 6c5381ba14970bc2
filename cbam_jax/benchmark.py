"""Speed, measured: ``python -m cbam_jax.benchmark search``.

Every run warms up first, apart from what is measured, and ends with one JSON document as the last
line on stdout.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search import FIRST_PASSES, search

_PAUSE_S = 0.1


def seconds(functions: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each function, after one call of each to warm up.

    The functions take turns, so that a disturbance of the machine meets all of them, with a pause
    between: threads of OpenMP and OpenBLAS keep a core busy for a while after their work.

    Example:
      >>> measured = seconds({"nothing": lambda: None}, repeats=3)
      >>> sorted(measured["nothing"])
      ['max', 'median', 'min']
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(_PAUSE_S)
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Normally distributed embeddings, the hardest case for a search: nothing clusters.

    Example:
      >>> embeddings(2, 3, seed=0).shape
      (2, 3)
    """
    return np.random.default_rng(seed).standard_normal((count, dim), np.float32)


def bare_product(queries: np.ndarray, gallery: jax.Array) -> np.ndarray:
    """The largest inner product of each query, [q]: a search with nothing but its matrix product.

    Streamed over blocks of 16,384 items and 1,024 queries, with a maximum in place of the
    selection: XLA's CPU backend fuses the two, so that the products are never written to memory.

    Example:
      >>> bare_product(np.eye(2, dtype=np.float32), jnp.array([[1.0, 5.0], [3.0, 2.0]])).tolist()
      [3.0, 5.0]
    """
    device = gallery.devices().pop()
    # NumPy's view on a CPU: blocks of it are no copies, those of a jax.Array are.
    source = np.asarray(gallery) if device.platform == "cpu" else gallery
    tiles = [jax.device_put(queries[i : i + 1024], device) for i in range(0, len(queries), 1024)]
    best = [jnp.full(len(x), -jnp.inf) for x in tiles]
    for start in range(0, len(source), 16384):
        y = jax.device_put(source[start : start + 16384], device)
        best = [_maximum(b, x, y) for b, x in zip(best, tiles, strict=True)]
    return np.concatenate([np.asarray(b) for b in best])


@jax.jit
def _maximum(best: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(y, x.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(best, jnp.max(product, axis=0))


def peak_memory() -> int:
    """The most memory the process has held, in bytes; on a GPU, the most of the first device.

    Example:
      >>> peak_memory() > 2**20
      True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(stats.get("peak_bytes_in_use", on_host))


def machine() -> dict[str, str | int]:
    """What the numbers depend on: device, cores, versions.

    Example:
      >>> sorted(machine())
      ['cores', 'device', 'devices', 'jax', 'numpy', 'python']
    """
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def benchmark_search(
    *,
    queries: int = 1000,
    gallery: int = 100_000,
    dim: int = 512,
    k: int = 20,
    devices: int = 1,
    repeats: int = 5,
    first_pass: str = "float32",
    memmap: str | None = None,
) -> dict:
    """Seconds of `search` and of its bare product, which take turns, and memory.

    Queries and results are in host memory, and their transfer counts. The gallery is on the devices
    before the clock starts, or in a file, ``memmap``, made if it is not there; then there is no
    bare product. ``extra_bytes`` is the peak memory of the first search less that before it.

    Example:
      >>> result = benchmark_search(queries=3, gallery=50, dim=4, k=2, repeats=1)
      >>> result["recall"], result["search"]["median"] > 0
      (1.0, True)
    """
    arguments = dict(locals())
    x = embeddings(queries, dim, seed=1)
    y = _mapped(memmap, gallery, dim) if memmap else _on_devices(gallery, dim, devices)
    find = functools.partial(search, x, y, k, first_pass=first_pass)
    before = peak_memory()
    indices = find()[1]
    result = {"extra_bytes": peak_memory() - before, "recall": 1.0}
    if first_pass != "float32":
        exact = search(x, y, k)[1]
        shares = [np.isin(a, b).mean() for a, b in zip(indices, exact, strict=True)]
        result["recall"] = float(np.mean(shares))
    functions: dict[str, Callable] = {"search": find}
    if isinstance(y, jax.Array) and devices == 1:
        functions["product"] = functools.partial(bare_product, x, y)
    result |= seconds(functions, repeats)
    if "product" in functions:
        result["search_to_product"] = result["search"]["median"] / result["product"]["median"]
    return {"benchmark": "search", **arguments, **result, **machine()}


def _on_devices(gallery: int, dim: int, devices: int) -> jax.Array:
    y = embeddings(gallery, dim, seed=2)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.local_devices()[:devices])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.block_until_ready(jax.device_put(y, sharding if devices > 1 else mesh.devices[0]))


def _mapped(path: str, gallery: int, dim: int, rows: int = 65536) -> np.memmap:
    """A gallery in a file, written in parts so that it is never in memory whole."""
    size = gallery * dim * 4
    if not os.path.exists(path) or os.path.getsize(path) != size:
        with open(path, "wb") as file:
            for i in range(0, gallery, rows):
                embeddings(min(rows, gallery - i), dim, seed=2 + i).tofile(file)
    return np.memmap(path, np.float32, "r", shape=(gallery, dim))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark; prints a line a measurement and then the JSON document."""
    parser = argparse.ArgumentParser("python -m cbam_jax.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("search", help="exact search and its bare matrix product")
    command.add_argument("--queries", type=int, default=1000)
    command.add_argument("--gallery", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=512)
    command.add_argument("--k", type=int, default=20)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--first_pass", choices=FIRST_PASSES, default="float32")
    command.add_argument("--memmap", help="file to search in, instead of the devices' memory")
    options = vars(parser.parse_args(arguments))
    if not 1 <= options["devices"] <= jax.local_device_count():
        parser.error(f"--devices is {options['devices']}, there are {jax.local_device_count()}")
    if options["gallery"] % options["devices"]:
        parser.error(
            f"--gallery {options['gallery']} is no multiple of {options['devices']} devices"
        )
    if not 1 <= options["k"] <= options["gallery"]:
        parser.error(f"--k is {options['k']}, expected 1 to --gallery {options['gallery']}")
    result = {"search": benchmark_search}[options.pop("command")](**options)
    for name, value in result.items():
        if isinstance(value, dict):
            print(name, *(f"{key} {number:.4f} s" for key, number in value.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
