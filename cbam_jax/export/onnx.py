"""A model as ONNX, by jax2onnx: weights inside, height and width fixed, the batch free."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax import InputError
from cbam_jax.export.contract import relative_difference
from cbam_jax.foreign_files import shown
from cbam_jax.platforms import compiled_for

# It names an Orbax older than ours among its dependencies, and does not import it.
INSTALL = (
    "pip install --no-deps jax2onnx==0.17.1 && pip install onnx onnx-ir onnxruntime equinox dm-pix"
)
_OPSET = 21  # That ONNX Runtime has read since version 1.19, of 2024.
_NEEDED = ("jax2onnx", "onnx", "onnx_ir", "equinox", "dm_pix")
_MOST_BYTES = 2**31 - 2**20  # A file of protobuf has less than 2 GiB; the rest is for the program.
_SAME = 1e-4  # Of the largest number: products are summed up in another order.


def check_installed() -> None:
    """Raise InputError where jax2onnx, or what it imports, is not installed; the line says how."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--to=onnx needs {', '.join(missing)}, and the pins of jax2onnx fit no Orbax of now: "
            f"{INSTALL}"
        )


def check_dtype(dtype: str | None) -> None:
    """Raise InputError for bfloat16: ONNX has none for Conv before opset 22, for Einsum at all.

    Nor has ONNX Runtime convolutions in it on a CPU. None counts as float32.
    """
    if dtype not in (None, "float32"):
        raise InputError(
            f"--to=onnx of a model in {shown(dtype, 40)}: ONNX Runtime runs it in float32 alone; "
            "give --dtype=float32"
        )


def write(
    path: Path,
    embed: Callable[..., jax.Array],
    weights: Mapping[str, jax.Array],
    size: int,
) -> None:
    """Write ``embed`` of uint8 ``images`` [b, s, s, 3], with its weights, as an ONNX file.

    Raises:
        InputError: the weights are more than a file may hold, or jax2onnx knows no form of some
            operation.
    """
    size_of_weights = sum(weight.nbytes for weight in weights.values())
    if size_of_weights > _MOST_BYTES:
        raise InputError(
            f"--to=onnx of {size_of_weights / 1e9:.1f} GB of weights: a file holds 2 GiB; give "
            "--to=stablehlo"
        )

    def program(images: jax.Array) -> jax.Array:
        with compiled_for("onnx"):
            return embed(weights, images)

    try:
        path.write_bytes(_converted(program, jax.ShapeDtypeStruct(("b", size, size, 3), jnp.uint8)))
    except OSError:
        raise
    except Exception as error:  # Each of its conversions fails in its own way.
        raise InputError(
            f"jax2onnx cannot write this model ({shown(str(error))}): give --to=stablehlo"
        ) from error


def _converted(program: Callable[..., jax.Array], images: jax.ShapeDtypeStruct) -> bytes:
    """What jax2onnx makes of a function of images, as a file's bytes."""
    with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        import jax2onnx  # pyright: ignore[reportMissingImports]

        model = jax2onnx.to_onnx(
            program,
            inputs=[images],
            opset=_OPSET,
            input_names=["images"],
            output_names=["embeddings"],
        )
    return model.SerializeToString()


def check_file(path: Path, images: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of an ONNX file's embeddings, relative to the largest number.

    Raises:
        InputError: it is more than 1e-4, or ONNX Runtime cannot run the file.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # It warns of shapes that it merges, which harms nothing.
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        (actual,) = session.run(["embeddings"], {"images": images})
    except Exception as error:  # It has a class for each of its states, and no root of them.
        raise InputError(
            f"ONNX Runtime cannot run what jax2onnx wrote ({shown(str(error))}): give "
            "--to=stablehlo"
        ) from error
    difference = relative_difference(actual, expected)
    if not difference <= _SAME:
        raise InputError(
            f"what jax2onnx wrote gives other embeddings, by {difference:.2g} of the largest "
            "number: nothing was written"
        )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what jax2onnx tells of examples of its own, and of shapes that it does not know."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
