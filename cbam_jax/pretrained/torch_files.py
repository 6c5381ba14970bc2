"""Tensors from torch's files, without torch and without running what a pickle asks for.

A ``.pth`` is a pickle, and a pickle is a program: whoever wrote it decides what unpickling calls.
So it is read by a machine of our own, in torch_pickles.py; here are the two containers that torch
puts pickles and numbers into. What is promised for any file, however it was made:

- Nothing of the file is run, and nothing of it outlasts the call but what the call returns.
- No array reaches outside its own storage, has more elements than it, or can be written to.
- Memory stays at a small multiple of the file's size, and time at a few seconds: archives are
  uncompressed, as torch writes them, their sizes are compared with the file's before anything is
  read, and a pickle's instructions are counted.
- What comes back is made of arrays, dicts, lists, tuples, numbers, strings, bytes and None, is
  nested at most 100 deep and never holds itself. What was shared in the file is shared in it:
  whoever walks it by paths should count them.
- Everything else is an ``InputError`` of one line.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cbam_jax import InputError
from cbam_jax.foreign_files import open_regular, shown
from cbam_jax.pretrained.torch_pickles import PickleReader, Storage

# What a file from before torch 1.6 begins with, as the first of its pickles.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Bytes of a file, 128 GiB: more than any network that is read here.
_LARGEST = 2**37
# Of a zip archive; an entry takes about 100 bytes, and ten times that in memory.
_LONGEST_DIRECTORY = 4 * 2**20


def read_torch(path: str | Path) -> Any:
    """Read what ``torch.save`` wrote, every tensor as a read-only NumPy array.

    Both formats: the zip archive of torch 1.6 and later, and the plain pickles before it, which
    several of torchvision's published files still are. Views of one storage come back as views of
    one array. bfloat16 is ``ml_dtypes.bfloat16``; devices are ignored.

    Args:
        path: the file.

    Returns:
        The saved object, in dicts, lists and tuples as it was saved.

    Raises:
        InputError: the file is missing, truncated, in another format, or holds anything besides
            tensors and plain containers. Also for what torch could read but a file of weights has
            no use for: tensors expanded beyond their storage, bare storages, keys of dicts that
            are neither strings nor numbers.
    """
    try:
        file = open_regular(path, _LARGEST)
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such file") from None
    try:
        with file:
            size = os.fstat(file.fileno()).st_size
            # As torch decides it, so that both read the same of a file that is both.
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file, size) if zipped else _read_legacy(file, size)
    except InputError as error:
        raise InputError(f"{shown(path)}: {_one_line(error)}") from None
    except _DAMAGE as error:
        raise InputError(
            f"{shown(path)}: not a file of torch.save, or damaged "
            f"({type(error).__name__}: {_one_line(error)}); fetch it again"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."


# What reading a truncated or overwritten file, or a file of another kind, comes up with.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read_zip(file: BinaryIO, size: int) -> Any:
    members = _members(file, size)
    if "data.pkl" not in members:
        raise InputError("a zip archive without data.pkl: torch.save did not write it")
    if "byteorder" in members and _content(file, members["byteorder"]) != b"little":
        raise InputError("saved on a big-endian machine: save it again on a common one")
    # One piece of memory for all storages: the system hands it out in large pages, where filling
    # small ones would cost more than reading does. Of what is never filled nothing is taken.
    names = [name for name in members if name.startswith("data/")]
    room = np.empty(sum(_aligned(members[name].file_size) for name in names), np.uint8)
    used = 0

    def content(key: str, length: int) -> np.ndarray:
        nonlocal used
        member = members[f"data/{key}"]
        place = room[used : used + member.file_size]
        used += _aligned(member.file_size)
        _read_member(file, member, place)
        if len(place) < length:
            raise InputError(f"a storage of {length} bytes has {len(place)}: the file is damaged")
        return place

    pickled = _content(file, members["data.pkl"])
    reader = PickleReader(io.BytesIO(pickled), len(pickled), content)
    saved = reader.load()
    _check_booleans(reader.storages.values())
    room.setflags(write=False)
    return saved


class _Directory:
    """The file as zipfile opens it: the list of members is read at once, so that is bounded."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _LONGEST_DIRECTORY:
            raise InputError(f"a zip archive whose list of members takes {size} bytes")
        return self._file.read(size)


