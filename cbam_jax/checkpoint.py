"""Checkpoints of a run: model, optimizer, data iterator and config as separate Orbax items.

Arrays are stored under flat dotted names (``params.backbone.conv1.kernel``), so that a part can be
read without building the rest. Orbax notices a truncated file, but not overwritten bytes: the
CRC-32 of each array and of both JSON documents is stored beside them and compared on the way back,
and a damaged checkpoint falls back to the one before.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cbam_jax import InputError
from cbam_jax.foreign_files import read_json, shown

Arrays = Mapping[str, np.ndarray]


class Checkpoint(NamedTuple):
    """What was read: ``optimizer`` is empty when only the model was asked for."""

    step: int
    model: Arrays
    optimizer: Arrays
    data: dict[str, Any]
    config: dict[str, Any]


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Copy a pytree's arrays to the host under dotted names.

    Copies, since a step that donates its state may reuse the memory while a save is under way.

    >>> flatten({"a": [np.zeros(2), np.ones(3)]}).keys()
    dict_keys(['a.0', 'a.1'])
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): np.array(leaf) for path, leaf in leaves}


def unflatten(tree: Any, arrays: Arrays) -> Any:
    """Return ``tree`` with each array replaced by the one of its name.

    Raises:
        InputError: when names or shapes differ; one line with the first of each kind.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    expected = {_name(path): np.shape(leaf) for path, leaf in leaves}
    missing = sorted(expected.keys() - arrays.keys())
    unexpected = sorted(arrays.keys() - expected.keys())
    wrong = sorted(
        name for name in expected.keys() & arrays.keys() if arrays[name].shape != expected[name]
    )
    if missing or unexpected or wrong:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
        found = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]
        raise InputError(
            f"the checkpoint is of another model or optimizer: arrays {', '.join(found)}; "
            "use the config it was trained with, or a new --workdir"
        )
    return jax.tree_util.tree_unflatten(structure, [arrays[_name(path)] for path, _ in leaves])


def _name(path: Any) -> str:
    # NNX ends the path of a variable's array in ".value"; it says nothing.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


