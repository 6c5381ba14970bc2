"""How fast a step is, of training or of embedding, and what its program costs."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cbam_jax.benchmark import workloads
from cbam_jax.benchmark.environment import machine, peak_memory
from cbam_jax.benchmark.timing import spread, take_turns
from cbam_jax.models import MODELS, create_model

DTYPES = ("float32", "bfloat16")
# Operations a second by the data sheet, dense, bfloat16: what no real product reaches.
DATA_SHEET = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
_TRACED_STEPS = 3


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
    arguments = {name: value for name, value in locals().items() if name != "kind"}
    if kind == "embed":
        del arguments["images_per_class"], arguments["mining"]
    count = arguments["steps_per_repeat"] = steps_per_repeat or (1 if _on_cpu() else 20)
    options = {"embedding_dim": embedding_dim, "pooling": pooling, "dtype": jnp.dtype(dtype)}
    batch = workloads.random_batch(batch_size, image_size, images_per_class)
    build = functools.partial(_build, kind, options, batch, devices, mining)
    step, parameters = build(model)
    step.run(1)
    memory = peak_memory()
    runs: dict[str, Any] = {"step": step}
    runs |= {"product": workloads.matrix_product(dtype), "copy": workloads.copy()}
    plain_model = MODELS[model][0] if plain else model
    if plain_model != model:
        runs["plain"] = build(plain_model)[0]
    times = _seconds_a_step(runs, count, repeats)
    if trace:
        with jax.profiler.trace(trace):
            step.run(_TRACED_STEPS)
    return {
        "benchmark": kind,
        **arguments,
        "parameters": parameters,
        **_operations(step, devices, batch_size),
        **_speed(times["step"], batch_size),
        "peak_memory": memory,
        **_step_limits(runs, times, devices, dtype),
        **attention_cost(plain_model, times),
        **machine(),
    }


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _build(
    kind: str,
    options: dict[str, Any],
    batch: dict[str, Any],
    devices: int,
    mining: str,
    name: str,
) -> tuple[workloads.Step, int]:
    """The compiled step of a model, and the number of its parameters that are trained."""
    print(f"compiling the {kind} step of {name}", flush=True)
    model = create_model(name, **options, rngs=nnx.Rngs(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if kind == "train":
        return workloads.train_step(model, batch, devices, mining), parameters
    return workloads.embed_step(model, batch, devices), parameters


def _seconds_a_step(
    runs: dict[str, workloads.Step | workloads.Limit], count: int, repeats: int
) -> dict[str, list[float]]:
    """Of each round, in which all take their turn of ``count`` steps."""
    turns = {name: functools.partial(what.run, count) for name, what in runs.items()}
    rounds = take_turns(turns, repeats)
    return {name: [turn / count for turn in found] for name, found in rounds.items()}


def _operations(step: workloads.Step, devices: int, batch_size: int) -> dict[str, Any]:
    flops = step.cost["flops_per_device"]
    return {"flops": flops and flops * devices / batch_size, **step.cost}


def _speed(times: list[float], batch_size: int) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "step": spread(times),
        "step_ms": 1e3 * median,
        "images_per_second": batch_size / median,
    }


def _step_limits(
    runs: dict[str, Any], times: dict[str, list[float]], devices: int, dtype: str
) -> dict[str, Any]:
    # A CPU's fake devices share its cores, and so its limits.
    together = devices if _on_cpu() else 1
    costs = (runs["step"].cost[f"{name}_per_device"] for name in ("flops", "bytes"))
    flops, moved = (cost and cost * together for cost in costs)
    product, copy = (runs[name].amount / min(times[name]) for name in ("product", "copy"))
    return limits(flops, moved, statistics.median(times["step"]), product, copy, dtype)


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
