"""The processes that train and measure rows: which they are, their output, their end."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cbam_jax import InputError, stopping
from cbam_jax.file_locks import take_lock

# Where the processes find this package: a checkout, or what it was installed into.
_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "cbam_jax")  # What Python is given before a command's name.


def script(name: str) -> list[str]:
    """Return what Python is given to run ``"train"`` or ``"evaluate"``, before its flags."""
    return [*PROGRAM, name]


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold a workdir's lock; wait where another command, or what it left behind, has it.

    Processes that are started inherit it: one whose parent was killed ends at its next line of
    output, and until then nobody else may write to its run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "w") as file:
        if not take_lock(file):
            print(f"another process is at work in {workdir}: waiting for it to end", flush=True)
            take_lock(file, wait=True)
        os.set_inheritable(file.fileno(), True)
        yield


def call(workdir: Path, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run Python with arguments; return the JSON document of the last line of its output.

    What it says is shown, and kept in ``WORKDIR/logs/NAME.log`` with its errors.

    Raises:
        InputError: it failed; with its own line where it told one.
        KeyboardInterrupt: it was stopped, and goes on when it is called again.
    """
    path = workdir / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        log.write(f"$ {shlex.join(['python', *arguments])}\n")
        log.flush()
        begin = path.stat().st_size
        # A session of its own: Ctrl-C in a terminal would reach it beside the signal of _follow,
        # and the second signal keeps train.py from saving.
        with subprocess.Popen(
            [sys.executable, *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            close_fds=False,
            start_new_session=True,
        ) as process:
            last = _follow(process, log)
    if process.returncode == stopping.STATUS:
        raise KeyboardInterrupt
    if process.returncode:
        with path.open() as log:
            log.seek(begin)
            raise InputError(_failure(name, process.returncode, log.read(), path))
    return json.loads(last)


def _environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    path = str(_ROOT) if not inherited else f"{_ROOT}{os.pathsep}{inherited}"
    return {**os.environ, "PYTHONPATH": path}


def _follow(process: subprocess.Popen, log: Any) -> str:
    """Show and keep a process's output to its end; its last line is only returned."""
    last, stopped = "", False
    while process.stdout is not None:
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if last:
                    print(f"    {last}", flush=True)
                last = line.rstrip("\n")
            process.wait()
            break
        except KeyboardInterrupt:
            if stopped:  # The second time it is meant.
                process.kill()
                raise
            stopped = True
            print("stopping: the step under way is saved first", flush=True)
            process.terminate()
    if stopped:
        raise KeyboardInterrupt
    return last


def _failure(name: str, status: int, errors: str, path: Path) -> str:
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    if told:
        return f"{name}: {told[-1].removeprefix('error: ')}"
    cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"{name} ended with {cause}: see {path}; the same command goes on from there"
