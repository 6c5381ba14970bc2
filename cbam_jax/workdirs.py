"""A folder that a command writes to: held by one at a time; what a machine lacks in one line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from cbam_jax import InputError, experiment
from cbam_jax.config_files import Config
from cbam_jax.file_locks import open_lock, take_lock
from cbam_jax.foreign_files import shown

# What training writes to in a workdir.
_OURS = ("config.json", "metrics.jsonl", "tensorboard", "checkpoints", "eval", "lock")
# Of an OSError: no room, or not allowed to.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make a workdir and keep others from training in it; the lock goes with the process.

    Raises:
        InputError: another process trains there, or the folder cannot be written.
    """
    if jax.process_index() != 0:  # Of several processes of one run the first one holds it.
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open_lock(workdir / "lock")
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another"
        ) from error
    with file:
        if not take_lock(file):
            raise InputError(
                f"--workdir={workdir} is in use by another training: wait for it to end, stop it, "
                "or choose another"
            )
        yield


def check_links(workdir: Path) -> None:
    """Raise an InputError where training would write elsewhere: a stranger's run may hold links.

    The workdir may be a link itself, and lie below one: whoever gave it meant that. What training
    appends to has no other name either; what it writes anew takes the place of what was there.
    """
    if link := next(filter(os.path.islink, _written(workdir)), None):
        raise InputError(
            f"{shown(link)} is a link to {shown(os.readlink(link))}, and training writes into the "
            "run's own folder alone: put what it leads to in its place, or remove it; "
            "--workdir itself may be a link"
        )
    for path in (workdir / "metrics.jsonl", workdir / "lock"):
        if path.is_file() and path.stat().st_nlink > 1:
            raise InputError(
                f"{shown(path)} is a file of another name too (a hard link), which training would "
                "write to: put a copy in its place, or remove it"
            )


def _written(workdir: Path) -> Iterator[str]:
    """Paths in a workdir that are training's, whatever else lies there."""
    for name in sorted(os.listdir(workdir)) if workdir.is_dir() else ():
        if name in _OURS or name.startswith(("partial-", "metrics.")):
            yield str(workdir / name)
            for folder, folders, files in os.walk(workdir / name):
                yield from (os.path.join(folder, inner) for inner in (*folders, *files))


def check_inside(folder: Path, workdir: Path) -> None:
    """Raise an InputError where a folder of a run is elsewhere: a stranger's run may hold links."""
    real = Path(os.path.realpath(folder))
    if not real.is_relative_to(os.path.realpath(workdir)):
        raise InputError(
            f"{shown(folder)} leads to {shown(real)}, outside the run: if results are to be "
            "written there, give that folder yourself with --out=DIR"
        )


def make_writable(folder: Path) -> None:
    """Make a folder; InputError, with the remedy, where nothing could be written to it."""
    probe = folder / "partial-metrics.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)  # In a stranger's run it may be a link to elsewhere.
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): give a folder with --out=DIR"
        ) from error


@contextlib.contextmanager
def told_in_one_line(config: Config, folder: Path) -> Iterator[None]:
    """Turn what a machine lacks, memory or room in ``folder``, into an InputError that says so."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise InputError(out_of_memory(config, str(error))) from error
    except OSError as error:
        named = str(error.filename or folder)
        if error.errno not in _UNWRITABLE or not named.startswith(str(folder)):
            raise
        raise InputError(
            f"{named} cannot be written ({error.strerror}): make room in {folder}, or let it be "
            "written, and give the same command again; what was saved is kept"
        ) from error


def out_of_memory(config: Config, error: str) -> str:
    """Say in one line what would need less memory than there is.

    >>> from cbam_jax.configs import default
    >>> told = out_of_memory(default.get_config(), "Out of memory allocating 12 bytes.")
    >>> "a batch of 64 images of 224 pixels: set --config.train.chunk_size=32" in told
    True
    """
    batch = experiment.batch_size(config)
    return (
        f"out of memory ({' '.join(error.split())[:120]}) with a batch of {batch} images of "
        f"{config.data.image_size} pixels: set {', '.join(_smaller(config, batch))}; for an "
        f"evaluation --config.eval.batch_size={max(config.eval.batch_size // 2, 1)}; on a GPU see "
        "with nvidia-smi who else holds it, and that XLA_PYTHON_CLIENT_MEM_FRACTION is not too "
        "small"
    )


def _smaller(config: Config, batch: int) -> list[str]:
    """Flags that a run would take, each of which needs less memory."""
    devices, fields = jax.device_count(), config.data
    largest = (config.train.chunk_size or batch) - 1
    chunks = (n for n in range(largest, 0, -1) if batch % n == 0 and n % devices == 0)
    flags = [f"--config.train.chunk_size={n}" for n in list(chunks)[:1]]
    flags.append(f"--config.data.image_size={max(fields.image_size * 5 // 7, 32)}")
    images = max(fields.images_per_class // 2, 2)
    if images < fields.images_per_class and fields.classes_per_batch * images % devices == 0:
        flags.append(f"--config.data.images_per_class={images}")
    return [*flags, "--config.model.dtype=bfloat16"]
