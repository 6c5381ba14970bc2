"""Where weights are read from: files, folders of runs and of models, mappings of arrays."""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cbam_jax import InputError
from cbam_jax.foreign_files import open_regular, read_json, shown, shown_folder
from cbam_jax.pretrained.published import IMAGENET, check_hash
from cbam_jax.pretrained.torch_files import read_torch
from cbam_jax.whole_files import written_whole

Source = str | os.PathLike | Mapping[str, Any]

# Of folders of models, ours and others', those first that are read where there are several.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
# How the name ends of what says in which of several files each tensor of a large model is.
INDEX = ".safetensors.index.json"
_MOST_SHARDS = 1_000
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Under which training scripts save the weights, those first that they evaluate.
_WRAPPERS = (
    "state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "net", "network",
    "teacher", "student",
)  # fmt: skip
# Bytes. The format allows headers up to 100 MB; those of a model of images have some 100 kB.
_MOST_BYTES = 16 << 30
_LONGEST_HEADER = 100_000_000
# What a file of Git LFS begins with that was not fetched.
_LFS = b"version https://git-lfs"
# No model of images comes near these. A file of a few hundred bytes can hold dicts within dicts
# with more ways through them than there is time, and any number of views of the same numbers.
_MOST_PLACES = 20_000
_LONGEST_NAME = 1_000
_MOST_TIMES = 8


def read_arrays(source: Source) -> Mapping[str, Any]:
    """Read what a source holds, arrays by name or nested dicts of them, as it was saved.

    Raises:
        InputError: there is nothing, or nothing that can be read or is meant by a name.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if os.path.isdir(path):
        return _read_folder(path)
    if not os.path.lexists(path):
        raise InputError(
            f"no weights at {shown(path)}: give a file, a folder, or one of {', '.join(IMAGENET)}"
        )
    if not os.path.isfile(path):
        raise InputError(f"{shown(path)} is not a regular file: give a file of weights")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    check_hash(path)
    check_pointer(path)
    saved = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(saved, Mapping):
        raise InputError(f"{path} holds a {type(saved).__name__}: save a model's state_dict()")
    return saved


def check_pointer(path: Path) -> None:
    """Raise InputError where a file is what Git LFS leaves in place of one."""
    with open_regular(path, _MOST_BYTES) as file:
        if file.read(len(_LFS)) == _LFS:
            raise InputError(
                f"{shown(path)} is a Git LFS pointer, not the weights: run git lfs pull in its "
                "folder, or fetch the file itself"
            )


def _read_folder(folder: Path) -> Mapping[str, Any]:
    for name in WEIGHTS:
        if os.path.lexists(folder / name):
            return read_arrays(folder / name)
    if not (folder / "checkpoints").is_dir():
        raise InputError(
            f"{shown_folder(folder)} has no weights that are read: of a folder those are "
            f"{', '.join(WEIGHTS)} or a run's checkpoints; fetch one, or give the file itself"
        )
    # Imported late: Orbax takes a second, and only a run needs it.
    from cbam_jax.checkpoint import Checkpoints

    with Checkpoints(folder / "checkpoints", best_metric="") as checkpoints:
        return checkpoints.restore("last", optimizer=False).model


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Read the files beside an index, of which each must hold what the index says, and no more."""
    try:
        places = read_json(index)["weight_map"]
        shards = sorted(set(places.values()))
        if len(shards) > _MOST_SHARDS or not all(map(_SHARD.fullmatch, shards)):
            raise ValueError("weight_map names others than .safetensors files beside it")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"{shown(index)} is damaged ({shown(str(error))}): fetch it again"
        ) from error
    arrays = {}
    for shard in shards:
        found = read_arrays(index.with_name(shard))
        expected = {name for name, place in places.items() if place == shard}
        if found.keys() != expected:
            name = min(found.keys() ^ expected)
            raise InputError(
                f"{shown(index.with_name(shard))} and {index.name} disagree on {shown(name)}: "
                "fetch both again"
            )
        arrays |= found
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # Not safetensors.numpy: it has no bfloat16.
    import safetensors

    try:
        with open_regular(path, _MOST_BYTES) as file:
            _check_length(file)
            tensors = safetensors.deserialize(file.read())
    except FileNotFoundError:
        raise InputError(f"no weights at {shown(path)}: fetch or save it again") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{shown(path)}: damaged or truncated ({shown(str(error))}); fetch it again"
        ) from error
    unknown = sorted({tensor["dtype"] for _, tensor in tensors} - _SAFETENSORS_DTYPES.keys())
    if unknown:
        raise InputError(
            f"{path} has tensors of dtype {', '.join(unknown)}: save it in float32, "
            "float16 or bfloat16"
        )
    try:
        return {
            name: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(
                tensor["shape"]
            )
            for name, tensor in tensors
        }
    except ValueError as error:  # Of more axes than NumPy has, or of nothing beyond all sizes.
        raise InputError(
            f"{shown(path)}: damaged or truncated ({shown(str(error))}); fetch it again"
        ) from error


