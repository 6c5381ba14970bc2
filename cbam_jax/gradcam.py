"""Where a model looks: class activation maps for embeddings, and the attention's own gates.

An embedding has no classes. What is explained is its similarity to another image's embedding, or,
without another image, its own energy. The model is split at a layer, f = g(A), A [b, h', w', c];
the gradient G of the target by A, in float32, and A itself make the map:

========== ===================================================================================
grad_cam   sum over c of A times the mean of G over h' and w'
grad_cam++ the same with weights sum over h', w' of alpha max(G, 0),
           alpha = G^2 / (2 G^2 + G^3 sum of A over h', w')
hires_cam  sum over c of A times G; equal to grad_cam where A is only averaged and projected
========== ===================================================================================

The numbers are those of pytorch-grad-cam, but for grad_cam++ before a max-pool: its squares show
how a gradient is shared among equal entries, and torch gives it all to one of them.

Selvaraju et al.: Grad-CAM, ICCV 2017. Chattopadhay et al.: Grad-CAM++, WACV 2018. Draelos, Carin:
Use HiResCAM instead of Grad-CAM for faithful explanations of CNNs, 2020.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from jax.core import Tracer

from cbam_jax.attention import CBAM, SqueezeExcite
from cbam_jax.model_state import evaluation_view

METHODS = ("grad_cam", "grad_cam++", "hires_cam")
# Pixels less their mean, divided by their deviation, are below 3.
_LARGEST = 16
# What is below this share of the terms it was summed from is rounding.
_ROUNDING = 1e-5


class HeatMaps(NamedTuple):
    """Maps of b images.

    Attributes:
        heat: [b, h, w] in [0, 1], of the images' size: negative entries of the raw map set to
            zero, scaled to [0, 1], enlarged bilinearly, scaled again. All zero for an empty map.
        raw: [b, h', w'], of the layer's size, signed, in units of the target for one entry of the
            feature map. What lowers the target is negative.
        maximum: [b], the greatest entry of the raw map.
        empty: bool [b], whether the map shows nothing but rounding: no entry of the raw map is
            positive, or all are equal, or the target does not change with the embedding.
            pytorch-grad-cam scales rounding up to 1.
    """

    heat: jax.Array
    raw: jax.Array
    maximum: jax.Array
    empty: jax.Array


Target = jax.Array | np.ndarray | Callable[[jax.Array], jax.Array] | None


def grad_cam(
    model: Any,
    images: jax.Array | np.ndarray,
    target: Target = None,
    *,
    layer: str = "backbone",
    method: str = "grad_cam",
) -> HeatMaps:
    """Return where each image holds what its embedding's target value comes from.

    Computed in evaluation mode, in float32 whatever the model's dtype, each image by itself, jitted
    once for each layer, method and shape. The model is left as it is.

    With a cosine the mean of the raw map is zero where A is only averaged, since an embedding's
    length does not change a cosine: such a map shows where an image is more like the other than it
    is on the whole. An image with itself as reference is at the cosine's maximum, without a
    gradient, and gives an empty map. For unit vectors cosine and (negative squared) Euclidean
    distance give the same heat.

    Args:
        model: maps images [b, h, w, 3] to embeddings [b, d], such as an ``EmbeddingModel``.
        images: [b, h, w, 3] float32, as ``model`` takes them.
        target: an embedding [d] or one for each image [b, d]: the cosine similarity to it. None:
            half the squared length of the embedding before its L2 norm. Or a function of the
            embeddings [b, d] to values [b], the i-th of the i-th embedding alone; jitted once for
            each function object.
        layer: name of a submodule whose output is the feature map: ``"backbone"`` is the last
            feature map after its attention, ``model.features``, and of a transformer the tokens
            of its patches that its pooled token last attends to, normalised; others are such as
            ``"backbone.layer4"`` or ``"layer3.2"`` (``backbone.`` may be left out; a list means its
            last entry), ``"last_attention"``, ``"features.29"``, ``"inception4e"``.
        method: one of ``METHODS``.

    Raises:
        ValueError: on an unknown layer, with the choices, on one that gives no feature map, on an
            unknown method, images that were not scaled or have other axes, a target of another
            shape, or a layer inside ``nnx.remat``.

    >>> from cbam_jax.models import create_model
    >>> build = lambda: create_model("resnet10_cbam", rngs=nnx.Rngs(0))
    >>> model = nnx.eval_shape(build)  # Or build(), and maps = grad_cam(model, images).
    >>> images = jnp.ones((2, 64, 96, 3))
    >>> maps = nnx.eval_shape(grad_cam, model, images)
    >>> maps.heat.shape, maps.raw.shape, maps.empty.shape
    ((2, 64, 96), (2, 2, 3), (2,))
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    _check_images(images)
    path = find_layer(model, layer)
    function, reference = (target, None) if callable(target) else (None, target)
    attributes = {"dtype": jnp.float32} | ({"normalize": False} if target is None else {})
    view = nnx.with_attributes(_evaluated(model), raise_if_not_found=False, **attributes)
    with _told_of_remat():
        return _maps(
            *nnx.split(view), images, reference, path=path, method=method, function=function
        )


