"""Runs of several processes beside one: the same losses, metrics, checkpoints; and their ends.

The processes are of this machine, joined as those of a cluster are; models and photos are tiny.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_photos

from cbam_jax.checkpoint import Checkpoints
from cbam_jax.runlog import read_log

pytestmark = pytest.mark.processes
DRIVER = Path(__file__).with_name("train_driver.py")
STEPS = 20


@contextlib.contextmanager
def starter(folder):
    """What starts train.py in a process of its own with so many devices; ends those that are left.

    Photos are drawn into ``folder``, and compiled steps are shared there.
    """
    photos, cache = write_photos(folder, splits=("train", "validation")), folder / "compiled"
    quick = os.environ.get("XLA_FLAGS", "")  # conftest.py's; of a flag given twice the last counts.
    running = []

    def start(workdir, *flags, devices=1, **options):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{quick} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, str(DRIVER), json.dumps(options), *config(photos), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command.append(f"--workdir={workdir}")
        running.append(subprocess.Popen(command, env=environment, **pipes))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with starter(tmp_path_factory.mktemp("photos")) as start:
        yield start


def config(photos):
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
    }
    return ["--config=quickstart", *(f"--config.{name}={v}" for name, v in fields.items())]


def finish(*processes, within=480):
    """Wait for all; exit status, stdout and stderr of each."""
    outputs = [process.communicate(timeout=within) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def together(start, workdir, count, *flags, devices=1, options=None):
    """Start so many processes that know of each other; ``options`` are of one alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--distributed", f"--coordinator={address}", f"--num_processes={count}", *flags]
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
    began[2].wait()
    killed = time.monotonic()
    results = finish(*began)
    assert time.monotonic() - killed < 60
    for number, (status, stdout, stderr) in enumerate(results):
        assert f"process {number} of 4, on {os.uname().nodename}: 1 of 4 cpu devices" in stdout
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
    began[number].wait()
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