def _check_length(file: BinaryIO) -> None:
    """Raise OSError where a file is longer than its header says: nothing would be worth reading."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _LONGEST_HEADER):
        raise OSError("its header is longer than the file, or than such headers are")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_each_once)
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        if len(tensors) > _MOST_PLACES:
            raise ValueError(f"{len(tensors)} tensors, more than {_MOST_PLACES}")
        ends = [tensor["data_offsets"][1] for tensor in tensors]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it has {size} bytes")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise OSError(f"its header does not fit it: {error}") from error
    file.seek(0)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values by one name readers would take one or the other."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def unwrap(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a training script's checkpoint, by the usual keys.

    >>> unwrap({"epoch": 3, "model": {"state_dict": {"bias": 0}}})
    {'bias': 0}
    """
    for wrapper in _WRAPPERS:
        if isinstance(saved.get(wrapper), Mapping):
            return unwrap(saved[wrapper])
    return saved


def without_prefix(arrays: Mapping[str, np.ndarray], own: Collection[str]) -> dict[str, np.ndarray]:
    """Names without what all of them begin with, as whatever wraps a whole model adds it.

    ``own`` are the first parts of the model's own names. Of the two networks that a contrastive
    training keeps it is ``encoder_q``, which its authors evaluate.

    >>> without_prefix({"module._orig_mod.conv1.weight": 1, "module._orig_mod.fc.bias": 2}, ["fc"])
    {'conv1.weight': 1, 'fc.bias': 2}
    """
    arrays = dict(arrays)
    if any(name.startswith(("encoder_q.", "module.encoder_q.")) for name in arrays):
        arrays = {name: array for name, array in arrays.items() if "encoder_q." in name}
    firsts = {name.partition(".")[0] for name in arrays}
    if len(firsts) != 1 or not firsts.isdisjoint(own) or not all("." in name for name in arrays):
        return arrays
    return without_prefix({name.partition(".")[2]: a for name, a in arrays.items()}, own)


def flatten(tree: Mapping[Any, Any], label: str) -> dict[str, np.ndarray]:
    """Each entry by the keys that lead to it. A dict may stand at many places, and so they count.

    >>> flatten({"a": {"b": np.zeros(3)}, "epoch": 2}, "x.pth")
    {'a.b': array([0., 0., 0.]), 'epoch': array(0)}
    """
    flat = {}
    for count, (name, value) in enumerate(_places(tree)):
        if count >= _MOST_PLACES:
            raise InputError(f"{label} has more than {_MOST_PLACES} entries: save one model alone")
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise InputError(f"{label} has an entry named {name[:80]!a}: too long, or no name")
        if not isinstance(value, Mapping):
            # What is no array (an epoch, a list) is known by its name alone, and refused by it.
            flat[name] = np.asarray(value if hasattr(value, "shape") else 0)
    return flat


def _places(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _places(value, f"{prefix}{key}.")


def convert(source: str | os.PathLike, destination: str | os.PathLike) -> int:
    """Write a torch file's tensors as ``.safetensors``, under the names they have.

    Returns:
        The number of tensors.

    Raises:
        InputError: the source can't be read, or the destination is no ``.safetensors``.
    """
    import safetensors
    import safetensors.numpy

    if Path(destination).suffix != ".safetensors":
        raise InputError(f"the destination {destination} must end in .safetensors")
    saved = flatten(unwrap(read_arrays(source)), str(source))
    _check_amount(saved, source)
    arrays = {name: np.ascontiguousarray(array) for name, array in saved.items()}
    try:
        with written_whole(destination) as partial:
            safetensors.numpy.save_file(arrays, partial)
    except safetensors.SafetensorError as error:
        raise InputError(f"{source} can't be written as .safetensors: {error}") from None
    return len(arrays)


def _check_amount(arrays: Mapping[str, np.ndarray], source: str | os.PathLike) -> None:
    # Each array is at most its storage, but any number of them may share one.
    written = sum(array.nbytes for array in arrays.values())
    if Path(source).is_file() and written > _MOST_TIMES * Path(source).stat().st_size:
        raise InputError(
            f"{source}: its tensors share storages, and apart they would take {written} bytes, "
            f"more than {_MOST_TIMES} times the file; save a state_dict() alone"
        )
