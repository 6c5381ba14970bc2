"""A photo's file read once: its bytes, their hash, and how it looks in 64 bits."""

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

from cbam_jax import InputError
from cbam_jax.catalogue.sources import Photo
from cbam_jax.datasets.looks import look_of
from cbam_jax.foreign_files import read_file

LARGEST = 2**28  # Bytes of a photo's file: no camera writes as many.


class Read(NamedTuple):
    """A file as it was read; ``problem`` says why it was not, and the rest is empty then.

    ``hash`` is the SHA-256 of the file, ``modified`` its time of writing and ``seen`` when it was
    read, in ns; ``look`` is `look_of` its pixels, None where they cannot be decoded.
    """

    photo: Photo
    content: bytes = b""
    hash: bytes | None = None
    size: int | None = None
    modified: int | None = None
    seen: int | None = None
    look: int | None = None
    problem: str | None = None


def read_photo(photo: Photo) -> Read:
    """Read a file; what is wrong with it is said in the result.

    >>> read_photo(Photo("/nowhere/a.jpg")).problem
    'no such file'
    """
    path = Path(photo.path)
    try:
        photo.path.encode()
        if not path.is_file():
            return Read(photo, problem="not a file" if path.exists() else "no such file")
        state, seen = path.stat(), time.time_ns()
        content = read_file(path, LARGEST)
    except UnicodeEncodeError:
        name = os.fsencode(photo.path).decode(errors="backslashreplace")
        return Read(photo._replace(path=name), problem="its name is not UTF-8: rename it")
    except InputError:
        return Read(photo, problem=f"more than the {LARGEST} bytes that a photo may have")
    except OSError as error:
        return Read(photo, problem=error.strerror or "cannot be read")
    digest = hashlib.sha256(content).digest()
    return Read(photo, content, digest, len(content), state.st_mtime_ns, seen, look_of(content))
