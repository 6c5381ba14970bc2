"""Speed, measured: ``python -m cbam_jax.benchmark {train,embed,data,search}``.

Every run warms up first, apart from what is measured, and ends with one JSON document as the last
line on stdout. No dataset is needed.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import InputError, workloads
from cbam_jax.losses import MININGS
from cbam_jax.models import MODELS, POOLINGS, create_model
from cbam_jax.search import FIRST_PASSES, search
from cbam_jax.timing import seconds, spread, take_turns

DTYPES = ("float32", "bfloat16")
# Operations a second by the data sheet, dense, bfloat16: what no real product reaches.
DATA_SHEET = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
_TRACED_STEPS = 3


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Normally distributed embeddings, the hardest case for a search: nothing clusters.

    Example:
      >>> embeddings(2, 3, seed=0).shape
      (2, 3)
    """
    return np.random.default_rng(seed).standard_normal((count, dim), np.float32)


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
    """What the numbers depend on: device, cores, versions, how malloc was told to behave.

    Example:
      >>> sorted(machine())
      ['cores', 'device', 'devices', 'glibc_tunables', 'jax', 'numpy', 'python']
    """
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def benchmark_search(
    *,
    queries: int = 1000,
    gallery: int = 100_000,
    dim: int = 512,
    k: int = 20,
    devices: int = 1,
    repeats: int = 5,
    first_pass: str | None = None,
    memmap: str | None = None,
) -> dict:
    """Seconds of `search` and of its bare products, which take turns, and memory.

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
    if first_pass == "bfloat16":
        exact = search(x, y, k, first_pass="float32")[1]
        shares = [np.isin(a, b).mean() for a, b in zip(indices, exact, strict=True)]
        result["recall"] = float(np.mean(shares))
    functions: dict[str, Callable] = {"search": find}
    if isinstance(y, jax.Array) and devices == 1:
        functions["product"] = functools.partial(bare_product, x, y)
        functions["product_bfloat16"] = functools.partial(bare_product, x, y, "bfloat16")
    result |= seconds(functions, repeats)
    products = [name for name in functions if name != "search"]
    median = result["search"]["median"]
    result |= {f"search_to_{name}": median / result[name]["median"] for name in products}
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


def benchmark_step(
    kind: str,
    *,
    model: str = "resnet50_cbam",
    embedding_dim: int | None = None,
    pooling: str = "average",
    dtype: str = "float32",
    image_size: int = 224,
    batch_size: int = 64,
    images_per_class: int = 8,
    mining: str = "batch_hard",
    devices: int = 1,
    repeats: int = 5,
    steps_per_repeat: int | None = None,
    plain: bool = True,
    trace: str | None = None,
) -> dict:
    """Speed of a jitted step, ``"train"`` or ``"embed"``, and what its program costs.

    The step is that of ``train.py`` or ``evaluate.py``, on random images that are on the devices
    already, compiled first. Then the step, the same of the model without its attention (unless
    ``plain`` is false or it has none), a large matrix product and a copy in memory take turns; a
    turn is ``steps_per_repeat`` of them in a row (default: 1 on a CPU, 20 elsewhere).

    Returns:
      The arguments, the entries of ``compiled.compile_cold``, those of ``machine``, and

      * ``step``: seconds a step (median, min, max over the turns), ``step_ms`` the median in ms,
        ``images_per_second`` the batch over the median;
      * ``parameters``, those that are trained, and ``flops``: operations an image;
      * ``peak_memory``: bytes, of the first device, or on a CPU of the process, before the plain
        model is built;
      * the entries of ``limits`` and of ``attention_cost``.
    """
    arguments = dict(locals())
    del arguments["kind"]
    if kind == "embed":
        del arguments["images_per_class"], arguments["mining"]
    options = {"embedding_dim": embedding_dim, "pooling": pooling, "dtype": jnp.dtype(dtype)}
    batch = workloads.random_batch(batch_size, image_size, images_per_class)

    def build(name: str) -> tuple[workloads.Step, int]:
        print(f"compiling the {kind} step of {name}", flush=True)
        built = create_model(name, **options, rngs=nnx.Rngs(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
        if kind == "train":
            return workloads.train_step(built, batch, devices, mining), parameters
        return workloads.embed_step(built, batch, devices), parameters

    step, parameters = build(model)
    step.run(1)
    memory = peak_memory()
    product, copy = workloads.matrix_product(dtype), workloads.copy()
    runs = {"step": step.run, "product": product.run, "copy": copy.run}
    plain_model = MODELS[model][0] if plain else model
    if plain_model != model:
        runs["plain"] = build(plain_model)[0].run
    on_cpu = jax.default_backend() == "cpu"
    count = steps_per_repeat or (1 if on_cpu else 20)
    turns = {name: functools.partial(run, count) for name, run in runs.items()}
    times = {
        name: [turn / count for turn in found] for name, found in take_turns(turns, repeats).items()
    }
    if trace:
        with jax.profiler.trace(trace):
            step.run(_TRACED_STEPS)
    median = statistics.median(times["step"])
    flops, moved = (step.cost[f"{name}_per_device"] for name in ("flops", "bytes"))
    speeds = product.amount / min(times["product"]), copy.amount / min(times["copy"])
    # A CPU's fake devices share its cores, and so its limits.
    together = devices if on_cpu else 1
    return {
        "benchmark": kind,
        **arguments,
        "steps_per_repeat": count,
        "parameters": parameters,
        "flops": flops and flops * devices / batch_size,
        **step.cost,
        "step": spread(times["step"]),
        "step_ms": 1e3 * median,
        "images_per_second": batch_size / median,
        "peak_memory": memory,
        **limits(flops and flops * together, moved and moved * together, median, *speeds, dtype),
        **attention_cost(plain_model, times),
        **machine(),
    }


def limits(
    flops: float | None,
    moved: float | None,
    step_seconds: float,
    product_speed: float,
    copy_speed: float,
    dtype: str,
) -> dict[str, Any]:
    """A step's operations and bytes beside what the machine did at its best in the same run.

    Returns:
      ``product_flops_per_second`` and ``copy_bytes_per_second``, the fastest turn of each;
      ``share_of_product``, the step's operations a second over the product's;
      ``share_of_data_sheet``, the same over the published figure, on an H100 or H200 in bfloat16;
      ``floor_ms``, what the operations alone would take at the product's speed, and the bytes at
      the copy's. None where unknown.

    Example:
      >>> shares = limits(1e9, 1e6, 0.1, 2e10, 1e9, "float32")
      >>> shares["share_of_product"], shares["floor_ms"]
      (0.5, {'flops': 50.0, 'bytes': 1.0})
    """
    sheet = DATA_SHEET.get(jax.local_devices()[0].device_kind) if dtype == "bfloat16" else None
    return {
        "product_flops_per_second": product_speed,
        "copy_bytes_per_second": copy_speed,
        "share_of_product": flops and flops / step_seconds / product_speed,
        "share_of_data_sheet": flops / step_seconds / sheet if flops and sheet else None,
        "floor_ms": {
            "flops": flops and 1e3 * flops / product_speed,
            "bytes": moved and 1e3 * moved / copy_speed,
        },
    }


def attention_cost(plain_model: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """What a step costs beyond that of the plain model, as a share of the latter.

    Returns:
      ``attention_cost``, the median over the rounds, its ``attention_cost_range``, and ``plain``:
      the plain model and its seconds a step. None where ``times`` has no ``"plain"``.

    Example:
      >>> cost = attention_cost("resnet50", {"step": [1.5, 3.0, 2.5], "plain": [1.0, 2.0, 2.0]})
      >>> cost["attention_cost"], cost["attention_cost_range"]
      (0.5, [0.25, 0.5])
    """
    if "plain" not in times:
        return {"attention_cost": None, "attention_cost_range": None, "plain": None}
    rounds = [step / plain - 1 for step, plain in zip(times["step"], times["plain"], strict=True)]
    return {
        "attention_cost": statistics.median(rounds),
        "attention_cost_range": [min(rounds), max(rounds)],
        "plain": {"model": plain_model, "step": spread(times["plain"])},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark; prints what was found and then the JSON document."""
    parser = argparse.ArgumentParser("python -m cbam_jax.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the training step")
    _add_step(train)
    train.add_argument("--images_per_class", type=int, default=8)
    train.add_argument("--mining", choices=MININGS, default="batch_hard")
    _add_step(commands.add_parser("embed", help="the embedding step"))
    _add_search(commands.add_parser("search", help="exact search and its bare matrix product"))
    _add_data(commands.add_parser("data", help="images/s that are read, decoded and augmented"))
    options = vars(parser.parse_args(arguments))
    for name, value in options.items():
        if type(value) is int and value < (name != "workers"):
            parser.error(f"--{name} is {value}, expected at least {int(name != 'workers')}")
    command = options.pop("command")
    if command == "data":
        result = _run_data(parser, options)
    elif command == "search":
        _check_search(parser, options)
        result = benchmark_search(**options)
        _tell(result)
    else:
        _check_step(parser, options)
        result = benchmark_step(command, **options)
        _tell(result)
    print(json.dumps(result))


