"""The embedding model: backbone, pooling, optional projection, L2 norm.

``python -m cbam_jax.models`` lists the models, what each costs and its published weights.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax import named_parts
from cbam_jax.attention import CBAM, GATE_INITS, SqueezeExcite
from cbam_jax.backbones import efficientnet, googlenet, resnet, vgg
from cbam_jax.backbones.vit import Variant, VisionTransformer
from cbam_jax.backbones.vit_published import PUBLISHED
from cbam_jax.distances import l2_normalize
from cbam_jax.preprocessing import IMAGENET_MEAN, IMAGENET_STD, check_images, checked_scaling

BACKBONES = {
    "resnet10": resnet.ResNet10,
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "vgg16": vgg.VGG16,
    "vgg16_bn": vgg.VGG16BN,
    "googlenet": googlenet.GoogLeNet,
    "efficientnet_lite0": efficientnet.EfficientNetLite,
}
# Mean and standard deviation of pixels in [0, 1] that a backbone's published weights expect, where
# they are not ImageNet's.
_SCALINGS = {"efficientnet_lite0": ((127 / 255,) * 3, (128 / 255,) * 3)}
ATTENTIONS = {"": None, "_se": SqueezeExcite, "_cbam": CBAM}
MODELS = {
    backbone + attention: (backbone, attention)
    for backbone in BACKBONES
    for attention in ATTENTIONS
}
# Vision transformers, without attention of ours; "vit" is any, by its fields.
TRANSFORMERS = {name: published.variant for name, published in PUBLISHED.items()}
MODELS |= {name: (name, "") for name in TRANSFORMERS}
ANY_TRANSFORMER = "vit"
POOLINGS = ("average", "gem")
# What says how attention is built, and which attention takes it.
FORM = {"reduction": 16, "kernel_size": 7, "original": False}
_TAKEN = {"": (), "_se": ("reduction",), "_cbam": tuple(FORM)}


def parts_of(name: str) -> tuple[str, str]:
    """Return a model's backbone and attention; a name of one's own is a backbone's.

    Raises:
        ValueError: on an unknown name; the message lists the choices.

    >>> parts_of("resnet50_cbam"), parts_of("mine.parts:backbone")
    (('resnet50', '_cbam'), ('mine.parts:backbone', ''))
    """
    if named_parts.is_named(name) or name == ANY_TRANSFORMER:
        return name, ""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]


def pixel_scaling(
    backbone: str, transformer: Mapping[str, Any] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the deviation, by channel, of the pixels in [0, 1] that it expects.

    ``transformer`` are the fields of the backbone ``"vit"``, see ``create_model``.

    >>> pixel_scaling("resnet50")
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    if transformer is not None:
        return checked_scaling(transformer["mean"], transformer["std"])
    if backbone in PUBLISHED:
        return PUBLISHED[backbone].scaling
    return _SCALINGS.get(backbone, (IMAGENET_MEAN, IMAGENET_STD))


def normalize_images(
    images: jax.Array | np.ndarray,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> jax.Array:
    """Turn uint8 RGB [b, h, w, 3] into float32: in [0, 1], less the mean, over the deviation.

    Raises:
        ValueError: for anything else, such as floats in [0, 1], channels first, a single image.

    >>> white = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    >>> [round(float(value), 2) for value in normalize_images(white).flatten()]
    [2.25, 2.43, 2.64]
    """
    check_images(images)
    images = jnp.asarray(images)
    scale = 1 / (255 * jnp.array(std, jnp.float32))
    shift = jnp.array(mean, jnp.float32) / jnp.array(std, jnp.float32)
    shape = (1, 1, 1, 3)
    return images.astype(jnp.float32) * scale.reshape(shape) - shift.reshape(shape)


class GeM(nnx.Module):
    """Generalised mean over h and w with a learned exponent: mean(max(x, eps)^p)^(1/p), p = 3.

    p = 1 is average pooling, large p approaches max-pooling. One exponent for all channels.
    Radenović, Tolias, Chum: Fine-tuning CNN Image Retrieval with No Human Annotation, 2018.

    >>> round(float(GeM()(jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1))[0, 0]), 4)
    1.651
    """

    def __init__(self, power: float = 3.0, epsilon: float = 1e-6):
        self.power = nnx.Param(jnp.array([power], jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool [b, h, w, c] to [b, c]."""
        x = jnp.maximum(x.astype(jnp.float32), self.epsilon)
        # Divided by the largest entry, so that the power neither overflows nor loses small maps.
        # The result does not depend on the divisor, so no gradient is lost by stopping it there.
        largest = jax.lax.stop_gradient(jnp.max(x, axis=(1, 2), keepdims=True))
        power = self.power[0]
        pooled = jnp.mean((x / largest) ** power, axis=(1, 2)) ** (1 / power)
        return pooled * largest[:, 0, 0]


