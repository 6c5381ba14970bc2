import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cbam_jax import attention
from cbam_jax.attention import CBAM, ChannelGate, SpatialGate, SqueezeExcite


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def parameters(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def float64(param):
    return np.asarray(param[...], np.float64)


def channel_gate(x, w0, w1, b0=0.0, b1=0.0):
    """Equation by equation, one image at a time."""
    gates = []
    for image in x:
        pooled = image.mean((0, 1)), image.max((0, 1))
        logits = [np.maximum(v @ w0 + b0, 0) @ w1 + b1 for v in pooled]
        gates.append(sigmoid(logits[0] + logits[1]))
    return np.array(gates)[:, None, None, :]


def spatial_gate(x, kernel, order):
    """The 7 x 7 convolution as a loop over every output pixel."""
    b, h, w, _ = x.shape
    pooled = {"average": x.mean(-1), "maximum": x.max(-1)}
    maps = np.stack([pooled[name] for name in order], -1)
    pad = kernel.shape[0] // 2
    padded = np.pad(maps, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.zeros((b, h, w, 1))
    for n in range(b):
        for i in range(h):
            for j in range(w):
                window = padded[n, i : i + kernel.shape[0], j : j + kernel.shape[1]]
                out[n, i, j, 0] = (window * kernel[..., 0]).sum()
    return out


@pytest.fixture
def x(rng):
    return rng.normal(0.3, 1.5, (3, 9, 6, 32)).astype(np.float32)


def test_cbam_is_the_papers_equations(x):
    cbam = CBAM(32, reduction=8, rngs=nnx.Rngs(3))
    channel = channel_gate(
        x.astype(np.float64), float64(cbam.channel.fc1.kernel), float64(cbam.channel.fc2.kernel)
    )
    refined = x * channel
    logits = spatial_gate(refined, float64(cbam.spatial.conv.kernel), ("average", "maximum"))
    np.testing.assert_allclose(cbam.channel(x), channel, rtol=1e-5)
    np.testing.assert_allclose(cbam(x), refined * sigmoid(logits), rtol=1e-4, atol=1e-5)
    # The order of the two pooled maps matters: the other order must not pass for this one.
    swapped = spatial_gate(refined, float64(cbam.spatial.conv.kernel), ("maximum", "average"))
    assert np.abs(np.asarray(cbam(x)) - refined * sigmoid(swapped)).max() > 0.1


def test_original_form_pools_maximum_first_and_normalises(x, rng):
    cbam = nnx.view(CBAM(32, original=True, rngs=nnx.Rngs(3)), use_running_average=True)
    channel, spatial = cbam.channel, cbam.spatial
    channel.fc1.bias[...] = jnp.asarray(rng.normal(size=2), jnp.float32)
    channel.fc2.bias[...] = jnp.asarray(rng.normal(size=32), jnp.float32)
    spatial.bn.mean[...] = jnp.array([0.7])
    spatial.bn.var[...] = jnp.array([2.3])
    spatial.bn.scale[...] = jnp.array([1.4])
    spatial.bn.bias[...] = jnp.array([-0.2])
    gate = channel_gate(
        x.astype(np.float64),
        float64(channel.fc1.kernel),
        float64(channel.fc2.kernel),
        float64(channel.fc1.bias),
        float64(channel.fc2.bias),
    )
    logits = spatial_gate(x * gate, float64(spatial.conv.kernel), ("maximum", "average"))
    logits = (logits - 0.7) / np.sqrt(2.3 + 1e-5) * 1.4 - 0.2
    np.testing.assert_allclose(cbam(x), x * gate * sigmoid(logits), rtol=1e-4, atol=1e-5)


def test_squeeze_excite_is_its_equation(x):
    se = SqueezeExcite(32, rngs=nnx.Rngs(5))
    hidden = np.maximum(x.astype(np.float64).mean((1, 2)) @ float64(se.fc1.kernel), 0)
    gate = sigmoid(hidden @ float64(se.fc2.kernel))[:, None, None]
    np.testing.assert_allclose(se.gate(x), gate, rtol=1e-5)
    np.testing.assert_allclose(se(x), x * gate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", [CBAM, SqueezeExcite])
def test_identity_init_changes_nothing_and_still_learns(attention, x):
    module = attention(32, init="identity", rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(module(x), x)

    def energy(module):
        return jnp.sum(jnp.square(module(jnp.asarray(x))))

    gradients = jax.tree.leaves(nnx.grad(energy)(module))
    assert max(float(jnp.abs(gradient).max()) for gradient in gradients) > 0.01


@pytest.mark.parametrize("features", [64, 512, 2048])
def test_parameter_counts(features):
    hidden = features // 16
    assert parameters(CBAM(features, rngs=nnx.Rngs(0))) == 2 * features * hidden + 7 * 7 * 2
    # The original code: biases (hidden + features), and the spatial BatchNorm's scale and bias.
    original = parameters(CBAM(features, original=True, rngs=nnx.Rngs(0)))
    assert original == 2 * features * hidden + hidden + features + 7 * 7 * 2 + 2
    assert original == {64: 680, 512: 33_412, 2048: 526_564}[features]


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="'neutral'.*identity"):
        ChannelGate(32, init="neutral", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="odd.*got 4"):
        SpatialGate(4, rngs=nnx.Rngs(0))


def test_gates_near_one_half_scale_by_about_a_quarter(rng):
    x = np.maximum(rng.normal(size=(4, 14, 14, 64)), 0).astype(np.float32)
    ratio = np.linalg.norm(CBAM(64, rngs=nnx.Rngs(0))(x)) / np.linalg.norm(x)
    assert 0.05 < ratio < 0.8


@pytest.mark.parametrize("block", [CBAM, SqueezeExcite])
def test_a_map_of_other_axes_or_channels_is_told_so(block):
    attention = block(16, 4, rngs=nnx.Rngs(0))
    for shape in ((5, 7, 16), (2, 16, 5, 7), (2, 3, 5, 7, 16)):
        with pytest.raises(
            ValueError, match=r"a feature map has shape .*, expected \[b, h, w, 16\]"
        ):
            attention(jnp.zeros(shape))
    for reduction in (0, -1):
        with pytest.raises(ValueError, match=f"whole number of at least 1, got {reduction}"):
            block(16, reduction, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(5, 7, 16), (2, 3, 5, 7, 16)])
def test_a_spatial_gate_alone_is_told_of_other_axes_too(shape):
    with pytest.raises(ValueError, match=r"a feature map has shape .*, expected \[b, h, w, c\]"):
        SpatialGate(rngs=nnx.Rngs(0))(jnp.zeros(shape))


def test_a_negative_kernel_size_is_told_so():
    with pytest.raises(ValueError, match="kernel_size must be odd .* got -1"):
        CBAM(16, kernel_size=-1, rngs=nnx.Rngs(0))


@pytest.fixture
def tied(rng):
    """Few values, so that channels tie for the maximum; a pixel whose channels are all one."""
    x = rng.integers(-2, 3, (2, 4, 3, 7)).astype(np.float32)
    x[0, 0, 0] = -1.5
    return x


def test_a_gpus_pooling_of_channels_is_the_definition(tied, monkeypatch):
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    mean, maximum = attention._pooled_channels(jnp.asarray(tied))
    exact = tied.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(-1, keepdims=True), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(maximum, exact.max(-1, keepdims=True))
    narrow = attention._pooled_channels(jnp.asarray(tied, jnp.bfloat16))
    rounded = [np.asarray(pooled, jnp.bfloat16) for pooled in (mean, maximum)]
    np.testing.assert_array_equal(narrow, rounded)


def test_a_gpus_pooling_of_channels_has_its_gradient(tied, rng, monkeypatch):
    """Which channels that tie for the maximum share evenly, as with ``jnp.max``."""
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    weights = rng.normal(size=(2, *tied.shape[:3], 1)).astype(np.float32)

    def loss(x):
        return sum(
            jnp.sum(jnp.asarray(w) * pooled)
            for w, pooled in zip(weights, attention._pooled_channels(x), strict=True)
        )

    largest = tied == tied.max(-1, keepdims=True)
    expected = weights[0] / tied.shape[-1] + weights[1] * largest / largest.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(tied)), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(tied)), expected, rtol=1e-5, atol=1e-6)
