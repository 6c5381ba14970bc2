"""Files that others made, read in one way: opened once, regular, of a bounded size.

A path may lead to a pipe, at which a reader would wait for ever, to a device without an end, or to
a file of a terabyte of nothing. All of these are told in one line before anything is read. And what
such a file names is shown escaped: a name may hold what moves a terminal's cursor.
"""

import errno
import io
import json
import math
import os
import stat
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cbam_jax import InputError

# Sizes in bytes, far above what is common of a kind.
MOST_JSON = 64 << 20
MOST_IMAGE = 1 << 30
MOST_TABLE = 2 << 30
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_DEEPEST = 100  # Containers within containers of a JSON document.

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def expanded(path: str | os.PathLike) -> Path:
    """A path with ``~`` as the home folder that it names; ``~photo.jpg`` may be a file's name.

    Raises:
        InputError: there is neither such a home folder nor a file of that name.

    >>> expanded("~") == Path.home()
    True
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if os.path.lexists(path):
            return Path(path)
        raise InputError(
            f"{shown(path)}: there is no such home folder; give the whole path"
        ) from None


def is_gone(path: str | os.PathLike) -> bool:
    """Whether a path leads nowhere; not where that cannot be seen, as in a folder that is locked.

    ``os.path.exists`` takes what may not be looked at for what is not there.

    >>> is_gone("/nowhere/a.jpg"), is_gone("/")
    (True, False)
    """
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in _NOWHERE
    except ValueError:  # No path: it holds a zero byte.
        return True
    return False


def open_regular(path: str | os.PathLike, most: int) -> BinaryIO:
    """Open a regular file of at most so many bytes for reading; it is not waited for.

    Raises:
        InputError: it is a folder, a pipe or a device, or larger, or the path is none.
        OSError: it is not there, or may not be read.
    """
    # A pipe without a writer opens at once with O_NONBLOCK, which means nothing to a regular file.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except IsADirectoryError:
        raise InputError(f"{shown(path)} is a folder, not a file: give a file") from None
    except ValueError:
        raise InputError(f"{shown(path)} is no path: it holds a zero byte") from None
    try:
        _check_regular(path, os.fstat(file.fileno()), most)
    except InputError:
        file.close()
        raise
    return file


def _check_regular(path: str | os.PathLike, status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "no file")
        raise InputError(f"{shown(path)} is {kind}, not a regular file: give a file")
    if status.st_size > most:
        raise InputError(
            f"{shown(path)} has {status.st_size} bytes, more than the {most} that such a file may "
            "have: give another"
        )


def read_file(path: str | os.PathLike, most: int = MOST_IMAGE) -> bytes:
    """Return the contents of a regular file; raises as ``open_regular``.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"abc"), file.flush()
    ...     read_file(file.name)
    b'abc'
    """
    with open_regular(path, most) as file:
        content = file.read(most)
    if content is None:  # As of a system's log, which gives what there will be.
        raise InputError(f"{shown(path)} is a file that would be waited for: give another")
    return content


def read_text(path: str | os.PathLike, most: int = MOST_JSON) -> str:
    """Return a file's text, UTF-8 with or without BOM, line ends as ``open`` has them.

    Raises:
        InputError: as ``open_regular``.
        UnicodeDecodeError: it is no UTF-8.
    """
    text = read_file(path, most).decode("utf-8-sig")
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def read_json(path: str | os.PathLike, most: int = MOST_JSON) -> Any:
    """Return what a JSON file holds, nested at most 100 deep.

    Raises:
        ValueError: it is no JSON, or nested deeper; InputError as ``open_regular``.
        OSError: it is not there, or may not be read.
    """
    return parse_json(read_text(path, most))


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says, nested at most 100 deep; raises a ValueError as ``read_json``.

    >>> parse_json('{"price": 5}')
    {'price': 5}
    """
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [document]
    for _ in range(_DEEPEST):
        level = [child for item in level for child in _children(item)]
        if not level:
            return document
    raise ValueError("nested too deeply")


def map_array(path: str | os.PathLike) -> np.ndarray:
    """Map the numbers of a ``.npy`` file, of any shape and type but objects.

    Raises:
        ValueError: it is none, or shorter than its header says; InputError as ``open_regular``.
        OSError: it is not there, or may not be read.
    """
    open_regular(path, sys.maxsize).close()
    try:
        return np.lib.format.open_memmap(path, "r")
    except OSError:
        raise
    except Exception as error:  # Its header is parsed as Python is, which raises many kinds.
        raise ValueError(shown(" ".join(str(error).split()))) from error


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file that ``np.savez`` wrote, of any type but objects.

    Raises:
        ValueError: it is none, damaged, compressed, or an array is larger than its part of the
            file; InputError as ``open_regular``.
        OSError: it is not there, or may not be read.
    """
    with open_regular(path, sys.maxsize) as file:
        return parse_arrays(file)


def parse_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """Return the arrays of an open ``.npz``; raises a ValueError as ``read_arrays``.

    ``np.load`` sets aside what a header asks for before it reads, and unpacks whatever is packed.

    >>> file = io.BytesIO()
    >>> np.savez(file, x=np.array([1, 2]))
    >>> parse_arrays(file)["x"].tolist()
    [1, 2]
    """
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > size:
                raise ValueError("it is compressed, or its parts are larger than itself")
            return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
    except Exception as error:  # zipfile raises many kinds, and a header is parsed as Python is.
        raise ValueError(shown(" ".join(str(error).split()))) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as part:
        read_header = _NPY_HEADERS[np.lib.format.read_magic(part)]
        shape, _, dtype = read_header(part)
        if math.prod(shape) * max(dtype.itemsize, 1) > member.file_size:
            raise ValueError(f"{member.filename} is larger than its part of the file")
    with archive.open(member) as part:
        return np.lib.format.read_array(part, allow_pickle=False)


_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def shown(text: str | os.PathLike, most: int = 300) -> str:
    r"""Return text as a terminal may show it: control characters escaped, the middle left out.

    >>> print(shown("a\x1b[2J\nb"), shown("x" * 1000, most=9))
    a\x1b[2J\nb xxx...xxx
    """
    text = escaped(os.fsdecode(text) if isinstance(text, os.PathLike) else str(text))
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def shown_names(names: Iterable[str], most: int = 10) -> str:
    """Return the first of many names, each as it may be shown, and how many more there are.

    >>> print(shown_names(["hat", "coat", "dress"], most=2))
    ['hat', 'coat'] and 1 more
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    first = ", ".join(f"'{shown(name, 80)}'" for name in names[:most])
    return f"[{first}]{more}"


def shown_folder(folder: str | os.PathLike) -> str:
    """Return a folder and the names in it, as they may be shown.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shown_folder(folder).replace(folder, "FOLDER")
    'FOLDER (empty)'
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return shown(folder)
    return f"{shown(folder)} ({f'with {shown_names(names)}' if names else 'empty'})"


def escaped(text: str) -> str:
    """Return text with what is not printable escaped as Python writes it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
