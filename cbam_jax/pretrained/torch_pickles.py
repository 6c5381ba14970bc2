"""A machine for the pickles in torch's files that can make tensors and containers, nothing else.

Python's own unpickler builds whatever a file asks for, as large as it asks for it. This one knows
the instructions that torch.save writes. Of the globals that they may ask for it knows the names of
a tensor, its storage, a parameter, a size and an ordered dict, and of a few things that are read as
None; there is nothing behind a name that a file could reach. A storage is no array: no instruction
makes one or takes it apart.
"""

import math
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

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
# A tensor takes about 35 instructions, so this is some 28,000 tensors. One byte of an instruction
# can cost 100 of memory, which the file's size alone would not bound.
_MOST_INSTRUCTIONS = 1_000_000
_MOST_MARKS = 10_000  # Open at once: one for each container within another.
_DEEPEST = 100
_MOST_AXES = 64  # NumPy's bound
# Python hashes an int modulo 2**61 - 1: larger ones can be made to collide, all with all.
_LARGEST_KEY = 2**60


@dataclass(frozen=True, slots=True)
class Storage:
    """What tensors are views of; only ``PickleReader`` makes one."""

    content: np.ndarray  # uint8, filled or still to be
    dtype: np.dtype
    start: int  # in elements, as is the size
    size: int


@dataclass(frozen=True, slots=True)
class _Global:
    """A global that a pickle asked for: of it a name, with nothing behind it to reach."""

    name: str


_GLOBALS = {
    ("collections", "OrderedDict"): _Global("OrderedDict"),
    ("torch", "Size"): _Global("Size"),
    ("torch._utils", "_rebuild_tensor"): _Global("_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"): _Global("_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"): _Global("_rebuild_parameter"),
    ("torch.nn.parameter", "Parameter"): _Global("Parameter"),
    # What training scripts save beside the weights: read as None, whatever it is called with.
    **dict.fromkeys(
        (
            ("_codecs", "encode"),
            ("argparse", "Namespace"),
            ("numpy", "dtype"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy.core.multiarray", "scalar"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("torch", "device"),
        ),
        _Global("nothing"),
    ),
    **{(module, name): _Global(name) for module in ("torch", "torch.cuda") for name in _DTYPES},
}


class _Parameter:
    """What torch before 0.4 saved in place of a parameter's tensor: (tensor, gradient, ...)."""

    tensor: np.ndarray | None = None


def _no_content(key: str, length: int) -> np.ndarray:
    raise InputError("a storage where the format has none: the file is damaged")


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_CONTAINERS = {b"}": dict, b"]": list, b")": tuple}
# By the format of the number, or of the length before the text or the bytes.
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TEXTS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q", b"U": "<B", b"T": "<I"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q"}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


