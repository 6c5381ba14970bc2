"""Files that no torch wrote: each is refused in one line, and takes little memory."""

import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from cost import cheap  # noqa: F401, all is measured
from torch_writing import (
    BASE,
    FOUR,
    ORDERED,
    PARAMETER,
    call,
    doubled,
    legacy,
    name,
    push,
    shared_lists,
    shared_tuples,
    storage,
    tensor,
    zipped,
)

from cbam_jax import InputError
from cbam_jax.pretrained import read_torch

SHORT = storage(4, "ShortStorage")
# 256 * 256 is 0 in 16 bits.
SMALL = {"0": np.array([0, 1, 256, 257], np.int16).tobytes()}


def number(place):
    """A tensor without axes, to stand where a number should."""
    return tensor(SHORT, place, (), ())


def on_a_tensor(shape, strides):
    """A tensor on a tensor of stride 0, which would have 2**40 entries of four."""
    return tensor(tensor(BASE, 0, (2**40,), (0,)), 0, shape, strides)


def again(arguments):
    """One tensor, made again and again from what is in the memo."""
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return zipped(push(arguments) + b"q\x01" + rebuild + b"q\x02" + b"h\x02h\x01R0" * 20_000)


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
        "over 1000000 items",
    ),
    "many arguments": (again((BASE, 0, (4,), (1,), *range(10_000))), "over 1000000 items"),
    "many times many axes": (again((BASE, 0, (1,) * 64, (1,) * 64)), "over 1000000 items"),
    "a long state": (
        zipped(
            push((tensor(BASE, 0, (), ()), *range(10_000)))
            + b"q\x01"
            + (PARAMETER + b"h\x01b0") * 10_000
        ),
        "over 1000000 items",
    ),
    # Lengths and counts.
    "a place far off in the memo": (zipped(b"}r\xff\xff\xff\xffj\x00\x00\x00\x01"), "damaged"),
    "a long string": (zipped(b"X\xff\xff\xff\xff"), "ends within an instruction"),
    "a longer string": (zipped(b"\x8d" + struct.pack("<Q", 2**62)), "ends within an instruction"),
    "long bytes": (zipped(b"B\xff\xff\xff\x7f"), "ends within an instruction"),
    "a string that is none": (zipped(b"U\x02\xff\xfe"), "damaged"),
    "many instructions": (zipped(b"N0" * MANY), "more than 1000000 instructions"),
    "many dicts": (zipped(b"}" * MANY), "more than 1000000 instructions"),
    "many marks": (zipped(b"(" * MANY), "more than 10000 marks"),
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
from cbam_jax.pretrained import read_torch


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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of it")
def test_refusing_takes_little_memory(tmp_path):
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.pth").write_bytes(data)
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", LIMITED, *files]
    kilobytes = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert kilobytes < 200_000