def _tell(result: dict[str, Any]) -> None:
    """Prints the seconds, and what else there is to read at a glance."""
    for name, value in result.items():
        if isinstance(value, dict) and "median" in value:
            print(name, *(f"{key} {number:.4f} s" for key, number in value.items()))
    if (cost := result.get("attention_cost")) is not None:
        print(f"attention: {cost:+.1%} of the step of {result['plain']['model']}")
    if share := result.get("share_of_product"):
        print(f"{share:.1%} of the speed of a large matrix product")
    if "compile_seconds" in result:
        print(f"compiled in {result['compile_seconds']:.1f} s, no cache used")
        print(f"{result['peak_memory'] / 2**20:.0f} MiB at the peak")
        print(f"{result['images_per_second']:.2f} images/s")


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=MODELS, default="resnet50_cbam", metavar="NAME")
    command.add_argument("--embedding_dim", type=int, help="of a projection; default: none")
    command.add_argument("--pooling", choices=POOLINGS, default="average")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--batch_size", type=int, default=64, help="images, on all devices")
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5, help="turns that are measured")
    command.add_argument(
        "--steps_per_repeat", type=int, help="in a row; default: 1 on a CPU, 20 elsewhere"
    )
    command.add_argument(
        "--no_plain",
        dest="plain",
        action="store_false",
        help="leave out the model without attention, which has to be compiled as well",
    )
    command.add_argument("--trace", metavar="DIR", help="folder for a profile of a few steps")


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", type=int, default=1000)
    command.add_argument("--gallery", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=512)
    command.add_argument("--k", type=int, default=20)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument(
        "--first_pass", choices=FIRST_PASSES, help="default: what suits the device"
    )
    command.add_argument("--memmap", help="file to search in, instead of the devices' memory")