class PickleReader:
    """Reads one pickle, of protocols 2 to 5.

    A stack machine, as the format has it: most instructions take what they need off the stack and
    put what they make on it; the memo keeps what is used again.

    Args:
        file: at the pickle's beginning; it is left behind its end.
        size: of the file in bytes; no length in it can be larger.
        content: called once with each storage's key and length in bytes; returns its bytes, or
            room for them, uint8.

    Attributes:
        storages: those that were asked for, by key.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        content: Callable[[str, int], np.ndarray] = _no_content,
    ):
        self.storages: dict[str, Storage] = {}
        self._read = file.read
        self._read_line = file.readline
        self._bytes = size
        self._content = content
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack under each mark
        self._memo: dict[int, Any] = {}
        self._handled = 0

    def load(self, most: int = _MOST_INSTRUCTIONS) -> Any:
        """Return what the pickle makes, having followed at most ``most`` instructions.

        Raises:
            InputError: it makes something besides tensors and plain containers.
            Exception: of several kinds where it is damaged, as with Python's own unpickler.

        >>> import io
        >>> PickleReader(io.BytesIO(pickle.dumps({"epoch": [3, None]})), 100).load()
        {'epoch': [3, None]}
        """
        for _ in range(most):
            code = self._read(1)
            if code == b".":
                saved = self._stack.pop()
                _check_plain(saved)
                return saved
            if code not in _STEPS:
                raise pickle.UnpicklingError(f"torch.save writes no instruction {code!r}")
            _STEPS[code](self, code)
        raise InputError(f"a pickle of more than {most} instructions: save a state_dict() alone")

    # Reading.

    def _take(self, count: int) -> bytes:
        # Compared first: Python would set aside whatever a wrong length asks for.
        data = self._read(count) if count <= self._bytes else b""
        if len(data) < count:
            raise EOFError("the pickle ends within an instruction")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _protocol(self, code: bytes) -> None:
        protocol = self._number("<B")
        if protocol not in range(2, 6):
            raise pickle.UnpicklingError(f"a pickle of protocol {protocol}")

    def _frame(self, code: bytes) -> None:
        self._take(8)  # its length, which only a reader in pieces needs

    # Constants.

    def _push_constant(self, code: bytes) -> None:
        self._stack.append(_CONSTANTS[code])

    def _push_number(self, code: bytes) -> None:
        self._stack.append(self._number(_NUMBERS[code]))

    def _push_long(self, code: bytes) -> None:
        self._stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _push_text(self, code: bytes) -> None:
        self._stack.append(self._take(self._number(_TEXTS[code])).decode())

    def _push_bytes(self, code: bytes) -> None:
        self._stack.append(self._take(self._number(_BYTES[code])))

    # The stack and the memo.

    def _mark(self, code: bytes) -> None:
        if len(self._below) >= _MOST_MARKS:
            raise InputError(f"more than {_MOST_MARKS} marks within each other: it is damaged")
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self, code: bytes) -> None:
        self._stack.pop()

    def _put(self, code: bytes) -> None:
        self._memo[self._number(_PUTS[code])] = self._stack[-1]

    def _memoize(self, code: bytes) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, code: bytes) -> None:
        item = self._memo[self._number(_GETS[code])]
        self._stack.append(item.tensor if type(item) is _Parameter else item)

    # Containers.

    def _push_container(self, code: bytes) -> None:
        self._stack.append(_CONTAINERS[code]())

    def _tuple(self, code: bytes) -> None:
        count = _TUPLES[code]
        if len(self._stack) < count:
            raise IndexError("a tuple of more than there is")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _tuple_since_mark(self, code: bytes) -> None:
        items = tuple(self._since_mark())
        self._stack.append(items)

    def _append(self, code: bytes) -> None:
        self._extend([self._stack.pop()])

    def _append_since_mark(self, code: bytes) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise InputError("the pickle appends to what is no list: the file is damaged")
        self._stack[-1].extend(items)

    def _set_item(self, code: bytes) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([(key, value)])

    def _set_since_mark(self, code: bytes) -> None:
        items = self._since_mark()
        self._set(list(zip(items[::2], items[1::2], strict=True)))

    def _set(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise InputError("the pickle sets an item of what is no dict: the file is damaged")
        for key, value in pairs:
            target[_checked_key(key)] = value

    # Globals, and what they are called for.

    def _global(self, code: bytes) -> None:
        module, name = (self._read_line(300).removesuffix(b"\n").decode() for _ in range(2))
        self._stack.append(_known(module, name))

    def _global_from_stack(self, code: bytes) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_known(module, name))

    def _call(self, code: bytes) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or type(called) is not _Global:
            raise InputError("the pickle calls what is no function: the file is damaged")
        self._count(len(arguments))
        self._stack.append(_CALLS[called.name](self, *arguments))

    def _count(self, items: int) -> None:
        # One instruction, on what is in the memo, can handle all that came before it.
        self._handled += items
        if self._handled > _MOST_INSTRUCTIONS:
            raise InputError(f"calls with over {_MOST_INSTRUCTIONS} items: the file is damaged")

    def _ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        # Python 2 gave the items in a list of lists.
        if type(pairs) not in (list, tuple):
            raise InputError("an ordered dict of something else than pairs: the file is damaged")
        self._count(len(pairs))
        if any(type(pair) not in (list, tuple) for pair in pairs):
            raise InputError("an ordered dict of something else than pairs: the file is damaged")
        return {_checked_key(key): value for key, value in pairs}

    def _size(self, numbers: Any = ()) -> tuple[Any, ...]:
        if type(numbers) is not tuple:
            raise InputError("a size that is no tuple: the file is damaged")
        return numbers

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        view = _view(storage, offset, shape, strides)
        self._count(view.ndim)
        return view

    def _parameter(self, tensor: Any = None, *_: Any) -> np.ndarray:
        if type(tensor) is not np.ndarray:
            raise InputError("a parameter that is no tensor: the file is damaged")
        return tensor

    def _nothing(self, *_: Any) -> None:
        return None

    def _new(self, code: bytes) -> None:
        arguments, made = self._stack.pop(), self._stack.pop()
        made = _OBJECTS.get(made.name) if type(made) is _Global else None
        if type(arguments) is not tuple or made is None:
            raise InputError("the pickle makes an object that is no parameter: the file is damaged")
        self._stack.append(made())

    def _build(self, code: bytes) -> None:
        """An object's attributes: of a parameter its tensor, which replaces it; else dropped."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is _Parameter and type(state) is tuple:
            self._count(len(state))
            target.tensor = self._stack[-1] = self._parameter(*state)
        elif type(target) not in (dict, type(None)):
            raise InputError("the pickle sets attributes of what has none: the file is damaged")

    def _storage(self, code: bytes) -> None:
        """Put a storage on the stack by its persistent id."""
        pid = self._stack.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise InputError("a storage without type, key and size: the file is damaged")
        kind, made, key, _, size = pid[:5]
        if kind != "storage" or type(made) is not _Global or made.name not in _DTYPES:
            raise InputError("an unknown kind of storage: save tensors of a common dtype")
        if type(key) is not str or type(size) is not int or size < 0:
            raise InputError("a storage whose key or size is none: the file is damaged")
        storage = self._storage_once(key, _DTYPES[made.name], size)
        # Before torch 0.4 a storage could be a view.
        self._stack.append(storage if pid[5:] in ((), (None,)) else _part(storage, *pid[5]))

    def _storage_once(self, key: str, dtype: np.dtype, size: int) -> Storage:
        if key not in self.storages:
            content = self._content(key, size * dtype.itemsize)
            self.storages[key] = Storage(content, dtype, 0, size)
        storage = self.storages[key]
        if (storage.dtype, storage.size) != (dtype, size):
            raise InputError("one storage of two dtypes or sizes: the file is damaged")
        return storage


