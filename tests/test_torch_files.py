"""Files that no torch wrote: each is refused in one line, and no array reaches outside the file."""

import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from itertools import product

import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_writing import (
    FOUR,
    ORDERED,
    PARAMETER,
    call,
    legacy,
    name,
    push,
    storage,
    tensor,
    zipped,
)

from cbam_jax import InputError, pretrained
from cbam_jax.torch_files import read_torch

BASE = storage()
SHORT = storage(4, "ShortStorage")
# 256 * 256 is 0 in 16 bits.
SMALL = {"0": np.array([0, 1, 256, 257], np.int16).tobytes()}


def number(place):
    """A tensor without axes, to stand where a number should."""
    return tensor(SHORT, place, (), ())


def on_a_tensor(shape, strides):
    """A tensor on a tensor of stride 0, which would have 2**40 entries of four."""
    return tensor(tensor(BASE, 0, (2**40,), (0,)), 0, shape, strides)


def doubled(make, times):
    """A container that holds the one before it twice, and so on: 2**times ways to the bottom."""
    code = push(make("bottom", 0))
    for time in range(times):
        code += b"r" + struct.pack("<I", time) + b"0"
        get = b"j" + struct.pack("<I", time)
        code += push(make(get, time + 1))
    return code


def shared_lists(item, _):
    return [item, item]


def shared_dicts(item, _):
    return {"a": item, "b": item}


def shared_tuples(item, _):
    return (item, item)


def flagged(data, flag=1):
    """An archive whose members all carry a flag, as encrypted ones do."""
    data = bytearray(data)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + place] |= flag
            start = data.find(signature, start + 4)
    return bytes(data)


def claiming(data, size):
    """An archive whose list gives its storage another size than it has."""
    data = bytearray(data)
    entry = data.rindex(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, size, size)
    return bytes(data)


def with_a_byte_changed(data, place):
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


COMPRESSED = zipped(tensor(BASE, 0, (4,), (1,)), compression=zipfile.ZIP_DEFLATED)
MANY = 1_000_001

