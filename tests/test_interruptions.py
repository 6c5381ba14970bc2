"""Every end of a run, and what the same command makes of it. Steps and evaluations are faked.

That the real ones give the same bits is in test_train.py, and tests/fuzz/random_kills.py kills a
real run at random moments.
"""

import functools
import json
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import make_config, write_photos

from cbam_jax import (
    InputError,
    config_checks,
    config_files,
    evaluation,
    models,
    run_summary,
    runs,
    stopping,
    training,
    workdirs,
)
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.runlog import read_log
from cbam_jax.stopping import Stop, Stopped

# Validation map@10 after each evaluated step; the best one is of step 4.
VALUES = {0: 0.1, 2: 0.3, 4: 0.9, 6: 0.5}


class Pixels(nnx.Module):
    """A backbone that nothing is compiled for."""

    num_features = 3

    def __init__(self, *, attention, dtype, rngs):
        del attention, dtype, rngs
        self.scale = nnx.Param(np.float32(1))

    def __call__(self, images):
        return images * self.scale


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_photos(
        tmp_path_factory.mktemp("photos"), splits=("train", "validation"), count=6
    )  # fmt: skip


@pytest.fixture
def config(manifest, monkeypatch):
    """Six steps of eight images, evaluated every two; nothing is compiled."""
    monkeypatch.setitem(models.BACKBONES, "tiny", Pixels)
    monkeypatch.setitem(models.MODELS, "tiny", ("tiny", ""))
    monkeypatch.setattr(training, "make_train_step", lambda *_: functools.partial(step, {}))
    monkeypatch.setattr(runs, "evaluate_split", measured)
    monkeypatch.setattr(training.steps, "make_embed_step", lambda *_: None)
    return make_config(
        manifest,
        **{
            "model.name": "tiny",
            "model.embedding_dim": None,
            "data.classes_per_batch": 2,
            "data.images_per_class": 4,
            "optimizer.warmup_steps": 1,
            "train.steps": 6,
            "train.eval_every": 2,
            "train.checkpoint_every": 3,
            "train.log_every": 4,
        },
    )


def step(before, state, batch):
    """A step that counts; ``before[n]`` is called before the n-th."""
    number = int(state.step) + 1
    before.get(number, lambda: None)()
    loss = 1 / number + float(np.mean(np.asarray(batch["index"])))
    scalars = {"loss": np.float32(loss), "gradient_norm": np.float32(1)}
    scalars |= {name: np.float32(1) for name in ("embedding_spread", "valid_anchors")}
    return state._replace(step=np.int32(number)), scalars


def measured(config, dataset, embed_step, arrays, mesh, *, stop=None, at=lambda: None):
    """An evaluation whose result is that of ``VALUES``."""
    for _ in stop.checked(range(2)):
        at()
    number = measured.step
    metrics = {"map@5": VALUES[number], "map@10": VALUES[number], "precision@10": 0.5}
    return evaluation.Evaluation({"metrics": metrics}, *[None] * 5), None


@pytest.fixture(autouse=True)
def follow(monkeypatch):
    """Let the faked evaluation know the step."""
    evaluate = training.evaluate

    def followed(run, state, step):
        measured.step = step
        return evaluate(run, state, step)

    monkeypatch.setattr(training, "evaluate", followed)


def at_step(monkeypatch, number, action):
    """Have ``action`` called before a step."""
    made = functools.partial(step, {number: action})
    monkeypatch.setattr(training, "make_train_step", lambda *_: made)


def train(config, workdir, stop=None):
    with stop or Stop() as entered:
        return training.train_and_evaluate(config, workdir, stop=entered)


