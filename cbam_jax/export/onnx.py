"""A model as ONNX, by jax2onnx: weights inside, height and width fixed, the batch free."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from cbam_jax import InputError

# It names an Orbax older than ours among its dependencies, and does not import it.
INSTALL = "pip install --no-deps jax2onnx==0.17.1 && pip install onnx onnx-ir onnxruntime equinox"
_OPSET = 21


def check_installed() -> None:
    """Raise InputError where jax2onnx is not installed; the line says how it is."""
    if importlib.util.find_spec("jax2onnx") is None:
        raise InputError(f"--to=onnx needs jax2onnx, whose pins fit no Orbax of now: {INSTALL}")


def write(
    path: Path,
    embed: Callable[..., jax.Array],
    weights: Mapping[str, jax.Array],
    size: int,
) -> None:
    """Write ``embed`` of uint8 images [b, s, s, 3], with its weights, as an ONNX file."""
    import jax2onnx

    from cbam_jax.backbones.windows import compiled_for  # Late, as in lowering.

    def program(images: jax.Array) -> jax.Array:
        with compiled_for("onnx"):  # Whose convolutions are of every kind, as a GPU's.
            return embed(weights, images)

    images = jax.ShapeDtypeStruct(("b", size, size, 3), jnp.uint8)
    model = jax2onnx.to_onnx(program, inputs=[images])
    path.write_bytes(model.SerializeToString())
