"""ResNet 18 to 152 in their ImageNet form, with attention in the paper's two places.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016; stride 2 in the 3 x 3
convolution of a bottleneck, as torchvision has it ("ResNet v1.5"). Submodules carry torchvision's
names (``conv1, bn1, layer1.0.conv1, layer1.0.downsample.0``), so that weights port by one rule.

A block's last BatchNorm starts with scale 0, so that the block starts as its shortcut (Goyal et
al.: Accurate, Large Minibatch SGD, 2017); torchvision starts it with 1. Without it, a ResNet50
trained from scratch by a triplet loss collapsed in every recipe tried.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax.backbones.batch_norm import BatchNorm, conv_norm
from cbam_jax.backbones.layers import Conv, max_pool_3x3
from cbam_jax.remat import recomputable


def _downsample(
    in_features: int, features: int, strides: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List | None:
    if strides == 1 and in_features == features:
        return None
    convolution = Conv(in_features, features, 1, strides, dtype=dtype, rngs=rngs)
    return nnx.List([convolution, BatchNorm(features, rngs=rngs)])


def _shortcut(downsample: nnx.List | None, x: jax.Array) -> jax.Array:
    if downsample is None:
        return x
    conv, norm = downsample
    return conv_norm(conv, norm, x)


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and the shortcut; [b, h, w, c] to [b, h', w', features]."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = Conv(in_features, features, 3, strides, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(features, rngs=rngs)
        self.conv2 = Conv(features, features, 3, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(features, scale=0.0, rngs=rngs)
        self.downsample = _downsample(in_features, features, strides, dtype, rngs)

    @recomputable
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        shortcut = _shortcut(self.downsample, x)
        x = conv_norm(self.conv1, self.bn1, x, nnx.relu)
        return conv_norm(self.conv2, self.bn2, x, nnx.relu, shortcut)


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions and the shortcut; to [b, h', w', 4 * features]."""

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        out_features = features * self.expansion
        self.conv1 = Conv(in_features, features, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(features, rngs=rngs)
        self.conv2 = Conv(features, features, 3, strides, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(features, rngs=rngs)
        self.conv3 = Conv(features, out_features, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(out_features, scale=0.0, rngs=rngs)
        self.downsample = _downsample(in_features, out_features, strides, dtype, rngs)

    @recomputable
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        shortcut = _shortcut(self.downsample, x)
        x = conv_norm(self.conv1, self.bn1, x, nnx.relu)
        x = conv_norm(self.conv2, self.bn2, x, nnx.relu)
        return conv_norm(self.conv3, self.bn3, x, nnx.relu, shortcut)


class ResNet(nnx.Module):
    """The convolutional part of a ResNet: [b, h, w, 3] to [b, h/32, w/32, num_features].

    Args:
        stage_sizes: blocks in each of the four stages.
        block: ``BasicBlock`` or ``Bottleneck``.
        attention: called as ``attention(features, rngs=rngs)``; placed after the first convolution
            (conv1, BatchNorm, ReLU, *attention*, max-pool) and after the last stage. None: none.
        dtype: of the computation; parameters and BatchNorm are float32.
        rngs: for the parameters.

    >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    >>> build = lambda: ResNet(stage_sizes=(1, 1, 1, 1), block=BasicBlock, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda images: build()(images), images).shape
    (2, 2, 3, 512)
    """

    def __init__(
        self,
        *,
        stage_sizes: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck],
        attention: Callable[..., nnx.Module] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_features = 512 * block.expansion
        self.conv1 = Conv(3, 64, 7, 2, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(64, rngs=rngs)
        self.stem_attention = attention(64, rngs=rngs) if attention is not None else None
        widths = (64, 64 * block.expansion, 128 * block.expansion, 256 * block.expansion)
        stages = [
            _stage(block, size, widths[i], 64 * 2**i, 1 if i == 0 else 2, dtype, rngs)
            for i, size in enumerate(stage_sizes)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        last = attention(self.num_features, rngs=rngs) if attention is not None else None
        self.last_attention = last

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last feature map, after its attention."""
        x = conv_norm(self.conv1, self.bn1, images, nnx.relu)
        if self.stem_attention is not None:
            x = self.stem_attention(x)
        x = max_pool_3x3(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return x if self.last_attention is None else self.last_attention(x)


def _stage(block, size, in_features, features, strides, dtype, rngs) -> nnx.List:
    first = block(in_features, features, strides, dtype=dtype, rngs=rngs)
    width = features * block.expansion
    rest = [block(width, features, dtype=dtype, rngs=rngs) for _ in range(size - 1)]
    return nnx.List([first, *rest])


# Not of the paper (He et al. 2016): one block a stage, for tests and small photos.
ResNet10 = partial(ResNet, stage_sizes=(1, 1, 1, 1), block=BasicBlock)
ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
ResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
ResNet152 = partial(ResNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
