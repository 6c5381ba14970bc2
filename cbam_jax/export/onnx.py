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
_SAME = 1e-4  # Of the largest number: products are summed up in another order.


def check_installed() -> None:
    """Raise InputError where jax2onnx is not installed; the line says how it is."""
    if importlib.util.find_spec("jax2onnx") is None:
        raise InputError(f"--to=onnx needs jax2onnx, whose pins fit no Orbax of now: {INSTALL}")


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
    """Write ``embed`` of uint8 ``images`` [b, s, s, 3], with its weights, as an ONNX file."""

    def program(images: jax.Array) -> jax.Array:
        with compiled_for("onnx"):
            return embed(weights, images)

    images = jax.ShapeDtypeStruct(("b", size, size, 3), jnp.uint8)
    with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        import jax2onnx  # pyright: ignore[reportMissingImports]

        model = jax2onnx.to_onnx(
            program,
            inputs=[images],
            opset=_OPSET,
            input_names=["images"],
            output_names=["embeddings"],
        )
    path.write_bytes(model.SerializeToString())


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
        raise InputError(f"ONNX Runtime cannot run what jax2onnx wrote ({error})") from error
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
