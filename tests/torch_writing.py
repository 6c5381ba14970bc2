"""Torch's files by hand, also such as torch would never write: instructions, archives, headers."""

import io
import pickle
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


def push(value):
    """The instructions that put a plain value on the stack, without the memo."""
    if isinstance(value, bytes):  # Already instructions.
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(push, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(push(key) + push(item) for key, item in value.items()) + b"u"
    # An int of up to 255 bytes, a string: as pickle writes it, without header, memo and end.
    return pickle.dumps(value, 2)[2:-1].removesuffix(b"q\x00")


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + push(arguments) + b"R"


def storage(size=4, kind="FloatStorage", key="0", view=()):
    return push(("storage", name("torch", kind), key, "cpu", size, *view)) + b"Q"


def tensor(base, offset, shape, strides):
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, base, offset, shape, strides, False, ORDERED + b")R")


ORDERED = name("collections", "OrderedDict")
PARAMETER = name("torch.nn.parameter", "Parameter") + b")\x81"
FOUR = np.arange(4, dtype=np.float32).tobytes()


def zipped(code, contents=None, *, compression=zipfile.ZIP_STORED, **members):
    """An archive as torch writes it around a pickle's instructions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + code + b".")
        for key, content in ({"0": FOUR} if contents is None else contents).items():
            archive.writestr(f"x/data/{key}", content)
        for path, content in members.items():
            archive.writestr(path, content)
    return buffer.getvalue()


def legacy(code, contents=None, *, keys=None, itemsize=4):
    """A file as torch wrote it before 1.6."""
    contents = {"0": FOUR} if contents is None else contents
    header = (MAGIC, 1001, {"little_endian": True})
    pickles = [pickle.dumps(item, protocol=2) for item in header]
    pickles += [b"\x80\x02" + code + b".", b"\x80\x02" + push(keys or list(contents)) + b"."]
    data = [struct.pack("<q", len(c) // itemsize) + c for c in contents.values()]
    return b"".join(pickles + data)


BASE = storage()


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
