from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cbam_jax.backbones import layers, resnet
from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.layers import (
    Conv,
    DepthwiseConv,
    kaiming_normal,
    max_pool,
    max_pool_3x3,
)
from cbam_jax.backbones.windows import Window

# Without the classifier; torchvision's published totals less 1000 * (features + 1).
PARAMETERS = {
    # Nobody published it: the stem, then each stage's two convolutions, their BatchNorm, and the
    # projection of its shortcut.
    "ResNet10": 9_536 + 73_984 + 230_144 + 919_040 + 3_673_088,
    "ResNet18": 11_689_512 - 513_000,
    "ResNet34": 21_797_672 - 513_000,
    "ResNet50": 25_557_032 - 2_049_000,
    "ResNet101": 44_549_160 - 2_049_000,
    "ResNet152": 60_192_808 - 2_049_000,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = nnx.eval_shape(lambda: getattr(resnet, name)(rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == PARAMETERS[name]


def test_paths_are_torchvisions():
    model = nnx.eval_shape(lambda: resnet.ResNet50(rngs=nnx.Rngs(0)))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    expected = {"conv1.kernel", "bn1.scale", "layer1.0.downsample.0.kernel", "layer3.5.bn2.var"}
    assert expected <= paths


def direct_conv(x, kernel, strides):
    """Torch's cross-correlation with explicit padding, pixel by pixel, in float64."""
    k = kernel.shape[0]
    x = np.pad(x.astype(np.float64), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    height = (x.shape[1] - k) // strides + 1
    width = (x.shape[2] - k) // strides + 1
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * strides : i * strides + k, j * strides : j * strides + k]
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_size", "strides"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("shape", [(2, 9, 12, 5), (3, 4, 3, 5), (2, 1, 2, 5)])
def test_conv_pads_as_torch(rng, kernel_size, strides, shape):
    x = rng.normal(size=shape).astype(np.float32)
    layer = Conv(5, 4, kernel_size, strides, dtype=jnp.float32, rngs=nnx.Rngs(1))
    expected = direct_conv(x, np.asarray(layer.kernel[...], np.float64), strides)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_patches_of_a_small_map_are_a_cpus_form_alone(rng, monkeypatch):
    layer = Conv(5, 4, 3, dtype=jnp.float32, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.normal(size=(2, 2, 3, 5)), jnp.float32)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(layer)(x))
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda x: layer(x))(x))
    expected = direct_conv(np.asarray(x), np.asarray(layer.kernel[...], np.float64), 1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_gpus_convolution_has_its_gradient_and_its_tangent(rng, monkeypatch):
    """Both linear in the kernel: of each of its numbers what a kernel of that alone gives."""
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    x, weight = rng.normal(size=(2, 5, 4, 2)), rng.normal(size=(2, 3, 2, 3))
    kernel, along = rng.normal(size=(2, 3, 3, 2, 3))
    units = np.eye(kernel.size).reshape(-1, *kernel.shape)
    expected = [np.sum(weight * direct_conv(x, unit, 2)) for unit in units]
    x, weight, kernel, along = (jnp.asarray(a, jnp.float32) for a in (x, weight, kernel, along))
    window = Window.over(x, 3, 2)
    convolve = jax.jit(lambda kernel: layers._convolve(x, kernel, window))
    _, tangent = jax.jvp(convolve, (kernel,), (along,))
    np.testing.assert_allclose(tangent, convolve(along), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda kernel: jnp.sum(weight * convolve(kernel)))(kernel)
    np.testing.assert_allclose(gradient.reshape(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "size", "strides"),
    [
        ((2, 5, 7, 6), 1, 2),
        ((2, 4, 3, 6), 3, 1),
        ((3, 8, 6, 6), 3, 2),
        ((2, 57, 62, 6), 3, 2),  # A convolution, its input's gradient a product.
        ((1, 60, 57, 6), 7, 2),
    ],
)
def test_conv_as_a_product_has_the_convolutions_gradient(rng, shape, size, strides):
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def by_product(x, kernel):
        layer = Conv(6, 3, size, strides, dtype=jnp.float32, rngs=nnx.Rngs(1))
        layer.kernel[...] = kernel
        return jnp.sum(jnp.sin(layer(x)))

    def by_convolution(x, kernel):
        padding = ((size // 2, size // 2),) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), padding, dimension_numbers=layout
        )
        return jnp.sum(jnp.sin(y))

    kernel = jnp.asarray(rng.normal(size=(size, size, 6, 3)), jnp.float32)
    expected = jax.grad(by_convolution, argnums=(0, 1))(x, kernel)
    for ours, theirs in zip(jax.grad(by_product, argnums=(0, 1))(x, kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 12, 3), (1, 7, 5, 2)])
def test_max_pool_is_the_padded_window(rng, shape):
    x = rng.normal(-3, 1, shape).astype(np.float32)
    expected = nnx.max_pool(jnp.asarray(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(max_pool_3x3(jnp.asarray(x)), expected)


def slow_max_pool_gradient(x, dy, size, strides, padding):
    """Of sum(dy * max_pool(x)), window by window; ties share alike."""
    gradient = np.zeros(x.shape)
    for b, i, j, c in np.ndindex(dy.shape):
        top, left = strides * i - padding, strides * j - padding
        rows, columns = slice(max(top, 0), top + size), slice(max(left, 0), left + size)
        greatest = x[b, rows, columns, c] == x[b, rows, columns, c].max()
        gradient[b, rows, columns, c] += dy[b, i, j, c] * greatest / greatest.sum()
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "size", "strides", "padding", "ceil_mode"),
    [
        ((2, 8, 13, 3), 3, 2, 1, False),
        ((1, 7, 5, 2), 3, 2, 0, True),
        ((2, 6, 9, 2), 2, 2, 0, True),
        ((1, 5, 6, 2), 3, 1, 1, False),
        ((1, 7, 8, 1), 2, 3, 0, False),
    ],
)
def test_max_pool_gradient_goes_to_the_greatest(rng, shape, size, strides, padding, ceil_mode):
    x = rng.integers(-3, 4, shape).astype(np.float32)  # Full of ties.
    pool = partial(max_pool, size=size, strides=strides, padding=padding, ceil_mode=ceil_mode)
    y, gradient = jax.vjp(pool, jnp.asarray(x))
    dy = rng.normal(size=y.shape).astype(np.float32)
    expected = slow_max_pool_gradient(x, dy, size, strides, padding)
    np.testing.assert_allclose(gradient(jnp.asarray(dy))[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1, 300, 400)])