_STEPS: dict[bytes, Callable[[PickleReader, bytes], None]] = {
    **dict.fromkeys(_CONSTANTS, PickleReader._push_constant),
    **dict.fromkeys(_CONTAINERS, PickleReader._push_container),
    **dict.fromkeys(_NUMBERS, PickleReader._push_number),
    **dict.fromkeys(_TEXTS, PickleReader._push_text),
    **dict.fromkeys(_BYTES, PickleReader._push_bytes),
    **dict.fromkeys(_PUTS, PickleReader._put),
    **dict.fromkeys(_GETS, PickleReader._get),
    **dict.fromkeys(_TUPLES, PickleReader._tuple),
    b"\x80": PickleReader._protocol,
    b"\x95": PickleReader._frame,
    b"\x8a": PickleReader._push_long,
    b"(": PickleReader._mark,
    b"0": PickleReader._pop,
    b"\x94": PickleReader._memoize,
    b"t": PickleReader._tuple_since_mark,
    b"a": PickleReader._append,
    b"e": PickleReader._append_since_mark,
    b"s": PickleReader._set_item,
    b"u": PickleReader._set_since_mark,
    b"c": PickleReader._global,
    b"\x93": PickleReader._global_from_stack,
    b"R": PickleReader._call,
    b"\x81": PickleReader._new,
    b"b": PickleReader._build,
    b"Q": PickleReader._storage,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "OrderedDict": PickleReader._ordered_dict,
    "Size": PickleReader._size,
    "_rebuild_tensor": PickleReader._tensor,
    "_rebuild_parameter": PickleReader._parameter,
    "nothing": PickleReader._nothing,
}
_OBJECTS: dict[str, Callable[[], Any]] = {"Parameter": _Parameter, "nothing": lambda: None}


