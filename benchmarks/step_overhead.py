"""What a training step costs outside the device: dispatch, transfers, logging.

python benchmarks/step_overhead.py [--model=resnet50_cbam --batch=64 --image_size=224 --steps=5]

Runs train.py's loop (``to_devices``, ``train_step``, ``StepMonitor`` with a record every step) on
random images that are in memory already, and divides the CPU seconds of the Python thread by the
wall seconds. XLA computes in threads of its own, and waiting costs no CPU time, so the Python
thread's time is what the device could be kept waiting at most; since steps are dispatched ahead,
it is hidden as long as it is shorter than the step. Left out: decoding and augmentation (other
threads), evaluation, checkpoints, the first two steps. The last line is one JSON document.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from functools import partial

import jax
import numpy as np
from flax import nnx

from cbam_jax import losses, models, steps
from cbam_jax.runlog import RunLog, StepMonitor

_WARM_UP = 2


def random_batches(count: int, batch: int, image_size: int):
    """Yield batches of random pixels, eight images a class."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (batch, image_size, image_size, 3), dtype=np.uint8),
            "label": (np.arange(batch) // 8).astype(np.int32),
            "index": np.arange(batch, dtype=np.int32),
        }


def measure(name: str, batch: int, image_size: int, count: int) -> dict:
    """Time the loop step by step."""
    mesh = steps.data_mesh()
    model = models.create_model(name, rngs=nnx.Rngs(0))
    optimizer = steps.create_optimizer("adamw", 1e-4, weight_decay=1e-4)
    state = steps.create_train_state(model, optimizer, mesh)
    train_step = steps.make_train_step(model, optimizer, losses.triplet_loss)
    batches = list(random_batches(_WARM_UP + count, batch, image_size))
    thread, wall = [time.thread_time()], [time.perf_counter()]
    with tempfile.TemporaryDirectory() as workdir, RunLog(workdir, step=0, total=count) as log:
        monitor = StepMonitor(
            log,
            log_every=1,
            batch_size=batch,
            learning_rate=lambda step: 1e-4,
            warning=partial(losses.collapse_warning, margin=0.2),
        )
        for step, data in enumerate(monitor.waiting(steps.to_devices(batches, mesh)), 1):
            state, scalars = train_step(state, data)
            monitor.step_done(step, scalars, data["index"])
            thread.append(time.thread_time())
            wall.append(time.perf_counter())
        monitor.flush()
        wall[-1] = time.perf_counter()
    python = [1e3 * s for s in np.diff(thread)[_WARM_UP:]]
    return {
        "model": name,
        "batch": batch,
        "image_size": image_size,
        "steps": count,
        "step_ms": round(1e3 * (wall[-1] - wall[_WARM_UP]) / count, 1),
        "python_ms_median": round(statistics.median(python), 2),
        "python_ms_min_max": [round(min(python), 2), round(max(python), 2)],
        "python_share_of_step": round(sum(python) / 1e3 / (wall[-1] - wall[_WARM_UP]), 5),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, jax {jax.__version__}",
    }


def main() -> None:
    """Read the flags, measure, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50_cbam")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5)
    flags = parser.parse_args()
    print(json.dumps(measure(flags.model, flags.batch, flags.image_size, flags.steps)))


if __name__ == "__main__":
    main()
