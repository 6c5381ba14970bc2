"""Speed, measured: ``python -m cbam_jax.benchmark {search,embed,data}``.

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
from flax import nnx

from cbam_jax import InputError
from cbam_jax.models import MODELS, POOLINGS, create_model
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


def benchmark_embed(
    *,
    model: str = "resnet50_cbam",
    embedding_dim: int | None = None,
    pooling: str = "average",
    dtype: str = "float32",
    image_size: int = 224,
    batch_size: int = 64,
    repeats: int = 5,
) -> dict:
    """Parameters, operations and speed of the jitted embedding of uint8 images, on one device.

    ``flops`` is what XLA counts in the program compiled for one image: a multiply-add is two, what
    falls on the border's padding is none. ``images_per_second`` is ``batch_size`` over the median
    seconds of a call, its images on the device already. ``parameters`` are those that are trained.

    Example:
      >>> sizes = {"image_size": 32, "batch_size": 2, "repeats": 1}
      >>> result = benchmark_embed(model="resnet18", **sizes)
      >>> result["parameters"], result["images_per_second"] > 0
      (11176512, True)
    """
    arguments = dict(locals())
    options = {"embedding_dim": embedding_dim, "pooling": pooling, "dtype": jnp.dtype(dtype)}
    built = create_model(model, **options, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.view(built, use_running_average=True))

    @jax.jit
    def embed(state: nnx.State, images: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, state)
        return merged(merged.preprocess(images))

    shape = (image_size, image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    images = jax.device_put(pixels)
    cost = embed.lower(state, jax.ShapeDtypeStruct((1, *shape), jnp.uint8)).compile()
    measured = seconds({"call": lambda: embed(state, images).block_until_ready()}, repeats)
    return {
        "benchmark": "embed",
        **arguments,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param))),
        "flops": (cost.cost_analysis() or {}).get("flops"),
        **measured,
        "images_per_second": batch_size / measured["call"]["median"],
        **machine(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark; prints a line a measurement and then the JSON document."""
    parser = argparse.ArgumentParser("python -m cbam_jax.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_search(commands.add_parser("search", help="exact search and its bare matrix product"))
    _add_embed(commands.add_parser("embed", help="a model's parameters, operations and speed"))
    _add_data(commands.add_parser("data", help="images/s that are read, decoded and augmented"))
    options = vars(parser.parse_args(arguments))
    for name, value in options.items():
        if isinstance(value, int) and value < (name != "workers"):
            parser.error(f"--{name} is {value}, expected at least {int(name != 'workers')}")
    if options["command"] == "data":
        _run_data(parser, options)
        return
    if options["command"] == "search":
        _check_search(parser, options)
    benchmark = {"search": benchmark_search, "embed": benchmark_embed}[options.pop("command")]
    result = benchmark(**options)
    for name, value in result.items():
        if isinstance(value, dict):
            print(name, *(f"{key} {number:.4f} s" for key, number in value.items()))
    print(json.dumps(result))


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", type=int, default=1000)
    command.add_argument("--gallery", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=512)
    command.add_argument("--k", type=int, default=20)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--first_pass", choices=FIRST_PASSES, default="float32")
    command.add_argument("--memmap", help="file to search in, instead of the devices' memory")


def _add_embed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=MODELS, default="resnet50_cbam")
    command.add_argument("--embedding_dim", type=int, help="of a projection; default: none")
    command.add_argument("--pooling", choices=POOLINGS, default="average")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    command.add_argument("--image_size", type=int, default=224)
    command.add_argument("--batch_size", type=int, default=64)
    command.add_argument("--repeats", type=int, default=5)


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="NAME", help="as data.name; default: synthetic photos")
    command.add_argument("--split", default="train")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--batch_size", type=int, default=64, help="images, eight of a class")
    command.add_argument("--workers", type=int, default=0, help="processes; 0: threads")
    command.add_argument("--color_jitter", type=float, default=0.0, help="strength")
    command.add_argument("--count", type=int, default=8, help="batches in a repeat")
    command.add_argument("--repeats", type=int, default=5)


def _run_data(parser: argparse.ArgumentParser, options: dict) -> None:
    del options["command"]
    try:
        from cbam_jax.benchmark_data import UNITS, benchmark_data  # The others need no OpenCV.

        result = benchmark_data(**options)
    except (InputError, ModuleNotFoundError) as error:
        parser.error(str(error))
    for name in UNITS:
        print(name, *(f"{key} {number:.1f}" for key, number in result[name].items()))
    print(json.dumps(result | machine()))


def _check_search(parser: argparse.ArgumentParser, options: dict) -> None:
    if options["devices"] > jax.local_device_count():
        parser.error(f"--devices is {options['devices']}, there are {jax.local_device_count()}")
    if options["gallery"] % options["devices"]:
        parser.error(
            f"--gallery {options['gallery']} is no multiple of {options['devices']} devices"
        )
    if options["k"] > options["gallery"]:
        parser.error(f"--k is {options['k']}, expected at most --gallery {options['gallery']}")


if __name__ == "__main__":
    main()
