"""Convolutions and pooling with torch's conventions, in the form XLA runs fastest.

Parameters are float32 and shaped as ``nnx.Conv`` shapes them.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from cbam_jax.backbones.windows import (
    Window,
    add_views,
    convolution,
    phased_views,
    views_of,
)
from cbam_jax.platforms import for_onnx, on_cpu
from cbam_jax.sharding import as_varying

# Output pixels up to which a convolution is written as a product over patches; see Conv.
_FEW_PIXELS = 16
# From which on the gradient of a strided convolution's input is a product; see _convolve.
_MANY_PIXELS = 28 * 28
# Fewest numbers that are drawn at once; see kaiming_normal.
_FEWEST_DRAWN = 4**8


def kaiming_normal(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32, **_: Any
) -> jax.Array:
    """Draw torch's kaiming_normal_(mode="fan_out", nonlinearity="relu"), as torchvision does.

    The numbers are those of ``nnx.initializers.variance_scaling(2.0, "fan_out", "normal")``, bit
    for bit: the n-th depends on the key and on n alone. So they are the first of a flat array of
    one of few sizes, which takes a fifth of the time to compile that a draw for each shape does.

    >>> kaiming_normal(jax.random.key(0), (3, 3, 16, 32)).shape
    (3, 3, 16, 32)
    """
    drawn = _FEWEST_DRAWN
    while drawn < math.prod(shape):
        drawn *= 4
    fan_out = math.prod(shape) // shape[-2]
    # In float32, as the initializer takes the root.
    deviation = float(np.sqrt(np.float32(2 / fan_out)))
    return _scale(_draw(key, drawn, dtype), tuple(shape), deviation)


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, size: int, dtype: DTypeLike) -> jax.Array:
    return jax.random.normal(key, (size,), dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _scale(numbers: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return numbers[: math.prod(shape)].reshape(shape) * jnp.asarray(deviation, numbers.dtype)


class Conv(nnx.Module):
    """A convolution without bias, padded by kernel_size // 2 on every side, as torch pads it.

    ``same=True`` pads as TensorFlow does, with stride 2 on an even side the far end only; weights
    land exactly only where the padding is that of their origin.

    XLA's CPU backend runs a product over two dimensions about three times as fast as the same
    1 x 1 convolution, and is up to fifty times as slow as a product over patches for 3 x 3 kernels
    on maps of a few pixels (2 x 2, as the last stage has for images of 64 px). The form is chosen
    by shape and backend; results are equal but for the order of the sum. ``kernel`` is
    [k, k, c, d] float32.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        same: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, features)
        self.kernel = nnx.Param(kaiming_normal(rngs.params(), shape))
        self.strides = strides
        self.same = same
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to [b, h', w', d]."""
        kernel = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        window = self.window(x)
        few = window.height * window.width <= _FEW_PIXELS and on_cpu()
        if (window.size > 1 or for_onnx()) and not few:
            return _convolve(x, kernel, window)
        columns = jnp.concatenate(views_of(x, window, 0.0), axis=-1)
        product = columns.reshape(-1, columns.shape[-1]) @ kernel.reshape(columns.shape[-1], -1)
        return product.reshape(x.shape[0], window.height, window.width, -1)

    def window(self, x: jax.Array) -> Window:
        """Return the places where the kernel stands on [b, h, w, c]."""
        place = Window.same if self.same else Window.over
        return place(x, self.kernel.shape[0], self.strides)


def _convolve(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolve, with a gradient that suits XLA's CPU backend, or its GPU's."""
    if for_onnx():  # Where there are no gradients.
        return convolution(x, kernel, window)
    if not on_cpu():
        return convolution(x, _gradient_by_itself(kernel), window)
    if window.strides == 1 or window.height * window.width < _MANY_PIXELS:
        return convolution(x, kernel, window)
    return _convolve_strided(x, kernel, window)


@jax.custom_jvp
def _gradient_by_itself(kernel: jax.Array) -> jax.Array:
    """Return the kernel [k, k, c, d], whose gradient is laid out so before it is used.

    cuDNN's has another layout. What an optimizer makes of it while it is transposed cannot be
    written over the parameter and its moments: XLA would copy each of them.
    """
    return kernel


@_gradient_by_itself.defjvp
def _gradient_by_itself_jvp(primals: Any, tangents: Any):
    # What is done to the tangent first is, backwards, done to the gradient last.
    tangent = lax.optimization_barrier(tangents[0])
    return primals[0], with_layout_constraint(tangent, Layout((0, 1, 2, 3)))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve_strided(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    return convolution(x, kernel, window)


def _convolve_strided_jvp(window: Window, primals: Any, tangents: Any):
    (x, kernel), (dx, d_kernel) = primals, tangents
    y = _convolve_strided(x, kernel, window)
    tangent = jnp.zeros_like(y)
    if type(d_kernel) is not SymbolicZero:
        tangent += convolution(x, d_kernel, window)
    if type(dx) is not SymbolicZero:
        # A product over views: backwards it is a product and a sum of views. A convolution's would
        # be one over a map full of zeros, on one thread.
        columns = jnp.concatenate(phased_views(dx, window), axis=-1)
        tangent += columns @ kernel.reshape(-1, kernel.shape[-1])
    return y, tangent


_convolve_strided.defjvp(_convolve_strided_jvp, symbolic_zeros=True)


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by itself, without bias, padded as TensorFlow's ``"SAME"``.

    XLA's CPU backend runs a grouped convolution 50 to 100 times as slow as PyTorch does; there it
    is size^2 shifted products, added up, with a gradient written out in the same terms, and without
    derivatives in forward mode: one derived by JAX takes three times as long. ``kernel`` is
    [k, k, 1, c] float32; sums are float32.

    >>> layer = DepthwiseConv(4, 3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 5, 4))).shape
    (1, 4, 3, 4)
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, 1, features)
        self.kernel = nnx.Param(kaiming_normal(rngs.params(), shape))
        self.strides = strides
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to [b, h', w', c]."""
        kernel = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        window = self.window(x)
        if not on_cpu():
            return convolution(x, kernel, window, groups=x.shape[-1])
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
        try:
            y: Any = _depthwise(x, as_varying(kernel, x), window)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "DepthwiseConv has no forward mode (jvp, jacfwd, hessian) on a CPU: use reverse "
                "mode (vjp, jacrev), or an accelerator"
            ) from error
        return y.astype(self.dtype)

    def window(self, x: jax.Array) -> Window:
        """Return the places where the kernel stands on [b, h, w, c]."""
        return Window.same(x, self.kernel.shape[0], self.strides)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Add up the views of [b, h, w, c], each times its row of the kernel [k, k, 1, c]."""
    return reduce(jnp.add, _products(views_of(x, window, 0.0), kernel))


