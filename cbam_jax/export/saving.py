"""Writing a model as a program: everything is written beside, checked, then renamed."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from cbam_jax import InputError, __version__
from cbam_jax.export import contract, lowering, onnx
from cbam_jax.foreign_files import expanded, shown
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.whole_files import written_whole

FORMATS = ("stablehlo", "onnx")
_CHECKED = 3  # Images of check.npz.


def save(
    model: Any,
    folder: str | os.PathLike,
    *,
    to: str = "stablehlo",
    preprocessing: Preprocessing,
    arguments: Mapping[str, Any],
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    license: str | None = None,
) -> dict[str, Any]:
    """Write a model as a program that needs none of its code.

    The folder holds ``contract.json``; ``check.npz`` (``images`` uint8 [3, s, s, 3] and the
    ``embeddings`` that the model gives for them, float32 [3, d]); and as StableHLO a program for
    each platform, with its own form of each layer, and ``weights.safetensors``, or as ONNX
    ``model.onnx``. Programs map uint8 RGB [b, s, s, 3], cut as ``preprocessing`` says, to
    embeddings float32 [b, d]: normalisation of pixels and embeddings is inside.

    Args:
        model: a module with ``preprocess``; evaluated whatever mode it is in.
        folder: where to; made when needed, files of these names in it are replaced.
        to: ``"stablehlo"`` or ``"onnx"``.
        preprocessing: how images are cut; its ``image_size`` is s.
        arguments: of ``create_model`` that built the model, but ``rngs``, as JSON has them: what
            the fingerprint needs, as for ``Embedder``.
        platforms: of StableHLO: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``; this machine need
            have none of them.
        license: of the weights, to be told in the contract.

    Returns:
        What ``contract.json`` says.

    Raises:
        InputError: an unknown format or platform, ONNX of a model in bfloat16, jax2onnx is missing,
            or the folder cannot be written or is a run's; nothing has been written then.
    """
    folder = expanded(folder)
    check(folder, to, platforms, arguments.get("dtype"))
    embed, weights = lowering.split(model)
    document = _document(to, preprocessing, arguments, license)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # All are there before any takes its place.
            # The contract is entered first, so renamed last: it vouches for the others.
            last = stack.enter_context(written_whole(folder / contract.CONTRACT))
            files = _Files(folder, stack)
            size = preprocessing.image_size
            document["embedding_dim"] = _write_check(files, embed, weights, size)
            if to == "onnx":
                _write_onnx(files, embed, weights, size)
            else:
                document["programs"] = _write_programs(files, embed, weights, size, platforms)
            text = _sealed(document, files.paths)
            last.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{shown(folder)} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return json.loads(text)


def _sealed(document: dict[str, Any], paths: Mapping[str, Path]) -> str:
    """The contract's text, with what tells damage of the files and of itself."""
    document["files"] = {name: contract.described(path) for name, path in paths.items()}
    document["checksum"] = contract.checksum(document)
    return json.dumps(document, indent=2) + "\n"


class _Files:
    """Files of a folder that take their places together."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self._folder, self._stack = folder, stack
        self.paths: dict[str, Path] = {}

    def new(self, name: str) -> Path:
        """Return the path to write one to."""
        self.paths[name] = self._stack.enter_context(written_whole(self._folder / name))
        return self.paths[name]


def check(
    folder: str | os.PathLike, to: str, platforms: Sequence[str], dtype: str | None = None
) -> None:
    """Raise InputError where ``save`` would, before anything slow begins; as its arguments.

    ``dtype`` is that of the model, None: float32, or not known yet.
    """
    folder = expanded(folder)
    if to not in FORMATS:
        raise InputError(f"--to={shown(to, 80)}: give one of {', '.join(FORMATS)}")
    wrong = [name for name in platforms if name not in contract.PLATFORMS]
    if wrong or not platforms:
        raise InputError(
            f"--platforms={shown(','.join(platforms), 80)}: give some of "
            f"{', '.join(contract.PLATFORMS)}"
        )
    if os.path.lexists(folder / "config.json"):
        raise InputError(
            f"{shown(folder)} holds a run or a model, by its config.json: give another folder"
        )
    _check_place(folder)
    if to == "onnx":
        onnx.check_dtype(dtype)
        onnx.check_installed()


def _check_place(folder: Path) -> None:
    """Raise InputError where a folder cannot be made, or written to; nothing is made yet."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    problem = None if there.is_dir() else "is no folder"
    if problem is None and not os.access(there, os.W_OK | os.X_OK):
        problem = "may not be written to"
    if problem:
        raise InputError(
            f"{shown(folder)} cannot be written ({shown(there)} {problem}): choose another folder"
        )


def _document(
    to: str, preprocessing: Preprocessing, arguments: Mapping[str, Any], license: str | None
) -> dict[str, Any]:
    side = preprocessing.image_size
    return {
        "format_version": contract.FORMAT_VERSION,
        "to": to,
        "cbam_jax_version": __version__,
        "jax_version": jax.__version__,
        "input": f"images: uint8 [b, {side}, {side}, 3], RGB, cut as preprocessing says",
        "output": "embeddings: float32 [b, embedding_dim]",
        "preprocessing": preprocessing.to_dict(),
        "preprocessing_version": preprocessing.version,
        "model": dict(arguments),
        "license": license,
        "checked_on": jax.export.default_export_platform(),
        "programs": {},
    }


def _write_check(files: _Files, embed: Any, weights: Mapping[str, jax.Array], size: int) -> int:
    """Write images and what the model itself gives for them; return d."""
    shape = (_CHECKED, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    embeddings = np.asarray(jax.jit(embed)(weights, images))
    if not np.all(np.isfinite(embeddings)):
        raise InputError("the model's embeddings are not finite: no model to be used")
    with files.new(contract.CHECK).open("wb") as file:
        np.savez(file, images=images, embeddings=embeddings)
    return embeddings.shape[1]


def _write_onnx(files: _Files, embed: Any, weights: Mapping[str, jax.Array], size: int) -> None:
    """Write the model, and compare it with the check where ONNX Runtime is installed."""
    path = files.new(contract.ONNX)
    onnx.write(path, embed, weights, size)
    if importlib.util.find_spec("onnxruntime") is not None:
        with np.load(files.paths[contract.CHECK]) as check:
            onnx.check_file(path, check["images"], check["embeddings"])


def _write_programs(
    files: _Files, embed: Any, weights: Mapping[str, jax.Array], size: int, platforms: Sequence[str]
) -> dict[str, str]:
    """Write the weights and a program for each platform; return the programs' names."""
    import safetensors.numpy

    values = {name: np.array(value) for name, value in weights.items()}
    files.new(contract.WEIGHTS).write_bytes(safetensors.numpy.save(values))
    names = {platform: contract.program_file(platform) for platform in dict.fromkeys(platforms)}
    for platform, name in names.items():
        files.new(name).write_bytes(_program(embed, weights, size, platform).serialize())
    return names


def _program(embed: Any, weights: Mapping[str, jax.Array], size: int, platform: str) -> Any:
    """Lower a model; one of the user's own may do what no program can, or ``load`` refuses."""
    try:
        program = lowering.lower(embed, weights, size, platform)
    except OSError:
        raise
    except Exception as error:  # JAX has many kinds, some of no common root.
        raise InputError(
            f"the model is no program for {platform} and any number of images "
            f"({shown(str(error))}): let it take a batch whose size is not known"
        ) from error
    if called := lowering.outside_call(program.mlir_module()):
        raise InputError(
            f"the model calls {shown(called, 80)} on {platform}, and a program computes alone: "
            "leave that call out of it"
        )
    return program