class Checkpoints:
    """The checkpoints below one folder: the newest ``keep`` and the best by one metric.

    Saving is asynchronous: ``wait`` or ``close`` before the process ends.

    Args:
        directory: where they lie; made when needed.
        best_metric: the metric, larger is better, that decides which one is the best; or what
            chooses it among the metrics that an evaluation has.
        keep: how many of the newest stay beside the best; 2, so that a damaged one has another
            behind it.
        read_only: nothing is made, cleaned up or saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        best_metric: str | Callable[[Mapping[str, float]], str],
        keep: int = 2,
        read_only: bool = False,
    ):
        def metric(metrics: dict[str, float]) -> float:
            name = best_metric if isinstance(best_metric, str) else best_metric(metrics)
            value = metrics.get(name, float("nan"))
            return -float("inf") if np.isnan(value) else value

        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        self.directory = os.path.abspath(directory)
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                best_fn=metric,
                best_mode="max",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,  # Of saves that were killed.
            )
            self._manager = _Manager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself; closed on the way out."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for saves under way and close."""
        self.close()

    def steps(self) -> list[int]:
        """Return the steps saved whole, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Return the step with the best metric, None when no checkpoint has any."""
        self.wait()  # The metrics of a save under way cannot be read yet.
        scored = any(self._manager.metrics(step) for step in self.steps())
        return self._manager.best_step() if scored else None

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        data: dict[str, Any],
        config: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save two pytrees and two JSON documents, in the background.

        A step that is there already is left as it is.

        Raises:
            FloatingPointError: for an array that is not finite, which no run could go on from.
        """
        if step in self._manager.all_steps():
            return
        arrays = {"model": flatten(model), "optimizer": flatten(optimizer)}
        for name, array in (*arrays["model"].items(), *arrays["optimizer"].items()):
            if not np.all(np.isfinite(array)):
                raise FloatingPointError(
                    f"{name} is not finite at step {step}, which is not saved: lower the learning "
                    "rate or clip the gradient; earlier checkpoints are kept"
                )
        checksums = {item: _checksums(value) for item, value in arrays.items()}
        checksums |= {"data": _checksum_of_json(data), "config": _checksum_of_json(config)}
        items = {
            **{item: ocp.args.StandardSave(value) for item, value in arrays.items()},
            "data": ocp.args.JsonSave(data),
            "config": ocp.args.JsonSave(config),
            "checksums": ocp.args.JsonSave(checksums),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, which: str | int = "last", *, optimizer: bool = True) -> Checkpoint:
        """Read ``"last"``, ``"best"`` or one step; a damaged last one falls back to those before.

        Raises:
            InputError: when there is none, or none that is whole; the line says what is there.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"no checkpoint in {self.directory}: train first, or check --workdir")
        if which == "last":
            return self._restore_newest(steps, optimizer)
        step = self.best_step() if which == "best" else which
        if step not in steps:
            raise InputError(
                f"no checkpoint {which!r} in {self.directory}: it has steps "
                f"{', '.join(map(str, steps))}; choose one, best or last"
            )
        checkpoint = self._try_restore(int(step), optimizer)
        if isinstance(checkpoint, str):
            raise InputError(f"{checkpoint}; choose another of {', '.join(map(str, steps))}")
        return checkpoint

    def _restore_newest(self, steps: list[int], optimizer: bool) -> Checkpoint:
        for step in reversed(steps):
            checkpoint = self._try_restore(step, optimizer)
            if not isinstance(checkpoint, str):
                return checkpoint
            print(f"{checkpoint}; trying the one before", flush=True)
        raise InputError(
            f"every checkpoint in {self.directory} is damaged (steps "
            f"{', '.join(map(str, steps))}): restore a copy, or start with a new --workdir"
        )

    def _try_restore(self, step: int, optimizer: bool) -> Checkpoint | str:
        """Return the checkpoint, or one line on what is wrong with it."""
        arrays = ("model", "optimizer") if optimizer else ("model",)
        items = {item: ocp.args.StandardRestore() for item in arrays}
        items |= {item: ocp.args.JsonRestore() for item in ("data", "config", "checksums")}
        strange = _strange_file(Path(self.directory, str(step)))
        if strange:
            return f"checkpoint {step} is damaged ({strange} is not a regular file)"
        _ignore_closed_loops()
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds, by the file that is damaged.
            return f"checkpoint {step} is damaged ({type(error).__name__})"
        problem = _problem(step, read, arrays)
        if problem:
            return f"checkpoint {step} is damaged ({problem})"
        kept = read["optimizer"] if optimizer else {}
        return Checkpoint(step, read["model"], kept, read["data"], read["config"])

    def read_config(self) -> dict[str, Any] | None:
        """Return the config of the newest checkpoint that has it whole, None where none has."""
        for step in reversed(self.steps()):
            try:
                items = ocp.args.Composite(config=ocp.args.JsonRestore())
                return self._manager.restore(step, args=items)["config"]
            except Exception:  # Orbax raises many kinds, by the file that is damaged.
                continue
        return None

    def delete_after(self, step: int) -> None:
        """Delete what is newer than ``step``: damaged, and about to be trained again."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines' scheduler asked all processes of a distributed run to stop."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until every save has ended."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


class StopSignal:
    """While entered, SIGTERM and SIGINT (Ctrl-C) only set ``received``; a second one interrupts.

    So the step under way is finished and saved before the process ends.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Take over the two signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from warning that it may only read, which is what was asked for."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Manager(ocp.CheckpointManager):
    """One that opens a folder whose metrics are damaged: it reads all of them, and would fail."""

    def metrics(self, step: int) -> Any:
        path = Path(self.directory, str(step), "metrics", "metrics")
        try:
            metrics = read_json(path)
        except FileNotFoundError:
            if path.parent.is_dir():  # Else it was saved without an evaluation.
                _tell_once(f"the metrics of checkpoint {step} are lost")
            return None
        except (OSError, ValueError) as error:
            _tell_once(f"the metrics of checkpoint {step} are damaged ({shown(str(error))})")
            return None
        if isinstance(metrics, dict) and all(type(v) in (int, float) for v in metrics.values()):
            return metrics
        _tell_once(f"the metrics of checkpoint {step} are damaged (no numbers)")
        return None


@functools.cache
def _tell_once(line: str) -> None:
    print(f"{line}: it is not taken for the best by them", file=sys.stderr)


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep the answers of TensorStore off stderr that come after Orbax gave up.

    At the first damaged array Orbax closes its event loop, while the other arrays are still being
    read: each of them would print a traceback.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def _strange_file(folder: Path) -> str | None:
    """The name of what is neither a file nor a folder in a checkpoint: a pipe is waited for."""
    names = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return next((shown(os.path.basename(name)) for name in names if not os.path.isfile(name)), None)


def _problem(step: int, read: Any, arrays: Iterable[str]) -> str | None:
    """What is wrong with a checkpoint that was read; earlier ones have no sums of documents."""
    checksums, data = read["checksums"], read["data"]
    if not isinstance(checksums, dict) or not isinstance(data, dict):
        return "its documents are none"
    for item in arrays:
        if _checksums(read[item]) != checksums.get(item):
            return f"the {item}'s checksums differ"
    for item in ("data", "config"):
        found = _checksum_of_json(read[item])
        if checksums.get(item, found) != found:
            return f"the {item}'s checksum differs"
    return None if data.get("next_step", step) == step else "it goes on at another step"


def _checksum_of_json(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _checksums(arrays: Arrays) -> dict[str, int]:
    return {
        name: zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
        for name, array in arrays.items()
    }
