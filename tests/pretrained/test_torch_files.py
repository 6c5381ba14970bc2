"""Torch's files read without torch; test_torch_files_torch.py compares with torch itself."""

import argparse
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from golden.make_backbones import FOLDER
from tiny_resnet import tiny, values
from torch_writing import (
    BASE,
    ORDERED,
    PARAMETER,
    call,
    doubled,
    legacy,
    push,
    shared_dicts,
    shared_lists,
    shared_tuples,
    storage,
    tensor,
    zipped,
)
from torch_writing import (
    name as global_name,
)

from cbam_jax import InputError, pretrained
from cbam_jax.pretrained import load_pretrained, read_torch


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_torch_files_without_torch(file):
    saved = read_torch(FOLDER / file)
    base = np.arange(42, dtype=np.float32).reshape(6, 7) / 8
    expected = {
        "base": base,
        "transposed": base.T,
        "strided": base[1:5:2, 2:],
        "expanded": np.broadcast_to(base[0], (3, 7)),
        "parameter": base[0] * 2,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.int64(5),
        "half": base[2].astype(np.float16),
        "bfloat16": base[3].astype(ml_dtypes.bfloat16),
        "bool": np.array([True, False, True]),
    }
    for name, array in expected.items():
        assert saved[name].dtype == array.dtype
        np.testing.assert_array_equal(saved[name], array, strict=name != "scalar")
    assert np.shares_memory(saved["base"], saved["strided"])
    nested = saved["nested"]
    assert nested["epoch"] == 3
    assert nested["list"][:3] == [1.5, "a", None]
    np.testing.assert_array_equal(nested["list"][3][0], base[5])


