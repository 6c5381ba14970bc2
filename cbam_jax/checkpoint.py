"""Checkpoints of a run: model, optimizer, data iterator and config as separate Orbax items.

Arrays are stored under flat dotted names (``params.backbone.conv1.kernel``), so that a part can be
read without building the rest. Orbax notices a truncated file, but not overwritten bytes: the
CRC-32 of each array and of both JSON documents is stored beside them and compared on the way back,
and a damaged checkpoint falls back to the one before. What a checkpoint was measured to be worth is
added once it is known, since a state is saved before its evaluation begins.
"""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from cbam_jax import InputError
from cbam_jax.foreign_files import read_json, shown
from cbam_jax.sharding import on_host

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
    Arrays that are shared among processes are gathered, so that all of these have to call it.

    >>> flatten({"a": [np.zeros(2), np.ones(3)]}).keys()
    dict_keys(['a.0', 'a.1'])
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): on_host(leaf) for path, leaf in leaves}


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
        known: metrics by step that the run's log has, for a checkpoint that lost its own.

    Raises:
        InputError: on the way in, while saving or on the way out, when the folder cannot be
            written; the line says which steps are kept.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        best_metric: str | Callable[[Mapping[str, float]], str],
        keep: int = 2,
        read_only: bool = False,
        known: Mapping[int, Mapping[str, Any]] | None = None,
    ):
        def metric(metrics: Mapping[str, Any]) -> float:
            name = best_metric if isinstance(best_metric, str) else best_metric(metrics)
            value = metrics.get(name)
            return -math.inf if value is None or math.isnan(value) else value

        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        self.directory = os.path.abspath(directory)
        self._metric, self._known = metric, known or {}
        with _quiet(), self._writing():
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
        """Wait for saves under way and close; an error that is on its way out stays the one."""
        with contextlib.suppress(*([Exception] if any(error) else [])):
            self.close()

    def steps(self) -> list[int]:
        """Return the steps saved whole, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Return the step with the best metric, of equals the last; None when none has any."""
        self.wait()  # The metrics of a save under way cannot be read yet.
        scored = {step: metrics for step in self.steps() if (metrics := self.metrics(step))}
        return max(scored, key=lambda step: (self._metric(scored[step]), step), default=None)

    def metrics(self, step: int) -> Mapping[str, Any] | None:
        """Return what a saved step was measured to be worth, None where that is not known."""
        return self._manager.metrics(step) or self._known.get(step)

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        data: dict[str, Any],
        config: dict[str, Any],
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
        _ignore_closed_loops()
        with _quiet(), self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep with a saved step what it was measured to be worth.

        Called by all processes of a distributed run; the first one writes.
        """
        self.wait()
        if jax.process_index() == 0:
            with self._writing():
                self._write_metrics(step, metrics)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"metrics of step {step}")
        self._manager.reload()

    def keep_known_metrics(self) -> None:
        """Give each checkpoint that lost its metrics the known ones: the best one is kept then."""
        for step in self.steps():
            if step in self._known and not self._manager.metrics(step):
                self.add_metrics(step, self._known[step])

    def _write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """As an item of Orbax, whole or not at all."""
        partial = Path(self.directory, "partial-metrics")
        partial.mkdir(exist_ok=True)
        # No JSON has NaN, the mean over nothing.
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in metrics.items()}
        Path(partial, "metrics").write_text(json.dumps(known))
        item = Path(self.directory, str(step), "metrics")
        shutil.rmtree(item, ignore_errors=True)
        partial.rename(item)

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
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way and release the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell in one line that the folder could not be written."""
        try:
            yield
        except Exception as error:  # Orbax raises many kinds, by the file that failed.
            with contextlib.suppress(Exception):  # An earlier save may be under way.
                self._manager.wait_until_finished()
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InputError(
                f"{self.directory} cannot be written ({reason[:200]}): make room there, or let it "
                f"be written, and give the same command again; {self._kept()}"
            ) from error

    def _kept(self) -> str:
        """Say which steps are saved whole."""
        names = (path.name for path in Path(self.directory).glob("[0-9]*"))
        found = sorted(int(name) for name in names if name.isdigit())
        return f"saved: step {', '.join(map(str, found))}" if found else "no step is saved"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from warning that it may only read, which is what was asked for."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
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
        numbers = (int, float, type(None))  # None: a mean over nothing.
        if isinstance(metrics, dict) and all(type(value) in numbers for value in metrics.values()):
            return metrics
        _tell_once(f"the metrics of checkpoint {step} are damaged (no numbers)")
        return None


@functools.cache
def _tell_once(line: str) -> None:
    print(f"{line}: it is not taken for the best by them", file=sys.stderr)


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep the answers of TensorStore off stderr that come after Orbax gave up.

    At the first array that is damaged, or cannot be written, Orbax closes its event loop while the
    others are still under way: each of them would print a traceback.
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