# What is in each file, and a part of the line that refuses it.
HOSTILE = {
    # Tensors that would reach outside their storage, each a way that once worked.
    "write behind a storage": (
        legacy(on_a_tensor((6,), (1,)) + push(4) + push(7.5) + b"s"),
        "repeats its storage of 4",
    ),
    "read behind a storage": (
        zipped(on_a_tensor((2**20,), (1,))),
        "repeats its storage of 4",
    ),
    "a tensor on a tensor": (
        zipped(tensor(tensor(BASE, 0, (4,), (1,)), 0, (4,), (1,))),
        "does not stand on a storage",
    ),
    "sizes that wrap": (
        zipped(tensor(SHORT, 0, (number(3),), (number(2),)), SMALL),
        "no whole numbers",
    ),
    # Small files that took all memory, or for ever.
    "endless pairs": (
        zipped(call(ORDERED, tensor(BASE, 0, (2**40, 2), (0, 0)))),
        "repeats its storage of 4",
    ),
    "endless dict": (zipped(call(ORDERED, tensor(BASE, 0, (2, 2), (2, 1)))), "else than pairs"),
    "expanded": (zipped(tensor(BASE, 0, (2**30,), (0,))), "repeats its storage of 4"),
    "expanded beyond memory": (zipped(tensor(BASE, 0, (2**40,), (0,))), "repeats its storage"),
    "compressed": (COMPRESSED, "a compressed zip archive"),
    "a bomb": (
        zipped(b"N", {"0": bytes(2**27)}, compression=zipfile.ZIP_DEFLATED),
        "a compressed zip archive",
    ),
    "compressed otherwise": (
        zipped(b"N", compression=zipfile.ZIP_LZMA),
        "a compressed zip archive",
    ),
    "damaged compression": (with_a_byte_changed(COMPRESSED, 45), "a compressed zip archive"),
    "encrypted": (flagged(zipped(b"N")), "an encrypted zip archive"),
    "two roots": (zipped(b"N", **{"other/data.pkl": b"N."}), "several folders"),
    # Numbers that are none.
    "a bool as a shape": (zipped(tensor(BASE, 0, (True,), (1,))), "no whole numbers"),
    "a float as an offset": (zipped(tensor(BASE, 1.0, (2,), (1,))), "no whole numbers"),
    "a tensor as an offset": (
        zipped(tensor(SHORT, number(1), (2,), (1,)), SMALL),
        "no whole numbers",
    ),
    "a tensor as a shape": (
        zipped(tensor(BASE, 0, tensor(BASE, 0, (2,), (1,)), (1,))),
        "does not stand on a storage",
    ),
    "a large stride": (zipped(tensor(BASE, 0, (2,), (2**63,))), "reaches beyond"),
    "strides that wrap to nothing": (zipped(tensor(BASE, 0, (5,), (2**62,))), "reaches beyond"),
    "a large offset": (zipped(tensor(BASE, 2**64, (1,), (1,))), "reaches beyond"),
    "a negative stride": (zipped(tensor(BASE, 3, (2,), (-1,))), "reaches beyond"),
    "a shape of much": (zipped(tensor(BASE, 0, (2**63, 0), (1, 1))), "damaged"),
    "many axes": (zipped(tensor(BASE, 0, (1,) * 65, (1,) * 65)), "65 axes"),
    "more strides": (zipped(tensor(BASE, 0, (1,), (1, 1))), "1 axes and 2 strides"),
    # Storages.
    "a size below zero": (zipped(tensor(storage(-4), 0, (1,), (1,))), "whose key or size"),
    "a size of a tensor": (zipped(storage(number(1)), SMALL), "whose key or size"),
    "a storage too short": (zipped(tensor(storage(5), 0, (1,), (1,))), "of 20 bytes has 16"),
    "a storage of two dtypes": (
        zipped(push([tensor(BASE, 0, (4,), (1,)), tensor(storage(4, "IntStorage"), 0, (), ())])),
        "two dtypes or sizes",
    ),
    "a storage that is not there": (zipped(tensor(storage(key="1"), 0, (), ())), "damaged"),
    "a storage of its own": (zipped(BASE), "holds Storage objects"),
    "a storage in a dict": (zipped(push({"a": BASE})), "holds Storage objects"),
    "items of a storage": (zipped(call(ORDERED, BASE)), "else than pairs"),
    "a part beyond": (
        legacy(tensor(storage(view=(("0", 2, 3),)), 0, (3,), (1,))),
        "reaches beyond it",
    ),
    "a part before": (legacy(storage(view=(("0", -1, 3),))), "reaches beyond it"),
    "a part of a fraction": (legacy(storage(view=(("0", 1.0, 1),))), "without a place"),
    "beyond a part": (
        legacy(tensor(storage(view=(("0", 1, 2),)), 0, (3,), (1,))),
        "reaches beyond its storage of 2",
    ),
    "other booleans": (
        zipped(tensor(storage(4, "BoolStorage"), 0, (4,), (1,)), {"0": b"\0\1\2\0"}),
        "neither 0 nor 1",
    ),
    "other booleans before 1.6": (
        legacy(tensor(storage(4, "BoolStorage"), 0, (4,), (1,)), {"0": b"\0\1\xff\0"}, itemsize=1),
        "neither 0 nor 1",
    ),
    # Instructions where they don't belong.
    "an item of a tensor": (zipped(tensor(BASE, 0, (4,), (1,)) + push(1) + push(2) + b"s"), "item"),
    "items of a tuple": (zipped(push((1, 2)) + b"(" + push(1) + push(2) + b"u"), "sets an item"),
    "appended to a tensor": (zipped(tensor(BASE, 0, (4,), (1,)) + push(1) + b"a"), "no list"),
    "extended tuple": (zipped(b"t(" + push(1) + b"e"), "damaged"),
    "attributes of a tensor": (
        zipped(tensor(BASE, 0, (4,), (1,)) + push({"shape": (2**40,)}) + b"b"),
        "sets attributes",
    ),
    "attributes of a storage": (zipped(BASE + push({"size": 2**40}) + b"b"), "sets attributes"),
    "attributes of a global": (
        zipped(ORDERED + push({"name": "x", "keys": 1}) + b"b"),
        "sets attributes",
    ),
    "a global": (zipped(push([ORDERED])), "holds Global objects"),
    "a call of a storage's type": (zipped(call(name("torch", "FloatStorage"), 4)), "damaged"),
    "a call of a tensor": (zipped(call(tensor(BASE, 0, (4,), (1,)), 4)), "no function"),
    "a call of a string": (zipped(call(push("_rebuild_tensor"), BASE)), "no function"),
    "a call with a list": (zipped(ORDERED + push([1]) + b"R"), "no function"),
    "a new dict": (zipped(ORDERED + b")\x81"), "no parameter"),
    "a parameter of nothing": (zipped(push([PARAMETER])), "holds Parameter objects"),
    "a parameter of a list": (zipped(PARAMETER + push(([1],)) + b"b"), "no tensor"),
    "a parameter of itself": (zipped(PARAMETER + b"q\x00(h\x00tb"), "no tensor"),
    "a parameter twice": (
        zipped(PARAMETER + 2 * (push((tensor(BASE, 0, (), ()),)) + b"b")),
        "sets attributes",
    ),
    "a parameter of a storage": (
        zipped(call(name("torch._utils", "_rebuild_parameter"), BASE)),
        "no tensor",
    ),
    "a global from the stack": (
        zipped(push("posix\x1b[2J\n") + push("system") + b"\x93"),
        r"asks for 'posix\x1b[2J\n'.system",
    ),
    "a global without a name": (zipped(push(1) + push("x") + b"\x93"), "without a name"),
    "an instance": (zipped(b"(iposix\nsystem\n"), "no instruction b'i'"),
    "a protocol to come": (zipped(b"\x80\x06N"), "a pickle of protocol 6"),
    "an extension": (zipped(b"\x82\x01"), "no instruction"),
    "a buffer": (zipped(b"\x97"), "no instruction"),
    "nothing in the memo": (zipped(b"h\x00"), "damaged"),
    "nothing on the stack": (zipped(b""), "damaged"),
    "no mark": (zipped(b"t"), "damaged"),
    "a tuple of more than there is": (zipped(b"N\x87"), "damaged"),
    "half a pair": (zipped(b"}(" + push("a") + b"u"), "damaged"),
    # Containers.
    "a list of itself": (zipped(b"]q\x00h\x00a"), "hold themselves"),
    "a dict of itself": (zipped(b"}q\x00" + push("a") + b"h\x00s"), "hold themselves"),
    "a tuple of itself": (zipped(b"]q\x00\x85q\x01h\x00h\x01a0"), "hold themselves"),
    "deep lists": (zipped(b"]" * 5_000 + b"a" * 4_999), "100 deep"),
    "deep tuples": (zipped(b"N" + b"\x85" * 5_000), "100 deep"),
    "deep by sharing": (zipped(doubled(shared_lists, 60) + b"\x85" * 60), "100 deep"),
    "a tuple as a key": (zipped(b"}" + doubled(shared_tuples, 60) + b"Ns"), "of type tuple"),
    "a tensor as a key": (zipped(b"}" + tensor(BASE, 0, (4,), (1,)) + b"Ns"), "of type ndarray"),
    "keys of one hash": (
        zipped(b"}(" + b"".join(push(i * (2**61 - 1)) + b"N" for i in range(9_000)) + b"u"),
        "above 2**60",
    ),
    "keys of a list of pairs": (zipped(call(ORDERED, [[(1,), 2]])), "of type tuple"),
    "pairs of a string": (zipped(call(ORDERED, ["ab"])), "else than pairs"),
    "many copies": (
        zipped(push([(0, 1)] * 2_000) + b"q\x000(" + (ORDERED + b"h\x00\x85R") * 1_000 + b"t"),
        "more than 1000000 items",
    ),
    # Lengths and counts.
    "a place far off in the memo": (zipped(b"}r\xff\xff\xff\xffj\x00\x00\x00\x01"), "damaged"),
    "a long string": (zipped(b"X\xff\xff\xff\xff"), "ends within an instruction"),
    "a longer string": (zipped(b"\x8d" + struct.pack("<Q", 2**62)), "ends within an instruction"),
    "long bytes": (zipped(b"B\xff\xff\xff\x7f"), "ends within an instruction"),
    "a string that is none": (zipped(b"U\x02\xff\xfe"), "damaged"),
    "many instructions": (zipped(b"N0" * MANY), "more than 1000000 instructions"),
    "many dicts": (zipped(b"}" * MANY), "more than 1000000 instructions"),
    "many marks": (zipped(b"(" * MANY), "more than 1000000 instructions"),
    "a header of many": (b"\x80\x02" + b"N0" * 51 + legacy(b"N"), "more than 100 instructions"),
    "a large directory": (
        zipped(b"N", **{f"x/{'long' * 5_000}{i}": b"" for i in range(250)}),
        "list of members takes",
    ),
    "larger than the file": (claiming(zipped(b"N"), 2**31), "larger than itself"),
    "a member twice": (
        zipped(b"N", {"0": FOUR, "1": FOUR}).replace(b"x/data/1", b"x/data/0"),
        "two members of one name",
    ),
    # Files from before torch 1.6.
    "storages longer than the file": (
        legacy(push([tensor(storage(200, key=str(i)), 0, (4,), (1,)) for i in range(9)])),
        "longer than the file",
    ),
    "a storage before the object": (
        b"".join([b"\x80\x02" + BASE + b".", legacy(b"N")]),
        "has none",
    ),
    "a storage without contents": (
        legacy(tensor(BASE, 0, (4,), (1,)), {"1": FOUR}),
        "list of storages",
    ),
    "a storage twice": (legacy(tensor(BASE, 0, (4,), (1,)), keys=["0", "0"]), "list of storages"),
    "a storage of one number": (
        legacy(tensor(BASE, 0, (4,), (1,)), {"0": FOUR[:4]}),
        "a storage of 4 has 1 entries",
    ),
    "storages by list": (legacy(tensor(BASE, 0, (4,), (1,)), keys=[["0"]]), "without a name"),
    "half a storage": (legacy(tensor(BASE, 0, (4,), (1,)))[:-1], "ends within a storage"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_in_one_line(what, tmp_path):
    data, message = HOSTILE[what]
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_torch(tmp_path / "x.pth")
    line = str(caught.value)
    assert message in line
    assert line.startswith(str(tmp_path / "x.pth"))
    assert line.isprintable()
    assert len(line) < 700


LIMITED = """
import resource, sys
from cbam_jax import InputError
from cbam_jax.torch_files import read_torch

def peak():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0])

resource.setrlimit(resource.RLIMIT_CPU, (240, 240))  # A file that never ends ends here.
before = peak()
for path in sys.argv[1:]:
    try:
        read_torch(path)
    except InputError:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of it")
def test_refusing_takes_little_memory(tmp_path):
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.pth").write_bytes(data)
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", LIMITED, *files]
    kilobytes = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert kilobytes < 200_000


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path, os.devnull):
        with pytest.raises(InputError, match="not a regular file"):
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


def test_dicts_of_more_places_than_time_are_not_walked(tmp_path):
    for bottom in (b"N", b"}"):
        code = doubled(shared_dicts, 60).replace(push("bottom"), bottom)
        (tmp_path / "x.pth").write_bytes(zipped(code))
        with pytest.raises(InputError, match="x.pth has more than 100000 entries"):
            pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["a" * 1_001, "a\nb", "\x1b[2J"])
def test_names_that_are_none(key, tmp_path):
    with pytest.raises(InputError, match="given arrays has an entry named 'a*") as caught:
        pretrained.load_pretrained(nnx.Module(), {key: np.zeros(3)})
    assert str(caught.value).isprintable()
    deep = {}
    for _ in range(30):
        deep = {"a" * 40: deep}
    with pytest.raises(InputError, match="too long"):
        pretrained.load_pretrained(nnx.Module(), deep)


def test_views_of_one_storage_are_not_written_apart_without_end(tmp_path):
    (tmp_path / "x.pth").write_bytes(
        zipped(
            push({str(i): tensor(storage(25_000), 0, (25_000,), (1,)) for i in range(100)}),
            {"0": bytes(100_000)},
        )
    )
    with pytest.raises(InputError, match="would take 10000000 bytes, more than 8 times the file"):
        pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_numbers_that_safetensors_lacks(tmp_path):
    code = push({"a": tensor(storage(2, "ComplexDoubleStorage"), 0, (2,), (1,))})
    (tmp_path / "x.pth").write_bytes(zipped(code, {"0": bytes(32)}))
    with pytest.raises(InputError, match="x.pth can't be written as .safetensors: .*complex128"):
        pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")


def check_inside(saved):
    """Every array lies in what it stands on, has no more elements, and can't be written to."""
    seen, rest = set(), [saved]
    while rest:
        item = rest.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            check_array(item)
        elif isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        else:
            assert isinstance(item, str | int | float | bytes | None), type(item)


def check_array(array):
    assert not array.flags.writeable
    root = array
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    if not array.size:
        return
    root = np.frombuffer(root, np.uint8) if isinstance(root, bytes) else root
    low, high = np.lib.array_utils.byte_bounds(array)
    first, last = np.lib.array_utils.byte_bounds(root)
    assert first <= low < high <= last
    assert array.nbytes <= root.nbytes
    array.copy()  # Reads all of it.


# The same cases each time, and none kept in a folder.
quickly = settings(derandomize=True, deadline=None, database=None, max_examples=200)
WRITERS = st.sampled_from([zipped, legacy])
PLACES = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**61, 2**62, 2**63, 2**64 + 1]))


