"""CBAM and squeeze-and-excitation, as the paper writes them; the original authors' form by option.

A gate returns the gate; the composition multiplies, so that the maps can be looked at::

    F'  = M_c(F)  * F       M_c: ChannelGate, [b, 1, 1, c]
    F'' = M_s(F') * F'      M_s: SpatialGate, [b, h, w, 1]

Woo, Park, Lee, Kweon: CBAM: Convolutional Block Attention Module, ECCV 2018.
Hu, Shen, Sun: Squeeze-and-Excitation Networks, CVPR 2018.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from cbam_jax.platforms import for_onnx, on_cpu
from cbam_jax.sharding import as_varying

_zeros = nnx.initializers.zeros_init()
_he_normal = nnx.initializers.he_normal()


# With its last layer at zero a gate is scale * sigmoid(0): 2 makes that exactly one, so the module
# starts as the identity and pretrained statistics downstream still fit. In the paper's form each
# gate starts near one half, and a CBAM scales its input by about one quarter.
GATE_INITS = {"paper": 1.0, "identity": 2.0}


def _gate_scale(init: str) -> float:
    if init not in GATE_INITS:
        raise ValueError(f"unknown attention init {init!r}: choose one of {', '.join(GATE_INITS)}")
    return GATE_INITS[init]


def _check_map(x: jax.Array, channels: int | None = None) -> None:
    """Raise ValueError unless x is a feature map of so many channels; None: of any number."""
    if x.ndim != 4 or channels not in (None, x.shape[-1]):
        expected = "c" if channels is None else channels
        raise ValueError(f"a feature map has shape {x.shape}, expected [b, h, w, {expected}]")


def _pooled_channels(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and maximum over the channels of [b, h, w, c], both [b, h, w, 1]."""
    if on_cpu() or for_onnx():
        return jnp.mean(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    return _pooled_in_one_reading(x)


@jax.custom_jvp
def _pooled_in_one_reading(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both by one reduction: of two, XLA's GPU backend has each read the map."""
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    starts = [as_varying(jnp.asarray(start, wide.dtype), x) for start in (0, -jnp.inf)]
    total, maximum = lax.reduce(
        (wide, wide), tuple(starts), lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])), (3,)
    )
    return (total / x.shape[-1]).astype(x.dtype)[..., None], maximum.astype(x.dtype)[..., None]


@_pooled_in_one_reading.defjvp
def _pooled_jvp(primals: Any, tangents: Any):
    # The gradients of jnp.mean and jnp.max: channels that are all the maximum share its evenly.
    (x,), (dx,) = primals, tangents
    mean, maximum = _pooled_in_one_reading(x)
    largest = (x == maximum).astype(x.dtype)
    d_mean = jnp.mean(dx, axis=-1, keepdims=True)
    count = jnp.sum(largest, axis=-1, keepdims=True)
    return (mean, maximum), (d_mean, jnp.sum(dx * largest, axis=-1, keepdims=True) / count)


