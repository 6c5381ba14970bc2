"""What is told of how far something is, by a clock of the test's own."""

import pytest

from cbam_jax import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_tells_rate_and_time_left_of_batches(clock, capsys):
    batches = [["a"] * 30, ["b"] * 30, ["c"] * 30, ["d"] * 10]
    told = progress.progress(batches, "adding", total=100, unit=" photos", size=len)
    for seen, _ in enumerate(told):
        assert len(capsys.readouterr().err.splitlines()) == (seen == 2)
        clock[0] += 6
    assert capsys.readouterr().err == "adding: 100 of 100 photos, 4.2/s\n"


def test_a_line_comes_every_ten_seconds(clock, capsys):
    for _ in progress.progress("abc", "looking", total=50):
        clock[0] += 15
    assert capsys.readouterr().err.splitlines() == [
        "looking: 1 of 50 images, 0.1/s, 735 s left",
        "looking: 2 of 50 images, 0.1/s, 720 s left",
        "looking: 3 of 50 images, 0.1/s, 705 s left",
    ]


def test_a_terminal_gets_a_bar_of_what_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.progress(["ab", "c"], "adding", total=3, size=len)) == ["ab", "c"]
