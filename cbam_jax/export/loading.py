"""Running a program: read whole, looked through, and called on batches of any size."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cbam_jax import InputError
from cbam_jax.export import contract, lowering
from cbam_jax.foreign_files import expanded, parse_arrays, shown
from cbam_jax.preprocessing import Preprocessing, check_images

# A weight's name, which has a point, so that it is no name of a module's own.
_NAME = re.compile(r"\w+(\.[\w-]+)+")
# Largest difference between embeddings of one platform's programs, and of two platforms', whose
# products of float32 may be computed with fewer digits; both relative to the largest number.
_SAME, _OTHERS = 1e-5, 2e-2


class Program:
    """A model as a program; ``load`` makes one.

    Attributes:
        contract: what ``contract.json`` says.
        preprocessing: how images are cut for it, as ``data.cut_file`` and ``Embedder`` do.
        weights: float32 arrays by name.
        exported: ``jax.export``'s program, of ``weights`` and images; to be jitted with others.
    """

    def __init__(self, folder: Path, document: dict[str, Any]):
        self.folder, self.contract = folder, document
        self.preprocessing = _preprocessing(folder, document)
        self.platform = _platform(folder, document)
        self.exported = _exported(folder, document, self.platform)
        self.weights = _weights(folder, document)
        _check_signature(self)
        self._call = jax.jit(self.exported.call)
        self._on_device = jax.device_put(self.weights)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding, d."""
        return self.contract["embedding_dim"]

    def __call__(self, images: Any) -> np.ndarray:
        """Map uint8 RGB [b, s, s, 3] to float32 [b, d]; each b is compiled once.

        Raises:
            ValueError: the images are none such; the line says what is meant.
        """
        check_images(images)
        side = self.preprocessing.image_size
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"images are {images.shape[1]} x {images.shape[2]} pixels, expected {side} x "
                f"{side}: cut them with cbam_jax.data.cut_file(file, program.preprocessing)"
            )
        if not len(images):
            return np.zeros((0, self.dimension), np.float32)
        return np.asarray(self._call(self._on_device, images))

    def check(self) -> float:
        """Embed the images of ``check.npz``; return the largest relative difference.

        Raises:
            InputError: the embeddings are not those that the model gave. On the platform that it
                was exported on 1e-5 is allowed, on others, and in bfloat16, 2e-2.
        """
        images, expected = _read_check(self)
        difference = contract.relative_difference(self(images), expected)
        exact = self.platform == self.contract.get("checked_on") and self._is_float32
        most = _SAME if exact else _OTHERS
        if not difference <= most:
            raise InputError(
                f"{shown(self.folder)} gives other embeddings than its model did: they differ by "
                f"{difference:.2g} of the largest number, more than {most}; export it again"
            )
        return difference

    @property
    def _is_float32(self) -> bool:
        return self.contract["model"].get("dtype", "float32") == "float32"


def load(folder: str | os.PathLike, *, check: bool = False) -> Program:
    """Load a program that ``save`` or ``cbam-jax export --to=stablehlo`` wrote.

    Neither Flax nor any code of the model is needed. Every file is compared with the contract, and
    a program that would call anything outside of itself is refused.

    Args:
        folder: of the program.
        check: also embed the images of ``check.npz``, and compare: ``Program.check``.

    Raises:
        InputError: the folder is none, damaged, of a newer format, for another platform, or ONNX.

    Example:
        >>> program = load("my-program", check=True)  # doctest: +SKIP
        >>> program(np.zeros((5, 224, 224, 3), np.uint8)).shape  # doctest: +SKIP
        (5, 2048)
    """
    folder = expanded(folder)
    program = Program(folder, contract.read(folder))
    if check:
        program.check()
    return program


def _preprocessing(folder: Path, document: dict[str, Any]) -> Preprocessing:
    fields = document["preprocessing"]
    try:
        mean, std = (tuple(map(float, fields[name])) for name in ("mean", "std"))
        preprocessing = Preprocessing.from_dict(fields, mean=mean, std=std)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{shown(folder)}: {shown(str(error))}") from error
    return preprocessing


