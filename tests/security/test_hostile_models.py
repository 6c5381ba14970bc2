"""Weights, configs of exported models and ids that someone damaged, or made to do harm."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
from cost import cheap  # noqa: F401, all is measured
from flax import nnx

from cbam_jax import InputError, config_checks, hub, hub_config
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import load_pretrained
from cbam_jax.pretrained.sources import read_arrays

RNG = np.random.default_rng(7)
ARRAYS = {"bias": RNG.normal(size=3).astype(np.float32), "scale": np.ones((2, 3), np.float32)}
WEIGHTS = safetensors.numpy.save(ARRAYS)


def described(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(3,), offsets=(0, 12)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWELVE = bytes(12)
DAMAGED = "damaged or truncated"
SAFETENSORS = {
    "an empty file of weights": (b"", DAMAGED),
    "weights that are zeros": (bytes(100), DAMAGED),
    "half the weights": (WEIGHTS[:-12], DAMAGED),
    "weights with more behind them": (WEIGHTS + b"more", DAMAGED),
    "a header longer than the file": (described({}, length=2**40), DAMAGED),
    "a header of 2**63 bytes": (described({}, length=2**63), DAMAGED),
    "a header that is no JSON": (described(b"{bias}"), DAMAGED),
    "a header that is a list": (described([1]), DAMAGED),
    "a header nested 100,000 deep": (described(b'{"a":' * 100_000), DAMAGED),
    "a tensor that reaches beyond the file": (
        described({"a": entry(offsets=(0, 2**40), shape=(2**38,))}, TWELVE),
        DAMAGED,
    ),
    "a tensor that ends before it begins": (described({"a": entry(offsets=(12, 0))}), DAMAGED),
    "a tensor of more numbers than bytes": (
        described({"a": entry(shape=(2**40,))}, TWELVE),
        DAMAGED,
    ),
    "two tensors in one place": (described({"a": entry(), "b": entry()}, TWELVE), DAMAGED),
    "a hole between tensors": (
        described({"a": entry(), "b": entry(offsets=(16, 28))}, bytes(28)),
        DAMAGED,
    ),
    "an offset of text": (described({"a": entry(offsets=("0", "12"))}, TWELVE), DAMAGED),
    "a shape that overflows": (
        described({"a": entry(shape=(2**32, 2**32, 2**32))}, TWELVE),
        DAMAGED,
    ),
    "a negative shape": (described({"a": entry(shape=(-3,))}, TWELVE), DAMAGED),
    "a dtype that is none": (described({"a": entry("os.system")}, TWELVE), DAMAGED),
    "a tensor of 65 axes": (described({"a": entry(shape=(1,) * 64 + (3,))}, TWELVE), DAMAGED),
    "a tensor of nothing beyond all sizes": (
        described({"a": entry(shape=(0, 2**62), offsets=(0, 0))}),
        DAMAGED,
    ),
    "30,000 tensors of nothing": (
        described({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(30_000)}),
        "30000 tensors, more than 20000",
    ),
    "two tensors of one name": (
        described(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), TWELVE),
        DAMAGED,
    ),
    "two shapes of one tensor": (
        described(b'{"a":{"dtype":"F32","shape":[3],"shape":[1],"data_offsets":[0,12]}}', TWELVE),
        DAMAGED,
    ),
    "an offset of NaN": (
        described(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,NaN]}}', TWELVE),
        DAMAGED,
    ),
    "an offset of a fraction": (described({"a": entry(offsets=(0, 12.0))}, TWELVE), DAMAGED),
    "a shape that is true": (described({"a": entry(shape=(True, 3))}, TWELVE), DAMAGED),
    "words about weights that are nested": (
        described({"__metadata__": {"a": {"b": "c"}}, "a": entry()}, TWELVE),
        DAMAGED,
    ),
    "a name with half a letter": (
        described(b'{"a\\ud800":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}', TWELVE),
        DAMAGED,
    ),
    "a header in UTF-16": (described("{}".encode("utf-16")), DAMAGED),
    "tensors of four bits": (described({"a": entry("F4", (24,))}, TWELVE), "dtype F4"),
    "tensors of eight bits": (described({"a": entry("I8", (12,))}, TWELVE), "dtype I8"),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_weights_are_refused_in_one_line(what, tmp_path):
    data, message = SAFETENSORS[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_arrays(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_weights_that_are_whole_are_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(WEIGHTS)
    np.testing.assert_equal(dict(read_arrays(tmp_path / "x.safetensors")), ARRAYS)


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 40)


NO_FILES = {
    "a pipe for weights": (os.mkfifo, "not a regular file|is a pipe"),
    "a device for weights": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself for weights": (lambda path: path.symlink_to(path.name), "not a regular"),
    "a terabyte of nothing for weights": (sparse, "has 1099511627776 bytes|truncated|damaged"),
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "model.safetensors"])
def test_what_stands_in_the_place_of_weights(what, name, tmp_path):
    make, message = NO_FILES[what]
    make(tmp_path / name)
    folder = name == "model.safetensors"
    with pytest.raises(InputError, match=f"{message}|is a device|damaged"):
        read_arrays(tmp_path if folder else tmp_path / name)


class Norm(nnx.Module):
    def __init__(self):
        self.bn = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


NUMBERS = {
    "weights of NaN": ("weight", np.nan, "bn.weight has NaN or infinity"),
    "weights beyond float32": ("weight", 1e300, "bn.weight has NaN or infinity"),
    "weights of infinity": ("running_mean", -np.inf, "bn.running_mean has NaN or infinity"),
    "a variance below zero": ("running_var", -1e-9, "bn.running_var has variances below zero"),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_no_model_has(what):
    name, value, message = NUMBERS[what]
    model = Norm()
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = {f"bn.{key}": np.ones(3, np.float32) for key in names}
    load_pretrained(model, arrays)
    arrays[f"bn.{name}"] = np.array([1, value, 1], np.float64)
    with pytest.raises(InputError, match=message):
        load_pretrained(model, arrays)


DOCUMENT = {
    "format_version": 1,
    "cbam_jax_version": "0.1.0",
    "model": {"name": "resnet18", "embedding_dim": 5},
    "preprocessing": {"image_size": 64, "crop_fraction": 0.875},
    "metrics": {"map@10": 0.5},
}


def changed(field, value, *, seal=True):
    document = json.loads(json.dumps(hub_config.with_hashes(DOCUMENT, ARRAYS)))
    *path, last = field.split(".")
    place = document
    for name in path:
        place = place[name]
    place[last] = value
    if seal:
        document["checksum"] = hub_config.checksum(document)
    return json.dumps(document).encode()


CONFIGS = {
    "an empty config": (b"", "is damaged"),
    "half a config": (changed("metrics", {})[:60], "is damaged"),
    "a config that is a list": (b"[]", "it is no object"),
    "a config that is null": (b"null", "it is no object"),
    "a config nested 100,000 deep": (b'{"format_version":' * 100_000, "nested too deeply"),
    "a config in another encoding": ('{"a": "ä"}'.encode("latin-1"), "is damaged"),
    "a number of 5,000 digits": (b'{"format_version": ' + b"1" * 5_000 + b"}", "is damaged"),
    "a config of another library": (b'{"architectures": ["ResNet"]}', "of no model that"),
    "a version of text": (changed("format_version", "1"), "format_version is '1'"),
    "a version of null": (changed("format_version", None), "format_version is None"),
    "a version of 4,000 digits": (
        changed("format_version", 1).replace(
            b'"format_version": 1', b'"format_version": 1' + b"0" * 4_000
        ),
        "has format 1000",
    ),
    "a version of -1": (changed("format_version", -1), "format_version is -1"),
    "a version of NaN": (changed("format_version", float("nan")), "format_version is nan"),
    "a version of true": (changed("format_version", True), "format_version is True"),
    "a version to come": (changed("format_version", 2), "has format 2, .*upgrade"),
    "a version to come, by \x1b[2J": (
        changed("format_version", 2).replace(b"0.1.0", rb"\u001b[2J"),
        r"by cbam_jax \\x1b\[2J",
    ),
    "a model that is text": (changed("model", "resnet18"), "model is no object"),
    "no preprocessing": (changed("preprocessing", None), "preprocessing is no object"),
    "no image_size": (changed("preprocessing", {}), "image_size None"),
    "an image_size of 10**9": (changed("preprocessing.image_size", 10**9), "image_size 10000"),
    "an image_size of text": (changed("preprocessing.image_size", "64"), "image_size '64'"),
    "an image_size of 64.5": (changed("preprocessing.image_size", 64.5), "image_size 64.5"),
    "hashes that are a list": (changed("weights", ["a"]), "weights is no object"),
    "another model than was saved": (
        changed("model.name", "resnet34", seal=False),
        "its checksum differs",
    ),
    "another mean than was saved": (
        changed("preprocessing.mean", [0.5, 0.5, 0.5], seal=False),
        "its checksum differs",
    ),
    "another hash than was saved": (
        changed("weights.bias", "0" * 16, seal=False),
        "its checksum differs",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_is_refused_in_one_line(what, tmp_path):
    data, message = CONFIGS[what]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        hub_config.read_config(tmp_path / "config.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_each_damaged_byte_of_a_config_is_noticed_or_changes_nothing(tmp_path, rng):
    path = tmp_path / "config.json"
    whole = json.dumps(hub_config.with_hashes(DOCUMENT, ARRAYS), indent=2).encode()
    path.write_bytes(whole)
    right = hub_config.read_config(path)
    refused = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            document = hub_config.read_config(path)
        except InputError:
            refused += 1
            continue
        for name in ("model", "preprocessing", "weights"):
            # Without its checksum, or its hashes, a folder is as the earlier ones were.
            assert document.get(name, right[name]) == right[name] or "checksum" not in document
    assert refused > 0.6 * len(whole)


@pytest.mark.parametrize("what", ["a pipe for weights", "a terabyte of nothing for weights"])
def test_what_stands_in_the_place_of_a_config(what, tmp_path):
    NO_FILES[what][0](tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json is damaged"):
        hub_config.read_config(tmp_path / "config.json")


def test_hashes_notice_any_change_of_a_tensor(tmp_path):
    document = hub_config.with_hashes(DOCUMENT, ARRAYS)
    hub_config.check_weights(ARRAYS, document, tmp_path)
    nudged = ARRAYS | {"bias": np.nextafter(ARRAYS["bias"], np.float32(9))}
    for arrays in (nudged, {"bias": ARRAYS["bias"]}, ARRAYS | {"more": np.zeros(1)}):
        with pytest.raises(InputError, match="1 tensors are not those that were saved"):
            hub_config.check_weights(arrays, document, tmp_path)
    hub_config.check_weights(nudged, DOCUMENT, tmp_path)  # A folder of before has no hashes.


MODELS = {
    "a dtype that is a function": {"dtype": "os.system"},
    "a dtype of objects": {"dtype": "object"},
    "a dtype of 5": {"dtype": 5},
    "an argument that is none": {"__class__": "x"},
    "an embedding of no numbers": {"embedding_dim": 0},
    "an embedding of -1 numbers": {"embedding_dim": -1},
    "an embedding of text": {"embedding_dim": "five"},
    "a model of no classes": {"num_classes": 0},
    "a model that is a list": {"name": ["resnet18"]},
    "a model of another name": {"name": "../../etc/passwd"},
}


TRANSFORMER = {
    "width": 8, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16, "mlp_width": 8,
    "activation": "gelu", "epsilon": 1e-6, "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip


def transformer(**fields):
    return {"name": "vit", "transformer": TRANSFORMER | fields}


MODELS |= {
    "a pooling that is a list": {"pooling": ["gem"]},
    "a pooling of a module": {"pooling": "os:system"},
    "a name of a megabyte": {"name": "r" * 10**6},
    "half a letter for a name": {"name": "\ud800"},
    "random numbers that are given": {"rngs": 5},
    "an embedding of half a number": {"embedding_dim": 5.5},
    "a transformer of nothing": {"name": "vit", "transformer": None},
    "a transformer's fields in a list": {"name": "vit", "transformer": [1]},
    "a transformer of 1,000 layers": transformer(depth=1_000),
    "a transformer whose means are text": transformer(mean="123"),
    "a transformer whose means are 10**300": transformer(mean=[1e300] * 3),
    "a transformer whose deviation is nothing": transformer(std=[0.0] * 3),
    "a transformer whose switch is text": transformer(gated="no"),
    "a transformer whose registers are true": transformer(registers=True),
    "a transformer whose epsilon is text": transformer(epsilon="1e-6"),
}
CUTS = {
    "a share of 10**-300 of a photo": {"crop_fraction": 1e-300},
    "a share that is text": {"crop_fraction": "0.9"},
    "a share that is NaN": {"crop_fraction": float("nan")},
    "a whole share that is true": {"crop_fraction": True},
    "a way to resize in a list": {"resize": ["crop"]},
    "a filter that clears the screen": {"interpolation": "\x1b[2J"},
    "a border that is text": {"pad_color": "abc"},
    "a border of 10**30": {"pad_color": [10**30] * 3},
    "a border that is true": {"pad_color": [True] * 3},
    "a border of 10,000 numbers": {"pad_color": [1] * 10_000},
    "means that are NaN": {"mean": [float("nan")] * 3},
    "10,000 means": {"mean": [0.5] * 10_000},
    "means in a text": {"mean": "abc"},
}


@pytest.mark.parametrize("what", CUTS)
def test_no_photo_is_cut_by_it(what):
    with pytest.raises(InputError) as caught:
        Preprocessing.from_dict({"image_size": 64} | CUTS[what])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("what", MODELS)
def test_no_model_is_built_from_it(what):
    with pytest.raises(InputError, match="no model can be built from") as caught:
        hub._build({"name": "resnet10"} | MODELS[what])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000


IDS = {
    "an id that leads out": "../../no-such-place",
    "an id that is an address": "https://evil.example/model",
    "an id with a zero byte": "user/mo\0del",
    "an id of 100,000 letters": "u/" * 50_000,
    "an id that clears the screen": "user/\x1b[2J",
    "an id of four parts": "a/b/c/d",
}


@pytest.mark.parametrize("what", IDS)
def test_an_id_is_refused_before_anything_is_fetched(what):
    with pytest.raises(InputError, match="no folder .*no id of the hub") as caught:
        hub.from_pretrained(IDS[what])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content", [b"{}", b"[", b'{"model": "resnet18"}', b'{"model": null}', b'{"architectures": []}']
)
def test_weights_beside_the_config_of_another_library_are_looked_at(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert config_checks.saved_model(tmp_path / "config.json") == {}