def _members(file: BinaryIO, size: int) -> dict[str, zipfile.ZipInfo]:
    """What an archive holds, by the names below its one root; only what torch would write."""
    directory: Any = _Directory(file)
    if not zipfile.is_zipfile(directory):
        raise InputError("the archive's end is missing: the file is truncated; fetch it again")
    with zipfile.ZipFile(directory) as archive:
        infos = archive.infolist()
    if any(info.flag_bits & 1 for info in infos):
        raise InputError("an encrypted zip archive: torch.save never writes one")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise InputError("a compressed zip archive: torch.save never compresses; save it again")
    if sum(info.file_size for info in infos) > size:
        raise InputError("a zip archive whose members are larger than itself: it is damaged")
    if len({info.filename.partition("/")[0] for info in infos}) > 1:
        raise InputError("a zip archive of several folders: torch.save writes one; save it again")
    members = {info.filename.partition("/")[2]: info for info in infos}
    if len(members) < len(infos):
        raise InputError("a zip archive with two members of one name: torch.save never writes one")
    return members


def _content(file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    data = np.empty(member.file_size, np.uint8)
    _read_member(file, member, data)
    return data.tobytes()


def _read_member(file: BinaryIO, member: zipfile.ZipInfo, place: np.ndarray) -> None:
    """Fill ``place`` with a member's bytes: zipfile itself would copy them once more."""
    file.seek(member.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("no member where the archive lists one")
    file.seek(name_length + extra_length, os.SEEK_CUR)
    _read_into(file, place, "the archive ends within a member")
    if zlib.crc32(place.data) != member.CRC:
        raise zipfile.BadZipFile(f"bad CRC-32 of {member.filename[:80]!a}")


def _read_into(file: BinaryIO, place: Any, ended: str) -> None:
    if file.readinto(place) < len(place):  # pyright: ignore[reportAttributeAccessIssue]
        raise EOFError(ended)


def _aligned(size: int) -> int:
    """The next multiple of 16, as NumPy aligns memory: no dtype of torch's asks for more."""
    return -(-size // 16) * 16


def _read_legacy(file: BinaryIO, size: int) -> Any:
    # Pickles one after another: magic number, protocol, machine, the object, storage keys; then
    # each storage's length and bytes. So the object's arrays exist before their contents.
    left = size

    def content(key: str, length: int) -> np.ndarray:
        nonlocal left
        left -= length
        if left < 0:
            raise InputError("storages longer than the file: it is truncated; fetch it again")
        return np.zeros(length, np.uint8)

    magic, protocol, machine = (PickleReader(file, size).load(most=100) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != 1001 or not machine["little_endian"]:
        raise InputError("not a format that torch.save wrote since 2017 on a common machine")
    reader = PickleReader(file, size, content)
    saved = reader.load()
    # Two instructions a key, and a few for each thousand.
    keys = PickleReader(file, size).load(most=3 * len(reader.storages) + 100)
    # Only strings are compared: comparing nested lists can take for ever.
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise InputError("storages without a name: the file is damaged")
    if sorted(keys) != sorted(reader.storages):
        raise InputError("the file's list of storages is not of those that its tensors stand on")
    for key in keys:
        _fill(reader.storages[key], file)
    _check_booleans(reader.storages.values())
    return saved


def _fill(storage: Storage, file: BinaryIO) -> None:
    content: Any = storage.content
    (size,) = struct.unpack("<q", file.read(8))
    if size != storage.size:
        raise InputError(f"a storage of {storage.size} has {size} entries: the file is damaged")
    _read_into(file, content, "the file ends within a storage")
    content.setflags(write=False)


def _check_booleans(storages: Iterable[Storage]) -> None:
    """A byte other than 0 and 1 is no boolean: NumPy counts and selects wrongly by it."""
    for storage in storages:
        numbers = np.frombuffer(storage.content, np.uint8)
        if storage.dtype == np.bool_ and numbers.max(initial=0) > 1:
            raise InputError("a boolean that is neither 0 nor 1: the file is damaged")
