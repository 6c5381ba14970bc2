"""Tensors from torch's files, without torch and without running what a pickle asks for.

A ``.pth`` is a pickle, and a pickle is a program: whoever wrote it decides what unpickling calls.
The reader here knows tensors, numbers, strings and containers, and refuses everything else.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cbam_jax import InputError

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
# What a file from before torch 1.6 begins with, as the first of its pickles.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(path: str | Path) -> Any:
    """Read what ``torch.save`` wrote, every tensor as a NumPy array.

    Both formats: the zip archive of torch 1.6 and later, and the plain pickles before it, which
    several of torchvision's published files still are. Views of one storage come back as views of
    one array. bfloat16 is ``ml_dtypes.bfloat16``; devices are ignored.

    Args:
        path: the file.

    Returns:
        The saved object, in dicts, lists and tuples as it was saved.

    Raises:
        InputError: the file is missing, truncated, in another format, or holds anything besides
            tensors and plain containers.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                return _plain(_read_zip(file))
            file.seek(0)
            if file.read(4) == b"PK\x03\x04":
                raise InputError("the archive's end is missing: the file is truncated; fetch again")
            file.seek(0)
            return _plain(_read_legacy(file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise InputError(
            f"{path}: not a file of torch.save, or damaged "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error


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
    NotImplementedError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def _read_zip(file) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in names:
            raise InputError("a zip archive without data.pkl: torch.save did not write it")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise InputError("saved on a big-endian machine: save it again on a common one")

        @cache
        def storage(key: str, dtype: np.dtype, size: int) -> np.ndarray:
            return np.frombuffer(archive.read(names[f"data/{key}"]), dtype, size)

        return _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"])), storage).load()


def _read_legacy(file) -> Any:
    # Pickles one after another: magic number, protocol, machine, the object, storage keys; then
    # each storage's length and bytes. So the object's arrays exist before their contents.
    storages: dict[str, np.ndarray] = {}
    remaining = Path(file.name).stat().st_size

    def storage(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        if key not in storages:
            if not 0 <= size * dtype.itemsize <= remaining:
                raise InputError("a storage longer than the file: it is truncated; fetch it again")
            storages[key] = np.zeros(size, dtype)
        return storages[key]

    magic, protocol, machine = (_TensorUnpickler(file, storage).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != 1001 or not machine["little_endian"]:
        raise InputError("not a format that torch.save wrote since 2017 on a common machine")
    saved = _TensorUnpickler(file, storage).load()
    for key in _TensorUnpickler(file, storage).load():
        (size,) = struct.unpack("<q", file.read(8))
        data = file.read(size * storages[key].itemsize)
        storages[key][:] = np.frombuffer(data, storages[key].dtype, size)
    return saved


class _Parameter:
    """What torch before 0.4 saved in place of a parameter's tensor: (tensor, gradient, ...)."""

    def __setstate__(self, state):
        self.data = state[0]


def _plain(saved: Any) -> Any:
    """Replace the parameters by their arrays. Methods are the types' own, never the pickle's."""
    if isinstance(saved, _Parameter):
        return saved.data
    if isinstance(saved, dict):
        return {key: _plain(value) for key, value in dict.items(saved)}
    if isinstance(saved, list | tuple):
        return type(saved)(map(_plain, saved))
    return saved


class _TensorUnpickler(pickle.Unpickler):
    """Knows the few globals that tensors need.

    They are bound methods, strings and a class made for the occasion: a pickle can set attributes
    on what it is handed, and nothing of it must outlast the file.
    """

    def __init__(self, file, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self._known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            ("torch.nn.parameter", "Parameter"): type("Parameter", (_Parameter,), {}),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return a known global, or refuse."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return name
        raise InputError(
            f"refused: the pickle asks for {module}.{name}, which is neither a tensor nor a plain "
            "container and could run code; save the model's state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the storage that a tensor stands on."""
        kind, storage_type, key, _, size = pid[:5]
        if kind != "storage" or storage_type not in _DTYPES:
            raise InputError(f"an unknown kind of storage: {kind!r}, {storage_type!r}")
        array = self._storage(key, _DTYPES[storage_type], size)
        if len(pid) > 5 and pid[5] is not None:  # Before torch 0.4 a storage could be a view.
            _, start, length = pid[5]
            array = array[start : start + length]
        return array

    def _rebuild_tensor(self, storage, offset, shape, strides, *_) -> np.ndarray:
        # as_strided checks nothing: a wrong stride would read outside the array.
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= storage.size):
            raise InputError(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches beyond "
                f"its storage of {storage.size}: the file is damaged"
            )
        if 0 in shape:
            return np.zeros(shape, storage.dtype)
        byte_strides = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides)

    def _rebuild_parameter(self, data, *_) -> np.ndarray:
        return data
