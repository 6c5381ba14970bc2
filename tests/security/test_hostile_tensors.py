"""Weights whose names and shapes someone damaged, or made to do harm."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from cost import cheap  # noqa: F401, all is measured
from flax import nnx
from golden.make_vit import VARIANTS

from cbam_jax import InputError
from cbam_jax.backbones.vit import VisionTransformer
from cbam_jax.pretrained import load_pretrained
from cbam_jax.pretrained.sources import read_arrays

GOLDEN = Path(__file__).parents[1] / "golden" / "vit.npz"


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


class Block(nnx.Module):
    """A part of EfficientNet's, under its names."""

    def __init__(self):
        self.bn0, self.bn1 = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))


NAMES = ("weight", "bias", "running_mean", "running_var")
WHOLE = {f"_bn{n}.{name}": ones(3) for n in range(2) for name in NAMES}
# What else stands in the source, and a part of what refuses it. None: it does not stand there.
EFFICIENTNET = {
    "a tensor missing": ({"_bn0.bias": None}, "missing: bn0.bias"),
    "a tensor too many": ({"_bn2.bias": ones(3)}, "unexpected: bn2.bias"),
    "a tensor of another shape": ({"_bn0.bias": ones(4)}, r"shape: bn0.bias is \(4,\)"),
    "a tensor of no axes": ({"_bn0.bias": ones()}, r"shape: bn0.bias is \(\)"),
    "a tensor of 32 axes": ({"_bn0.bias": ones(*[1] * 32)}, "shape: bn0.bias is"),
    "a tensor under two names": ({"bn0.bias": ones(3)}, "two of its tensors are bn0.bias"),
    "a tensor of whole numbers": ({"_bn0.bias": ones(3, dtype=int)}, "dtype: bn0.bias is int64"),
    "a tensor of complex numbers": (
        {"_bn0.bias": ones(3, dtype=np.complex64)},
        "dtype: bn0.bias is complex64",
    ),
    "an epoch in a tensor's place": ({"_bn0.bias": 7}, r"shape: bn0.bias is \(\)"),
    "a name of 1,001 letters": ({"a" * 1_001: ones(3)}, "too long, or no name"),
    "a name that clears the screen": ({"\x1b[2J": ones(3)}, "too long, or no name"),
}


@pytest.mark.parametrize("what", EFFICIENTNET)
def test_efficientnets_weights_are_refused(what):
    changed, message = EFFICIENTNET[what]
    model = Block()
    assert len(load_pretrained(model, WHOLE).loaded) == 8
    before = numbers(model)
    arrays = {name: a for name, a in (WHOLE | changed).items() if a is not None}
    refused(message, model, arrays)
    np.testing.assert_array_equal(numbers(model), before)


def numbers(model):
    return np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))])


def refused(message, model, arrays):
    with pytest.raises(InputError, match=message) as caught:
        load_pretrained(model, arrays)
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert len(str(caught.value)) < 3_000


QKV = "encoder.layer.0.attention"
SHAPES, ONCE = "shapes that no transformer has", "two of its tensors are"
TRANSFORMERS = {
    "queries of other axes than keys": ({f"{QKV}.q_proj.weight": ones(8)}, SHAPES),
    "queries of no axes": (
        {f"{QKV}.{part}_proj.weight": ones() for part in "qkv"},
        SHAPES,
    ),
    "biases of no axes": (
        {f"{QKV}.{part}_proj.bias": ones() for part in "qkv"},
        SHAPES,
    ),
    "queries twice, joined": (
        {"encoder.layer.0.attn.in_proj_weight": ones(96, 32)},
        "unexpected: blocks.0.attn.k.weight",
    ),
    "a token of nothing": ({"embeddings.cls_token": ones(1, 0)}, SHAPES),
    "positions of nothing": ({"embeddings.position_embeddings": ones(0)}, SHAPES),
    "a token under two names": ({"class_embedding": ones(32)}, f"{ONCE} cls_token"),
    "a token of complex numbers": (
        {"embeddings.cls_token": ones(1, 1, 32, dtype=np.complex64)},
        "dtype: cls_token is complex64",
    ),
    "a token of booleans": (
        {"embeddings.cls_token": ones(1, 1, 32, dtype=bool)},
        "dtype: cls_token is bool",
    ),
    "a pooling of no axes": ({"attn_pool.in_proj.weight": ones()}, SHAPES),
    "a billionth block": (
        {f"encoder.layer.{'9' * 400}.norm1.weight": ones(32)},
        "unexpected: blocks.9999",
    ),
}


@pytest.fixture(scope="module")
def transformer():
    """The tensors of a small DINOv2 as transformers names them, and a model for them."""
    with np.load(GOLDEN) as file:
        lines = [str(line).partition(" ") for line in file["hf_dinov2/names"]]
    arrays = {name: ones(*json.loads(shape)) for name, _, shape in lines}
    variant = VARIANTS["hf_dinov2"]
    return nnx.eval_shape(lambda: VisionTransformer(variant, rngs=nnx.Rngs(0))), arrays


@pytest.mark.parametrize("what", TRANSFORMERS)
def test_a_transformers_weights_are_refused(what, transformer):
    changed, message = TRANSFORMERS[what]
    model, arrays = transformer
    refused(message, model, arrays | changed)


SHARD = "model-00001-of-00001.safetensors"
DAMAGED = "index.json is damaged"
# What stands in the index, and a part of the line that refuses it.
INDEXES = {
    "an empty index": (b"", DAMAGED),
    "an index nested deep": (b'{"weight_map":' * 100_000, DAMAGED),
    "an index that is a list": ([1], DAMAGED),
    "an index without a map": ({}, DAMAGED),
    "a map that is a list": ({"weight_map": [SHARD]}, DAMAGED),
    "a map to a list": ({"weight_map": {"a": [SHARD]}}, DAMAGED),
    "a map to a number": ({"weight_map": {"a": 5}}, DAMAGED),
    "a map out of the folder": ({"weight_map": {"a": f"../{SHARD}"}}, DAMAGED),
    "a map to a whole path": ({"weight_map": {"a": f"/elsewhere/{SHARD}"}}, DAMAGED),
    "a map to an address": ({"weight_map": {"a": "http://evil/x.safetensors"}}, DAMAGED),
    "a map to a pickle": ({"weight_map": {"a": "model.bin"}}, DAMAGED),
    "a map to the index": ({"weight_map": {"a": "model.safetensors.index.json"}}, DAMAGED),
    "a map to a line's end": ({"weight_map": {"a": f"{SHARD}\n"}}, DAMAGED),
    "a map to 1,001 files": (
        {"weight_map": {f"{i}": f"{i}.safetensors" for i in range(1_001)}},
        DAMAGED,
    ),
    "a file that is not there": ({"weight_map": {"a": "b.safetensors"}}, "no weights at"),
    "a file that is a pipe": ({"weight_map": {"a": "pipe.safetensors"}}, "not a regular file"),
    "a tensor that no file has": ({"weight_map": {"a": SHARD, "b": SHARD}}, "disagree on b"),
    "a file with a tensor more": ({"weight_map": {"c": SHARD}}, "disagree on a"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_is_refused_in_one_line(what, tmp_path):
    document, message = INDEXES[what]
    safetensors.numpy.save_file({"a": ones(2)}, tmp_path / SHARD)
    os.mkfifo(tmp_path / "pipe.safetensors")
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_arrays(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000