def test_numbers_drawn_flat_are_those_of_the_initializer(shape):
    expected = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
    key = jax.random.key(5)
    np.testing.assert_array_equal(kaiming_normal(key, shape), expected(key, shape, jnp.float32))


class Stem(nnx.Module):
    """A strided convolution over a map large enough for its own rule, BatchNorm, max-pool."""

    def __init__(self):
        self.conv = Conv(2, 3, 3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.norm = BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.mean(max_pool_3x3(jnp.tanh(self.norm(self.conv(x)))), axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_is_the_transpose_of_reverse_mode(rng, training):
    graphdef, state = nnx.split(nnx.view(Stem(), use_running_average=not training))
    x, dx = (jnp.asarray(rng.normal(size=(2, 56, 56, 2)), jnp.float32) for _ in range(2))
    d_state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), state)

    def embed(state, x):
        return nnx.merge(graphdef, state, copy=True)(x)

    y, forward = jax.jit(lambda *d: jax.jvp(embed, (state, x), d))(d_state, dx)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    back = jax.jit(lambda dy: jax.vjp(embed, state, x)[1](dy))(dy)
    products = jax.tree.map(lambda a, b: float(jnp.vdot(a, b)), back, (d_state, dx))
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), jnp.vdot(dy, forward), rtol=1e-4)


@pytest.mark.slow
def test_hessian_of_an_embedding_is_symmetric(rng):
    graphdef, state = nnx.split(Stem())
    x = jnp.asarray(rng.normal(size=(1, 56, 56, 2)), jnp.float32)
    along = jnp.asarray(rng.normal(size=(4, *x.shape)), jnp.float32)

    def energy(t):
        moved = x + jnp.einsum("i,ibhwc->bhwc", t, along)
        return jnp.sum(jnp.square(nnx.merge(graphdef, state, copy=True)(moved)))

    hessian = jax.jit(jax.hessian(energy))(jnp.zeros(4))
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-3, atol=1e-4)


def test_a_depthwise_convolution_says_that_it_has_no_forward_mode():
    layer = DepthwiseConv(2, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 3, 2))
    with pytest.raises(TypeError, match="DepthwiseConv has no forward mode .* use reverse"):
        jax.jvp(layer, (x,), (x,))
