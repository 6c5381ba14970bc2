"""A run that is asked to stop: by a signal, or because its time is up.

``Stop`` takes the signals of a scheduler, of a terminal and of Ctrl-C, so that the training can
finish the step under way and save it. What asks is answered at once, also while the main thread is
inside a compiled program or the compiler, where Python runs no handler of signals.
"""

import contextlib
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from cbam_jax import InputError

# EX_TEMPFAIL of sysexits.h: stopped before its end, and the same command goes on from there.
STATUS = 75
# Of schedulers (SLURM's --signal=USR1), of Ctrl-C, and of a terminal that is closed. Windows lacks
# some of them.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = {getattr(signal, name): name for name in _NAMES if hasattr(signal, name)}
_UNITS = {"h": 3600, "m": 60, "s": 1}
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """Left in the middle of what is made again: the run was asked to stop."""


class Stop:
    """While entered, a signal only sets ``received``; a second one interrupts.

    Where signals cannot be taken, in a thread that is not the main one, ``after`` alone stops.

    Args:
        after: seconds from here on; None: no end.
        exits: whether the process may be ended at once, with ``STATUS``, where nothing would be
            lost or a second signal comes; False, as in a notebook: ``Stopped`` is raised there.

    Attributes:
        waits_for: what a stop has to wait for, in words; None while nothing would be lost, as
            before the first step.

    >>> with Stop(after=0) as stop:
    ...     stop.received
    '--stop_after'
    """

    def __init__(self, *, after: float | None = None, exits: bool = False):
        self.waits_for: str | None = None
        self._end = None if after is None else time.monotonic() + after
        self._exits = exits
        self._signal: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> str | None:
        """Why to stop, None where there is no reason to."""
        if self._signal is None and self._end is not None and time.monotonic() >= self._end:
            return "--stop_after"
        return self._signal

    def checked(self, elements: Iterable[T]) -> Iterator[T]:
        """Hand elements on; raises ``Stopped`` between two of them once a stop was asked for."""
        for element in elements:
            if self.received:
                raise Stopped
            yield element

    def __enter__(self) -> "Stop":
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        if self._exits:
            self._watch()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before and self._exits:
            os.close(signal.set_wakeup_fd(self._wakeup_before))
            self._thread.join()

    def _receive(self, number: int, _: Any) -> None:
        """In the main thread, once it runs Python again."""
        _leave_lost_terminal()
        first = self._signal is None
        self._signal = SIGNALS[number]
        if not self._exits and first and self.waits_for:
            print(_answer(self._signal, self.waits_for), file=sys.stderr, flush=True)
        elif not self._exits:
            raise Stopped

    def _watch(self) -> None:
        """Let a thread see each signal when it arrives."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._follow, args=(reader,), daemon=True)
        self._thread.start()

    def _follow(self, reader: int) -> None:
        count = 0
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in SIGNALS:
                    continue
                count += 1
                _leave_lost_terminal()
                name, waits_for = SIGNALS[signal.Signals(number[0])], self.waits_for
                if count > 1 or waits_for is None:
                    print(f"stopped by {name}: the same command goes on", file=sys.stderr)
                    _leave()
                else:
                    print(_answer(name, waits_for), file=sys.stderr, flush=True)


def _leave_lost_terminal() -> None:
    """Send output nowhere where its terminal was closed: writing there would be an error."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # It may be closed.
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _leave() -> None:
    """End the process: the main thread may be inside the compiler for minutes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(STATUS)


def _answer(name: str, waits_for: str) -> str:
    return f"{name}: waiting for {waits_for}; a second one ends this at once, unsaved"


def seconds(text: str) -> float:
    """Read a duration: a number with h, m or s, or several of them.

    Raises:
        InputError: for anything else, and for no time at all.

    >>> seconds("45m"), seconds("1h30m"), seconds("90s")
    (2700.0, 5400.0, 90.0)
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip().lower())
    try:
        values = [float(part or 0) for part in parts.groups()] if parts else [0.0]
    except ValueError:
        values = [0.0]
    total = sum(value * unit for value, unit in zip(values, _UNITS.values(), strict=False))
    if total <= 0:
        raise InputError(f"--stop_after={text}: give a time such as 45m, 2h or 1h30m")
    return total
