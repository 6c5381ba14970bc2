"""What a run leaves to look at: ``metrics.jsonl``, TensorBoard scalars, lines or a progress bar."""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from cbam_jax.command_line import to_json
from cbam_jax.forecast import duration, seconds_left
from cbam_jax.foreign_files import MOST_TABLE, read_file
from cbam_jax.whole_files import written_whole

# Steps whose scalars are left on the device while later ones are dispatched: reading them at once
# would make the device wait for Python.
_IN_FLIGHT = 2
# Share of the time waiting for data from which on a hint says what helps.
_WAITING = 0.05
# Of a loss's statistics, those that its line shows; a loss has some of them.
_SHOWN = {
    "distance_positive": "d(a,p) {:.3f}  ",
    "distance_negative": "d(a,n) {:.3f}  ",
    "active_fraction": "active {:.2f}  ",
    "accuracy": "accuracy {:.3f}  ",
}


class RunLog:
    """Log of one run; goes on where an interrupted run stopped.

    Args:
        workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
        step: the step that the run starts from. Records of later steps, written between the last
            checkpoint and an interruption, are dropped: they are about to be made again; all of
            them at step 0.
        total: steps of the whole run, for the progress bar.
        active: False on all processes but one of a distributed run: writes and prints nothing.
    """

    def __init__(self, workdir: str | os.PathLike, *, step: int, total: int, active: bool = True):
        self._active = active
        self.total = total
        if not active:
            return
        # Imported late: reading a log needs no TensorBoard.
        from tensorboardX import SummaryWriter

        path = Path(workdir, "metrics.jsonl")
        _drop_after(path, step or -1)
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir, "tensorboard")), purge_step=step + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not terminal)

    def __enter__(self) -> "RunLog":
        """Return itself; closed on the way out."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close all files."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._active:
            self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record one object: to ``metrics.jsonl`` and to TensorBoard."""
        if not self._active:
            return
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def line(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        if self._active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()


class StepMonitor:
    """Follows the steps of a run: finite scalars, their means, throughput, waiting for data.

    Args:
        log: gets one record every ``log_every`` steps.
        log_every: steps.
        batch_size: images in a step, over all processes.
        learning_rate: of a step, for the record.
        warning: maps the mean scalars to a warning line or None.
        eval_every: steps between two evaluations.
        window: scalars of the steps since the last record, of a run that goes on.

    Attributes:
        images: that the steps of ``seconds`` saw.
        seconds: that steps took, but for the first one, which is compiled, and for pauses.
        evaluation_seconds: that the last evaluation took, None before any.
    """

    def __init__(
        self,
        log: RunLog,
        *,
        log_every: int,
        batch_size: int,
        learning_rate: Callable[[int], Any],
        warning: Callable[[Mapping[str, float]], str | None],
        eval_every: int,
        window: Sequence[dict[str, float]] = (),
    ):
        self._log = log
        self._log_every = log_every
        self._batch_size = batch_size
        self._learning_rate = learning_rate
        self._warning = warning
        self._eval_every = eval_every
        self._pending: deque[tuple[int, Any, Any]] = deque()
        self._window = list(window)
        self._steps = 0  # Finished, by this process.
        self._timed = 0  # Of those, the ones since the last record.
        self._waited = 0.0
        self._told_to_wait = False
        self._seconds = 0.0  # Since the last record, up to _start.
        self._elapsed = 0.0  # Since the first step, up to _start.
        self._start = time.perf_counter()
        self.images = 0
        self.seconds = 0.0
        self.evaluation_seconds: float | None = None

    @property
    def window(self) -> list[dict[str, float]]:
        """The scalars of each step since the last record."""
        return list(self._window)

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Hand on batches, and keep the seconds that were spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def step_done(self, step: int, scalars: Any, index: Any) -> None:
        """Take a dispatched step's scalars and its batch's ``index``; arrays may be under way.

        Raises:
            FloatingPointError: for a loss or gradient that is not finite, some steps later.
        """
        self._pending.append((step, scalars, index))
        first = not self._steps
        while len(self._pending) > (0 if first else _IN_FLIGHT):
            self._fetch()
        if first:  # It was spent compiling; throughput counts from here.
            since_command = time.time() - psutil.Process().create_time()
            self._log.line(
                f"first step after {time.perf_counter() - self._start:.1f} s, "
                f"{since_command:.1f} s after the command"
            )
            self._start = time.perf_counter()
            self._waited = self._seconds = self._elapsed = 0.0

    def flush(self) -> None:
        """Wait for all steps that are under way; raises as ``step_done`` does."""
        while self._pending:
            self._fetch()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, saving) out of the throughput."""
        self.flush()
        self._lap()
        yield
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep how long an evaluation takes."""
        start = time.perf_counter()
        yield
        self.evaluation_seconds = time.perf_counter() - start

    @property
    def seconds_per_step(self) -> float | None:
        """How long a finished step took so far, the first one apart; None before the second."""
        return self._elapsed / (self._steps - 1) if self._steps > 1 else None

    def seconds_left(self, step: int) -> float | None:
        """Return how long the rest after ``step`` will take at the pace so far."""
        if self.seconds_per_step is None:
            return None
        return seconds_left(
            step,
            self._log.total,
            seconds_per_step=self.seconds_per_step,
            eval_every=self._eval_every,
            evaluation_seconds=self.evaluation_seconds,
        )

    def _lap(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._start
        self._elapsed += now - self._start
        self._start = now

    def _fetch(self) -> None:
        step, scalars, index = self._pending.popleft()
        values = {name: float(value) for name, value in scalars.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            rows = np.asarray(index).tolist()
            raise FloatingPointError(
                f"loss {values['loss']} at step {step}, gradient norm {values['gradient_norm']}; "
                f"statistics {values}; rows of the batch {rows}; lower the learning rate, clip the "
                "gradient, or look at these images; earlier checkpoints are kept"
            )
        self._window.append(values)
        self._steps += 1
        self._timed += 1
        self._log.advance()
        if step % self._log_every == 0:
            self._record(step)

    def _record(self, step: int) -> None:
        self._lap()
        window, seconds, images = self._window, self._seconds, self._timed * self._batch_size
        means = {name: sum(v[name] for v in window) / len(window) for name in window[-1]}
        values = {
            **means,
            "learning_rate": float(self._learning_rate(step)),
            "images_per_second": images / seconds,
            "data_wait_seconds": self._waited,
        }
        self._log.scalars(step, values)
        left = self.seconds_left(step)
        shown = "".join(text.format(means[name]) for name, text in _SHOWN.items() if name in means)
        self._log.line(
            f"step {step:6d} of {self._log.total}  loss {means['loss']:.4f}  {shown}"
            f"{images / seconds:.1f} images/s  waiting {100 * self._waited / seconds:.0f}%"
            + ("" if left is None else f"  {duration(left)} left")
        )
        self._hint(seconds)
        warning = self._warning(means)
        if warning is not None:
            self._log.line(f"warning at step {step}: {warning}")
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self._window, self._waited, self._seconds, self._timed = [], 0.0, 0.0, 0

    def _hint(self, seconds: float) -> None:
        """Tell once what makes loading faster, where it took a part of these seconds."""
        if self._told_to_wait or self._waited <= _WAITING * seconds:
            return
        self._told_to_wait = True
        share = f"{100 * self._waited / seconds:.0f}% of the time was spent waiting for data"
        self._log.line(
            f"hint: {share} (told once): train on smaller files (python -m cbam_jax.datasets "
            "resize), or set data.workers to a number of processes"
        )


def read_log(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``, without lines that are cut off or damaged.

    Raises:
        InputError: something else than a file stands there.

    >>> import tempfile
    >>> read_log(tempfile.mkdtemp())
    []
    """
    return _read(Path(workdir, "metrics.jsonl"))[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log, and how many lines are none but for a last one that was cut off."""
    try:
        lines = read_file(path, MOST_TABLE).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    records = [_record(line) for line in lines]
    damaged = sum(
        record is None and bool(line) for record, line in zip(records, lines, strict=True)
    )
    cut_off = records[-1] is None and bool(lines[-1])  # No line end: killed while writing it.
    return [record for record in records if record is not None], damaged - cut_off


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to a step; a damaged log stays aside, whole, for who wants to mend it."""
    records, damaged = _read(path)
    if damaged:
        aside = next(
            name
            for number in itertools.count(1)
            if not os.path.lexists(name := path.with_name(f"metrics.damaged-{number}.jsonl"))
        )
        shutil.copyfile(path, aside)
        print(f"{damaged} damaged lines of {path} are left out; kept in {aside.name}", flush=True)
    if not path.exists():
        return
    kept = [record for record in records if record["step"] <= step]
    with written_whole(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