def _platform(folder: Path, document: dict[str, Any]) -> str:
    """This machine's platform, which the folder has a program for."""
    if document["to"] != "stablehlo":
        raise InputError(
            f"{shown(folder)} is {shown(document['to'], 40)}, which ONNX Runtime runs; for this, "
            "export it with --to=stablehlo"
        )
    from jax import export

    platform = export.default_export_platform()
    if platform not in document["programs"]:
        raise InputError(
            f"{shown(folder)} has programs for {', '.join(document['programs'])}, none for "
            f"{platform}: export it again with --platforms={platform}"
        )
    return platform


def _exported(folder: Path, document: dict[str, Any], platform: str) -> Any:
    from jax import export

    data = contract.read_whole(folder, contract.program_file(platform), document)
    try:
        exported = export.deserialize(bytearray(data))
        text = exported.mlir_module()
    except Exception as error:  # Of many kinds, as each part of a newer format fails in its own.
        raise InputError(
            f"{shown(folder)} was exported with jax {shown(str(document.get('jax_version')), 40)}; "
            f"this is {jax.__version__}, which cannot read it: export it again"
        ) from error
    if called := lowering.outside_call(text):
        raise InputError(
            f"{shown(folder)} has a program that calls {shown(called, 80)}, not computation alone: "
            "it is not run"
        )
    return exported


def _weights(folder: Path, document: dict[str, Any]) -> dict[str, np.ndarray]:
    import safetensors.numpy

    data = contract.read_whole(folder, contract.WEIGHTS, document)
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{shown(folder / contract.WEIGHTS)}: damaged ({shown(str(error))}); export it again"
        ) from error


def _check_signature(program: Program) -> None:
    """Raise InputError where a program takes other weights, or else, than the contract says."""
    exported, weights, side = program.exported, program.weights, program.preprocessing.image_size
    _, structure = jax.tree.flatten(((weights, 0), {}))
    fits = exported.in_tree == structure and all(map(_NAME.fullmatch, weights))
    taken = [(a.shape, a.dtype) for a in exported.in_avals]
    given = [(weights[name].shape, weights[name].dtype) for name in sorted(weights)]
    fits = fits and taken[:-1] == given and {d for _, d in given} <= {np.dtype("float32")}
    fits = fits and taken[-1][1] == np.uint8 and taken[-1][0][1:] == (side, side, 3)
    results = [(len(a.shape), a.shape[1:], a.dtype) for a in exported.out_avals]
    if not fits or results != [(2, (program.dimension,), np.dtype("float32"))]:
        raise InputError(
            f"{shown(program.folder)} has a program of other weights or images than "
            f"{contract.CONTRACT} tells of: export it again"
        )


def _read_check(program: Program) -> tuple[np.ndarray, np.ndarray]:
    import io

    data = contract.read_whole(program.folder, contract.CHECK, program.contract)
    try:
        arrays = parse_arrays(io.BytesIO(data))
        images, embeddings = arrays["images"], arrays["embeddings"]
        _compare_shapes(program, images, embeddings)
    except Exception as error:  # NumPy reads headers as Python does, which raises many kinds.
        raise InputError(
            f"{shown(program.folder / contract.CHECK)} is damaged ({shown(str(error))}): export it "
            "again"
        ) from error
    return images, embeddings


def _compare_shapes(program: Program, images: np.ndarray, embeddings: np.ndarray) -> None:
    """Raise ValueError where a check holds nothing that a program can be compared with."""
    check_images(images)
    side = program.preprocessing.image_size
    if not len(images) or images.shape[1:3] != (side, side):
        raise ValueError(f"images of shape {images.shape}")
    if embeddings.shape != (len(images), program.dimension) or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings {embeddings.dtype} of shape {embeddings.shape}")
    if not 0 < np.max(np.abs(embeddings)) < np.inf:
        raise ValueError("embeddings that are all 0, or not finite")
