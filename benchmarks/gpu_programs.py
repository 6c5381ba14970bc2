"""The programs that an H100 would run, compiled on a machine without a GPU, and what holds of them.

python benchmarks/gpu_programs.py [--check | --report | --update] [embed train train8 search]

Needs, beside flax and optax, XLA's compiler for CUDA and NVIDIA's assembler, 223 MB, and neither a
driver nor a toolkit (any version of JAX, but the figures are of one):

    pip install jax==0.10.2 jax-cuda12-plugin==0.10.2 nvidia-cuda-nvcc-cu12==12.9.86

Passes, fusions, layouts and collectives are those of a GPU. Autotuning is not: on a GPU a product
may become a call of cuBLAS. Nothing is run, so nothing is said of values or of time. Embedding is
compiled with BatchNorm folded (``CBAM_JAX_FOLD_BATCH_NORM=1``).

``--check`` ends with status 1 where a program breaks a rule (``rules``), or has other figures than
``gpu_programs.json`` by more than 1 %: a change that means to writes them anew with ``--update``.
``--report`` prints them. Where JAX lacks the experimental API, all of it is skipped.

Planted in real programs, ResNet10 with CBAM and 64 images of 64 px: the loss's product at the
default precision broke the rule of TF32 (32 of its instructions in the kernels), a sum in float64
that of float64, a loss's scan over all embeddings, on 8 devices, that of loops (2 operations
between them). These break no rule, but change the figures: one more sum over the devices (22
all-reduces for 21, and 5 kernels more), a CPU's forms (in embedding 7 figures, of the bytes 0.22
for 0.12 GB).
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cbam_jax import losses, model_state, models, steps
from cbam_jax.backbones import batch_norm
from cbam_jax.benchmark import collectives, given_flops, kernels
from cbam_jax.search import groups, pairs, passes, shards, types

FIGURES = pathlib.Path(__file__).with_suffix(".json")
_TOLERANCE = 0.01
# An H100's description in XLA's terms, from its specs/h100_sxm.txtpb. Without cub_version, which
# would have it ask the driver how a large sort is best done.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What the layers and the kernels are asked of: the README's GPU recipe, and its search.
_BATCH, _PIXELS = 256, 224
_QUERIES, _GALLERY, _WIDTH, _K = 10_000, 1_000_000, 512, 20


def described_devices(count: int) -> list[Any]:
    """H100s that programs can be compiled for."""
    from jax.experimental import topologies

    shape = f"1x1x{count}"  # Slices, hosts, devices.
    found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape)
    return list(found.devices)


def described_mesh(count: int) -> Mesh:
    return Mesh(np.array(described_devices(count)), ("data",), axis_types=(AxisType.Auto,))


def shaped(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes in place of arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=sharding), tree
    )


def embed_program(dump: pathlib.Path) -> dict[str, Any]:
    mesh = described_mesh(1)
    model, images = _model(), _images(mesh)
    _, params, stats, _ = model_state.split(model)
    arrays = shaped((params, stats), NamedSharding(mesh, PartitionSpec()))
    return built(dump, steps.make_embed_step(model, mesh), *arrays, {"image": images})


def train_program(dump: pathlib.Path, devices: int = 1) -> dict[str, Any]:
    mesh = described_mesh(devices)
    model, optimizer = _model(), steps.create_optimizer("adamw", 1e-3, weight_decay=1e-4)
    _, params, stats, _ = model_state.split(model)
    count, opt_state = np.zeros((), np.int32), jax.eval_shape(optimizer.init, params)
    state = steps.TrainState(count, params, stats, opt_state, None)
    labels = jax.ShapeDtypeStruct((_BATCH,), jnp.int32, sharding=_images(mesh).sharding)
    batch = {"image": _images(mesh), "label": labels}
    loss = partial(losses.triplet_loss, mining="batch_hard")
    step = steps.make_train_step(model, optimizer, loss, mesh=mesh)
    return built(dump, step, shaped(state, NamedSharding(mesh, PartitionSpec())), batch)


def _model() -> nnx.Module:
    """Its shapes, of which nothing is drawn."""
    build = partial(models.create_model, "resnet50_cbam", dtype=jnp.bfloat16)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def _images(mesh: Mesh) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct((_BATCH, _PIXELS, _PIXELS, 3), jnp.uint8, sharding=sharding)


def search_programs(dump: pathlib.Path) -> dict[str, Any]:
    """Each program of a search, and how often the lowest bounds are selected in all."""
    (device,) = described_devices(1)
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    gpu = argparse.Namespace(platform="gpu")
    query_block, gallery_block = passes.block_sizes(gpu, (_QUERIES, _WIDTH), None, None)
    tiles = shards.query_tiles(_QUERIES, query_block)
    size = groups.group_size(_K, _GALLERY)
    kept = groups._blocks_kept("gpu", tiles, gallery_block, size)
    rows = shards.block_rows(_GALLERY, gallery_block)
    blocks = -(-_GALLERY // rows)
    found: dict[str, Any] = {"selections": len(tiles) * -(-blocks // kept)}
    t, labels = len(tiles[0]), types.Labels(array((rows,), jnp.int32), None, None)
    for dtype in passes.FIRST_PASSES:
        side = array((t, _WIDTH), dtype), None, types.Labels(None, None, None)
        block = array((rows, _WIDTH), dtype), array((rows,), jnp.float32), array((), jnp.int32)
        program = groups._minima_program(dtype)
        found[f"minima_{dtype}"] = built(dump, program, *side, *block, labels, size=size)
    count, bounds = passes._candidates(_K, "bfloat16"), array((-(-rows // size), t), jnp.int32)
    lowest = types.Lowest(*[array((t, count), jnp.int32)] * 3)
    kept_blocks = [(array((), jnp.int32), bounds, bounds)] * kept
    found["select"] = built(dump, groups._select, lowest, kept_blocks, size=size)
    with jax.enable_x64(True):
        x, y = array((_QUERIES, _WIDTH), jnp.float32), array((_GALLERY, _WIDTH), jnp.float32)
        chosen = array((16, 51), jnp.int32), array((16, 51, _K), jnp.int32)
        found["distances"] = built(dump, pairs._distances, x, y, *chosen, metric="euclidean")
    return found


def built(dump: pathlib.Path, function: Any, *arguments: Any, **static: Any) -> dict[str, Any]:
    """Compile a jitted function for shapes on described devices; what its program is like."""
    shutil.rmtree(dump, ignore_errors=True)
    start = time.perf_counter()
    lowered = function.lower(*arguments, **static)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    ptx = [file.read_text() for file in dump.glob("*.ptx")]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "tflop": round(given_flops(lowered) / 1e12, 3),
        "temporary_gib": round(temporary / 2**30, 3),
        **facts(compiled.as_text(), ptx),
        "seconds": round(seconds, 1),
    }


def facts(text: str, ptx: list[str]) -> dict[str, Any]:
    """What a program's text and its kernels' PTX say of it."""
    count, moved = kernels(text)
    entry = text.index("\nENTRY ")
    loops = collectives(text[:entry])
    return {
        "kernels": count,
        "gigabytes": round(moved / 1e9, 2),
        "calls": dict(
            sorted(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text)).items())
        ),
        "convolutions": convolutions(text),
        "float64": len(re.findall(r"= \(?f64\[", text)),
        "to_host": len(re.findall(r" (?:infeed|outfeed|send|recv)\(|callback", text)),
        "conditionals": len(re.findall(r" conditional\(", text)),
        "sorts": len(re.findall(r" sort\(", text)),
        "collectives": {kind: c["count"] for kind, c in collectives(text[entry:]).items()},
        "collectives_in_loops": sum(found["count"] for found in loops.values()),
        "tf32": sum(kernel.count(".tf32") for kernel in ptx),
        "bfloat16_products": sum(kernel.count(".bf16.bf16") for kernel in ptx),
        "float32_products": sum(kernel.count("fma.rn.f32") for kernel in ptx),
    }


def convolutions(text: str) -> list[str]:
    """Return the dtype and the layouts of each kind of convolution that cuDNN is called for."""
    lines = [line for line in text.splitlines() if 'custom_call_target="__cudnn$conv' in line]
    parts = (r"= \(?(\w+)\[", r"dim_labels=([\w>-]+)")
    return sorted({" ".join(re.search(part, line)[1] for part in parts) for line in lines})


def rules(name: str, found: dict[str, Any]) -> list[str]:
    """Return the rules that a program breaks, whatever its figures."""
    if name == "search":
        return _search_rules(found)
    calls = [c for c in found["calls"] if not c.startswith(("__cudnn$conv", "__cublas"))]
    broken = {
        "calls something other than cuDNN's convolutions and cuBLAS": calls,
        "has convolutions other than bfloat16, NHWC": [
            c for c in found["convolutions"] if c != "bf16 b01f_o01i->b01f"
        ],
        "has no convolution by cuDNN": not found["convolutions"],
        "computes in float64": found["float64"],
        "moves data to or from the host": found["to_host"],
        "asks the host which way to go": found["conditionals"],
        "has float32 products rounded to TF32": found["tf32"],
        "has operations between devices in a loop": found["collectives_in_loops"],
        "has operations between devices, of which there is one": (
            not name.endswith("8") and found["collectives"]
        ),
    }
    return _named(name, broken)


def _search_rules(found: dict[str, Any]) -> list[str]:
    """What the proofs of the bounds assume of products, and that there is one a block."""
    broken = {}
    for name, program in found.items():
        if name != "selections":
            broken |= {
                f"{name}: has products rounded to TF32": program["tf32"],
                f"{name}: moves data to or from the host": program["to_host"],
                f"{name}: {'lacks' if name == 'distances' else 'has'} float64": (
                    (name == "distances") == (program["float64"] == 0)
                ),
            }
    bfloat16, float32 = found["minima_bfloat16"], found["minima_float32"]
    broken |= {
        "minima_bfloat16: has no tensor cores' products": not bfloat16["bfloat16_products"],
        "minima_float32: has no float32 products": not float32["float32_products"],
    }
    return _named("search", broken)


def _named(name: str, broken: dict[str, Any]) -> list[str]:
    return [
        f"{name} {rule}" + ("" if value is True else f": {value}")
        for rule, value in broken.items()
        if value
    ]


def differences(name: str, found: Any, recorded: Any) -> list[str]:
    """Return the figures that are not those recorded; of seconds, none."""
    if isinstance(found, dict):
        known = recorded if isinstance(recorded, dict) else {}
        keys = dict.fromkeys((*found, *known))
        return [
            line
            for key in keys
            if key != "seconds"
            for line in differences(f"{name} {key}", found.get(key), known.get(key))
        ]
    if isinstance(found, int | float) and isinstance(recorded, int | float):
        same = abs(found - recorded) <= _TOLERANCE * abs(recorded)
    else:
        same = found == recorded
    return [] if same else [f"{name}: {found}, in {FIGURES.name} {recorded}"]


def report(found: dict[str, Any]) -> str:
    """A table of programs, one a row."""
    columns = ("kernels", "gigabytes", "temporary_gib", "tflop")
    lines = [" ".join(("program                 ", *columns, "collectives (in loops)"))]
    programs = {name: what for name, what in found.items() if name != "search"}
    parts = found.get("search", {})
    programs |= {f"search {n}": part for n, part in parts.items() if n != "selections"}
    for name, program in programs.items():
        cells = [f"{program[column]:>{len(column)}}" for column in columns]
        between = f"{sum(program['collectives'].values())} ({program['collectives_in_loops']})"
        lines.append(" ".join((f"{name:24}", *cells, between)))
    if parts:
        lines.append(f"a search selects {parts['selections']} times")
    return "\n".join(lines)


PROGRAMS = {
    "embed": embed_program,
    "train": train_program,
    "train8": partial(train_program, devices=8),
    "search": search_programs,
}


def without_a_gpu(flags: str) -> None:
    """Have XLA ask for no GPU and take these flags; have the layers take a GPU's forms."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = flags
    os.environ[batch_norm.FOLD_VARIABLE] = "1"  # Of training, where nothing is frozen, no change.
    jax.config.update("jax_platforms", "cpu")
    jax.default_backend = lambda: "gpu"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="program", help=", ".join(PROGRAMS))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="status 1 where rules are broken")
    what.add_argument("--report", action="store_true", help="print a table (the default)")
    what.add_argument("--update", action="store_true", help=f"write {FIGURES.name} anew")
    options = parser.parse_args(arguments)
    if unknown := set(options.programs) - set(PROGRAMS):
        parser.error(f"there is no program {min(unknown)!r}: {', '.join(PROGRAMS)}")
    with tempfile.TemporaryDirectory() as dump:
        without_a_gpu(f"--xla_dump_to={dump} --xla_dump_hlo_as_text")  # With it the PTX.
        try:
            described_devices(1)
        except ImportError as error:
            print(f"skipped: {error}")
            return 0
        found = {n: PROGRAMS[n](pathlib.Path(dump)) for n in options.programs or PROGRAMS}
    print(report(found))
    recorded = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if options.update:
        FIGURES.write_text(json.dumps(recorded | found, indent=1) + "\n")
        recorded = found
    faults = [fault for name, program in found.items() for fault in rules(name, program)]
    for name, program in found.items():
        faults += differences(name, program, recorded.get(name))
    if options.check or options.update:
        print(*faults, sep="\n")
    return int(bool(faults) and (options.check or options.update))


if __name__ == "__main__":
    sys.exit(main())
