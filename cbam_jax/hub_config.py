"""The ``config.json`` of a folder of ``save_pretrained``: what must stand in it, and its hashes.

Whoever fetches such a folder has it from someone else, over networks and disks that lose a bit now
and then. So each tensor's hash is kept, and one of what the model is built and used by.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax import InputError, __version__
from cbam_jax.foreign_files import read_json, shown, shown_folder

# Raised when a folder needs something that earlier versions can't read.
FORMAT_VERSION = 1
_CHECKED = ("format_version", "model", "preprocessing", "weights")
_LARGEST_IMAGE = 4096  # Pixels of a side; a batch of 64 such would take 3 GB.


def with_hashes(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a config with the hashes of its tensors and of itself."""
    document = {**document, "weights": hashes(arrays)}
    return document | {"checksum": checksum(document)}


def hashes(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the first 16 digits of the SHA-256 of each array's bytes, by name.

    >>> hashes({"bias": np.zeros(3, np.float32)})
    {'bias': '15ec7bf0b50732b4'}
    """
    return {
        name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
        for name, array in arrays.items()
    }


def checksum(document: Mapping[str, Any]) -> str:
    """Return 16 digits that change with what a model is built and used by; metrics may change."""
    parts = {name: document.get(name) for name in _CHECKED}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config.

    Raises:
        InputError: it is missing, damaged, of something else or of a newer format.
    """
    try:
        document = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{shown(path)} is missing: {shown_folder(path.parent)} is neither the workdir of a "
            "run nor a folder of save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, shown(str(error))) from error
    if isinstance(document, dict) and "format_version" not in document:
        raise InputError(
            f"{shown(path)} is of no model that save_pretrained wrote; checkpoints of a run "
            "are missing, or this is another folder"
        )
    problem = _problem(document)
    if problem:
        raise _damaged(path, problem)
    if document["format_version"] > FORMAT_VERSION:
        version = shown(str(document["format_version"]), 40)
        raise InputError(
            f"{shown(path)} has format {version}, written by cbam_jax "
            f"{shown(str(document.get('cbam_jax_version')), 40)}; this is {__version__}, which "
            f"reads up to {FORMAT_VERSION}: upgrade it"
        )
    if document.get("checksum", checksum(document)) != checksum(document):
        raise _damaged(
            path, "its checksum differs; if you changed it yourself, remove the line checksum"
        )
    return document


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{shown(path)} is damaged ({reason}): fetch or save it again")


def _problem(document: Any) -> str | None:
    """What is wrong with the types of a config's fields, None for nothing."""
    if not isinstance(document, dict):
        return "it is no object"
    version = document["format_version"]
    if type(version) is not int or version < 1:
        return f"format_version is {shown(repr(version), 80)}"
    if version > FORMAT_VERSION:
        return None  # Of whose fields nothing is known here.
    for name in ("model", "preprocessing"):
        if not isinstance(document.get(name), dict):
            return f"{name} is no object"
    size = document["preprocessing"].get("image_size")
    if type(size) is not int or not 1 <= size <= _LARGEST_IMAGE:
        return f"preprocessing has the image_size {shown(repr(size), 80)}"
    if not isinstance(document.get("weights", {}), dict):
        return "weights is no object"
    return None


def check_weights(arrays: Mapping[str, np.ndarray], document: Mapping[str, Any], path: Path):
    """Raise InputError where a tensor is not the one that was saved; old folders have no hashes.

    Args:
        arrays: of the model, by name.
        document: the config.
        path: of the weights, for the message.
    """
    if "weights" not in document:
        return
    expected, found = document["weights"], hashes(arrays)
    changed = sorted(
        name for name in expected.keys() | found if expected.get(name) != found.get(name)
    )
    if changed:
        raise InputError(
            f"{shown(path)} is damaged, or of another config.json: {len(changed)} tensors are not "
            f"those that were saved, the first {shown(changed[0], 80)}: fetch it again"
        )