def average_pool(x: jax.Array) -> jax.Array:
    """Average [b, h, w, c] over h and w, in float32, to [b, c]."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def _pooled_already(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _pool(
    pooling: str | Callable[[jax.Array], jax.Array], backbone: Any
) -> Callable[[jax.Array], jax.Array]:
    """The pooling that is asked for, of what a backbone gives."""
    if not callable(pooling) and pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}: choose one of {list(POOLINGS)}")
    if getattr(backbone, "pools_itself", False):
        if pooling != "average":
            raise ValueError(f"pooling={pooling!r}: a transformer pools itself; leave it out")
        return _pooled_already
    if callable(pooling):
        return pooling
    return GeM() if pooling == "gem" else average_pool


class EmbeddingModel(nnx.Module):
    """Backbone, pooling, optional linear projection and L2 norm: images to embeddings.

    Args:
        backbone: maps [b, h, w, 3] to [b, h', w', backbone.num_features]; or, with an attribute
            ``pools_itself`` that is true, as a transformer's is, to [b, backbone.num_features].
        embedding_dim: d of the projection; None: no projection, d = ``num_features``.
        normalize: divide each embedding by its Euclidean norm.
        pooling: ``"average"`` or ``"gem"``, or a function or module that maps [b, h', w', c] to
            [b, c]; a module's parameters are trained.
        num_classes: n of a linear layer from embeddings to logits, for training by cross-entropy;
            None: no such layer.
        scaling: mean and deviation, by channel, of the pixels in [0, 1] that the backbone expects.
        rngs: for the parameters.
    """

    def __init__(
        self,
        backbone,
        *,
        embedding_dim: int | None = None,
        normalize: bool = True,
        pooling: str | Callable[[jax.Array], jax.Array] = "average",
        num_classes: int | None = None,
        scaling: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD),
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.pool = _pool(pooling, backbone)
        width = backbone.num_features
        self.projection = (
            None if embedding_dim is None else nnx.Linear(width, embedding_dim, rngs=rngs)
        )
        self.embedding_dim = embedding_dim or width
        self.normalize = normalize
        self.mean, self.std = (nnx.static(numbers) for numbers in scaling)
        self.class_head = (
            None if num_classes is None else nnx.Linear(self.embedding_dim, num_classes, rngs=rngs)
        )
        # Vectors of the classes, where a loss trains some: no embedding depends on them.
        self.proxies: nnx.Module | None = nnx.data(None)

    def preprocess(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Turn uint8 RGB [b, h, w, 3] into what the backbone expects; see normalize_images.

        Raises:
            ValueError: for anything else; the line says what is meant.
        """
        return normalize_images(images, self.mean, self.std)

    def features(self, images: jax.Array) -> jax.Array:
        """Return the last feature map [b, h', w', c], with attention; a transformer's [b, c]."""
        return self.backbone(images)

    def embed(self, features: jax.Array) -> jax.Array:
        """Turn what ``features`` gives into embeddings [b, d], float32.

        Raises:
            ValueError: a pooling of one's own gave something else than [b, c].
        """
        x = self.pool(features)
        expected = features.shape[0], features.shape[-1]
        if x.shape != expected:
            raise ValueError(
                f"pooling gave an array of shape {x.shape} for features of shape {features.shape}, "
                f"expected {expected}"
            )
        x = x.astype(jnp.float32)
        x = x if self.projection is None else self.projection(x)
        return l2_normalize(x) if self.normalize else x

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embed normalised float32 images [b, h, w, 3] as [b, d] float32."""
        return self.embed(self.features(images))

    def classify(self, images: jax.Array) -> jax.Array:
        """Turn normalised float32 images [b, h, w, 3] into logits [b, n], float32.

        Raises:
            ValueError: the model was built without ``num_classes``.
        """
        if self.class_head is None:
            raise ValueError("num_classes is None: a model without classes gives no logits")
        return self.class_head(self(images))

    def classify_deeply(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Return ``classify``'s logits, then those of the backbone's auxiliary classifiers, if any.

        For training from scratch: GoogLeNet alone has such classifiers.

        Raises:
            ValueError: the model was built without ``num_classes``.
        """
        if not isinstance(self.backbone, googlenet.GoogLeNet) or self.class_head is None:
            return (self.classify(images),)
        features, auxiliary = self.backbone.with_auxiliary(images)
        return self.class_head(self.embed(features)), *auxiliary


