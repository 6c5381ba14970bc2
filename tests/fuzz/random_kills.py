"""Kill a small run at random moments, go on, and compare its end with an uninterrupted run's.

python tests/fuzz/random_kills.py [--kills=100] [--seed=0] [--folder=DIR]

SIGKILL, and the signals that ask to stop, hit a training of a minute at most at moments drawn from
all of its life: while it starts, compiles, trains, saves and evaluates. Each run is killed and
continued until it has finished; then its parameters, optimizer, log, evaluations, best step and
last line must be those of a run that nothing interrupted. Not collected by pytest: 100 kills take
about half an hour. The last line on stdout is one JSON document.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
# ruff: noqa: E402
sys.path.insert(0, str(HERE.parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

import cv2
import jax
import numpy as np
from flax import nnx

from cbam_jax import command_line, models, training
from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.layers import Conv
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.runlog import read_log

ASKED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOPPED = 75
FIELDS = {
    "data.image_size": 32,
    "data.classes_per_batch": 3,
    "data.images_per_class": 4,
    "model.name": "tiny",
    "model.embedding_dim": 16,
    "optimizer.warmup_steps": 2,
    "train.steps": 40,
    "train.log_every": 7,
    "train.eval_every": 10,
    "train.checkpoint_every": 4,
    "train.ema_decay": 0.9,
    "eval.batch_size": 8,
    "eval.ks": "(5,10)",
}
# Of the machine, not of the run.
TIMES = ("images_per_second", "data_wait_seconds")


class OneLayer(nnx.Module):
    """A backbone that compiles at once: a convolution and its BatchNorm."""

    num_features = 16

    def __init__(self, *, attention, dtype, rngs):
        self.conv = Conv(3, 16, 7, 2, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(16, rngs=rngs)

    def __call__(self, images):
        return nnx.relu(self.bn(self.conv(images)))


def forked(function, log=None):
    """Call a function in a child that has everything imported already; return its process id."""
    if child := os.fork():
        return child
    try:
        if log is not None:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = function() or 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        status = 70
    os._exit(status)


def train(manifest, workdir):
    """Be train.py, with a model of one layer."""
    models.BACKBONES["tiny"], models.MODELS["tiny"] = OneLayer, ("tiny", "")
    jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    sys.argv = ["train.py", "--config=default", f"--config.data.name={manifest}", *fields]
    sys.argv.append(f"--workdir={workdir}")
    return command_line.run(training.main)


def ended(child, seconds=None):
    """Wait for a child to end; its exit status, None where it goes on after ``seconds``."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        number, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def live(manifest, workdir, log, draw, name, lasts):
    """One life of a run: its exit status, and the seconds from the signal to the end or None.

    The signal comes within ``lasts`` seconds of the line that says what is trained, or for one in
    five within those of the start.
    """
    begun = log.seek(0, os.SEEK_END)
    child = forked(lambda: train(manifest, workdir), log)
    if draw.random() > 0.2:
        while b"parameters) on" not in told(log, begun):
            if (status := ended(child, 0.02)) is not None:
                return status, None
    status = ended(child, draw.uniform(0, lasts))
    if status is not None:
        return status, None
    os.kill(child, getattr(signal, name))
    sent = time.monotonic()
    return ended(child), time.monotonic() - sent


def told(log, begun):
    with open(log.name, "rb") as file:
        file.seek(begun)
        return file.read()


def write_document(workdir, log):
    """Write all that two runs must agree on beside the workdir."""
    with Checkpoints(workdir / "checkpoints", best_metric="map@10", read_only=True) as checkpoints:
        last, best = checkpoints.restore("last"), checkpoints.restore("best", optimizer=False)
    records = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_log(workdir)
    ]
    summary = json.loads(Path(log.name).read_text().splitlines()[-1])
    summary = {n: v for n, v in summary.items() if n not in ("workdir", *TIMES)}
    arrays = {"last": last.model, "optimizer": last.optimizer, "best": best.model}
    document = {
        f"{part}.{name}": [array.dtype.str, array.shape, hashlib.sha256(array).hexdigest()]
        for part, items in arrays.items()
        for name, array in items.items()
    }
    document |= {"steps": [last.step, last.data, best.step], "summary": summary}
    document |= {f"record {i}": record for i, record in enumerate(records)}
    document["left behind"] = sorted(p.name for p in workdir.rglob("*") if is_left_behind(p.name))
    workdir.with_suffix(".json").write_text(json.dumps(document))


def document(workdir, log):
    """Return what ``write_document`` writes, in a child: JAX starts no thread here."""
    assert ended(forked(lambda: write_document(workdir, log))) == 0
    return json.loads(workdir.with_suffix(".json").read_text())


def write_photos(folder):
    """Noise of three classes that differ by a shade: nothing is learnt perfectly."""
    rng = np.random.default_rng(11)
    lines = ["path,label,split"]
    for i in range(3 * 2 * 24):
        label, split = i % 3, ("train", "validation")[i % 2]
        image = rng.integers(0, 250, (36, 40, 3)) + 2 * label
        cv2.imwrite(str(folder / f"{i}.png"), image.astype(np.uint8))
        lines.append(f"{i}.png,{'abc'[label]},{split}")
    path = folder / "photos.csv"
    path.write_text("\n".join(lines) + "\n")


def is_left_behind(name):
    return "tmp" in name or name.startswith("partial")


def differences(actual, expected):
    """The names of what differs."""
    names = actual.keys() | expected.keys()
    return sorted(name for name in names if actual.get(name) != expected.get(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of all runs, kept; default: a new one")
    flags = parser.parse_args()
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="random_kills_"))
    return campaign(folder, flags.kills, random.Random(flags.seed))


def campaign(folder, kills, draw):
    """Kill runs below ``folder``; whether anything was found."""
    (folder / "photos").mkdir(parents=True)
    assert ended(forked(lambda: write_photos(folder / "photos"))) == 0
    manifest = folder / "photos" / "photos.csv"
    for name in ("warm", "expected"):  # The first one fills the cache of compiled programs.
        with open(folder / f"{name}.log", "wb+") as log:
            begin = time.monotonic()
            train_it = functools.partial(train, manifest, folder / name)
            assert ended(forked(train_it, log)) == 0, log.name
            lasts = time.monotonic() - begin
    expected = document(folder / "expected", log)
    print(f"a life lasts {lasts:.1f} s", flush=True)
    found, statuses, slowest = [], Counter(), 0.0
    number = run = 0
    while number < kills:
        run += 1
        workdir, status = folder / f"run{run}", None
        with open(folder / f"run{run}.log", "wb+") as log:
            while status != 0:
                name = draw.choice(("SIGKILL", "SIGKILL", *ASKED))
                status, seconds = live(manifest, workdir, log, draw, name, lasts)
                if seconds is not None:
                    number += 1
                    statuses[f"{name}: {status}"] += 1
                    slowest = max(slowest, seconds if name != "SIGKILL" else 0.0)
                number_of = getattr(signal, name)
                if status not in (0, STOPPED, -number_of):
                    found.append(f"run{run}: status {status} after {name}")
                    break
        text = Path(log.name).read_text()
        if "Traceback" in text:
            found.append(f"run{run}: a traceback")
        if status == 0 and (names := differences(document(workdir, log), expected)):
            found.append(f"run{run}: {len(names)} things differ: {names[:5]}")
        print(f"{number} kills, {run} runs, found: {found}", flush=True)
    result = {"kills": number, "runs": run, "statuses": statuses, "found": found}
    print(json.dumps(result | {"slowest_stop_seconds": round(slowest, 1)}))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
