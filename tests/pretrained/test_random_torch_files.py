"""Random views, instructions and damage: refused, or every array inside its storage."""

import math
import zipfile
from itertools import product

import numpy as np
import pytest
from golden.make_backbones import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from random_cases import cases
from torch_writing import (
    BASE,
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

from cbam_jax import InputError
from cbam_jax.pretrained import read_torch


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
    if not array.size:
        return
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.setflags(write=True)
    low, high = np.lib.array_utils.byte_bounds(array)
    first, last = np.lib.array_utils.byte_bounds(array.base)  # Its storage.
    assert first <= low < high <= last
    assert array.nbytes <= array.base.nbytes
    array.copy()  # Reads all of it.


WRITERS = st.sampled_from([zipped, legacy])
PLACES = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**61, 2**62, 2**63, 2**64 + 1]))


@cases(200)
@given(data=st.data(), write=WRITERS, offset=PLACES, size=st.integers(0, 12))
def test_views_are_taken_exactly_where_they_lie_inside(data, write, offset, size, tmp_path_factory):
    axes = data.draw(st.integers(0, 3))
    shape, strides = (
        tuple(data.draw(st.lists(PLACES, min_size=axes, max_size=axes))) for _ in range(2)
    )
    contents = np.arange(size, dtype=np.float32)
    code = tensor(storage(size), offset, shape, strides)
    path = tmp_path_factory.getbasetemp() / "views.pth"
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


@cases(200)
@given(code=st.lists(st.sampled_from(SNIPPETS) | st.binary(max_size=2), max_size=40), write=WRITERS)
def test_random_instructions(code, write, tmp_path_factory):
    read_or_refuse(write(b"".join(code)), tmp_path_factory)


def read_or_refuse(data, folders):
    path = folders.getbasetemp() / "random.pth"
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


@cases(200)
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