def _known(module: Any, name: Any) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise InputError("the pickle asks for a global without a name: the file is damaged")
    if (module, name) not in _GLOBALS:
        raise InputError(
            f"refused: the pickle asks for {_shown(module)}.{_shown(name)}, which is neither a "
            "tensor nor a plain container and could run code; save the model's state_dict() alone"
        )
    return _GLOBALS[module, name]


def _shown(name: str) -> str:
    """A file's name as it may stand in a message: not long, and without control characters."""
    return name if re.fullmatch(r"[\w.]{1,80}", name) else ascii(name[:80])


def _checked_key(key: Any) -> Any:
    # Python hashes a tuple anew each time, by all that is in it, however often it holds it.
    if type(key) not in (str, int, float, bool, type(None)):
        raise InputError(f"a dict with a key of type {type(key).__name__}: save names or numbers")
    if type(key) is int and abs(key) > _LARGEST_KEY:
        raise InputError("a dict with a key above 2**60: save names or common numbers")
    return key


def _part(storage: Storage, _: Any, start: Any, size: Any) -> Storage:
    if type(start) is not int or type(size) is not int:
        raise InputError("a part of a storage without a place: the file is damaged")
    if min(start, size) < 0 or start + size > storage.size:
        raise InputError(f"a part of a storage of {storage.size} that reaches beyond it")
    return Storage(storage.content, storage.dtype, start, size)


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """The tensor at ``offset`` of a storage, all counted in elements; every number is checked."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise InputError("a tensor that does not stand on a storage: the file is damaged")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise InputError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    # Not isinstance: with a bool or an array in place of a number the sums below could wrap.
    if any(type(n) is not int for n in (offset, *shape, *strides)):
        raise InputError("a tensor whose shape, strides or offset are no whole numbers")
    what = f"a tensor of shape {shape}, strides {strides} and offset {offset}"
    place = f"its storage of {storage.size}"
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and last >= storage.size):
        raise InputError(f"{what} reaches beyond {place}: the file is damaged")
    if math.prod(shape) > storage.size:
        raise InputError(f"{what} repeats {place}: save its .contiguous()")
    return _array(storage, offset, shape, strides)


def _array(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    if 0 in shape:
        array = np.zeros(shape, storage.dtype)
    else:
        width = storage.dtype.itemsize
        # Along an axis of one entry a stride means nothing, and a file may give any.
        strides = tuple(min(stride, storage.size) * width for stride in strides)
        # NumPy checks the bounds once more.
        place = (storage.start + offset) * width
        array = np.ndarray(shape, storage.dtype, storage.content, place, strides)
    array.setflags(write=False)
    return array


def _check_plain(saved: Any) -> None:
    """Refuse what holds itself, is nested deeply, or is neither an array nor a plain value."""
    heights: dict[int, int] = {}

    def height(item: Any, depth: int) -> int:
        if type(item) not in (dict, list, tuple):
            if type(item) not in _PLAIN:
                raise InputError(f"holds {type(item).__name__.strip('_')} objects: save tensors")
            return 0
        # A shared container is measured once, or this would take as long as there are paths.
        if depth < _DEEPEST and id(item) not in heights:
            children = item.values() if type(item) is dict else item
            heights[id(item)] = 1 + max((height(c, depth + 1) for c in children), default=0)
        if depth >= _DEEPEST or depth + heights[id(item)] > _DEEPEST:
            raise InputError(f"containers that hold themselves, or are {_DEEPEST} deep")
        return heights[id(item)]

    height(saved, 0)


_PLAIN = (np.ndarray, str, int, float, bool, bytes, type(None))
