"""BatchNorm with torch's conventions, and what a convolution, it and a ReLU are together.

On a GPU they are memory's work, 65 % of a training step's least time, and take other forms than on
a CPU: the statistics come of one reading, ReLU's gradient of x, and for embedding BatchNorm may be
part of the convolution's kernel. Parameters are float32 and shaped as ``nnx.BatchNorm`` has them.
"""

import os
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from cbam_jax.backbones.layers import Conv, DepthwiseConv
from cbam_jax.backbones.windows import convolution
from cbam_jax.platforms import on_cpu
from cbam_jax.sharding import as_varying

# Most slices that a sum over a map starts with, see _channel_sum; more take long to compile.
_SLICES = 8
FOLD_VARIABLE = "CBAM_JAX_FOLD_BATCH_NORM"


def conv_norm(
    conv: Any,
    norm: Any,
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    shortcut: jax.Array | None = None,
) -> jax.Array:
    """Return ``activation(norm(conv(x)) + shortcut)``, in the form that suits the backend.

    Args:
        conv: a ``Conv`` or ``DepthwiseConv``, or what stands in its place (a hook of Grad-CAM).
        norm: a ``BatchNorm``, or what stands in its place.
        x: the map, [b, h, w, c].
        activation: ``nnx.relu`` or another; None: none.
        shortcut: added before it, of the result's shape; None: none.
    """
    own = isinstance(conv, Conv | DepthwiseConv) and isinstance(norm, BatchNorm)
    if own and norm.use_running_average and _folds():
        y = _folded(conv, norm, x)
    elif own and activation is nnx.relu and shortcut is None:
        return norm(conv(x), relu=True)
    else:
        y = norm(conv(x))
    if shortcut is not None:
        y = y + shortcut
    return y if activation is None else activation(y)


def _folds() -> bool:
    """Whether BatchNorm is folded: asked for, since in bfloat16 it rounds other numbers."""
    return os.environ.get(FOLD_VARIABLE) == "1" and not on_cpu()


