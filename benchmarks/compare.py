"""Ours beside PyTorch in one run: ``python benchmarks/compare.py {train,embed}``.

Needs ``pip install torch`` and torchvision. Two processes, one a library, so that neither's threads
spin while the other computes: each builds its step (``cbam_jax.benchmark``, ``torch_peer.py``),
then they take turns, a step to warm up and ``--steps_per_repeat`` that are timed, the order
swapped from round to round, while the other waits. A large matrix product takes its turns as well,
in both libraries: the machine's own limit is the faster one's best. ``ratio`` is their seconds
over ours in the same round: above 1 ours is faster. The last line on stdout is JSON.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.step_flags import add_step_flags, complete
from cbam_jax import command_line
from cbam_jax.benchmark import spread

LIBRARIES = ("ours", "torch")
_PAUSE_S = 0.2


def prepare_ours(
    kind: str, *, model: str, image_size: int, batch_size: int, dtype: str, images_per_class: int
) -> tuple[dict[str, Callable[[int], Any]], dict[str, Any]]:
    """What ``torch_peer.prepare`` gives, of ours."""
    import jax
    from flax import nnx

    from cbam_jax import benchmark
    from cbam_jax.models import create_model

    built = create_model(model, dtype=jax.numpy.dtype(dtype), rngs=nnx.Rngs(0))
    batch = benchmark.random_batch(batch_size, image_size, images_per_class)
    make = {"train": benchmark.train_step, "embed": benchmark.embed_step}[kind]
    step = make(built, batch)
    step.run(1)
    memory = benchmark.peak_memory()
    product = benchmark.matrix_product(dtype)
    return {"step": step.run, "product": product.run}, {
        **step.cost,
        "peak_memory": memory,
        "product_flops": product.amount,
        "platform": jax.default_backend(),
        **benchmark.machine(),
    }


def serve(parser: argparse.ArgumentParser, library: str, kind: str, options: dict) -> None:
    """One library: tells its facts, then the seconds of each turn that it is asked for."""
    answers, sys.stdout = sys.stdout, sys.stderr  # What libraries print is no answer.

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    if library == "ours":
        import jax

        options = complete(parser, options, on_cpu=jax.default_backend() == "cpu")
        prepare = prepare_ours
    else:
        from benchmarks.torch_peer import prepare
    rest = {n: v for n, v in options.items() if n not in ("repeats", "steps_per_repeat")}
    runs, facts = prepare(kind, **rest)
    answer({"options": options, "facts": facts})
    for line in sys.stdin:
        name, count = line.split()
        runs[name](1)
        start = time.perf_counter()
        runs[name](int(count))
        answer({"seconds": (time.perf_counter() - start) / int(count)})


@contextlib.contextmanager
def started(library: str, kind: str, options: dict[str, Any]) -> Iterator[subprocess.Popen]:
    # Two libraries share a GPU: ours would take three quarters of its memory at once.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6", **os.environ}
    command = [sys.executable, __file__, kind, "--serve", library, json.dumps(options)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def read(process: subprocess.Popen, library: str) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        process.wait()
        sys.exit(f"error: {library} ended with status {process.returncode}, as told above")
    return json.loads(line)


def turn(process: subprocess.Popen, library: str, name: str, count: int) -> float:
    time.sleep(_PAUSE_S)  # Threads keep a core busy for a while after their work.
    process.stdin.write(f"{name} {count}\n")
    process.stdin.flush()
    return read(process, library)["seconds"]


def rounds(processes: dict[str, subprocess.Popen], repeats: int, count: int) -> dict:
    """Seconds by library of each turn: of a step, and of a product."""
    times = {name: {library: [] for library in processes} for name in ("step", "product")}
    for i in range(repeats):
        for library in (LIBRARIES, LIBRARIES[::-1])[i % 2]:
            for name, found in times.items():
                found[library].append(turn(processes[library], library, name, count))
        ours, theirs = (times["step"][library][-1] for library in LIBRARIES)
        print(
            f"round {i + 1} of {repeats}: ours {1e3 * ours:.1f} ms a step, torch "
            f"{1e3 * theirs:.1f} ms, ratio {theirs / ours:.3f}",
            flush=True,
        )
    return times


def compare(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        processes, facts = {}, {}
        for library in LIBRARIES:
            print(f"{library}: building and compiling", flush=True)
            processes[library] = stack.enter_context(started(library, kind, options))
            told = read(processes[library], library)
            # The second takes the first's, with the defaults of the platform.
            options, facts[library] = told["options"], told["facts"]
        platforms = {library: facts[library]["platform"] for library in LIBRARIES}
        if len(set(platforms.values())) > 1:
            sys.exit(f"error: nothing to compare on different devices: {platforms}")
        times = rounds(processes, options["repeats"], options["steps_per_repeat"])
    ratios = [t / o for o, t in zip(*(times["step"][x] for x in LIBRARIES), strict=True)]
    sides = {}
    for library in LIBRARIES:
        step = spread(times["step"][library])
        speed = facts[library]["product_flops"] / min(times["product"][library])
        sides[library] = {
            "images_per_second": options["batch_size"] / step["median"],
            "step_ms": 1e3 * step["median"],
            "step": step,
            "product_flops_per_second": speed,
            **facts[library],
        }
    limit = max(side["product_flops_per_second"] for side in sides.values())
    flops = facts["ours"]["flops_per_device"]
    return {
        "benchmark": f"compare_{kind}",
        **options,
        "ratio": spread(ratios),
        "images_per_second": {x: sides[x]["images_per_second"] for x in LIBRARIES},
        # Ours, of the faster product of the two.
        "share_of_product": flops and flops / sides["ours"]["step"]["median"] / limit,
        **sides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("train", "embed"))
    add_step_flags(parser, repeats=7)
    parser.add_argument("--output", type=Path, help="file for the JSON document as well")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    kind, output, serving = (options.pop(name) for name in ("kind", "output", "serve"))
    if serving:
        return serve(parser, serving[0], kind, json.loads(serving[1]))
    for library in ("torch", "torchvision"):
        if importlib.util.find_spec(library) is None:
            parser.error(f"{library} is not installed: pip install torch torchvision")
    complete(parser, options, on_cpu=True)
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output={output}: {error.strerror}; give a file to write to")
    result = compare(kind, options)
    low, middle, high = (result["ratio"][name] for name in ("min", "median", "max"))
    print(f"{kind}: {middle:.3f} x torch's speed ({low:.3f} to {high:.3f})")
    if output is not None:
        command_line.write_json(output, result)
    print(command_line.to_json(result))
    return None


if __name__ == "__main__":
    main()
