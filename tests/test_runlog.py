import json

import numpy as np
import pytest

from cbam_jax import runlog
from cbam_jax.runlog import RunLog, StepMonitor, read_log


class Clock:
    """perf_counter that goes on only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runlog.time, "perf_counter", clock)
    return clock


def scalars(loss, gradient_norm=1.0):
    values = {
        "loss": loss,
        "gradient_norm": gradient_norm,
        "distance_positive": 0.5,
        "distance_negative": 0.75,
        "active_fraction": 1.0,
    }
    return {name: np.float32(value) for name, value in values.items()}


def open_monitor(log, *, log_every=2, warning=lambda means: None):
    return StepMonitor(
        log,
        log_every=log_every,
        batch_size=8,
        learning_rate=lambda step: step / 100,
        warning=warning,
        eval_every=100,
    )


def test_log_goes_on_where_the_run_does(tmp_path):
    with RunLog(tmp_path, step=0, total=9) as log:
        for step in (0, 2, 4, 6):
            log.scalars(step, {"loss": step / 8})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # Killed while writing.
    assert [record["step"] for record in read_log(tmp_path)] == [0, 2, 4, 6]
    with RunLog(tmp_path, step=4, total=9) as log:
        log.scalars(6, {"loss": 7.0})
    assert read_log(tmp_path) == [
        {"step": 0, "loss": 0.0},
        {"step": 2, "loss": 0.25},
        {"step": 4, "loss": 0.5},
        {"step": 6, "loss": 7.0},
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_log(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_every_record_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, step=0, total=9) as log:
        log.scalars(1, {"loss": 0.5})
        assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_log_of_another_process_writes_and_prints_nothing(tmp_path, capsys):
    with RunLog(tmp_path, step=0, total=9, active=False) as log:
        log.scalars(1, {"loss": 0.5})
        log.line("not to be seen")
        log.advance()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_no_log_yet(tmp_path):
    assert read_log(tmp_path) == []
    assert read_log(tmp_path / "absent") == []


def test_monitor_records_means_throughput_and_waiting(tmp_path, clock, capsys):
    def batches():
        for number in range(1, 6):
            clock.now += 0.25  # Loading.
            yield number

    with RunLog(tmp_path, step=0, total=5) as log:
        monitor = open_monitor(log)
        for step in monitor.waiting(batches()):
            clock.now += 30.0 if step == 1 else 0.75  # Compiling, then steps.
            monitor.step_done(step, scalars(step / 10), np.arange(8))
            if step == 3:
                with monitor.paused():
                    clock.now += 1000.0
        monitor.flush()
    first, second = read_log(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    assert first["loss"] == pytest.approx((0.1 + 0.2) / 2)
    assert second["loss"] == pytest.approx((0.3 + 0.4) / 2)
    assert (first["learning_rate"], second["learning_rate"]) == (0.02, 0.04)
    # Two steps of one second each lie between the first record and the second, and the pause.
    assert "first step after 30.2 s" in capsys.readouterr().out
    assert monitor.images == 32
    assert second["data_wait_seconds"] + first["data_wait_seconds"] == pytest.approx(1.0)


@pytest.mark.parametrize(("wait", "hints"), [(0.04, 0), (0.08, 1)])
def test_waiting_for_data_is_hinted_at_once_a_run(tmp_path, clock, capsys, wait, hints):
    def batches():
        for number in range(1, 10):
            clock.now += wait
            yield number

    with RunLog(tmp_path, step=0, total=9) as log:
        monitor = open_monitor(log)
        for step in monitor.waiting(batches()):
            clock.now += 1.0 - wait
            monitor.step_done(step, scalars(0.5), np.arange(8))
        monitor.flush()
    printed = capsys.readouterr().out
    assert printed.count("hint: ") == hints
    assert printed.count("8% of the time was spent waiting for data") == hints
    assert printed.count("data.workers") == hints


def test_a_pause_is_left_out_of_the_throughput(tmp_path, clock):
    with RunLog(tmp_path, step=0, total=4) as log:
        monitor = open_monitor(log, log_every=4)
        for step in range(1, 5):
            clock.now += 2.0
            monitor.step_done(step, scalars(0.5), np.arange(8))
            with monitor.paused():
                clock.now += 500.0
    # Three steps of two seconds after the first, which compiled, hold what is timed.
    [record] = read_log(tmp_path)
    assert monitor.seconds == pytest.approx(6.0)
    assert record["images_per_second"] == pytest.approx(monitor.images / 6.0)


@pytest.mark.parametrize("bad", [{"loss": np.nan}, {"loss": 0.1, "gradient_norm": np.inf}])
def test_what_is_not_finite_is_told_with_step_rows_and_statistics(tmp_path, bad):
    with RunLog(tmp_path, step=0, total=9) as log:
        monitor = open_monitor(log)
        monitor.step_done(1, scalars(0.25), np.arange(8))
        monitor.step_done(2, scalars(**bad), np.array([5, 3, 11]))
        with pytest.raises(FloatingPointError) as told, monitor.paused():
            raise AssertionError("nothing may be saved")
    message = str(told.value)
    assert "\n" not in message
    for part in ("step 2", "[5, 3, 11]", "'distance_negative': 0.75", "earlier checkpoints"):
        assert part in message


def test_steps_under_way_are_not_waited_for(tmp_path):
    class Unfinished:
        def __float__(self):
            raise AssertionError("fetched while under way")

    with RunLog(tmp_path, step=0, total=9) as log:
        monitor = open_monitor(log)
        monitor.step_done(1, scalars(0.25), np.arange(8))
        for step in (2, 3):
            monitor.step_done(step, {"loss": Unfinished()}, np.arange(8))
        with pytest.raises(AssertionError, match="under way"):
            monitor.step_done(4, scalars(0.25), np.arange(8))


def test_a_warning_is_printed_with_its_step(tmp_path, capsys):
    with RunLog(tmp_path, step=0, total=9) as log:
        warning = lambda means: "collapsed" if means["loss"] > 0.5 else None  # noqa: E731
        monitor = open_monitor(log, warning=warning)
        for step, loss in enumerate((0.1, 0.2, 0.7, 0.8), start=1):
            monitor.step_done(step, scalars(loss), np.arange(8))
        monitor.flush()
    printed = capsys.readouterr().out
    assert "warning at step 4: collapsed" in printed
    assert "warning at step 2" not in printed