def pair_maps(
    model: Any, queries: jax.Array | np.ndarray, results: jax.Array | np.ndarray, **options: str
) -> tuple[HeatMaps, HeatMaps]:
    """Return for each query and its result where either is like the other.

    Both are embedded, and the target of each is the cosine similarity to the other's embedding,
    held constant.

    Args:
        model: as for ``grad_cam``.
        queries: [b, h, w, 3] float32.
        results: [b, h, w, 3] float32, the i-th for the i-th query.
        **options: ``layer`` and ``method`` of ``grad_cam``.

    Returns:
        The queries' maps and the results'.
    """
    _check_images(results)
    graphdef, state = nnx.split(_evaluated(model))
    return (
        grad_cam(model, queries, _embed(graphdef, state, results), **options),
        grad_cam(model, results, _embed(graphdef, state, queries), **options),
    )


def attention_gates(model: Any, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
    """Return what the model's own attention multiplies its feature maps by.

    Args:
        model: as for ``grad_cam``, with ``CBAM`` and ``SqueezeExcite`` among its submodules.
        images: [b, h, w, 3] float32.

    Returns:
        For each attention its name and ``.channel``: [b, c], and for a CBAM also ``.spatial``:
        [b, h', w']. Empty for a model without attention.

    Raises:
        ValueError: an attention is used more than once or inside ``nnx.remat``, or images are no
            such array.

    >>> from cbam_jax.attention import CBAM
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), CBAM(8, 4, rngs=rngs))
    >>> for name, gate in attention_gates(model, jnp.ones((2, 6, 5, 3))).items():
    ...     print(name, gate.shape)
    layers.1.channel (2, 8)
    layers.1.spatial (2, 6, 5)
    """
    _check_images(images)
    with _told_of_remat():
        return _gates(*nnx.split(_evaluated(model)), images)


@contextlib.contextmanager
def _told_of_remat() -> Iterator[None]:
    """Say in one line what JAX and Flax say of a value that leaves a transformation."""
    try:
        yield
    except (jax.errors.UnexpectedTracerError, errors.TraceContextError) as error:
        raise ValueError(
            "the model calls the layer inside nnx.remat, or another transformation, which lets "
            "nothing out: give a model built without it, with the same parameters"
        ) from error


def find_layer(model: Any, layer: str) -> tuple[str, ...]:
    """Return the path of a layer's name; ValueError, with the choices, where there is none."""
    names = layer.split(".")
    backbone = _layers(model).get("backbone")
    short = names[0] not in _layers(model) and backbone is not None
    path, node = (["backbone"], backbone) if short else ([], model)
    for name in names:
        if name not in _layers(node):
            where, choices = ".".join(path) or "the model", ", ".join(_layers(node)) or "nothing"
            raise ValueError(
                f"unknown layer {layer!r}: no {name!r} in {where}, which has {choices}"
            )
        path.append(name)
        node = _layers(node)[name]
    while isinstance(node, nnx.List):
        path.append(str(len(node) - 1))
        node = node[-1]
    if getattr(node, "pools_itself", False):  # Of a transformer, the tokens of its patches.
        path.append("grid")
    return tuple(path)


def _check_images(images: jax.Array | np.ndarray) -> None:
    """Raise ValueError, with the remedy, unless images are what ``model.preprocess`` gives."""
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if len(shape) == 3:
        remedy = "add the batch axis, images[None]"
    elif len(shape) == 4 and shape[1] == 3 != shape[3]:
        remedy = "move the channels last, transpose(0, 2, 3, 1)"
    elif len(shape) != 4 or 0 in shape or not hasattr(images, "dtype"):
        remedy = "give an array of images"
    elif not jnp.issubdtype(dtype, jnp.floating):
        remedy = "scale pixels first, model.preprocess(images)"
    elif not isinstance(images, Tracer) and np.max(np.abs(np.asarray(images))) > _LARGEST:
        remedy = "these are pixels up to 255; give model.preprocess of them as uint8"
    else:
        return
    raise ValueError(f"images are {dtype} {list(shape)}, expected float [b, h, w, 3]: {remedy}")


def _layers(node: Any) -> dict[str, Any]:
    if isinstance(node, nnx.List):  # Its functions too, such as a ReLU.
        return {str(i): layer for i, layer in enumerate(node)}
    return {name: child for name, child in vars(node).items() if isinstance(child, nnx.Module)}


def _evaluated(model: Any) -> Any:
    return evaluation_view(model)


@jax.jit(static_argnums=0)
def _embed(graphdef: Any, state: Any, images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(images)


class _Hooked(nnx.Module):
    """Stands in a layer's place and does ``hook(layer, x)``."""

    def __init__(self, layer: Any, hook: Callable[[Any, jax.Array], jax.Array]):
        self.layer = layer
        self.hook = hook

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.hook(self.layer, x)


def _hook(model: Any, path: tuple[str, ...], hook: Callable[[Any, jax.Array], jax.Array]) -> None:
    parent = model
    for name in path[:-1]:
        parent = getattr(parent, name)
    setattr(parent, path[-1], nnx.data(_Hooked(getattr(parent, path[-1]), hook)))


@partial(jax.jit, static_argnames=("graphdef", "path", "method", "function"))
def _maps(
    graphdef: Any,
    state: Any,
    images: jax.Array,
    reference: jax.Array | None,
    *,
    path: tuple[str, ...],
    method: str,
    function: Callable[[jax.Array], jax.Array] | None,
) -> HeatMaps:
    def value(embeddings: jax.Array) -> jax.Array:
        return jnp.sum(_scores(embeddings, reference, function))

    def rest(activation: jax.Array) -> tuple[jax.Array, jax.Array]:
        # What stands before the layer is computed for nothing, and XLA leaves it out.
        model = nnx.merge(graphdef, state)
        _hook(model, path, lambda layer, x: activation)
        embeddings = model(images)
        return value(embeddings), embeddings

    # Also where the device would multiply float32 in fewer bits.
    with jax.default_matmul_precision("highest"):
        activation = _activation(nnx.merge(graphdef, state), path, images)
        gradient, embeddings = jax.grad(rest, has_aux=True)(activation)
    terms = activation * _weights(activation, gradient, method)
    # Nothing that the embedding, or the feature map, could change makes a difference.
    slopes = [
        jnp.sum(jnp.abs(embeddings * jax.grad(value)(embeddings)), axis=-1),
        jnp.sum(jnp.abs(activation * gradient), axis=(1, 2, 3)),
    ]
    scores = _scores(embeddings, reference, function)
    flat = jnp.minimum(*slopes) <= _ROUNDING * jnp.abs(scores)
    return _heat_maps(terms, flat, (images.shape[1], images.shape[2]))


def _activation(model: Any, path: tuple[str, ...], images: jax.Array) -> jax.Array:
    seen = []

    def keep(layer: Any, x: jax.Array) -> jax.Array:
        seen.append(layer(x))
        return seen[-1]

    _hook(model, path, keep)
    model(images)
    name = ".".join(path)
    if len(seen) != 1:
        raise ValueError(f"layer {name!r} is used {len(seen)} times by the model: choose another")
    if seen[0].ndim != 4:
        raise ValueError(
            f"layer {name!r} gives {list(seen[0].shape)}, no feature map [b, h, w, c]: "
            "choose another"
        )
    return seen[0]


def _scores(
    embeddings: jax.Array,
    reference: jax.Array | None,
    function: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    if function is not None:
        scores = function(embeddings)
        if scores.shape != embeddings.shape[:1]:
            raise ValueError(
                f"target gives {list(scores.shape)}, expected a value for each of "
                f"{len(embeddings)} embeddings"
            )
        return scores
    if reference is None:
        return jnp.sum(jnp.square(embeddings), axis=-1) / 2
    if reference.shape not in (embeddings.shape, embeddings.shape[1:]):
        raise ValueError(
            f"target has shape {list(reference.shape)}, expected the embeddings' "
            f"{list(embeddings.shape)} or {list(embeddings.shape[1:])}"
        )
    reference = jnp.broadcast_to(reference, embeddings.shape).astype(jnp.float32)
    return jnp.sum(_unit(embeddings) * _unit(reference), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    # Finite, as is its gradient, at zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-16))


def _weights(activation: jax.Array, gradient: jax.Array, method: str) -> jax.Array:
    if method == "hires_cam":
        return gradient
    if method == "grad_cam":
        return jnp.mean(gradient, axis=(1, 2), keepdims=True)
    square, total = jnp.square(gradient), jnp.sum(activation, axis=(1, 2), keepdims=True)
    alpha = square / (2 * square + total * square * gradient + 1e-6)
    return jnp.sum(nnx.relu(gradient) * alpha, axis=(1, 2), keepdims=True)


def _heat_maps(terms: jax.Array, flat: jax.Array, size: tuple[int, int]) -> HeatMaps:
    raw = jnp.sum(terms, axis=-1)
    maximum = jnp.max(raw, axis=(1, 2))
    above = maximum - jnp.maximum(jnp.min(raw, axis=(1, 2)), 0)
    empty = flat | (above <= _ROUNDING * jnp.max(jnp.sum(jnp.abs(terms), axis=-1), axis=(1, 2)))
    heat = jnp.where(empty[:, None, None], 0, _scale(nnx.relu(raw)))
    # Half-pixel centres and repeated edges, as OpenCV's INTER_LINEAR.
    heat = jax.image.resize(heat, (len(raw), *size), "linear", antialias=False)
    return HeatMaps(_scale(heat), raw, maximum, empty)


def _scale(maps: jax.Array) -> jax.Array:
    maps = maps - jnp.min(maps, axis=(1, 2), keepdims=True)
    return maps / (1e-7 + jnp.max(maps, axis=(1, 2), keepdims=True))


@jax.jit(static_argnums=0)
def _gates(graphdef: Any, state: Any, images: jax.Array) -> dict[str, jax.Array]:
    model = nnx.merge(graphdef, state)
    gates = {}

    def keep(name: str, kind: str, layer: Any, x: jax.Array) -> jax.Array:
        gate = getattr(layer, "gate", layer)(x)  # SqueezeExcite multiplies; its gate is a method.
        if f"{name}.{kind}" in gates:
            raise ValueError(f"attention {name!r} is used more than once by the model")
        gates[f"{name}.{kind}"] = gate[:, 0, 0] if kind == "channel" else gate[..., 0]
        return layer(x)

    for path, module in list(nnx.iter_modules(model)):
        path = tuple(map(str, path))
        name = ".".join(path)
        if isinstance(module, SqueezeExcite):
            _hook(model, path, partial(keep, name, "channel"))
        elif isinstance(module, CBAM):
            _hook(model, (*path, "channel"), partial(keep, name, "channel"))
            _hook(model, (*path, "spatial"), partial(keep, name, "spatial"))
    model(images)
    return gates
