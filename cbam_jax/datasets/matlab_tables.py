"""Tables of structs from MATLAB's files, version 5, as strangers give them.

SciPy's reader is written in C and follows the file's own sizes: a few changed bytes end the process
with a segmentation fault, and a packed file of a megabyte takes gigabytes. A list of annotations
needs little of the format: one array of structs, whose fields are texts and numbers.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax.foreign_files import read_file

_MOST_FILE, _MOST_UNPACKED = 32 << 20, 64 << 20  # Of Cars-196: about 1 MB, and 9.
_HEADER = 128
_MATRIX, _PACKED = 14, 15  # Kinds of elements that are not numbers.
_STRUCT, _CHAR, _FIRST_NUMBER, _LAST_NUMBER = 2, 4, 6, 15  # Classes of matrices.
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
    16: "u1", 17: "u2", 18: "u4",
}  # fmt: skip
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}

Element = tuple[int, memoryview]  # Its kind, and its bytes.


def read_structs(path: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """Read the structs of one variable: texts as ``str``, a number alone as such, else arrays.

    Args:
        path: of the file.
        name: of the variable, an array of structs.

    Raises:
        ValueError: it is no such file, damaged, or has no such variable; InputError for a file
            that is none, or far too large.
    """
    content = memoryview(read_file(Path(path), _MOST_FILE))
    if len(content) < _HEADER or content[124:128] != b"\x00\x01IM":
        raise ValueError("no file of MATLAB, version 5, of a common machine")
    try:
        for kind, data in _elements(content[_HEADER:]):
            if kind == _PACKED:
                ((kind, data),) = _elements(_unpacked(data))
            if kind == _MATRIX and _text(_parts(data)[2]) == name:
                return _structs(_parts(data))
    except (IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error) as error:
        raise ValueError(f"damaged: {type(error).__name__}") from error
    raise ValueError(f"has no {name}")


def _unpacked(data: memoryview) -> memoryview:
    packed = zlib.decompressobj()
    content = packed.decompress(data, _MOST_UNPACKED)
    if not packed.eof:
        raise ValueError(f"it is cut off, or has more than {_MOST_UNPACKED} bytes unpacked")
    return memoryview(content)


def _elements(data: memoryview) -> Iterator[Element]:
    """What lies one after another: a tag of kind and size, then so many bytes, filled up to 8."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from("<II", data, place)
        start, step = place + 8, 8 + -(-size // 8) * 8
        if kind >> 16:  # Of at most 4 bytes, which stand in the tag.
            kind, size, start, step = kind & 0xFFFF, kind >> 16, place + 4, 8
            if size > 4:
                raise ValueError("damaged: a small element of more than 4 bytes")
        if kind == _PACKED:  # Not filled up.
            step = 8 + size
        if start + size > len(data):
            raise ValueError("damaged or cut off: an element that reaches beyond its end")
        yield kind, data[start : start + size]
        place += step


def _parts(data: memoryview) -> list[Element]:
    """Of a matrix: flags, shape, name, then what is in it."""
    return list(_elements(data))


def _structs(parts: list[Element]) -> list[dict[str, Any]]:
    if _class(parts) != _STRUCT:
        raise ValueError("no array of structs")
    width = int(_numbers(parts[3]).item())
    names = bytes(parts[4][1])
    if width < 1:
        raise ValueError("damaged: names of no letters")
    fields = [
        names[i : i + width].partition(b"\0")[0].decode("latin-1")
        for i in range(0, len(names), width)
    ]
    values = parts[5:]
    if not fields or len(values) % len(fields):
        raise ValueError("damaged: structs of too few fields")
    rows = range(0, len(values), len(fields))
    return [dict(zip(fields, map(_value, values[i : i + len(fields)]), strict=True)) for i in rows]


def _value(element: Element) -> Any:
    kind, data = element
    parts = _parts(data)
    if kind != _MATRIX or len(parts) != 4:
        raise ValueError("a field that is neither a text nor numbers")
    if _class(parts) == _CHAR:
        return _text(parts[3])
    if not _FIRST_NUMBER <= _class(parts) <= _LAST_NUMBER:
        raise ValueError("a field that is neither a text nor numbers")
    numbers = _numbers(parts[3])
    return numbers.item() if numbers.size == 1 else numbers


def _class(parts: list[Element]) -> int:
    return int(_numbers(parts[0])[0]) & 0xFF


def _numbers(element: Element) -> np.ndarray:
    kind, data = element
    return np.frombuffer(data, np.dtype(_NUMBERS[kind]).newbyteorder("<"))


def _text(element: Element) -> str:
    kind, data = element
    return bytes(data).decode(_TEXTS[kind])