def _folded(conv: Any, norm: "BatchNorm", x: jax.Array) -> jax.Array:
    """Convolve by the kernel times BatchNorm's slope: with ReLU, one call of cuDNN."""
    slope = norm.scale[...] * lax.rsqrt(norm.var[...] + norm.epsilon)
    kernel = (conv.kernel[...] * slope.reshape(1, 1, 1, -1)).astype(conv.dtype)
    bias = (norm.bias[...] - norm.mean[...] * slope).astype(conv.dtype)
    x = x.astype(conv.dtype)
    y = convolution(x, kernel, conv.window(x), groups=x.shape[-1] // kernel.shape[2])
    return y + bias.reshape(1, 1, 1, -1)


class BatchNorm(nnx.Module):
    """BatchNorm over [b, h, w] in float32, with torch's defaults and torch's running variance.

    The running variance is the unbiased one, as in torch (``nnx.BatchNorm`` keeps the biased one).
    ``momentum`` is the share that is kept: 0.9 is torch's 0.1. Statistics and the normalisation are
    float32 whatever the dtype of the input, which the result takes on again. ``scale`` is where the
    scales start. The batch is the global one: under ``jit`` over a mesh the sums run over all
    devices.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        del rngs  # Nothing is random; taken so that all layers are built alike.
        self.scale = nnx.Param(jnp.full((features,), scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.epsilon = epsilon
        self.momentum = momentum
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Choose running (True) or batch (False) statistics; called by ``nnx.view``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: jax.Array, *, relu: bool = False) -> jax.Array:
        """Normalise [b, h, w, c]; in training, update the running statistics in place.

        ``relu`` applies that too, on a GPU as one function.
        """
        if x.ndim != 4 or x.shape[-1:] != self.scale.shape:
            raise ValueError(
                f"BatchNorm: x has shape {x.shape}, expected [b, h, w, {self.scale.shape[0]}]"
            )
        if self.use_running_average:
            inverse = self.scale[...] * lax.rsqrt(self.var[...] + self.epsilon)
            y = _per_channel(x.astype(jnp.float32), self.mean[...], inverse, self.bias[...])
            return nnx.relu(y.astype(x.dtype)) if relu else y.astype(x.dtype)
        together = relu and not on_cpu()
        results: Any = _normalize(self.epsilon, together, x, self.scale[...], self.bias[...])
        y, mean, var = results
        count = x.size // x.shape[-1]
        self._update(mean, var * (count / max(count - 1, 1)))
        return nnx.relu(y) if relu and not together else y

    def _update(self, mean: jax.Array, var: jax.Array) -> None:
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1 - keep) * lax.stop_gradient(mean)
        self.var[...] = keep * self.var[...] + (1 - keep) * lax.stop_gradient(var)


def _per_channel(x: jax.Array, mean: jax.Array, inverse: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) * inverse + bias, each [c]; the mean first, so that large means do not cancel."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - mean.reshape(shape)) * inverse.reshape(shape) + bias.reshape(shape)


def _channel_sum(x: jax.Array) -> jax.Array:
    """Sum [b, h, w, c], the result of a calculation, to [c].

    Before a reduction over rows XLA's CPU backend writes what is to be summed to memory. It does
    not before an addition of slices, which leaves a reduction of an eighth of the size.
    """
    if not on_cpu():
        return jnp.sum(x, axis=(0, 1, 2))
    parts = _slices(x.shape[1])
    sliced = x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:])
    return jnp.sum(reduce(jnp.add, [sliced[:, i] for i in range(parts)]), axis=(0, 1, 2))


def _slices(height: int) -> int:
    return max(n for n in range(1, _SLICES + 1) if height % n == 0)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of [b, h, w, c], both [c] float32."""
    if not on_cpu():
        return _moments_in_one_reading(x)
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=(0, 1, 2))
    # Two passes: E[x^2] - E[x]^2 in one would cancel where the mean is large.
    var = _channel_sum(jnp.square(x - mean.reshape(1, 1, 1, -1))) / (x.size // x.shape[-1])
    return mean, var


@jax.custom_jvp
def _moments_in_one_reading(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both sums by one reduction, of what x differs from the mean of four of its own pixels.

    These are seldom many deviations from the mean, so that E[x^2] - E[x]^2 of the differences does
    not cancel. (Two reductions XLA would run one after the other.) Added up as a GPU does, 98 rows
    one after the other and such sums in pairs, the variance of 12,544 float32 numbers was off by 1
    to 3e-7 of itself, their mean 0 to 1,000 deviations, and by two readings by 1e-7; all of them
    one after the other, by 3 to 10e-6 in either way.
    """
    count, (rows, columns) = x.size // x.shape[-1], ((n // 3, 2 * n // 3) for n in x.shape[1:3])
    pixels = [x[:1, i : i + 1, j : j + 1] for i in rows for j in columns]
    pixels = [pixel.astype(jnp.float32) for pixel in pixels]
    near = sum(pixels[1:], start=pixels[0]) / len(pixels)
    apart = x.astype(jnp.float32) - near
    zero = as_varying(jnp.zeros((), jnp.float32), x)
    sums = lax.reduce(
        (apart, jnp.square(apart)), (zero, zero), lambda a, b: tuple(map(jnp.add, a, b)), (0, 1, 2)
    )
    offset, square = (total / count for total in sums)
    return near.reshape(-1) + offset, jnp.maximum(square - jnp.square(offset), 0)


@_moments_in_one_reading.defjvp
def _moments_jvp(primals: Any, tangents: Any):
    (x,), (dx,) = primals, tangents
    mean, var = _moments_in_one_reading(x)
    x, dx = x.astype(jnp.float32), dx.astype(jnp.float32)
    d_var = 2 * jnp.mean((x - mean.reshape(1, 1, 1, -1)) * dx, axis=(0, 1, 2))
    return (mean, var), (jnp.mean(dx, axis=(0, 1, 2)), d_var)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(
    epsilon: float, relu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise by the batch's own statistics; also its mean and biased variance, both [c]."""
    return _normalized(epsilon, relu, x, scale, bias)


def _normalized(epsilon: float, relu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array):
    mean, var = _moments(x)
    inverse = lax.rsqrt(var + epsilon)
    y = _per_channel(x.astype(jnp.float32), mean, scale * inverse, bias).astype(x.dtype)
    return nnx.relu(y) if relu else y, mean, var


@_normalize.defjvp
def _normalize_jvp(epsilon: float, relu: bool, primals: Any, tangents: Any):
    # No gradient flows through the returned statistics, which only feed the running averages; but
    # second derivatives do through these.
    y, mean, var = _normalized(epsilon, relu, *primals)
    x, scale, bias = primals
    # Kept for the backward pass is x alone. Without a barrier (prevent_cse): it would be read once
    # more behind it.
    change = jax.checkpoint(partial(_normalized_change, relu), prevent_cse=False)
    changed = change(x, mean, lax.rsqrt(var + epsilon), scale, bias, *tangents)
    return (y, mean, var), (changed, jnp.zeros_like(mean), jnp.zeros_like(var))


def _normalized_change(relu, x, mean, inverse, scale, bias, dx, d_scale, d_bias):
    # Backwards one pass over the feature map for two sums, of what is spread, and one for the rest.
    # With ReLU each makes its mask of x, behind a barrier: else XLA would keep it in memory.
    x, later = lax.optimization_barrier((x, x)) if relu else (x, x)
    dx = dx.astype(jnp.float32) * inverse.reshape(1, 1, 1, -1)
    count, zero = x.size // x.shape[-1], jnp.zeros_like(mean)
    products = _per_channel(later.astype(jnp.float32), mean, inverse, zero) * dx
    offset = d_bias - scale * (jnp.sum(dx, axis=(0, 1, 2)) / count)
    slope = d_scale - scale * (jnp.sum(products, axis=(0, 1, 2)) / count)
    own = dx * scale.reshape(1, 1, 1, -1)
    if relu:
        own = jnp.where(_is_positive(later, mean, inverse, scale, bias), own, 0).astype(x.dtype)
        own, offset, slope = lax.optimization_barrier((own, offset, slope))
    normalized = _per_channel(x.astype(jnp.float32), mean, inverse, zero)
    spread = offset.reshape(1, 1, 1, -1) + normalized * _spread(slope, x)
    if relu:
        spread = jnp.where(_is_positive(x, mean, inverse, scale, bias), spread, 0)
    return (own.astype(jnp.float32) + spread).astype(x.dtype)


def _is_positive(x, mean, inverse, scale, bias):
    return _per_channel(x.astype(jnp.float32), mean, scale * inverse, bias) > 0


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat [c] over a map [b, h, w, c]: the transpose of `_channel_sum`."""
    if not on_cpu():
        return jnp.broadcast_to(x.reshape(1, 1, 1, -1), like.shape)
    parts = _slices(like.shape[1])
    shape = (like.shape[0], like.shape[1] // parts, *like.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(x.reshape(1, 1, 1, -1), shape)] * parts, axis=1)
