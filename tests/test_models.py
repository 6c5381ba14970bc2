import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeded import SmallBackbone
from tiny_run import drawn_model, patch_tiny_models

from cbam_jax.models import EmbeddingModel, GeM, create_model, normalize_images


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(2, 64, 96, 3)), jnp.float32)


def evaluation(model):
    return nnx.view(model, use_running_average=True)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["_se", "_cbam"])
def test_identity_attention_is_the_plain_backbone(suffix, images):
    plain = create_model("resnet10", rngs=nnx.Rngs(0))
    model = create_model("resnet10" + suffix, attention_init="identity", rngs=nnx.Rngs(7))
    # The same weights in the backbone; the attention keeps its own.
    nnx.update(model, nnx.state(plain))
    for view in (nnx.view, evaluation):
        kwargs = {"use_running_average": False} if view is nnx.view else {}
        expected = view(plain, **kwargs)(images)
        np.testing.assert_allclose(view(model, **kwargs)(images), expected, atol=1e-6)


@pytest.mark.slow
def test_paper_attention_is_not_the_plain_backbone(images):
    plain = create_model("resnet10", rngs=nnx.Rngs(0))
    model = create_model("resnet10_cbam", rngs=nnx.Rngs(7))
    nnx.update(model, nnx.state(plain))
    difference = evaluation(model).features(images) - evaluation(plain).features(images)
    assert float(jnp.abs(difference).max()) > 1e-3


@pytest.fixture
def small():
    """A small model, drawn without compiling, and one program of its features and embeddings."""

    def build(**options):
        backbone = lambda: SmallBackbone(rngs=nnx.Rngs(0))  # noqa: E731
        model = drawn_model(lambda: EmbeddingModel(backbone(), rngs=nnx.Rngs(1), **options))
        graph, state = nnx.split(evaluation(model))

        @jax.jit
        def run(state, images):
            model = nnx.merge(graph, state)
            return model.features(images), model(images)

        return model, lambda images: map(np.asarray, run(state, images))

    return build


def test_embedding_is_the_pooled_map_projected_and_normalised(images, small):
    model, run = small(embedding_dim=24)
    features, found = run(images)
    projection = model.projection
    embedding = features.astype(np.float64).mean((1, 2)) @ np.asarray(projection.kernel[...])
    embedding += np.asarray(projection.bias[...])
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(found, embedding, rtol=1e-4, atol=1e-6)


def test_normalize_off_keeps_the_length(images, small):
    features, found = small(normalize=False)[1](images)
    expected = features.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_gem_is_the_generalised_mean(rng):
    x = rng.gamma(1.0, 2.0, (3, 5, 4, 6)).astype(np.float32)
    x[0] *= 1e-3
    x[1, ..., 2] = 0.0
    pool = GeM(power=2.5)
    exact = np.maximum(x.astype(np.float64), 1e-6)
    expected = (exact**2.5).mean((1, 2)) ** (1 / 2.5)
    np.testing.assert_allclose(pool(jnp.asarray(x)), expected, rtol=1e-5)

    def loss(x, power):
        return jnp.sum(jnp.mean(x**power, axis=(1, 2)) ** (1 / power))

    positive = jnp.asarray(x + 0.1)
    expected = jax.grad(loss)(positive, 2.5)
    ours = jax.grad(lambda x: jnp.sum(pool(x)))(positive)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_with_float32_parameters(images):
    exact = create_model("resnet10_cbam", rngs=nnx.Rngs(0))
    model = create_model("resnet10_cbam", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert evaluation(model).features(images).dtype == jnp.bfloat16
    embedding, expected = evaluation(model)(images), evaluation(exact)(images)
    assert embedding.dtype == jnp.float32
    assert float(jnp.sum(embedding * expected, axis=1).min()) > 0.99
    assert not bool(jnp.array_equal(embedding, expected))


@pytest.mark.slow
def test_training_view_moves_statistics_and_evaluation_does_not(images):
    model = create_model("resnet10", rngs=nnx.Rngs(0))
    before = np.asarray(model.backbone.layer4[0].bn2.mean[...])
    evaluation(model)(images)
    np.testing.assert_array_equal(model.backbone.layer4[0].bn2.mean[...], before)
    nnx.view(model, use_running_average=False)(images)
    assert np.abs(np.asarray(model.backbone.layer4[0].bn2.mean[...]) - before).max() > 1e-3


def test_normalize_images_is_torchvisions_transform(rng):
    pixels = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels / 255.0 - mean) / std
    np.testing.assert_allclose(normalize_images(jnp.asarray(pixels)), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, "unknown model 'resnet51'.*resnet50_cbam"),
        ({"name": "resnet18_"}, "unknown model"),
        ({"name": "resnet18", "pooling": "max"}, "unknown pooling 'max'.*gem"),
        ({"name": "resnet18", "attention_init": "none"}, "unknown attention_init 'none'"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes=0: give at least 1, or None"),
        ({"name": "googlenet", "num_classes": -1}, "num_classes=-1: give at least 1, or None"),
        ({"name": "resnet18", "embedding_dim": 0}, "embedding_dim=0: give at least 1, or None"),
        ({"name": "resnet18", "reduction": 8}, "reduction=8: resnet18 has no attention that takes"),
        ({"name": "resnet18_se", "kernel_size": 3}, "kernel_size=3: resnet18_se has no attention"),
        ({"name": "dinov2_s14", "original": True}, "original=True: dinov2_s14 has no att"),
        ({"name": "resnet18_cbam", "kernel_size": 4}, "kernel_size must be odd .* got 4"),
        ({"name": "resnet18_cbam", "reduction": 2.5}, "whole number of at least 1, got 2.5"),
    ],
)
def test_bad_arguments_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: create_model(**arguments, rngs=nnx.Rngs(0)))


class Scaled(nnx.Module):
    """A pooling with a parameter: one place of a map, times a number."""

    def __init__(self):
        self.factor = nnx.Param(jnp.ones(1))

    def __call__(self, x):
        return x[:, 1, 2] * self.factor[0]


def test_a_pooling_of_ones_own(small):
    features = np.random.default_rng(3).normal(size=(2, 3, 5, 16)).astype(np.float32)
    model, _ = small(pooling=lambda x: x[:, 1, 2], normalize=False)
    np.testing.assert_array_equal(model.embed(features), features[:, 1, 2])
    model, _ = small(pooling=Scaled(), normalize=False)
    factor = float(model.pool.factor[0])
    assert factor != 1
    np.testing.assert_allclose(model.embed(features), features[:, 1, 2] * factor, rtol=1e-6)
    model, _ = small(pooling=lambda x: x[:, 0])
    with pytest.raises(ValueError, match=r"pooling gave .* shape \(2, 5, 16\) for .* \(2, 16\)"):
        model.embed(features)


def test_the_form_of_attention_is_that_asked_for(monkeypatch):
    patch_tiny_models(monkeypatch)
    form = {"reduction": 4, "kernel_size": 3, "original": True}
    model = nnx.eval_shape(lambda: create_model("tiny_cbam", **form, rngs=nnx.Rngs(0)))
    cbam = model.backbone.last_attention
    assert cbam.channel.fc1.kernel.shape == (16, 4)
    assert cbam.channel.fc1.bias.shape == (4,)
    assert cbam.spatial.conv.kernel.shape == (3, 3, 2, 1)
    assert cbam.spatial.bn.scale.shape == (1,)
