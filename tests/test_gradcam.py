"""Maps against pytorch-grad-cam's golden ones, and against finite differences in float64."""

from functools import partial
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_gradcam import CASES, inputs
from seeded import seeded_model

from cbam_jax.attention import CBAM, SqueezeExcite
from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.gradcam import METHODS, attention_gates, find_layer, grad_cam, pair_maps


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "gradcam.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def models():
    return {name: seeded_model(name) for name in {case.model for case in CASES.values()}}


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_maps_of_pytorch_grad_cam(key, golden, models):
    case = CASES[key]
    images, reference = inputs(case)
    target = None if case.target == "energy" else reference
    ours = grad_cam(models[case.model], images, target, layer=case.layer, method=case.method)
    raw = golden[f"{key}_raw"]
    assert np.abs(ours.raw - raw).max() < 1e-4 * np.abs(raw).max()
    np.testing.assert_allclose(ours.maximum, raw.max(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(ours.heat[:, ::4, ::4], golden[f"{key}_heat"], rtol=0, atol=1e-3)
    assert not ours.empty.any()


class Backbone(nnx.Module):
    """A convolution, BatchNorm, ReLU, attention, and a 1 x 1 convolution of each place."""

    def __init__(self, attention, dtype, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), strides=2, padding=1, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(6, rngs=rngs)
        draw = lambda: jax.random.uniform(rngs.params(), (6,), minval=0.5, maxval=1.5)  # noqa: E731
        self.bn.scale[...], self.bn.mean[...], self.bn.var[...] = draw(), draw() - 1, draw()
        self.attention = None if attention is None else attention(6, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(6, 5, dtype=dtype, rngs=rngs), nnx.relu])

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        x = x if self.attention is None else self.attention(x)
        for layer in self.blocks:
            x = layer(x)
        return x


class Tiny(nnx.Module):
    """Small enough that every entry's gradient is found by a finite difference."""

    def __init__(self, *, normalize=True, attention=None, dtype=jnp.float32):
        rngs = nnx.Rngs(3)
        self.backbone = Backbone(attention, dtype, rngs)
        self.projection = nnx.Linear(5, 4, rngs=rngs)
        self.normalize = normalize

    def __call__(self, images):
        x = jnp.mean(self.backbone(images).astype(jnp.float32), axis=(1, 2))
        x = self.projection(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) if self.normalize else x


IMAGES = np.random.default_rng(5).normal(0, 1, (3, 9, 14, 3)).astype(np.float32)
REFERENCE = np.random.default_rng(6).normal(0, 1, (3, 4)).astype(np.float32)


def float64(linear):
    kernel, bias = np.asarray(linear.kernel[...]), np.asarray(linear.bias[...])
    return kernel.astype(np.float64), bias.astype(np.float64)


def tail(model, layer, x):
    """From a layer's output [h, w, c] of one image to its embedding before the norm, in float64."""
    if layer == "conv":
        bn = model.backbone.bn
        scale, bias, mean, var = (
            np.asarray(v[...], np.float64) for v in (bn.scale, bn.bias, bn.mean, bn.var)
        )
        x = np.maximum((x - mean) / np.sqrt(var + bn.epsilon) * scale + bias, 0)
    if layer != "blocks":
        kernel, bias = float64(model.backbone.blocks[0])
        x = np.maximum(x @ kernel + bias, 0)
    kernel, bias = float64(model.projection)
    return x.mean(axis=(0, 1)) @ kernel + bias


def energy(embedding, _):
    return np.sum(embedding**2) / 2


def cosine(embedding, reference):
    return embedding @ reference / np.linalg.norm(embedding) / np.linalg.norm(reference)


def slow_gradient(value, x):
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-6
        gradient[i] = (value(x + step) - value(x - step)) / 2e-6
    return gradient


def slow_map(x, gradient, method):
    height, width, channels = x.shape
    total = np.zeros((height, width))
    for c in range(channels):
        g, weight = gradient[..., c], gradient[..., c].mean()
        if method == "hires_cam":
            weight = g
        if method == "grad_cam++":
            alpha = [v**2 / (2 * v**2 + x[..., c].sum() * v**3 + 1e-6) for v in g.flat]
            weight = sum(a * max(v, 0) for a, v in zip(alpha, g.flat, strict=True))
        total += weight * x[..., c]
    return total


def slow_heat(raw, height, width):
    heat = np.maximum(raw, 0)
    for size in ((width, height), None):
        heat = heat - heat.min()
        heat = heat / (heat.max() + 1e-7)
        heat = cv2.resize(heat, size, interpolation=cv2.INTER_LINEAR) if size else heat
    return heat


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["conv", "blocks"])
@pytest.mark.parametrize("target", [energy, cosine])
def test_maps_by_finite_differences(layer, target, method):
    model = nnx.view(Tiny(), use_running_average=True)
    x = model.backbone.conv(jnp.asarray(IMAGES))
    if layer == "blocks":
        x = model.backbone.blocks[0](
            nnx.relu(nnx.view(model, use_running_average=True).backbone.bn(x))
        )
        x = nnx.relu(x)
    reference = None if target is energy else REFERENCE
    ours = grad_cam(model, IMAGES, reference, layer=layer, method=method)
    for i, activation in enumerate(np.asarray(x, np.float64)):
        value = lambda a, i=i: target(tail(model, layer, a), REFERENCE[i].astype(np.float64))  # noqa: E731
        raw = slow_map(activation, slow_gradient(value, activation), method)
        np.testing.assert_allclose(ours.raw[i], raw, rtol=1e-4, atol=2e-5 * np.abs(raw).max())
        assert ours.maximum[i] == ours.raw[i].max()
        if not ours.empty[i]:
            np.testing.assert_allclose(ours.heat[i], slow_heat(raw, 9, 14), rtol=0, atol=1e-4)
    assert not ours.empty.all()