def test_parameters_of_torch_0_1(tmp_path, monkeypatch):
    """A state dict as torch pickled it in 2017: Parameter objects around views of storages."""

    def rebuild(storage, offset, size, stride):
        raise AssertionError("only pickled by name")

    class FloatStorage:
        pass

    class Parameter:
        def __getstate__(self):
            return (self.tensor, None, False, True, OrderedDict())

    class Tensor:
        def __init__(self, *state):
            self.state = state

        def __reduce__(self):
            return rebuild, self.state

    names = {rebuild: "_rebuild_tensor", FloatStorage: "FloatStorage", Parameter: "Parameter"}
    modules = {rebuild: "torch._utils", FloatStorage: "torch", Parameter: "torch.nn.parameter"}
    for item, module in modules.items():
        item.__module__, item.__qualname__ = module, names[item]
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], names[item], item)
    # setitem restores what was there, torch itself included.
    storage = np.arange(12, dtype=np.float32)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            view = ("17", 4, 8)  # The last eight of the twelve, as a view of the storage.
            return ("storage", FloatStorage, "17", "cpu", 12, view) if item is storage else None

    parameter = Parameter()
    parameter.tensor = Tensor(storage, 1, (2, 3), (3, 1))
    with open(tmp_path / "x.pth", "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        Pickler(file, protocol=2).dump(OrderedDict(weight=parameter))
        pickle.dump(["17"], file, protocol=2)
        file.write(struct.pack("<q", 12) + storage.tobytes())
    monkeypatch.undo()
    np.testing.assert_array_equal(read_torch(tmp_path / "x.pth")["weight"], [[5, 6, 7], [8, 9, 10]])


class Evil:
    """What a pickle can do: run a command when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_pickle(path, payload, kind):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", payload)
    else:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C)
        header = magic + pickle.dumps(1001) + pickle.dumps({"little_endian": True})
        path.write_bytes((header if kind == "legacy" else b"") + payload)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_pickle_that_executes_is_refused(tmp_path, kind):
    path, touched = tmp_path / "x.pth", tmp_path / "touched"
    write_pickle(path, pickle.dumps({"conv1.weight": Evil(touched)}, protocol=2), kind)
    model = tiny()
    before = values(model)
    with pytest.raises(InputError, match="x.pth: refused: the pickle asks for posix.system"):
        load_pretrained(model, path)
    assert not touched.exists()
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


# A stride beyond the storage of 21 numbers would read other memory.
@pytest.mark.parametrize(
    "view", [(0, (2, 7), (21, 1)), (40, (3,), (1,)), (19, (3,), (1,)), (0, (3,), (-1,))]
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, view):
    payload = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x15tQ"
        + b"".join(pickle.dumps(item, 2)[2:-1] for item in view)
        + b"\x89NtR."
    )
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", payload)
        archive.writestr("x/data/0", np.zeros(21, np.float32).tobytes())
    with pytest.raises(InputError, match="reaches beyond its storage of 21"):
        read_torch(tmp_path / "x.pth")


def test_storages_of_any_length_lie_apart_and_aligned(tmp_path):
    kinds = {1: "ByteStorage", 8: "DoubleStorage", 16: "ComplexDoubleStorage"}
    lengths = (1, 8, 3, 16, 17, 24, 5, 32)
    itemsizes = [max(size for size in kinds if length % size == 0) for length in lengths]
    rng = np.random.default_rng(3)
    contents = {str(n): rng.bytes(length) for n, length in enumerate(lengths)}
    tensors = [
        tensor(storage(length // size, kinds[size], str(n)), 0, (length // size,), (1,))
        for n, (length, size) in enumerate(zip(lengths, itemsizes, strict=True))
    ]
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(push(tensors), contents))
    for array, content in zip(read_torch(path), contents.values(), strict=True):
        assert array.tobytes() == content
        assert array.flags.aligned


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_truncated_torch_files(tmp_path, file):
    whole = (FOLDER / file).read_bytes()
    for keep in range(0, len(whole) - 1, 97):
        (tmp_path / file).write_bytes(whole[:keep])
        with pytest.raises(InputError, match=file):
            read_torch(tmp_path / file)


def test_overwritten_bytes_in_a_torch_file(tmp_path):
    whole = bytearray((FOLDER / "torch_zip.pth").read_bytes())
    place = whole.index((np.arange(42, dtype=np.float32) / 8).tobytes())
    whole[place + 5] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    with pytest.raises(InputError, match="x.pth: .*CRC-32"):
        read_torch(tmp_path / "x.pth")


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path, os.devnull):
        with pytest.raises(InputError, match="not a (regular )?file"):
            read_torch(path)
    with pytest.raises(InputError, match="pipe.pth is not a regular file"):
        pretrained.convert(tmp_path / "pipe.pth", tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_torch(tmp_path / "nothing.pth")


def read(data, folder):
    (folder / "x.pth").write_bytes(data)
    return read_torch(folder / "x.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol(protocol, tmp_path):
    shared = ["a", "ü" * 300, b"bytes"]
    saved = {"x": shared, 3: (shared, ()), None: [1, 2**40, -(2**70), 0.5, True, False, {}]}
    if protocol == 2:
        shared.pop()  # There bytes are a global's doing.
    pickled = pickle.dumps(saved, protocol)
    found = read(zipped(pickled.removesuffix(b".")), tmp_path)
    assert found == saved
    assert found["x"] is found[3][0]


def test_what_python_2_wrote(tmp_path):
    code = call(ORDERED, [[b"U\x06weight", tensor(BASE, 0, (2, 2), (1, 2))], [b"T\1\0\0\0b", 2]])
    found = read(legacy(code), tmp_path)
    np.testing.assert_array_equal(found["weight"], [[0, 2], [1, 3]])
    assert found["b"] == 2


def test_shared_containers_come_back_shared(tmp_path):
    for make, first in ((shared_lists, 0), (shared_dicts, "a"), (shared_tuples, 0)):
        found = read(zipped(doubled(make, 60)), tmp_path)
        for _ in range(60):
            left, right = found.values() if isinstance(found, dict) else found
            assert left is right
            found = found[first]


def test_a_shared_parameter_is_one_array(tmp_path):
    parameter = PARAMETER + b"q\x00" + push((tensor(BASE, 1, (2,), (1,)), None, False)) + b"b"
    found = read(zipped(push({"a": parameter, "b": b"h\x00"})), tmp_path)
    np.testing.assert_array_equal(found["a"], [1, 2])
    assert found["a"] is found["b"]


BESIDE = {
    "best_prec1": np.float64(76.1),
    "counts": [np.int64(3), np.bool_(True)],
    "args": argparse.Namespace(lr=0.1, data="/x", gpus=[0, 1]),
    "folder": pathlib.PosixPath("/data/photos"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("what", BESIDE)
def test_what_scripts_save_beside_the_weights_is_read_as_nothing(what, protocol, tmp_path):
    code = b"}(" + push("state_dict") + push({"a": tensor(BASE, 0, (4,), (1,))})
    code += push(what) + pickle.dumps(BESIDE[what], protocol)[2:-1]
    (tmp_path / "x.pth").write_bytes(zipped(code + b"u"))
    saved = read_torch(tmp_path / "x.pth")
    assert saved[what] in (None, [None, None])
    np.testing.assert_array_equal(saved["state_dict"]["a"], np.arange(4, dtype=np.float32))


def test_arguments_of_what_is_read_as_nothing_are_not_followed(tmp_path):
    """Whatever such a thing is called with, or is given, comes to nothing."""
    device = global_name("torch", "device")
    system = call(global_name("_codecs", "encode"), "import os", "exec")
    code = push({"device": call(device, "cuda", 0), "x": system})
    code += push("y") + call(device, call(device, [1], {"a": (2,)})) + push({"b": 3}) + b"bs"
    (tmp_path / "x.pth").write_bytes(zipped(code))
    assert read_torch(tmp_path / "x.pth") == {"device": None, "x": None, "y": None}


@pytest.mark.parametrize("write", [zipped, legacy])
def test_arrays_can_not_be_written_to(write, tmp_path):
    code = push(
        [tensor(BASE, 0, (4,), (1,)), tensor(BASE, 0, (0, 3), (3, 1)), tensor(BASE, 2, (), ())]
    )
    for array in read(write(code), tmp_path):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


def test_a_stride_means_nothing_along_an_axis_of_one(tmp_path):
    found = read(zipped(tensor(BASE, 1, (1, 3), (2**80, 1))), tmp_path)
    np.testing.assert_array_equal(found, [[1, 2, 3]])