@quickly
@given(data=st.data(), write=WRITERS, offset=PLACES, size=st.integers(0, 12))
def test_views_are_taken_exactly_where_they_lie_inside(data, write, offset, size, tmp_path_factory):
    axes = data.draw(st.integers(0, 3))
    shape, strides = (
        tuple(data.draw(st.lists(PLACES, min_size=axes, max_size=axes))) for _ in range(2)
    )
    contents = np.arange(size, dtype=np.float32)
    code = tensor(storage(size), offset, shape, strides)
    path = tmp_path_factory.mktemp("views") / "x.pth"
    path.write_bytes(write(code, {"0": contents.tobytes()}))
    expected = gathered(contents, offset, shape, strides)
    if expected is None:
        with pytest.raises(InputError):
            read_torch(path)
    else:
        found = read_torch(path)
        check_array(found)
        np.testing.assert_array_equal(found, expected, strict=True)


def gathered(contents, offset, shape, strides):
    """The view, element by element by its index in the storage; None where there is none."""
    if min((offset, *shape, *strides)) < 0:
        return None
    if 0 in shape:
        nearly = math.prod(n for n in shape if n)  # NumPy has no empty array beside too large axes.
        return np.zeros(shape, contents.dtype) if nearly < 2**61 else None
    if math.prod(shape) > len(contents):
        return None
    view = np.zeros(shape, contents.dtype)
    for index in product(*map(range, shape)):
        place = offset + sum(i * stride for i, stride in zip(index, strides, strict=True))
        if place >= len(contents):
            return None
        view[index] = contents[place]
    return view