def left(workdir):
    """What a run leaves that must not depend on its interruptions."""
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        last = checkpoints.restore("last")
        best = checkpoints.best_step()
    times = ("images_per_second", "data_wait_seconds")
    log = [{n: v for n, v in r.items() if n not in times} for r in read_log(workdir)]
    return last.step, last.data, best, log, (workdir / "config.json").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Where a run lies that nothing interrupts, once there is one."""
    return tmp_path_factory.mktemp("runs") / "uninterrupted"


@pytest.fixture
def expected(config, uninterrupted):
    """What a run leaves that nothing interrupts, and its summary."""
    if not uninterrupted.exists():
        train(config, uninterrupted)
    summary = train(config, uninterrupted)  # Finished: nothing more is done.
    assert (summary["finished"], summary["best_step"]) == (True, 4)
    log = read_log(uninterrupted)
    assert [r["step"] for r in log if "validation/map@10" in r] == [0, 2, 4, 6]
    assert [r["step"] for r in log if "loss" in r] == [4]
    return left(uninterrupted), summary


def assert_goes_on_to_the_same(config, workdir, expected):
    summary = train(config, workdir)
    assert left(workdir) == expected[0]
    timing = {"workdir": None, "images_per_second": None}
    assert summary | timing == expected[1] | timing


def stop_now(stop):
    return functools.partial(setattr, stop, "_signal", "SIGTERM")


# --- asked to stop ---


@pytest.mark.parametrize("number", [1, 4, 5, 6])
def test_a_stop_at_any_step_makes_up_the_evaluation_that_was_due(
    number, config, expected, tmp_path, monkeypatch, capsys
):
    stop = Stop()
    at_step(monkeypatch, number, stop_now(stop))
    summary = train(config, tmp_path / "run", stop)
    # Without its last evaluation a run is not finished.
    assert (summary["step"], summary["finished"]) == (number, False)
    assert f"stopped by SIGTERM; step {number} is saved" in capsys.readouterr().out
    at_step(monkeypatch, None, None)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


@pytest.mark.parametrize("evaluated", [4, 6])
def test_a_stop_during_an_evaluation_leaves_it_at_once(
    evaluated, config, expected, tmp_path, monkeypatch
):
    stop, seen = Stop(), []

    def at():
        if measured.step == evaluated:
            seen.append(evaluated)
            stop._signal = "SIGUSR1"

    monkeypatch.setattr(runs, "evaluate_split", functools.partial(measured, at=at))
    summary = train(config, tmp_path / "run", stop)
    assert seen == [evaluated]  # The second batch was not asked for.
    assert (summary["step"], summary["finished"]) == (evaluated, False)
    monkeypatch.setattr(runs, "evaluate_split", measured)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_a_stop_before_the_first_step_leaves_a_run_that_starts_anew(
    config, expected, tmp_path, monkeypatch
):
    stop = Stop()
    monkeypatch.setattr(runs, "evaluate_split", functools.partial(measured, at=stop_now(stop)))
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", stop)
    monkeypatch.setattr(runs, "evaluate_split", measured)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_time_that_is_up_stops_like_a_signal(config, expected, tmp_path, monkeypatch):
    stop = Stop(after=3600)
    at_step(monkeypatch, 3, lambda: setattr(stop, "_end", 0.0))
    assert train(config, tmp_path / "run", stop)["step"] == 3
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_a_stopped_run_has_a_status_of_its_own(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "parse_flags", lambda: (config, tmp_path / "run", 3600))
    stop = Stop(after=3600)
    monkeypatch.setattr(training, "take_signals", lambda **_: stop)
    at_step(monkeypatch, 2, stop_now(stop))
    assert training.main() == stopping.STATUS == 75
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] is False
    stop._signal = None
    assert training.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] is True
    assert training.main() == 0  # Finished already.


# --- ends that nobody asked for ---


def failing(error):
    def fail():
        raise error

    return fail


ERRORS = {
    "photo": (InputError("photos.csv: a.png cannot be decoded"), InputError, "a.png cannot be"),
    "memory": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."),
        InputError,
        # A chunk or batch below 8 could not be shared by the 8 devices of the tests.
        "allocating 99 bytes.* with a batch of 8 images of 32 pixels: set "
        "--config.data.image_size=32, --config.model.dtype=bfloat16; for an evaluation "
        "--config.eval.batch_size=4; .*nvidia-smi.* XLA_PYTHON_CLIENT_MEM_FRACTION",
    ),
    "host memory": (MemoryError("Unable to allocate 9 GiB"), InputError, "allocate 9 GiB"),
    "bug": (ZeroDivisionError("ours"), ZeroDivisionError, "ours"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_the_last_sound_step_is_saved_before_an_error_leaves(
    kind, config, expected, tmp_path, monkeypatch, capsys
):
    error, raised, message = ERRORS[kind]
    at_step(monkeypatch, 6, failing(error))
    with pytest.raises(raised, match=message) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert left(tmp_path / "run")[0] == 5
    assert "step 5 is saved: the same command goes on" in capsys.readouterr().out
    at_step(monkeypatch, None, None)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


@pytest.mark.slow
def test_what_needs_less_memory_is_what_a_run_would_take(monkeypatch):
    fields = {"data.classes_per_batch": 9, "data.images_per_class": 5, "model.name": "resnet18"}
    for devices, batch, flags in (
        (1, 45, ["train.chunk_size=15", "data.image_size=160", "data.images_per_class=2"]),
        (3, 45, ["train.chunk_size=15", "data.image_size=160", "data.images_per_class=2"]),
        (45, 45, ["data.image_size=160"]),
    ):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        config = make_config("photos.csv", **fields, **{"data.image_size": 224})
        told = [f"--config.{flag}" for flag in (*flags, "model.dtype=bfloat16")]
        assert workdirs._smaller(config, batch) == told
        for flag in flags:
            config_checks.check_config(config_files.override(config, [f"--config.{flag}"]))


def test_an_error_during_an_evaluation_loses_no_step(config, expected, tmp_path, monkeypatch):
    def at():
        if measured.step == 4:
            raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(runs, "evaluate_split", functools.partial(measured, at=at))
    with pytest.raises(InputError, match="--config.eval.batch_size=4"):
        train(config, tmp_path / "run")
    assert left(tmp_path / "run")[0] == 4
    monkeypatch.setattr(runs, "evaluate_split", measured)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_a_worker_that_got_the_signal_too_is_a_stop(config, expected, tmp_path, monkeypatch):
    stop = Stop()

    def die():
        stop._signal = "SIGTERM"
        raise InputError("a loading process ended")

    at_step(monkeypatch, 5, die)
    assert train(config, tmp_path / "run", stop)["step"] == 4
    at_step(monkeypatch, None, None)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_a_full_disk_is_one_line_that_names_what_is_saved(config, expected, tmp_path, monkeypatch):
    begin = Checkpoints.save

    def save(self, step, **items):
        if step == 4:
            refuse = failing(ValueError("OUT_OF_RANGE: Error writing\nto disk"))
            monkeypatch.setattr(self._manager, "save", lambda *_, **__: refuse())
        begin(self, step, **items)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(InputError, match=r"OUT_OF_RANGE: .* make room .* saved: step 2, 3$"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "save", begin)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


def test_a_log_that_cannot_be_written_is_one_line(config, expected, tmp_path, monkeypatch):
    full = failing(OSError(28, "No space left on device"))
    scalars = training.RunLog.scalars

    def write(self, step, values):
        return full() if step == 4 else scalars(self, step, values)

    monkeypatch.setattr(training.RunLog, "scalars", write)
    with pytest.raises(InputError, match="run cannot be written .No space left on device"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(training.RunLog, "scalars", scalars)
    assert_goes_on_to_the_same(config, tmp_path / "run", expected)


# --- what was measured ---


@pytest.mark.parametrize("lost", ["metrics", "metrics/metrics"])
def test_lost_metrics_of_a_checkpoint_do_not_change_the_best(
    lost, config, expected, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    path = workdir / "checkpoints" / "4" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with runs.open_checkpoints(config, workdir, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 4
    assert_goes_on_to_the_same(config, workdir, expected)
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        assert checkpoints.best_step() == 4


def test_a_finished_run_makes_up_its_last_evaluation(config, expected, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    log = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("\n".join(log[:-1]) + "\n")
    shutil.rmtree(workdir / "checkpoints" / "6" / "metrics")
    assert_goes_on_to_the_same(config, workdir, expected)


def test_a_mean_over_no_query_is_null_in_the_log_and_a_dash_in_words(config, tmp_path, monkeypatch):
    monkeypatch.setitem(VALUES, 4, float("nan"))
    workdir = tmp_path / "run"
    summary = train(config, workdir)
    assert summary["best_step"] == 6

    def refuse(name):
        raise AssertionError(name)

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["validation/map@10"] for r in records if r["step"] == 4 and "loss" not in r] == [None]
    metrics = json.loads((workdir / "checkpoints" / "6" / "metrics" / "metrics").read_text())
    assert metrics["map@10"] == 0.5
    told = run_summary.tell(summary | {"best": {"map@10": None}, "untrained": {"map@10": None}})
    assert "map@10        - -> -" in told


@pytest.mark.parametrize("ks", [(1, 10), (1, 10, 12)])
def test_ks_without_5_are_told(ks, config, tmp_path, monkeypatch):
    config.eval.ks = ks
    summary = train(config, tmp_path)
    assert {"map@1", "map@10"} <= summary["best"].keys()
    assert "map@1 " in run_summary.tell(summary)


# --- where it is called ---


def test_a_thread_and_a_str_will_do(config, expected, tmp_path):
    summaries = []
    workdir = str(tmp_path / "run")
    thread = threading.Thread(
        target=lambda: summaries.append(training.train_and_evaluate(config, workdir))
    )
    thread.start()
    thread.join()
    assert summaries[0]["finished"]
    assert left(tmp_path / "run") == expected[0]


def test_several_processes_leave_the_signals_to_jax(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with training.take_signals(exits=True) as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        assert stop.received is None
    monkeypatch.undo()
    with training.take_signals():
        assert signal.getsignal(signal.SIGTERM) is not before


# --- words ---


def test_training_that_made_it_worse_says_so():
    summary = {
        "workdir": "my run", "step": 6, "finished": True, "images_seen": 48,
        "split": "validation", "best_step": 4,
        "untrained": {"map@10": 0.5}, "best": {"map@10": 0.25},
    }  # fmt: skip
    told = run_summary.tell(summary)
    assert "map@10        0.5000 -> 0.2500" in told
    assert "training made it worse than the untrained network (map@10)" in told
    assert "worse" not in run_summary.tell(summary | {"best": {"map@10": 0.75}})
    assert "worse" not in run_summary.tell(summary | {"finished": False})


def test_after_the_third_step_the_rest_is_told(config, tmp_path, capsys, monkeypatch):
    train(config, tmp_path / "short")
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("about ")]
    assert "for the 3 steps that are left" in line
    assert "GB" in line
    assert "step      4 of 6  loss" in printed
    assert "long for a CPU" not in printed
    monkeypatch.setattr(training.StepMonitor, "seconds_left", lambda *_: 9000.0)
    train(config, tmp_path / "long")
    printed = capsys.readouterr().out
    assert "about 2 h 30 min for the 3 steps" in printed
    assert "that is long for a CPU. Shorter: --config.train.steps=1; " in printed
    assert "--stop_after=45m" in printed
