"""BatchNorm in both forms, a CPU's and a GPU's, against float64 and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cbam_jax.backbones import batch_norm
from cbam_jax.backbones.batch_norm import BatchNorm, conv_norm
from cbam_jax.backbones.layers import Conv, DepthwiseConv


@pytest.fixture
def on_gpu(monkeypatch):
    """The forms that a GPU gets, run here."""
    monkeypatch.setattr(batch_norm, "on_cpu", lambda: False)


@pytest.mark.parametrize("height", [6, 7, 11, 16])
def test_batch_norm_sums_maps_of_any_height(rng, height):
    x = rng.normal(2.0, 3.0, (2, height, 3, 4)).astype(np.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    norm(jnp.asarray(x))
    expected = 0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.var[...], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 3, 5), (2, 4, 3, 3), (1, 2, 3, 3, 4)])
def test_batch_norm_names_another_shape(shape):
    with pytest.raises(ValueError, match=r"BatchNorm: x has shape .* expected \[b, h, w, 4\]"):
        BatchNorm(4, rngs=nnx.Rngs(0))(jnp.zeros(shape))


def test_batch_norm_against_float64(rng):
    x = rng.normal(40.0, 2.0, (3, 4, 5, 6)).astype(np.float32)
    norm = BatchNorm(6, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(rng.normal(1, 0.3, 6), jnp.float32)
    norm.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    scale, bias = np.asarray(norm.scale[...], np.float64), np.asarray(norm.bias[...], np.float64)
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    y = norm(jnp.asarray(x))
    np.testing.assert_allclose(y, (exact - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=2e-5)
    # Torch's running averages: momentum 0.1, unbiased variance (n = 60).
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var * 60 / 59, rtol=1e-5)
    evaluated = nnx.view(norm, use_running_average=True)(jnp.asarray(x))
    mean, var = np.asarray(norm.mean[...], np.float64), np.asarray(norm.var[...], np.float64)
    running = (exact - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(evaluated, running * scale + bias, rtol=1e-5)


def test_batch_norm_gradient_is_autodiffs(rng):
    x = jnp.asarray(rng.normal(2.0, 3.0, (3, 4, 5, 6)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    scale = jnp.asarray(rng.normal(1, 0.3, 6), jnp.float32)
    bias = jnp.asarray(rng.normal(size=6), jnp.float32)

    def written_out(x, scale, bias):
        norm = BatchNorm(6, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = scale, bias
        return jnp.sum(weight * jnp.tanh(norm(x)))

    def by_definition(x, scale, bias):
        mean = jnp.mean(x, (0, 1, 2), keepdims=True)
        var = jnp.var(x, (0, 1, 2), keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * scale.reshape(1, 1, 1, -1)
        return jnp.sum(weight * jnp.tanh(y + bias.reshape(1, 1, 1, -1)))

    ours = jax.grad(written_out, argnums=(0, 1, 2))(x, scale, bias)
    theirs = jax.grad(by_definition, argnums=(0, 1, 2))(x, scale, bias)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batch_norm_stays_float32_in_bfloat16(rng):
    # Mean 100, deviation 0.1: in bfloat16 the statistics themselves would be lost.
    norm = nnx.view(BatchNorm(4, rngs=nnx.Rngs(0)), use_running_average=True)
    norm.mean[...] = jnp.full((4,), 100.3)
    norm.var[...] = jnp.full((4,), 0.01)
    x = jnp.full((1, 2, 2, 4), 100.5, jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    expected = (float(x[0, 0, 0, 0]) - 100.3) / 0.1
    np.testing.assert_allclose(norm(x).astype(np.float32), expected, rtol=0.02)


@pytest.mark.parametrize("ratio", [0, 10, 1000])
def test_moments_of_one_reading_do_not_cancel(rng, on_gpu, ratio):
    """Nor where the mean is a thousand deviations; unshifted, the variance would be lost."""
    x = (rng.normal(size=(4, 9, 7, 5)) + ratio * np.array([1, -1, 1, 0, 1])).astype(np.float32)
    mean, var = jax.jit(batch_norm._moments)(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=4e-6)


def relu_by_definition(x, scale, bias):
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    var = jnp.mean(jnp.square(x - mean), (0, 1, 2), keepdims=True)
    return jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)


def relu_with_it(x, scale, bias):
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale.reshape(-1), bias.reshape(-1)
    return norm(x, relu=True)


def norm_inputs(rng):
    """A map, scales and biases; and a direction of each."""
    shapes = (2, 4, 3, 3), (1, 1, 1, 3), (1, 1, 1, 3)
    return [[jnp.asarray(rng.normal(0.3, 1, s), jnp.float32) for s in shapes] for _ in range(2)]


def test_relu_with_batch_norm_has_the_definitions_gradient(rng, on_gpu):
    arrays, (weight, *_) = norm_inputs(rng)

    def gradient(apply):
        loss = lambda *a: jnp.sum(weight * jnp.sin(apply(*a)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

    ours, theirs = gradient(relu_with_it), gradient(relu_by_definition)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_relu_with_batch_norm_has_both_modes_and_second_derivatives(rng, on_gpu):
    arrays, along = norm_inputs(rng)

    def derivatives(apply):
        def along_line(t):
            moved = [x + t * dx for x, dx in zip(arrays, along, strict=True)]
            return jnp.sum(jnp.sin(apply(*moved)) * along[0])

        def each(t):
            forward = jax.jvp(along_line, (t,), (jnp.ones(()),))[1]
            return forward, jax.grad(along_line)(t), jax.hessian(along_line)(t)

        return jax.jit(each)(jnp.zeros(()))

    ours, theirs = derivatives(relu_with_it), derivatives(relu_by_definition)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(ours[0], ours[1], rtol=1e-5)


@pytest.mark.slow
def test_relu_with_batch_norm_in_bfloat16_is_relu_behind_it(rng, monkeypatch):
    """The mask that is made again is that of the rounded map."""
    (x, scale, bias), (weight, *_) = norm_inputs(rng)

    def gradient(x):
        rounded = weight.astype(jnp.bfloat16)
        loss = lambda x: jnp.sum((rounded * relu_with_it(x, scale, bias)).astype(jnp.float32))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(x.astype(jnp.bfloat16))

    expected = gradient(x)
    monkeypatch.setattr(batch_norm, "on_cpu", lambda: False)
    for a, b in zip(gradient(x), expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-2, atol=1e-6)


def evaluated(rng, layer):
    """A convolution and the BatchNorm behind it as after training, in evaluation."""
    norm = nnx.view(BatchNorm(4, epsilon=1e-3, rngs=nnx.Rngs(0)), use_running_average=True)
    for parameter in (norm.scale, norm.bias, norm.mean):
        parameter[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.1, 2, 4), jnp.float32)
    return layer, norm


LAYERS = {
    "1 x 1": lambda: Conv(4, 4, 1, 2, dtype=jnp.float32, rngs=nnx.Rngs(1)),
    "3 x 3": lambda: Conv(4, 4, 3, 2, dtype=jnp.float32, rngs=nnx.Rngs(1)),
    "same": lambda: Conv(4, 4, 3, 2, same=True, dtype=jnp.float32, rngs=nnx.Rngs(1)),
    "depthwise": lambda: DepthwiseConv(4, 5, 2, dtype=jnp.float32, rngs=nnx.Rngs(1)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in LAYERS])
def test_folded_into_the_kernel_it_is_the_same_function(rng, monkeypatch, name):
    """And has the same gradient, for a BatchNorm that is frozen in training."""
    conv, norm = evaluated(rng, LAYERS[name]())
    graphdef, state = nnx.split((conv, norm))
    x = jnp.asarray(rng.normal(size=(2, 6, 7, 4)), jnp.float32)
    shortcut = jnp.asarray(rng.normal(size=norm(conv(x)).shape), jnp.float32)

    def loss(state, x):
        y = conv_norm(*nnx.merge(graphdef, state, copy=True), x, nnx.relu6, shortcut)
        return jnp.sum(jnp.sin(y) * shortcut), y

    def gradient(*arguments):  # Jitted anew, for the other form.
        return jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1), True))(*arguments)

    expected = gradient(state, x)
    monkeypatch.setattr(batch_norm, "on_cpu", lambda: False)
    monkeypatch.setenv(batch_norm.FOLD_VARIABLE, "1")
    for a, b in zip(*map(jax.tree.leaves, (gradient(state, x), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_folded_norm_is_no_layer_that_is_run(rng, on_gpu, monkeypatch):
    """What stands in its place, or in the convolution's, is: Grad-CAM looks at either."""
    conv, norm = evaluated(rng, LAYERS["3 x 3"]())
    x, seen = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32), []
    expected = nnx.relu(norm(conv(x)))

    def seeing(layer):
        return lambda x: seen.append(layer) or layer(x)

    np.testing.assert_array_equal(conv_norm(conv, norm, x, nnx.relu), expected)  # Not asked for.
    monkeypatch.setenv(batch_norm.FOLD_VARIABLE, "1")
    monkeypatch.setattr(BatchNorm, "__call__", lambda *_: pytest.fail("is run"))
    np.testing.assert_allclose(conv_norm(conv, norm, x, nnx.relu), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setenv(batch_norm.FOLD_VARIABLE, "1")
    monkeypatch.setattr(batch_norm, "on_cpu", lambda: False)
    for pair in ((seeing(conv), norm), (conv, seeing(norm))):
        np.testing.assert_array_equal(conv_norm(*pair, x, nnx.relu), expected)
    assert seen == [conv, norm]
