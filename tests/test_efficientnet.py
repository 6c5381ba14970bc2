from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import FOLDER, NUM_CLASSES, seeded_images
from golden.make_efficientnet import HEIGHT, WIDTH
from seeded import Add, jitted, seeded_model, torch_arrays

from cbam_jax.backbones import layers
from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.efficientnet import EfficientNetLite, InvertedResidual
from cbam_jax.backbones.layers import Conv, DepthwiseConv
from cbam_jax.pretrained import load_pretrained


def same_padding(side, size, strides):
    """TensorFlow's documented rule, before and after."""
    total = max(size - (side % strides or strides), 0)
    return total // 2, total - total // 2


def direct_depthwise(x, kernel, strides):
    """Pixel by pixel in float64."""
    size = kernel.shape[0]
    border = [same_padding(side, size, strides) for side in x.shape[1:3]]
    x = np.pad(x.astype(np.float64), ((0, 0), *border, (0, 0)))
    height, width = ((side - size) // strides + 1 for side in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, x.shape[3]))
    for i, j in np.ndindex(height, width):
        window = x[:, i * strides : i * strides + size, j * strides : j * strides + size]
        out[:, i, j] = np.einsum("bhwc,hwc->bc", window, kernel[:, :, 0])
    return out


CASES = [
    ((2, 6, 9, 3), 3, 1),
    ((2, 7, 4, 3), 5, 1),
    ((2, 8, 9, 3), 3, 2),
    ((2, 9, 6, 3), 5, 2),
    ((1, 1, 2, 3), 5, 2),
]


@pytest.mark.parametrize(("shape", "size", "strides"), CASES)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_depthwise_is_the_definition_and_so_is_its_gradient(
    rng, shape, size, strides, on_cpu, monkeypatch
):
    monkeypatch.setattr(layers, "on_cpu", lambda: on_cpu)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, shape[3])).astype(np.float32)
    layer = nnx.eval_shape(
        lambda: DepthwiseConv(3, size, strides, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    graph, _ = nnx.split(layer)

    def apply(x, kernel):
        return nnx.merge(graph, nnx.State({"kernel": nnx.Param(kernel)}))(x)

    # Linear in each argument: the pullback of dy, dotted with another input, is what dy says of it.
    dy = rng.normal(size=direct_depthwise(x, kernel, strides).shape).astype(np.float32)
    y, (dx, d_kernel) = jax.jit(partial(pulled_back, apply))(x, kernel, dy)
    np.testing.assert_allclose(y, direct_depthwise(x, kernel, strides), rtol=1e-5, atol=1e-5)
    others = rng.normal(size=shape), rng.normal(size=kernel.shape)
    for gradient, other, moved in (
        (dx, others[0], direct_depthwise(others[0], kernel, strides)),
        (d_kernel, others[1], direct_depthwise(x, others[1], strides)),
    ):
        expected = np.sum(np.float64(dy) * moved)
        np.testing.assert_allclose(np.sum(np.float64(gradient) * other), expected, rtol=1e-4)


def pulled_back(function, x, kernel, dy):
    y, pullback = jax.vjp(function, x, kernel)
    return y, pullback(dy)


def test_depthwise_in_bfloat16_is_summed_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 6, 9, 3)), jnp.bfloat16)
    layer = nnx.eval_shape(lambda: DepthwiseConv(3, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 3)), jnp.bfloat16)
    nnx.update(layer, {"kernel": nnx.Param(kernel.astype(jnp.float32))})
    y = jitted(layer, x)
    assert y.dtype == jnp.bfloat16
    expected = direct_depthwise(np.float32(x), np.float32(kernel), 1)
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 9, 3), (1, 5, 6, 3)])
def test_same_is_tensorflows_padding(rng, shape):
    x = rng.normal(size=shape).astype(np.float32)
    layer = nnx.eval_shape(lambda: Conv(3, 3, 3, 2, same=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    # No channel hears of another: the definition of a depthwise convolution is that of this too.
    kernel = rng.normal(size=(3, 3, 1, 3)).astype(np.float32)
    nnx.update(layer, {"kernel": nnx.Param(jnp.asarray(kernel * np.eye(3, dtype=np.float32)))})
    np.testing.assert_allclose(jitted(layer, x), direct_depthwise(x, kernel, 2), atol=1e-5)


@pytest.mark.slow
def test_features_and_logits_are_the_pytorch_packages():
    golden = np.load(FOLDER / "efficientnet.npz")
    model = seeded_model("efficientnet_lite0", NUM_CLASSES)
    features = jitted(model.backbone, seeded_images(HEIGHT, WIDTH))
    logits = model.fc(np.asarray(features).mean((1, 2)))
    for ours, expected in ((features, golden["features"]), (logits, golden["logits"])):
        np.testing.assert_allclose(ours, expected, atol=5e-5 * np.abs(expected).max())


def test_parameter_count():
    # As timm counts tf_efficientnet_lite0, less the classifier's 1000 * (1280 + 1).
    model = nnx.eval_shape(lambda: EfficientNetLite(rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 4_652_008 - 1_281_000


def filled(build):
    """A model with seeded weights, in evaluation mode."""
    model = nnx.eval_shape(build)
    load_pretrained(model, torch_arrays(model))
    return nnx.view(model, use_running_average=True)


def test_attention_follows_the_first_and_the_last_convolution(monkeypatch):
    # One block, cut out: it shows what the stem gives, and the head is as wide as that.
    monkeypatch.setattr(InvertedResidual, "__call__", lambda self, x: x)
    stages = ((1, 3, 1, 1, 32),)
    build = lambda: EfficientNetLite(stages=stages, attention=Add, rngs=nnx.Rngs(0))  # noqa: E731
    graph, state = nnx.split(filled(build))

    def run(state, images):
        model = nnx.merge(graph, state)
        stem = nnx.relu6(model.bn0(model.conv_stem(images)))
        return model(images), nnx.relu6(model.bn1(model.conv_head(stem + 32))) + 1280

    found, expected = jax.jit(run)(state, seeded_images(4, 6))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.ptp(found) > 1


@pytest.mark.parametrize(
    ("features", "strides", "has"), [(8, 1, True), (8, 2, False), (6, 1, False)]
)
def test_the_shortcut_stands_where_shapes_allow(rng, features, strides, has, monkeypatch):
    # The layers of the block replaced: what passes them is nothing.
    monkeypatch.setattr(Conv, "__call__", lambda self, x: jnp.zeros((*x.shape[:3], features)))
    monkeypatch.setattr(BatchNorm, "__call__", lambda self, x: x)
    monkeypatch.setattr(DepthwiseConv, "__call__", lambda self, x: x[:, ::strides, ::strides])
    block = nnx.eval_shape(
        lambda: InvertedResidual(8, features, 3, strides, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 8)), jnp.float32)
    y = block(x)
    assert bool(jnp.any(y)) == has
    if has:
        np.testing.assert_array_equal(y, x)