def _check_devices(parser: argparse.ArgumentParser, devices: int) -> None:
    found = jax.local_device_count()
    if devices <= found:
        return
    remedy = f"; XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes as many of a CPU"
    parser.error(
        f"--devices is {devices}, there are {found}"
        + (remedy if jax.default_backend() == "cpu" else "")
    )


def check_classes(parser: argparse.ArgumentParser, batch_size: int, images_per_class: int) -> None:
    """Ends in one line where a batch's classes give mining nothing to choose from."""
    if batch_size % images_per_class or batch_size == images_per_class or images_per_class == 1:
        parser.error(
            f"--batch_size {batch_size} with --images_per_class {images_per_class}: mining needs "
            "two classes or more, each of as many images, two or more"
        )


def _check_step(parser: argparse.ArgumentParser, options: dict) -> None:
    size, devices = options["batch_size"], options["devices"]
    _check_devices(parser, devices)
    if size % devices:
        parser.error(f"--batch_size {size} is no multiple of {devices} devices")
    if "images_per_class" in options:
        check_classes(parser, size, options["images_per_class"])
    if options["trace"] is not None:
        try:
            os.makedirs(options["trace"], exist_ok=True)
            tempfile.TemporaryFile(dir=options["trace"]).close()
        except OSError as error:
            parser.error(f"--trace={options['trace']}: {error.strerror}; give a folder to write to")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="NAME", help="as data.name; default: synthetic photos")
    command.add_argument("--split", default="train")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--batch_size", type=int, default=64, help="images, eight of a class")
    command.add_argument("--workers", type=int, default=0, help="processes; 0: threads")
    command.add_argument("--color_jitter", type=float, default=0.0, help="strength")
    command.add_argument("--count", type=int, default=8, help="batches in a repeat")
    command.add_argument("--repeats", type=int, default=5)


def _run_data(parser: argparse.ArgumentParser, options: dict) -> dict:
    try:
        from cbam_jax.benchmark_data import UNITS, benchmark_data  # The others need no OpenCV.

        result = benchmark_data(**options)
    except (InputError, ModuleNotFoundError) as error:
        parser.error(str(error))
    for name in UNITS:
        print(name, *(f"{key} {number:.1f}" for key, number in result[name].items()))
    return result | machine()


def _check_search(parser: argparse.ArgumentParser, options: dict) -> None:
    _check_devices(parser, options["devices"])
    if options["gallery"] % options["devices"]:
        parser.error(
            f"--gallery {options['gallery']} is no multiple of {options['devices']} devices"
        )
    if options["k"] > options["gallery"]:
        parser.error(f"--k is {options['k']}, expected at most --gallery {options['gallery']}")


if __name__ == "__main__":
    main()
