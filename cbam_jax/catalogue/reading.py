"""A photo's file read once: its bytes, their hash, and how it looks in 64 bits."""

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cbam_jax.catalogue.sources import Photo
from cbam_jax.datasets import jpeg_size

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
        if not path.is_file():  # A pipe would be waited for.
            return Read(photo, problem="not a file" if path.exists() else "no such file")
        state = path.stat()
        if state.st_size > LARGEST:
            return Read(photo, problem=f"{state.st_size} bytes are more than a photo's {LARGEST}")
        seen = time.time_ns()
        content = path.read_bytes()
    except UnicodeEncodeError:
        name = os.fsencode(photo.path).decode(errors="backslashreplace")
        return Read(photo._replace(path=name), problem="its name is not UTF-8: rename it")
    except OSError as error:
        return Read(photo, problem=error.strerror or "cannot be read")
    digest = hashlib.sha256(content).digest()
    return Read(photo, content, digest, len(content), state.st_mtime_ns, seen, look_of(content))


def look_of(content: bytes) -> int | None:
    """The perceptual hash of an image file, a signed integer of 64 bits; None where it is none.

    The signs of the 64 lowest frequencies of a cosine transform of 32 x 32 grey pixels, the mean
    left out, against their median: scaling, another JPEG quality or a little brightness change a
    few of the bits.

    >>> look_of(b"no image") is None
    True
    """
    large = min(jpeg_size(content) or (0,)) >= 256  # Then a quarter of its sides is enough.
    flag = cv2.IMREAD_REDUCED_GRAYSCALE_4 if large else cv2.IMREAD_GRAYSCALE
    try:
        grey = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    except cv2.error:
        return None
    if grey is None:
        return None
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = cv2.dct(small)[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int(np.packbits(bits).view(">i8")[0])


def differing_bits(look: int, looks: np.ndarray) -> np.ndarray:
    """In how many of 64 bits each of ``looks`` [n] int64 is another than ``look``.

    >>> differing_bits(0b101, np.array([0b101, 0b1, -1]))
    array([ 0,  1, 62], dtype=uint8)
    """
    return np.bitwise_count(np.bitwise_xor(looks, np.int64(look)).view(np.uint64))
