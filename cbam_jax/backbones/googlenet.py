"""GoogLeNet as torchvision has it, with attention in the paper's two places.

Szegedy et al.: Going Deeper with Convolutions, CVPR 2015. torchvision's form differs from that
paper's, and its weights need the difference: BatchNorm (epsilon 1e-3) after every convolution, a
3 x 3 convolution in the 5 x 5 branch, ceil-mode pools, and inputs in [-1, 1]. The auxiliary
classifiers serve training from scratch only and are there when asked for. Submodules carry
torchvision's names (``conv1.conv, inception3a.branch2.0.bn``), so that weights port by one rule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax.backbones.batch_norm import BatchNorm, conv_norm
from cbam_jax.backbones.layers import Conv, adaptive_average_pool, max_pool
from cbam_jax.remat import recomputable

# Input width, then the widths of 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection: the
# paper's Table 1.
_INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


def transform_input(images: jax.Array) -> jax.Array:
    """Turn images normalised by ImageNet's mean and deviation into [-1, 1], by channel.

    torchvision's weights were ported from TensorFlow, which trained on that range.

    >>> black = (0 - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
    >>> transform_input(black.reshape(1, 1, 1, 3)).round(6).tolist()
    [[[[-1.0, -1.0, -1.0]]]]
    """
    scale = jnp.array([0.229, 0.224, 0.225], jnp.float32) / 0.5
    shift = (jnp.array([0.485, 0.456, 0.406], jnp.float32) - 0.5) / 0.5
    return images.astype(jnp.float32) * scale.reshape(1, 1, 1, 3) + shift.reshape(1, 1, 1, 3)


class BasicConv(nnx.Module):
    """Convolution, BatchNorm, ReLU: [b, h, w, c] to [b, h', w', features]."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_features, features, kernel_size, strides, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(features, epsilon=1e-3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the three."""
        return conv_norm(self.conv, self.bn, x, nnx.relu)


def _max_pool_same(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, 1, padding=1)


class Inception(nnx.Module):
    """Four branches side by side, joined along the channels; h and w stay."""

    def __init__(
        self,
        in_features: int,
        features_1x1: int,
        reduce_3x3: int,
        features_3x3: int,
        reduce_5x5: int,
        features_5x5: int,
        features_pool: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def basic(width: int, features: int, kernel_size: int) -> BasicConv:
            return BasicConv(width, features, kernel_size, dtype=dtype, rngs=rngs)

        self.branch1 = basic(in_features, features_1x1, 1)
        self.branch2 = nnx.List(
            [basic(in_features, reduce_3x3, 1), basic(reduce_3x3, features_3x3, 3)]
        )
        # 3 x 3 where the paper has 5 x 5: torchvision's weights were trained so.
        self.branch3 = nnx.List(
            [basic(in_features, reduce_5x5, 1), basic(reduce_5x5, features_5x5, 3)]
        )
        self.branch4 = nnx.List([_max_pool_same, basic(in_features, features_pool, 1)])

    @recomputable
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to [b, h, w, sum of the branches' widths]."""
        outputs = [self.branch1(x)]
        for first, second in (self.branch2, self.branch3, self.branch4):
            outputs.append(second(first(x)))
        return jnp.concatenate(outputs, axis=-1)


class AuxiliaryClassifier(nnx.Module):
    """Logits from the middle of the network, so that its lower half gets a gradient of its own.

    Averages [b, h, w, c] to 4 x 4, then a 1 x 1 convolution to 128 and two linear layers: [b, n],
    float32. Without the dropout of 0.7 that torchvision's has in training.
    """

    def __init__(self, in_features: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = BasicConv(in_features, 128, 1, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 128, 1024, rngs=rngs)
        self.fc2 = nnx.Linear(1024, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, h, w, c] to logits."""
        x = self.conv(adaptive_average_pool(x.astype(jnp.float32), 4)).astype(jnp.float32)
        # torch's order of the entries, channels first: the weights of fc1 follow it.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


class GoogLeNet(nnx.Module):
    """The convolutional part of GoogLeNet: [b, h, w, 3] to about [b, h/32, w/32, 1024].

    Takes images normalised as for the other backbones; ``transform_input`` is part of it.

    Args:
        attention: called as ``attention(features, rngs=rngs)``; placed after the first convolution
            (conv1, *attention*, max-pool) and after the last block, inception5b. None: none.
        auxiliary_classes: n of two auxiliary classifiers, after inception4a and inception4d; None:
            none. They are used by ``with_auxiliary`` alone.
        dtype: of the computation; parameters and BatchNorm are float32.
        rngs: for the parameters.

    >>> images = jax.ShapeDtypeStruct((2, 64, 97, 3), jnp.float32)
    >>> nnx.eval_shape(lambda images: GoogLeNet(rngs=nnx.Rngs(0))(images), images).shape
    (2, 2, 3, 1024)
    """

    num_features = 1024

    def __init__(
        self,
        *,
        attention: Callable[..., nnx.Module] | None = None,
        auxiliary_classes: int | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv1 = BasicConv(3, 64, 7, 2, dtype=dtype, rngs=rngs)
        self.stem_attention = attention(64, rngs=rngs) if attention is not None else None
        self.conv2 = BasicConv(64, 64, 1, dtype=dtype, rngs=rngs)
        self.conv3 = BasicConv(64, 192, 3, dtype=dtype, rngs=rngs)
        for name, widths in _INCEPTIONS.items():
            setattr(self, f"inception{name}", Inception(*widths, dtype=dtype, rngs=rngs))
        self.last_attention = attention(1024, rngs=rngs) if attention is not None else None
        options = {"dtype": dtype, "rngs": rngs}
        n = auxiliary_classes
        self.aux1 = AuxiliaryClassifier(512, n, **options) if n is not None else None
        self.aux2 = AuxiliaryClassifier(528, n, **options) if n is not None else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last feature map, after its attention."""
        return self.with_auxiliary(images)[0]

    def with_auxiliary(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return the last feature map, and the auxiliary classifiers' logits [b, n], if any."""
        x = self.conv1(transform_input(images))
        if self.stem_attention is not None:
            x = self.stem_attention(x)
        x = max_pool(x, 3, 2, ceil_mode=True)
        x = max_pool(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        auxiliary = []
        for name in _INCEPTIONS:
            if name == "4a":
                x = max_pool(x, 3, 2, ceil_mode=True)
            if name == "5a":
                x = max_pool(x, 2, 2, ceil_mode=True)
            x = getattr(self, f"inception{name}")(x)
            head = {"4a": self.aux1, "4d": self.aux2}.get(name)
            if head is not None:
                auxiliary.append(head(x))
        x = x if self.last_attention is None else self.last_attention(x)
        return x, tuple(auxiliary)