def _products(views: list[jax.Array], kernel: jax.Array) -> list[jax.Array]:
    rows = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    return [view * row for view, row in zip(views, rows, strict=True)]


def _depthwise_forward(x: jax.Array, kernel: jax.Array, window: Window):
    return _depthwise(x, kernel, window), (x, kernel)


def _depthwise_backward(window: Window, residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, kernel = residuals
    d_kernel = _depthwise_kernel_gradient(x, dy, window).reshape(kernel.shape)
    if window.strides == 1:  # Padded alike before and after, so turned round it is the same window.
        return _depthwise(dy, kernel[::-1, ::-1], window), d_kernel
    products = _products([dy] * window.size**2, kernel)
    return add_views(products, window, x), d_kernel


def _depthwise_kernel_gradient(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    """Sum dy times each view of x, to [size^2, c].

    All views in one reduction, by image: a sum apart for each view takes several times as long, to
    compile as well.
    """
    views: Any = views_of(x, window, 0.0)
    products = [view * dy for view in views]
    zeros = [jnp.zeros((), jnp.float32)] * len(products)
    by_image = lax.reduce(products, zeros, lambda a, b: list(map(jnp.add, a, b)), (1, 2))
    return jnp.stack([jnp.sum(image, axis=0) for image in by_image])


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def max_pool(
    x: jax.Array, size: int, strides: int, *, padding: int = 0, ceil_mode: bool = False
) -> jax.Array:
    """Max-pool [b, h, w, c] as torch's ``MaxPool2d`` does: the maximum of size^2 strided views.

    ``reduce_window``'s backward pass costs several times as much on the CPU. At ties the gradient
    is split evenly, where torch picks one entry. With ``ceil_mode`` the last window may hang over
    the edge, as long as it starts inside the input.

    >>> max_pool(jnp.arange(5.0).reshape(1, 5, 1, 1), 2, 2, ceil_mode=True).flatten()
    Array([1., 3., 4.], dtype=float32)
    """
    height = _pooled_length(x.shape[1], size, strides, padding, ceil_mode)
    width = _pooled_length(x.shape[2], size, strides, padding, ceil_mode)
    border = (padding, padding)
    return _max_pool(x, Window(size, strides, (border, border), height, width))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: Window) -> jax.Array:
    return reduce(jnp.maximum, views_of(x, window, -jnp.inf))


@_max_pool.defjvp
def _max_pool_jvp(window: Window, primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    (x,), (dx,) = primals, tangents
    y = _max_pool(x, window)

    # Kept for the backward pass are x and y, not which views are the greatest.
    @partial(jax.checkpoint, prevent_cse=False)
    def change(x: jax.Array, y: jax.Array, dx: jax.Array) -> jax.Array:
        greatest = [view == y for view in views_of(x, window, -jnp.inf)]
        parts = zip(greatest, phased_views(dx, window), strict=True)
        total = reduce(jnp.add, [jnp.where(g, d, 0) for g, d in parts])
        # Behind a barrier, or backwards each of the size^2 terms would count the ties again.
        return lax.optimization_barrier(total) / sum(g.astype(y.dtype) for g in greatest)

    return y, change(x, y, dx)


def _pooled_length(length: int, size: int, strides: int, padding: int, ceil_mode: bool) -> int:
    span = length + 2 * padding - size
    pooled = (span + (strides - 1 if ceil_mode else 0)) // strides + 1
    # torch drops a last window that would start in the padding beyond the end.
    return pooled - (ceil_mode and (pooled - 1) * strides >= length + padding)


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """Max-pool 3 x 3, stride 2, padding 1: the ResNet stem's."""
    return max_pool(x, 3, 2, padding=1)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Average [b, h, w, c] to [b, size, size, c] as torch's ``AdaptiveAvgPool2d`` does.

    Bin i of n spans the entries from floor(i h / n) up to ceil((i + 1) h / n), so bins overlap
    where n does not divide h, and repeat entries where h < n.

    >>> adaptive_average_pool(jnp.arange(3.0).reshape(1, 3, 1, 1), 2)[0, :, 0, 0]
    Array([0.5, 1.5], dtype=float32)
    """
    rows, columns = _bins(x.shape[1], size), _bins(x.shape[2], size)
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns, precision="highest")


def _bins(length: int, size: int) -> np.ndarray:
    """Averaging weights [size, length], float32."""
    weights = np.zeros((size, length), np.float32)
    for i in range(size):
        start, end = i * length // size, -(-(i + 1) * length // size)
        weights[i, start:end] = 1 / (end - start)
    return weights
