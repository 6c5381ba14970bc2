"""Structs of MATLAB's files, beside SciPy's reader, and files made to do harm."""

import random
import struct
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from cbam_jax import InputError
from cbam_jax.datasets.matlab_tables import read_structs

KIND = [("path", object), ("class", object), ("share", object), ("box", object)]
ROWS = [
    ("car_ims/1.jpg", np.uint8([[98]]), 0.5, np.int32([1, 2, 3])),
    ("é/2.jpg", np.uint8([[3]]), -2.0, np.int32([4, 5, 6])),
    ("x" * 300, np.uint16([[500]]), 1e300, np.int32([7, 8, 9])),
]


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def path(request, tmp_path):
    path = tmp_path / "a.mat"
    tables = {"other": np.eye(3), "annotations": np.array(ROWS, KIND)[None]}
    savemat(path, tables, do_compression=request.param)
    return path


def test_they_are_those_of_scipy(path):
    expected = loadmat(path, squeeze_me=True)["annotations"]
    found = read_structs(path, "annotations")
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert list(row) == [name for name, _ in KIND]
        for name, value in row.items():
            np.testing.assert_array_equal(value, other[name])


def test_what_is_not_there_is_told(path):
    with pytest.raises(ValueError, match="has no labels"):
        read_structs(path, "labels")
    with pytest.raises(ValueError, match="no array of structs"):
        read_structs(path, "other")
    with pytest.raises(InputError, match="a folder"):
        read_structs(path.parent, "annotations")


def test_damages_end_in_one_line(path):
    # SciPy's reader ends the process at some of these.
    whole, draw = path.read_bytes(), random.Random(0)
    for number in range(200):
        content = bytearray(whole)
        for _ in range(1 + number % 3):
            content[draw.randrange(128, len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(content))] if number % 10 == 0 else content)
        try:
            read_structs(path, "annotations")
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017, what is read with numbers changed is right


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content


HEADER = bytes(124) + b"\x00\x01IM"
HOSTILE = {
    "an empty file": (b"", "no file of MATLAB"),
    "another machine's": (bytes(124) + b"\x01\x00MI" + bytes(8), "no file of MATLAB"),
    "a file of nothing": (HEADER, "has no annotations"),
    "a bomb": (
        HEADER + element(15, zlib.compress(element(14, bytes(80 << 20)), 9)),
        "more than 67108864 bytes unpacked",
    ),
    "packed in packed": (
        HEADER + element(15, zlib.compress(element(15, zlib.compress(b"")))),
        "has no annotations",
    ),
    "a packed part cut off": (
        HEADER + element(15, zlib.compress(bytes(99))[:-5]),
        "cut off",
    ),
    "a small element of 9 bytes": (HEADER + struct.pack("<HH4x", 1, 9), "more than 4 bytes"),
    "an element beyond the end": (HEADER + struct.pack("<II", 14, 2**32 - 1), "beyond its end"),
    "a matrix of nothing": (HEADER + element(14, b""), "damaged"),
    "a matrix nested deep": (HEADER + element(14, element(14, element(14, b"")) * 3), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_none(name, tmp_path):
    content, words = HOSTILE[name]
    path = tmp_path / "a.mat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_structs(path, "annotations")