def _squeezing_layers(
    features: int, reduction: int, *, use_bias: bool, init: str, dtype: DTypeLike, rngs: nnx.Rngs
) -> tuple[nnx.Linear, nnx.Linear]:
    """W_0 and W_1, from c channels to c // r and back."""
    if reduction < 1 or reduction % 1:
        raise ValueError(f"reduction must be a whole number of at least 1, got {reduction}")
    hidden = max(features // reduction, 1)
    last_init = _zeros if init == "identity" else _he_normal
    options = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
    first = nnx.Linear(features, hidden, kernel_init=_he_normal, **options)
    return first, nnx.Linear(hidden, features, kernel_init=last_init, **options)


class ChannelGate(nnx.Module):
    """M_c(F) = sigmoid(MLP(AvgPool(F)) + MLP(MaxPool(F))), MLP = W_1 relu(W_0 .), shared, no bias.

    Args:
        features: channels c of the input.
        reduction: r; the hidden width is c // r, at least 1.
        use_bias: biases in the MLP, as in the original authors' code (not in the paper).
        init: ``"paper"``, or ``"identity"``: 2 sigmoid(0) = 1 at the start, range (0, 2).
        dtype: of the computation; parameters are float32.
        rngs: for the parameters.

    Raises:
        ValueError: on an unknown ``init``.

    >>> gate = ChannelGate(32, rngs=nnx.Rngs(0))
    >>> gate(jnp.ones((2, 7, 5, 32))).shape
    (2, 1, 1, 32)
    """

    def __init__(
        self,
        features: int,
        reduction: int = 16,
        *,
        use_bias: bool = False,
        init: str = "paper",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.scale = _gate_scale(init)
        self.fc1, self.fc2 = _squeezing_layers(
            features, reduction, use_bias=use_bias, init=init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to the gate [b, 1, 1, c]."""
        _check_map(x, self.fc1.in_features)
        average = jnp.mean(x, axis=(1, 2), keepdims=True)
        maximum = jnp.max(x, axis=(1, 2), keepdims=True)
        return self.scale * nnx.sigmoid(self._mlp(average) + self._mlp(maximum))

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.relu(self.fc1(x)))


class SpatialGate(nnx.Module):
    """M_s(F) = sigmoid(conv7x7([AvgPool(F); MaxPool(F)])), pooled over channels, average first.

    Args:
        kernel_size: of the convolution, odd.
        original: the original authors' form, [MaxPool; AvgPool] and a BatchNorm after the
            convolution, so that their weights can be ported.
        init: ``"paper"``, or ``"identity"``: 2 sigmoid(0) = 1 at the start, range (0, 2).
        dtype: of the computation; parameters are float32.
        rngs: for the parameters.

    Raises:
        ValueError: on an even ``kernel_size`` or an unknown ``init``.

    >>> gate = SpatialGate(rngs=nnx.Rngs(0))
    >>> gate(jnp.ones((2, 7, 5, 32))).shape
    (2, 7, 5, 1)
    """

    def __init__(
        self,
        kernel_size: int = 7,
        *,
        original: bool = False,
        init: str = "paper",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd to keep the map's size, got {kernel_size}")
        self.scale = _gate_scale(init)
        self.original = original
        self.conv = nnx.Conv(
            2,
            1,
            (kernel_size, kernel_size),
            padding=((kernel_size // 2, kernel_size // 2),) * 2,
            use_bias=False,
            kernel_init=_zeros if init == "identity" else _he_normal,
            dtype=dtype,
            rngs=rngs,
        )
        # torch's momentum 0.01 is 0.99 here; statistics stay in float32 (bfloat16 loses them).
        norm = nnx.BatchNorm(1, momentum=0.99, dtype=jnp.float32, rngs=rngs) if original else None
        self.bn = norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to the gate [b, h, w, 1]."""
        _check_map(x)
        average, maximum = _pooled_channels(x)
        pooled = (maximum, average) if self.original else (average, maximum)
        logits = self.conv(jnp.concatenate(pooled, axis=-1))
        if self.bn is not None:
            logits = self.bn(logits).astype(logits.dtype)
        return self.scale * nnx.sigmoid(logits)


class CBAM(nnx.Module):
    """Convolutional block attention: F' = M_c(F) * F, F'' = M_s(F') * F'.

    The default is the paper's form. timm's ``CbamModule`` has a BatchNorm in its spatial gate;
    the original authors' code has that, biases in the MLP, and the maximum before the average:
    ``original=True`` gives theirs.

    Args:
        features: channels c of the input.
        reduction: r of the channel gate.
        kernel_size: of the spatial gate.
        original: the original authors' form.
        init: ``"paper"``, or ``"identity"``: the module starts as exactly the identity.
        dtype: of the computation; parameters are float32.
        rngs: for the parameters.

    >>> cbam = CBAM(64, init="identity", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(1), (2, 7, 5, 64))
    >>> bool(jnp.array_equal(cbam(x), x))
    True
    """

    def __init__(
        self,
        features: int,
        reduction: int = 16,
        kernel_size: int = 7,
        *,
        original: bool = False,
        init: str = "paper",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channel = ChannelGate(
            features, reduction, use_bias=original, init=init, dtype=dtype, rngs=rngs
        )
        self.spatial = SpatialGate(
            kernel_size, original=original, init=init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Refine [b, h, w, c]; the shape stays."""
        x = x * self.channel(x)
        return x * self.spatial(x)


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excitation: x * sigmoid(W_1 relu(W_0 AvgPool(x))), channel attention only.

    With biases, as in Hu et al.'s released code and timm; hidden width c // r (timm rounds it up
    to a multiple of 8).

    Args:
        features: channels c of the input.
        reduction: r; the hidden width is c // r, at least 1.
        init: ``"paper"``, or ``"identity"``: 2 sigmoid(0) = 1 at the start, range (0, 2).
        dtype: of the computation; parameters are float32.
        rngs: for the parameters.

    >>> se = SqueezeExcite(64, init="identity", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(1), (2, 7, 5, 64))
    >>> bool(jnp.array_equal(se(x), x))
    True
    """

    def __init__(
        self,
        features: int,
        reduction: int = 16,
        *,
        init: str = "paper",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.scale = _gate_scale(init)
        self.fc1, self.fc2 = _squeezing_layers(
            features, reduction, use_bias=True, init=init, dtype=dtype, rngs=rngs
        )

    def gate(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to the gate [b, 1, 1, c]."""
        average = jnp.mean(x, axis=(1, 2), keepdims=True)
        return self.scale * nnx.sigmoid(self.fc2(nnx.relu(self.fc1(average))))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Refine [b, h, w, c]; the shape stays."""
        _check_map(x, self.fc1.in_features)
        return x * self.gate(x)
