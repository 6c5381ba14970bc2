"""``contract.json``: what a folder of ``save`` holds, takes and gives, and whether it is whole.

Such a folder comes from someone else, as ``hub_config`` says: each file's size and SHA-256 stand in
the contract, and a checksum of the contract in itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax import InputError, __version__
from cbam_jax.foreign_files import expanded, read_file, read_json, shown, shown_folder

CONTRACT = "contract.json"
WEIGHTS = "weights.safetensors"
CHECK = "check.npz"
ONNX = "model.onnx"
# Raised when a folder needs something that earlier versions can't read.
FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DTYPES = ("float32", "bfloat16")
_MOST = {".safetensors": 64 << 30, ".onnx": 64 << 30, ".npz": 1 << 30, ".stablehlo": 64 << 20}
_FIELDS = {"to": str, "preprocessing": dict, "model": dict, "programs": dict, "files": dict}
_LARGEST = 4096  # Pixels of a side, as hub_config has it.


def program_file(platform: str) -> str:
    """Return the name of a platform's program.

    >>> program_file("cpu")
    'program.cpu.stablehlo'
    """
    return f"program.{platform}.stablehlo"


def is_program(folder: str | os.PathLike) -> bool:
    """Whether a folder is one of ``save``, by its contract."""
    return os.path.lexists(expanded(folder) / CONTRACT)


def described(path: Path) -> dict[str, Any]:
    """Return a written file's size in bytes and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of embeddings, over the largest number expected.

    >>> relative_difference(np.array([1.0, 3.0]), np.array([1.0, 4.0]))
    0.25
    """
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def checksum(contract: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all else that a contract says."""
    parts = {name: value for name, value in contract.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """Read and check a contract, not yet the files that it names.

    Raises:
        InputError: it is missing, damaged or of a newer format.
    """
    path = folder / CONTRACT
    try:
        contract = read_json(path, 1 << 20)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{shown(path)} is missing: {shown_folder(folder)} is no program; write one with "
            "`cbam-jax export MODEL FOLDER --to=stablehlo`"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, shown(str(error))) from error
    if problem := _problem(contract):
        raise _damaged(path, problem)
    if contract["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{shown(path)} has format {contract['format_version']}, written by cbam_jax "
            f"{shown(str(contract.get('cbam_jax_version')), 40)}; this is {__version__}, which "
            f"reads up to {FORMAT_VERSION}: upgrade it"
        )
    if contract.get("checksum") != checksum(contract):
        raise _damaged(path, "its checksum differs")
    return contract


def _problem(contract: Any) -> str | None:
    """What is wrong with the types of a contract's fields, None for nothing."""
    if not isinstance(contract, dict):
        return "it is no object"
    version = contract.get("format_version")
    if type(version) is not int or version < 1:
        return f"format_version is {shown(repr(version), 80)}"
    if version > FORMAT_VERSION:
        return None  # Of whose fields nothing is known here.
    for name, kind in _FIELDS.items():
        if not isinstance(contract.get(name), kind):
            return f"{name} is {shown(repr(contract.get(name)), 80)}"
    return _value_problem(contract)


def _value_problem(contract: Mapping[str, Any]) -> str | None:
    size = contract["preprocessing"].get("image_size")
    if type(size) is not int or not 1 <= size <= _LARGEST:
        return f"preprocessing has the image_size {shown(repr(size), 80)}"
    dimension = contract.get("embedding_dim")
    if type(dimension) is not int or dimension < 1:
        return f"embedding_dim is {shown(repr(dimension), 80)}"
    dtype = contract["model"].get("dtype", "float32")
    if dtype not in DTYPES:
        return f"model has the dtype {shown(repr(dtype), 80)}"
    for platform, name in contract["programs"].items():
        if platform not in PLATFORMS or name != program_file(platform):
            return f"programs names {shown(repr(platform), 80)}: {shown(repr(name), 80)}"
    return None


def read_whole(folder: Path, name: str, contract: Mapping[str, Any]) -> bytes:
    """Return a file of a folder, which is as long as the contract says, and has its SHA-256.

    Raises:
        InputError: it has not, is missing, no regular file, or larger than such files are.
    """
    path, expected = folder / name, contract["files"].get(name)
    try:
        size, digest = int(expected["bytes"]), str(expected["sha256"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(folder / CONTRACT, f"files has no size and hash of {name}") from None
    try:
        data = read_file(path, min(size, _MOST[path.suffix]))
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read ({error.strerror}): fetch it") from error
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise _damaged(path, f"it is not the file that {CONTRACT} tells of")
    return data


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{shown(path)} is damaged ({reason}): fetch or export it again")