def create_model(
    name: str,
    *,
    embedding_dim: int | None = None,
    normalize: bool = True,
    pooling: str | Callable[[jax.Array], jax.Array] = "average",
    attention: str | None = None,
    attention_init: str = "paper",
    reduction: int = 16,
    kernel_size: int = 7,
    original: bool = False,
    num_classes: int | None = None,
    drop_path: float = 0.0,
    activation: str | None = None,
    transformer: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> EmbeddingModel:
    """Build an embedding model by name.

    Args:
        name: one of ``MODELS``: a backbone, alone or with ``_se`` or ``_cbam``. Or one's own,
            ``"package.module:factory"``, trusted first (``named_parts``): ``factory(dtype=...,
            rngs=...)`` returns what maps [b, h, w, 3] to [b, h', w', num_features].
        embedding_dim: d; None: the pooled features themselves, as in the paper.
        normalize: L2-normalise the embeddings.
        pooling: ``"average"`` or ``"gem"``; or a function or module, see ``EmbeddingModel``, which
            is code, so that no config can hold it.
        attention: a block of one's own, ``"package.module:Class"``, trusted first, in the two
            places where a backbone with ``_cbam`` has its own: ``Class(channels, rngs=...)`` maps
            [b, h, w, channels] to the same shape. With a backbone's name alone; None: the name's.
        attention_init: ``"paper"`` (gates start near one half) or ``"identity"`` (the model starts
            as exactly the plain backbone, so that pretrained statistics fit).
        reduction: r of the channel gate, of ``_se`` and ``_cbam``: its hidden width is c // r.
        kernel_size: of the spatial gate, of ``_cbam``; odd.
        original: CBAM as its authors' code has it, of ``_cbam``; see ``attention.CBAM``.
        num_classes: n of the layer that ``classify`` applies to embeddings, and of GoogLeNet's two
            auxiliary classifiers; None: no such layers.
        drop_path: of a transformer, see ``VisionTransformer``.
        activation: of a transformer's MLPs, where the weights' source has another than the name;
            one of ``backbones.vit.ACTIVATIONS``; None: the name's.
        transformer: with the name ``"vit"``, the fields of ``backbones.vit.Variant``, and of what
            the pixels are scaled by, ``mean`` and ``std``.
        dtype: of the backbone's computation, float32 or bfloat16. Parameters, BatchNorm, pooling
            and the embedding stay float32.
        rngs: for the parameters.

    Raises:
        ValueError: on an unknown name, pooling or init; the message lists the choices. For fewer
            than one class or dimension, and for what the model's attention, or its lack of it, does
            not take.

    >>> build = lambda: create_model("resnet18_cbam", embedding_dim=128, rngs=nnx.Rngs(0))
    >>> model = nnx.eval_shape(build)  # Or build(), which draws the parameters.
    >>> nnx.eval_shape(lambda model, images: model(images), model, jnp.ones((2, 64, 64, 3))).shape
    (2, 128)
    """
    options = {
        "embedding_dim": embedding_dim,
        "normalize": normalize,
        "pooling": pooling,
        "num_classes": num_classes,
    }
    for field, number in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
        if number is not None and number < 1:
            raise ValueError(f"{field}={number}: give at least 1, or None for no such layer")
    form = {"reduction": reduction, "kernel_size": kernel_size, "original": original}
    if attention is not None and name not in BACKBONES:
        raise ValueError(
            f"attention={attention!r}: {name} has no place for it; give one of "
            f"{', '.join(BACKBONES)}"
        )
    if name in TRANSFORMERS or name == ANY_TRANSFORMER:
        _check_form(name, "", form)
        variant, scaling = _variant(name, activation, transformer)
        backbone = VisionTransformer(variant, drop_path=drop_path, dtype=dtype, rngs=rngs)
        return EmbeddingModel(backbone, scaling=scaling, rngs=rngs, **options)
    backbone_name, suffix = parts_of(name)
    if drop_path or activation is not None or transformer is not None:
        raise ValueError(f"{name} has no drop_path, activation or transformer: leave them out")
    _check_form(name, suffix, form)
    if attention is not None:
        block = partial(_own_attention, attention)
    else:
        block = _attention(suffix, form, init=attention_init, dtype=dtype)
    auxiliary = {"auxiliary_classes": num_classes} if backbone_name == "googlenet" else {}
    if named_parts.is_named(name):
        backbone = named_parts.call(name, "model.name", dtype=dtype, rngs=rngs)
        if not isinstance(getattr(backbone, "num_features", None), int):
            raise ValueError(f"{name} has no num_features: give it the channels of its last map")
    else:
        build = BACKBONES[backbone_name]
        backbone = build(attention=block, dtype=dtype, rngs=rngs, **auxiliary)
    return EmbeddingModel(backbone, scaling=pixel_scaling(backbone_name), rngs=rngs, **options)


def _check_form(name: str, suffix: str, form: Mapping[str, Any]) -> None:
    for field, value in form.items():
        if field not in _TAKEN[suffix] and value != FORM[field]:
            raise ValueError(
                f"{field}={value!r}: {name} has no attention that takes it; leave it out"
            )


def _attention(
    suffix: str, form: Mapping[str, Any], *, init: str, dtype: DTypeLike
) -> Callable[..., nnx.Module] | None:
    """What makes the attention of a name's suffix, given its features and rngs."""
    if init not in GATE_INITS:
        choices = ", ".join(GATE_INITS)
        raise ValueError(f"unknown attention_init {init!r}: choose one of {choices}")
    block = ATTENTIONS[suffix]
    taken = {field: form[field] for field in _TAKEN[suffix]}
    return None if block is None else partial(block, init=init, dtype=dtype, **taken)


def _own_attention(name: str, channels: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A block of one's own, once it has shown that it keeps a map's shape."""
    block = named_parts.call(name, "model.attention", channels, rngs=rngs)
    if not isinstance(block, nnx.Module):
        raise ValueError(
            f"attention={name!r}: it makes a {type(block).__name__}, expected an nnx.Module"
        )
    given = jax.ShapeDtypeStruct((2, 7, 5, channels), jnp.float32)
    try:
        found = nnx.eval_shape(lambda block, x: block(x), block, given)
    except Exception as error:  # Whatever the user's class raises.
        raise ValueError(
            f"attention={name!r}: called with [2, 7, 5, {channels}] it raised "
            f"{type(error).__name__}: {named_parts.first_line(error)}"
        ) from error
    if getattr(found, "shape", None) != given.shape:
        raise ValueError(
            f"attention={name!r}: it makes {getattr(found, 'shape', found)} of {given.shape}, "
            "expected the same shape"
        )
    return block


def _variant(
    name: str, activation: str | None, fields: Mapping[str, Any] | None
) -> tuple[Variant, tuple[tuple[float, ...], tuple[float, ...]]]:
    """A transformer's variant, and the mean and the deviation of its pixels."""
    if (name == ANY_TRANSFORMER) != (fields is not None):
        raise ValueError(f"transformer={fields!r} of {name!r}: the fields are those of 'vit' alone")
    if fields is None:
        variant, scaling = TRANSFORMERS[name], pixel_scaling(name)
    else:
        try:
            scaling = pixel_scaling(name, fields)
            variant = Variant(**{k: v for k, v in fields.items() if k not in ("mean", "std")})
        except (TypeError, LookupError) as error:
            raise ValueError(f"transformer={str(fields)[:80]!r}: {str(error)[:80]}") from error
    changed = {} if activation is None else {"activation": activation}
    return dataclasses.replace(variant, **changed), scaling


if __name__ == "__main__":
    # By name: the list stands above the models, which know nothing of published weights.
    sys.exit(importlib.import_module("cbam_jax.model_list").command())
