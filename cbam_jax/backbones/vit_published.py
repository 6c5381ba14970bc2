"""Vision transformers that have been published: each one's variant, where it is, its licence."""

import dataclasses
from typing import Any, NamedTuple

from cbam_jax.backbones.vit import Variant

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
Scaling = tuple[tuple[float, ...], tuple[float, ...]]


class Published(NamedTuple):
    """A model: its variant, its repository on the Hugging Face hub, its licence, its scaling."""

    variant: Variant
    repository: str
    license: str
    scaling: Scaling


# Width, depth, heads, width of the MLP.
SIZES = {
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 20, 5120),
    "giantopt": (1536, 40, 16, 6144),
    "giant": (1536, 40, 24, 4096),
}


def sized(size: str, patch_size: int, image_size: int, **fields) -> Variant:
    """A variant of one of ``SIZES``.

    >>> sized("base", 16, 224, activation="gelu", epsilon=1e-6).grid
    14
    """
    width, depth, heads, mlp_width = SIZES[size]
    return Variant(width, depth, heads, patch_size, image_size, mlp_width, **fields)


def _siglip(name: str, size: str, patch_size: int, image_size: int) -> Published:
    fields = {"activation": "gelu_tanh", "epsilon": 1e-6, "pool": "map"}
    variant = sized(size, patch_size, image_size, interpolation="bicubic", **fields)
    return Published(variant, f"google/{name}", "Apache-2.0", (_HALF, _HALF))


def _clip(name: str, size: str, patch_size: int, image_size: int, projection: int) -> Published:
    fields = {"activation": "quick_gelu", "epsilon": 1e-5, "interpolation": "bicubic"}
    variant = sized(size, patch_size, image_size, **fields, **CLIP, projection=projection)
    return Published(variant, f"openai/{name}", "MIT", (_CLIP_MEAN, _CLIP_STD))


def _dinov2(size: str, registers: int) -> Published:
    fields = {"activation": "gelu", "epsilon": 1e-6, "layer_scale": True, "registers": registers}
    interpolation = "bicubic_antialias" if registers else "bicubic"
    variant = sized(size, 14, 518, interpolation=interpolation, **fields)
    name = f"facebook/dinov2{'-with-registers' * bool(registers)}-{size}"
    return Published(variant, name, "Apache-2.0", (_IMAGENET_MEAN, _IMAGENET_STD))


def _dinov3(name: str, size: str, gated: bool = False) -> Published:
    activation = "silu" if gated else "gelu"
    variant = sized(size, 16, 224, activation=activation, gated=gated, **DINOV3)
    repository = f"facebook/dinov3-{name}-pretrain-lvd1689m"
    return Published(variant, repository, "DINOv3 License", (_IMAGENET_MEAN, _IMAGENET_STD))


CLIP: dict[str, Any] = {"pre_norm": True, "patch_bias": False}
DINOV3: dict[str, Any] = {"epsilon": 1e-5, "position": "rope", "registers": 4, "layer_scale": True}
_FASHION_SIGLIP = dataclasses.replace(
    _siglip("", "base", 16, 224).variant, activation="gelu", interpolation="bicubic_antialias"
)
_FASHION_CLIP = dataclasses.replace(
    _clip("", "base", 16, 224, 512).variant, activation="gelu", interpolation="bicubic_antialias"
)
# As Hugging Face publishes them, with the conventions of that; Marqo's are of open_clip.
PUBLISHED = {
    "marqo_fashion_siglip": Published(
        _FASHION_SIGLIP, "Marqo/marqo-fashionSigLIP", "Apache-2.0", (_HALF, _HALF)
    ),
    "marqo_fashion_clip": Published(
        _FASHION_CLIP, "Marqo/marqo-fashionCLIP", "Apache-2.0", (_CLIP_MEAN, _CLIP_STD)
    ),
    "siglip_b16_224": _siglip("siglip-base-patch16-224", "base", 16, 224),
    "siglip_b16_256": _siglip("siglip-base-patch16-256", "base", 16, 256),
    "siglip_b16_384": _siglip("siglip-base-patch16-384", "base", 16, 384),
    "siglip_b16_512": _siglip("siglip-base-patch16-512", "base", 16, 512),
    "siglip_l16_256": _siglip("siglip-large-patch16-256", "large", 16, 256),
    "siglip_l16_384": _siglip("siglip-large-patch16-384", "large", 16, 384),
    "siglip_so400m14_384": _siglip("siglip-so400m-patch14-384", "so400m", 14, 384),
    "siglip2_b16_224": _siglip("siglip2-base-patch16-224", "base", 16, 224),
    "siglip2_b16_384": _siglip("siglip2-base-patch16-384", "base", 16, 384),
    "siglip2_b16_512": _siglip("siglip2-base-patch16-512", "base", 16, 512),
    "siglip2_l16_384": _siglip("siglip2-large-patch16-384", "large", 16, 384),
    "siglip2_so400m14_384": _siglip("siglip2-so400m-patch14-384", "so400m", 14, 384),
    "clip_b32_224": _clip("clip-vit-base-patch32", "base", 32, 224, 512),
    "clip_b16_224": _clip("clip-vit-base-patch16", "base", 16, 224, 512),
    "clip_l14_224": _clip("clip-vit-large-patch14", "large", 14, 224, 768),
    "clip_l14_336": _clip("clip-vit-large-patch14-336", "large", 14, 336, 768),
    "dinov2_s14": _dinov2("small", 0),
    "dinov2_b14": _dinov2("base", 0),
    "dinov2_l14": _dinov2("large", 0),
    "dinov2_s14_reg": _dinov2("small", 4),
    "dinov2_b14_reg": _dinov2("base", 4),
    "dinov2_l14_reg": _dinov2("large", 4),
    "dinov3_s16": _dinov3("vits16", "small"),
    "dinov3_s16plus": _dinov3("vits16plus", "small", gated=True),
    "dinov3_b16": _dinov3("vitb16", "base"),
    "dinov3_l16": _dinov3("vitl16", "large"),
    "dinov3_h16plus": _dinov3("vith16plus", "huge", gated=True),
}
# By the names that their authors write.
_ALIASES = {
    published.repository.split("/")[1].lower(): name for name, published in PUBLISHED.items()
}


def published_name(source: str) -> str | None:
    """Return the name in ``PUBLISHED`` of a model, also by its authors' name; None: it is none.

    >>> published_name("Marqo-FashionSigLIP"), published_name("resnet50")
    ('marqo_fashion_siglip', None)
    """
    return source if source in PUBLISHED else _ALIASES.get(source.lower())