SNIPPETS = [
    *(bytes([code]) for code in b"N\x88\x89}])(01t\x85\x86\x87aesuRb\x81Q\x94\x93"),
    *(push(value) for value in (0, 1, 4, 2**40, 2.5, "a", "0", "storage", "cpu")),
    *(code + bytes([place]) for code in (b"q", b"h") for place in range(3)),
    *(name("torch", kind) for kind in ("FloatStorage", "BoolStorage", "Size")),
    *(name("torch._utils", kind) for kind in ("_rebuild_tensor", "_rebuild_parameter")),
    *(BASE, ORDERED, PARAMETER, tensor(BASE, 0, (4,), (1,)), tensor(BASE, 0, (2, 2), (1, 2))),
    *(call(ORDERED), push(()), push({"a": 1}), push([]), push((1,))),
]


@quickly
@given(code=st.lists(st.sampled_from(SNIPPETS) | st.binary(max_size=2), max_size=40), write=WRITERS)
def test_random_instructions(code, write, tmp_path_factory):
    read_or_refuse(write(b"".join(code)), tmp_path_factory)


def read_or_refuse(data, folders):
    path = folders.mktemp("random") / "x.pth"
    path.write_bytes(data)
    try:
        check_inside(read_torch(path))
    except InputError as error:
        line = str(error)
        assert line.isprintable(), line


def golden_pickle():
    with zipfile.ZipFile(FOLDER / "torch_zip.pth") as archive:
        inside = {path.partition("/")[2]: archive.read(path) for path in archive.namelist()}
    contents = {path[5:]: data for path, data in inside.items() if path.startswith("data/")}
    return inside["data.pkl"], contents


EDITS = st.tuples(st.integers(0, 2**16), st.integers(0, 3), st.binary(min_size=1, max_size=4))


@quickly
@given(
    edits=st.lists(EDITS, min_size=1, max_size=4), kind=st.sampled_from(["pickle", "zip", "old"])
)
def test_damaged_files(tmp_path_factory, edits, kind):
    pickled, contents = golden_pickle()
    files = {"zip": FOLDER / "torch_zip.pth", "old": FOLDER / "torch_legacy.pth"}
    data = bytearray(pickled[:-1] if kind == "pickle" else files[kind].read_bytes())
    for place, removed, inserted in edits:
        place %= len(data)
        data[place : place + removed] = inserted
    whole = zipped(bytes(data), contents) if kind == "pickle" else bytes(data)
    read_or_refuse(whole, tmp_path_factory)
