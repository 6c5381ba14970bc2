"""The names that others give to a backbone's tensors, and ours, in terms of torchvision's.

One table a family: patterns, and what they become. All are applied to every name, in this order,
since none matches what another family writes; a new family is one more table. torchvision's own
names need none, nor do timm's ResNets and VGGs, which have torchvision's.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_Renames = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def _counted(kind: str) -> Callable[[re.Match[str]], str]:
    """Layers counted from one, as torchvision does."""
    return lambda match: f"{match[1]}.{kind}{int(match[2]) + 1}."


# What stands around a whole model: the two parts of a run's checkpoint; torch's DataParallel.
_AROUND: _Renames = [(r"^(params|batch_stats)\.", ""), (r"^module\.", "")]
_CBAM_AUTHORS: _Renames = [
    (r"ChannelGate\.mlp\.1\.", "channel.fc1."),
    (r"ChannelGate\.mlp\.3\.", "channel.fc2."),
    (r"SpatialGate\.spatial\.", "spatial."),
]
_BLOCK = r"(^encoder\.stages\.\d\.layers\.\d+)"
# Hugging Face transformers' ResNet.
_TRANSFORMERS: _Renames = [
    (r"^resnet\.(embedder|encoder)\.", r"\1."),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (rf"{_BLOCK}\.shortcut\.convolution\.", r"\1.downsample.0."),
    (rf"{_BLOCK}\.shortcut\.normalization\.", r"\1.downsample.1."),
    (rf"{_BLOCK}\.layer\.(\d)\.convolution\.", _counted("conv")),
    (rf"{_BLOCK}\.layer\.(\d)\.normalization\.", _counted("bn")),
    (
        r"^encoder\.stages\.(\d)\.layers\.(\d+)\.",
        lambda match: f"layer{int(match[1]) + 1}.{match[2]}.",
    ),
    (r"^classifier\.1\.", "fc."),
]
# EfficientNet-PyTorch and its Lite write each submodule with an underscore before it.
_EFFICIENTNET: _Renames = [
    (r"(^|\.)_(?=(?:conv_(?:stem|head)|blocks|(?:expand|depthwise|project)_conv|bn\d|fc)\.)", r"\1")
]
_FAMILIES = (_AROUND, _CBAM_AUTHORS, _TRANSFORMERS, _EFFICIENTNET)
_RENAMES = [(re.compile(pattern), new) for family in _FAMILIES for pattern, new in family]

# Ours on the left; a kernel is also laid out differently, see our_layout.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def family_name(name: str) -> str:
    """Any family's name by torchvision's.

    >>> family_name("resnet.encoder.stages.0.layers.2.layer.1.normalization.bias")
    'layer1.2.bn2.bias'
    >>> family_name("module.layer1.0.cbam.ChannelGate.mlp.1.weight")
    'layer1.0.cbam.channel.fc1.weight'
    >>> family_name("_blocks.3._bn0.running_var")
    'blocks.3.bn0.running_var'
    """
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def torch_name(name: str) -> str:
    """Our dotted path by torchvision's name: one rule for all models.

    >>> torch_name("backbone.layer1.0.bn2.var")
    'layer1.0.bn2.running_var'
    """
    parent, _, leaf = name.removeprefix("backbone.").rpartition(".")
    return f"{parent}.{_LEAVES.get(leaf, leaf)}".removeprefix(".")


def torch_shape(leaf: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which torch stores what we store as ``shape``."""
    if leaf == "kernel" and len(shape) == 4:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    return shape[::-1] if leaf == "kernel" else shape


def our_layout(leaf: Any, array: np.ndarray) -> np.ndarray:
    """An array of torch's, laid out as we store it."""
    if leaf == "kernel" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if leaf == "kernel" else array
