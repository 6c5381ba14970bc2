"""``milvus://HOST:PORT/COLLECTION``, and ``milvus:FILE.db``: where a collection is."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from cbam_jax import InputError
from cbam_jax.foreign_files import expanded, shown

_SERVER = re.compile(r"milvus(\+tls)?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::(\d{1,5}))?/(\w+)")
_NAME = re.compile(r"[A-Za-z_]\w{0,254}", re.ASCII)
_FILE = "photos"  # The collection of a file.
FORMS = "milvus://HOST:PORT/COLLECTION, milvus+tls://... or milvus:FILE.db"


class Address(NamedTuple):
    """What the client connects to, and the name of the collection there.

    ``text`` is what was typed, ``file`` that of Milvus Lite, None for a server.
    """

    text: str
    uri: str
    collection: str
    file: Path | None


def is_address(path: str | os.PathLike) -> bool:
    """Whether this names a collection rather than a catalogue's file.

    Raises:
        InputError: it is an address of something else.

    >>> is_address("shop.db"), is_address("milvus://localhost:19530/shop")
    (False, True)
    """
    if not isinstance(path, str) or ("://" not in path and not path.startswith("milvus:")):
        return False
    if path.partition(":")[0] not in ("milvus", "milvus+tls"):
        raise InputError(f"{shown(path)} is no catalogue: give a file, or {FORMS}")
    return True


def address(text: str) -> Address:
    """Read an address.

    Raises:
        InputError: it is none.

    >>> address("milvus://localhost:19530/shop")[1:]
    ('http://localhost:19530', 'shop', None)
    >>> address("milvus:shop-milvus.db").file
    PosixPath('shop-milvus.db')
    """
    if is_address(text):
        found = _SERVER.fullmatch(text)
        if found and _NAME.fullmatch(found[4]):
            scheme = "https" if found[1] else "http"
            return Address(text, f"{scheme}://{found[2]}:{found[3] or 19530}", found[4], None)
        if not found and "://" not in text and text.endswith(".db"):
            path = expanded(text.removeprefix("milvus:"))
            return Address(text, str(path), _FILE, path)
    raise InputError(f"{shown(text)} names no collection: give {FORMS}")


def did_you_mean(path: str | os.PathLike) -> str:
    """What is proposed where a copy was to be named and what was typed is a path.

    >>> did_you_mean("copy.db"), did_you_mean("10.0.0.1:19530/shop")
    ('; did you mean milvus:copy.db?', '; did you mean milvus://10.0.0.1:19530/shop?')
    """
    text = os.fspath(path)
    meant = f"milvus://{text}"
    found = _SERVER.fullmatch(meant)
    if not (found and found[3]):  # Without a port it is rather a folder's path.
        meant = f"milvus:{text}" if text.endswith(".db") else ""
    return f"; did you mean {meant}?" if meant else f": name one, or a copy, {FORMS}"
