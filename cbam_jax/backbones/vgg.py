"""VGG16 with and without BatchNorm, with attention in the paper's two places.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
``features`` is torchvision's list, its ReLUs and max-pools included, so that its numbers are
torchvision's names (``features.0``, ``features.28``) and weights port by one rule.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.layers import kaiming_normal, max_pool

# Widths of the 3 x 3 convolutions; None is a max-pool. The paper's configuration "D".
_VGG16 = (64, 64, None, 128, 128, None, *(256,) * 3, None, *(512,) * 3, None, *(512,) * 3, None)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Max-pool 2 x 2, stride 2, of [b, h, w, c]; an odd last row or column is left out."""
    return max_pool(x, 2, 2)


def _conv(in_features: int, features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    # With a bias even where BatchNorm follows: torchvision's weights have one.
    return nnx.Conv(
        in_features,
        features,
        (3, 3),
        padding=((1, 1), (1, 1)),
        kernel_init=kaiming_normal,
        dtype=dtype,
        rngs=rngs,
    )


class VGG(nnx.Module):
    """The convolutional part of VGG16: [b, h, w, 3] to [b, h // 32, w // 32, 512].

    The last feature map is the one after pool5, as torchvision's ``features`` gives it; the
    attention on the last convolution stands before that pool.

    Args:
        batch_norm: a BatchNorm between each convolution and its ReLU.
        attention: called as ``attention(features, rngs=rngs)``; placed after the first convolution
            (conv1_1, ReLU, *attention*) and after the last (conv5_3, ReLU, *attention*, max-pool).
            None: none.
        dtype: of the computation; parameters and BatchNorm are float32.
        rngs: for the parameters.

    >>> images = jax.ShapeDtypeStruct((2, 64, 97, 3), jnp.float32)
    >>> nnx.eval_shape(lambda images: VGG16(rngs=nnx.Rngs(0))(images), images).shape
    (2, 2, 3, 512)
    """

    num_features = 512

    def __init__(
        self,
        *,
        batch_norm: bool = False,
        attention: Callable[..., nnx.Module] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers = []
        width = 3
        for features in _VGG16:
            if features is None:
                layers.append(max_pool_2x2)
                continue
            norm = [BatchNorm(features, rngs=rngs)] if batch_norm else []
            layers += [_conv(width, features, dtype, rngs), *norm, nnx.relu]
            width = features
        self.features = nnx.List(layers)
        self.stem_size = 3 if batch_norm else 2
        self.stem_attention = attention(64, rngs=rngs) if attention is not None else None
        self.last_attention = attention(512, rngs=rngs) if attention is not None else None

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Take what ``nnx.view`` is given for every backbone; without BatchNorm it would raise."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last feature map, after its attention and pool5."""
        x = images
        for layer in self.features[: self.stem_size]:
            x = layer(x)
        if self.stem_attention is not None:
            x = self.stem_attention(x)
        for layer in self.features[self.stem_size : -1]:
            x = layer(x)
        if self.last_attention is not None:
            x = self.last_attention(x)
        return max_pool_2x2(x)


VGG16 = partial(VGG, batch_norm=False)
VGG16BN = partial(VGG, batch_norm=True)
