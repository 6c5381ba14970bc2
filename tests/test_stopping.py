"""Being asked to stop: by signals, in threads, in a process that is busy, by the clock."""

import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from cbam_jax import InputError, stopping
from cbam_jax.stopping import Stop, Stopped

ASKED = sorted(stopping.SIGNALS)


@pytest.mark.parametrize("number", ASKED, ids=stopping.SIGNALS.get)
def test_a_signal_is_answered_and_a_second_one_interrupts(number, capsys):
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.waits_for = "the step under way, to save it"
        assert stop.received is None
        os.kill(os.getpid(), number)
        name = stopping.SIGNALS[number]
        assert stop.received == name
        assert f"{name}: waiting for the step under way, to save it; " in capsys.readouterr().err
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_while_nothing_would_be_lost_a_signal_interrupts_at_once():
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"


def test_what_is_done_in_between_is_left_between_two_elements():
    stop = Stop()
    elements = stop.checked("abc")
    assert next(elements) == "a"
    stop._signal = "SIGTERM"
    with pytest.raises(Stopped):
        next(elements)
    assert list(Stop(after=1000).checked("ab")) == ["a", "b"]


def test_a_thread_takes_no_signals_but_its_time_runs():
    before = [signal.getsignal(number) for number in ASKED]
    found = []

    def run():
        with Stop(after=0) as stop:
            found.extend([stop.received, [signal.getsignal(number) for number in ASKED]])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["--stop_after", before]


# The main thread is where Python runs no handler: inside a lock that nobody gives back.
BUSY = """
import _thread, sys
from cbam_jax.stopping import Stop
with Stop(exits=True) as stop:
    stop.waits_for = sys.argv[1] or None
    print("busy", flush=True)
    lock = _thread.allocate_lock()
    lock.acquire()
    try:
        while True:
            lock.acquire()
    finally:
        print("left")
"""


@pytest.mark.parametrize("waits_for", ["", "the step under way"])
def test_a_busy_command_answers_at_once(waits_for):
    command = [sys.executable, "-c", BUSY, waits_for]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGHUP)
        if waits_for:
            line = process.stderr.readline()
            assert line.startswith("SIGHUP: waiting for the step under way; a second one")
            process.send_signal(signal.SIGINT)
        name = "SIGINT" if waits_for else "SIGHUP"
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (stopping.STATUS, "")
    assert stderr == f"stopped by {name}: the same command goes on\n"


# What a training does when the terminal that it runs in is closed: it saves, and says so.
IN_A_TERMINAL = """
import fcntl, sys, termios, threading
from cbam_jax.stopping import STATUS, Stop
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with Stop(exits=True) as stop:
    stop.waits_for = "the step under way"
    print("training", flush=True)
    while not stop.received:
        stop._thread.join(0.01)
    open(sys.argv[1], "w").write(stop.received)
    print("stopped", flush=True)
    print("stopped", file=sys.stderr, flush=True)
sys.exit(STATUS)
"""


def test_a_closed_terminal_is_a_stop_like_any_other(tmp_path):
    outer, inner = pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path / "saved")]
    with subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    ) as process:
        os.close(inner)
        assert os.read(outer, 100).startswith(b"training")
        os.close(outer)
    assert process.returncode == stopping.STATUS
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_after_a_command_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with Stop(exits=True) as stop:
        stop.waits_for = "a step"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not stop._thread.is_alive()


@pytest.mark.parametrize(
    "text", ["", "45", "m", "0m", "-5m", "45 minutes", "1m2h", "1.2.3h", "nan"]
)
def test_a_time_that_is_none_is_told(text):
    with pytest.raises(InputError, match="--stop_after=.*give a time such as 45m, 2h or 1h30m"):
        stopping.seconds(text)