@pytest.mark.slow
def test_one_image_more_or_less_changes_no_map():
    together = grad_cam(Tiny(), IMAGES, REFERENCE)
    for i in range(3):
        alone = grad_cam(Tiny(), IMAGES[i : i + 1], REFERENCE[i])
        np.testing.assert_allclose(alone.raw[0], together.raw[i], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(alone.heat[0], together.heat[i], rtol=0, atol=1e-5)


def negative_squared_distance(embeddings):
    return -jnp.sum(jnp.square(embeddings - _unit(REFERENCE)), axis=-1)


def _unit(x):
    return jnp.asarray(x) / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_distance_and_cosine_of_unit_vectors_give_the_same_heat():
    distance = grad_cam(Tiny(), IMAGES, negative_squared_distance)
    similarity = grad_cam(Tiny(), IMAGES, REFERENCE)
    np.testing.assert_allclose(distance.heat, similarity.heat, rtol=0, atol=1e-4)
    np.testing.assert_allclose(distance.raw, 2 * similarity.raw, rtol=1e-3, atol=1e-6)


def test_energy_is_of_the_embedding_before_its_norm():
    normalized, plain = (grad_cam(Tiny(normalize=n), IMAGES) for n in (True, False))
    np.testing.assert_array_equal(normalized.raw, plain.raw)


@pytest.mark.parametrize("layer", ["backbone", "conv"])
@pytest.mark.parametrize("method", METHODS)
def test_an_image_compared_with_itself_gives_an_empty_map(layer, method):
    model = nnx.view(Tiny(), use_running_average=True)
    reference = np.array(model(jnp.asarray(IMAGES)))
    reference[1] = REFERENCE[1]
    maps = grad_cam(model, IMAGES, reference, layer=layer, method=method)
    assert maps.empty.tolist() == [True, False, True]
    assert not maps.heat[::2].any()
    assert maps.heat[1].max() > 0.99
    assert maps.maximum.shape == (3,)


def constant(embeddings):
    return jnp.ones(len(embeddings))


def squared_length(embeddings):
    return jnp.sum(jnp.square(embeddings), axis=-1)


def negative_sum(embeddings):
    return -jnp.sum(embeddings, axis=-1)


@pytest.mark.slow
def test_maps_without_a_place_that_stands_out_are_empty():
    one_place = grad_cam(Tiny(), IMAGES[:, :2, :2])
    assert one_place.raw.shape == (3, 1, 1)
    no_gradient = grad_cam(Tiny(), IMAGES, constant)
    length_of_unit_vectors = grad_cam(Tiny(), IMAGES, squared_length)
    model = Tiny(normalize=False)
    model.projection.kernel[...] = jnp.abs(model.projection.kernel[...])
    lowered_by_every_place = grad_cam(model, IMAGES, negative_sum)
    assert lowered_by_every_place.maximum.max() <= 0 > lowered_by_every_place.raw.min()
    for maps in (one_place, no_gradient, length_of_unit_vectors, lowered_by_every_place):
        assert maps.empty.all()
        assert not maps.heat.any()


def test_pairs_hold_the_other_image_constant():
    model = nnx.view(Tiny(), use_running_average=True)
    queries, results = IMAGES[:2], IMAGES[1:]
    of_queries, of_results = pair_maps(model, queries, results, layer="conv", method="hires_cam")
    options = {"layer": "conv", "method": "hires_cam"}
    expected = grad_cam(model, queries, model(jnp.asarray(results)), **options)
    np.testing.assert_allclose(of_queries.raw, expected.raw, rtol=1e-5, atol=1e-7)
    expected = grad_cam(model, results, model(jnp.asarray(queries)), **options)
    np.testing.assert_allclose(of_results.raw, expected.raw, rtol=1e-5, atol=1e-7)
    assert np.abs(of_queries.raw - of_results.raw).max() > 1e-3


def test_computed_in_float32_and_evaluation_mode_and_the_model_is_left_alone():
    expected = grad_cam(Tiny(), IMAGES, REFERENCE, layer="conv")
    model = nnx.view(Tiny(dtype=jnp.bfloat16), use_running_average=False)
    before = nnx.split(model)
    half = grad_cam(model, IMAGES, REFERENCE, layer="conv")
    np.testing.assert_array_equal(half.raw, expected.raw)
    after = nnx.split(model)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_gates_are_what_the_attention_multiplies_by():
    model = nnx.view(Tiny(attention=CBAM), use_running_average=True)
    gates = attention_gates(model, IMAGES)
    backbone = model.backbone
    x = nnx.relu(backbone.bn(backbone.conv(jnp.asarray(IMAGES))))
    channel = backbone.attention.channel(x)
    spatial = backbone.attention.spatial(x * channel)
    assert set(gates) == {"backbone.attention.channel", "backbone.attention.spatial"}
    for name, gate in (("channel", channel[:, 0, 0]), ("spatial", spatial[..., 0])):
        np.testing.assert_allclose(gates[f"backbone.attention.{name}"], gate, rtol=1e-5)
    model = nnx.view(Tiny(attention=SqueezeExcite), use_running_average=True)
    gates = attention_gates(model, IMAGES)
    assert list(gates) == ["backbone.attention.channel"]
    expected = model.backbone.attention.gate(x)[:, 0, 0]
    np.testing.assert_allclose(gates["backbone.attention.channel"], expected, rtol=1e-5)
    assert attention_gates(Tiny(), IMAGES) == {}


def test_layers_are_found_by_their_names():
    model = Tiny(attention=CBAM)
    assert find_layer(model, "backbone") == ("backbone",)
    assert find_layer(model, "attention.spatial") == ("backbone", "attention", "spatial")
    assert find_layer(model, "backbone.blocks") == ("backbone", "blocks", "1")
    assert find_layer(model, "blocks.0") == ("backbone", "blocks", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "layer5"}, "'layer5' in backbone, which has conv, bn, attention, blocks"),
        ({"layer": "backbone.blocks.2"}, "no '2' in backbone.blocks, which has 0, 1"),
        ({"layer": "conv.kernel"}, "no 'kernel' in backbone.conv, which has nothing"),
        ({"layer": "projection"}, r"gives \[3, 4\], no feature map \[b, h, w, c\]"),
        ({"method": "gradcam"}, "'gradcam': choose one of grad_cam, grad_cam"),
        ({"target": REFERENCE[:2]}, r"shape \[2, 4\], expected the embeddings' \[3, 4\] or \[4\]"),
        ({"target": jnp.mean}, r"target gives \[\], expected a value for each of 3 embeddings"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        grad_cam(Tiny(attention=CBAM), IMAGES, **options)


def test_layer_that_takes_no_part_is_refused(models):
    with pytest.raises(ValueError, match="'backbone.features.30' is used 0 times"):
        grad_cam(models["vgg16"], np.zeros((1, 32, 32, 3), np.float32), layer="features")


def test_gates_are_of_our_attention_alone_and_used_once(rng):
    class Gated(nnx.Module):
        """A gated unit of someone else's, and an attention that may stand in two places."""

        def __init__(self, times):
            rngs = nnx.Rngs(0)
            self.gate = nnx.Linear(3, 3, rngs=rngs)
            self.attention = SqueezeExcite(3, 1, rngs=rngs)
            self.times = times

        def __call__(self, x):
            x = x * self.gate(x)
            for _ in range(self.times):
                x = self.attention(x)
            return jnp.mean(x, axis=(1, 2))

    images = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    assert set(attention_gates(Gated(1), images)) == {"attention.channel"}
    with pytest.raises(ValueError, match="attention 'attention' is used more than once"):
        attention_gates(Gated(2), images)


class InRemat(nnx.Module):
    """An attention whose call is computed again in the backward pass."""

    def __init__(self):
        self.attention = SqueezeExcite(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.mean(nnx.remat(lambda layer, x: layer(x))(self.attention, x), axis=(1, 2))


@pytest.mark.parametrize("look", [attention_gates, partial(grad_cam, layer="attention")])
def test_what_is_inside_remat_is_told_so(look):
    with pytest.raises(ValueError, match=r"calls the layer inside nnx\.remat, or another"):
        look(InRemat(), jnp.ones((1, 2, 2, 3)))
