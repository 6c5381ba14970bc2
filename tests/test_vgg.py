from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import FOLDER, seeded_images
from seeded import jitted, seeded_model, torch_arrays

from cbam_jax.backbones.layers import max_pool
from cbam_jax.backbones.vgg import VGG16, VGG16BN
from cbam_jax.models import create_model
from cbam_jax.pretrained import Classifier, load_pretrained


def slow_max_pool(x, size, strides, padding, ceil_mode):
    """torch's documented rule, window by window: one that starts past the input is left out."""
    lengths = []
    for length in x.shape[1:3]:
        span = (length + 2 * padding - size) / strides
        starts = range(0, (int(np.ceil(span)) if ceil_mode else int(span)) * strides + 1, strides)
        lengths.append([start for start in starts if start < length + padding])
    out = np.empty((x.shape[0], len(lengths[0]), len(lengths[1]), x.shape[3]), x.dtype)
    for i, top in enumerate(lengths[0]):
        for j, left in enumerate(lengths[1]):
            rows = slice(max(top - padding, 0), top - padding + size)
            columns = slice(max(left - padding, 0), left - padding + size)
            out[:, i, j] = x[:, rows, columns].max((1, 2))
    return out


@pytest.mark.parametrize("height_width", [(7, 8), (9, 10), (5, 3)])
@pytest.mark.parametrize(
    ("size", "strides", "padding", "ceil_mode"),
    [
        (2, 2, 0, False),
        (2, 2, 0, True),
        (3, 2, 0, True),
        (3, 2, 1, True),
        (3, 1, 1, True),
        (2, 2, 1, True),
    ],
)
def test_max_pool_is_torchs(rng, height_width, size, strides, padding, ceil_mode):
    x = rng.normal(-3, 1, (2, *height_width, 3)).astype(np.float32)
    ours = max_pool(jnp.asarray(x), size, strides, padding=padding, ceil_mode=ceil_mode)
    np.testing.assert_array_equal(ours, slow_max_pool(x, size, strides, padding, ceil_mode))


def test_features_are_torchvisions():
    golden = np.load(FOLDER / "backbones.npz")
    model = seeded_model("vgg16")
    expected = golden["vgg16_features"]
    features = jitted(model.backbone, seeded_images(65, 97))
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())


def test_the_head_takes_torchs_order(rng):
    """Channels first, after averaging to 7 x 7; the layers replaced by nothing."""
    layers = dict.fromkeys(("0", "3", "6"), lambda x: x)
    backbone = nnx.eval_shape(lambda: VGG16(rngs=nnx.Rngs(0)))
    head = SimpleNamespace(backbone=backbone, classifier=layers)
    x = rng.uniform(1, 2, (2, 6, 9, 5)).astype(np.float32)
    expected = np.empty((2, 5, 7, 7))
    for i in range(7):
        for j in range(7):
            rows = slice(i * 6 // 7, int(np.ceil((i + 1) * 6 / 7)))
            columns = slice(j * 9 // 7, int(np.ceil((j + 1) * 9 / 7)))
            expected[:, :, i, j] = x[:, rows, columns].mean((1, 2))
    ours = Classifier.classify(head, jnp.asarray(x))
    np.testing.assert_allclose(ours, expected.reshape(2, -1), rtol=1e-5)


# torchvision's published totals less the classifier's 123,642,856.
@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [(VGG16, 138_357_544 - 123_642_856), (VGG16BN, 138_365_992 - 123_642_856)],
)
def test_parameter_counts(backbone, parameters):
    model = nnx.eval_shape(lambda: backbone(rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == parameters


class Ramp(nnx.Module):
    """Stands where attention would: adds its width times the column, which no pool lets pass."""

    def __init__(self, features, *, rngs):
        self.features = features

    def __call__(self, x):
        assert x.shape[-1] == self.features
        return x + ramp(x)


def ramp(x):
    columns = jnp.arange(x.shape[2], dtype=jnp.float32)
    return x.shape[-1] * columns.reshape(1, 1, -1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "stem_size"), [(VGG16, 2), (VGG16BN, 3)])
def test_attention_follows_the_first_and_the_last_relu(backbone, stem_size):
    model = nnx.eval_shape(lambda: backbone(attention=Ramp, rngs=nnx.Rngs(0)))
    load_pretrained(model, torch_arrays(model))
    model = nnx.view(model, use_running_average=True)

    def by_hand(model, x):
        for layer in model.features[:stem_size]:
            x = layer(x)
        assert model.features[stem_size - 1] is nnx.relu
        x = x + ramp(x)
        for layer in model.features[stem_size:-1]:
            x = layer(x)
        assert model.features[-2] is nnx.relu
        return x + ramp(x)

    graph, state = nnx.split(model)
    images = seeded_images(32, 64)
    last = jax.jit(lambda state, x: by_hand(nnx.merge(graph, state), x))(state, images)
    expected = slow_max_pool(np.asarray(last), 2, 2, 0, False)
    np.testing.assert_allclose(jitted(model, images), expected, rtol=1e-5)


def test_names_with_and_without_batch_norm_and_attention():
    for name, block in [("vgg16_cbam", "channel"), ("vgg16_bn_se", "fc1")]:
        model = nnx.eval_shape(lambda name=name: create_model(name, rngs=nnx.Rngs(0)))
        assert hasattr(model.backbone.last_attention, block)
        assert len(model.backbone.features) == (44 if "bn" in name else 31)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"), [("vgg16_cbam", 0, 0.2), ("vgg16_bn_cbam", 0.6, 2)]
)
def test_random_weights_tell_images_apart_with_batch_norm_alone(name, least, most):
    model = create_model(name, embedding_dim=128, normalize=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.view(model, use_running_average=False))
    noise = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3)).astype(np.uint8)
    embed = jax.jit(lambda state, images: nnx.merge(graph, state)(model.preprocess(images)))
    embeddings = np.asarray(embed(state, noise), np.float64)
    distances = np.linalg.norm(embeddings[:, None] - embeddings, axis=-1)
    assert least < distances.sum() / (16 * 15) < most
