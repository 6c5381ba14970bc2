"""A photo's file read once: its bytes, their hash, and how it looks in 64 bits."""

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.sources import Photo
from cbam_jax.datasets import decode_image, jpeg_size
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


def look_of(content: bytes) -> int | None:
    """The perceptual hash of an image file, a signed integer of 64 bits; None where it is none.

    The signs of the 64 lowest frequencies of a cosine transform of 32 x 32 grey pixels, the mean
    left out, against their median: scaling, another JPEG quality or a little brightness change a
    few of the bits.

    >>> look_of(b"no image") is None
    True
    """
    try:
        image = small_image(content, 64)
    except InputError:
        return None
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = cv2.dct(small)[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int(np.packbits(bits).view(">i8")[0])


def small_image(content: bytes, side: int) -> np.ndarray:
    """An image of a file, uint8 [h, w, 3], as small as its decoder makes it at once.

    Its shorter side is still ``side`` pixels, or as many as the file has.

    Raises:
        InputError: it cannot be decoded.
    """
    shortest = min(jpeg_size(content) or (0, 0))
    reduction = next((n for n in (8, 4, 2) if shortest >= n * side), 1)
    return decode_image(content, reduction=reduction)


def differing_bits(look: int, looks: np.ndarray) -> np.ndarray:
    """In how many of 64 bits each of ``looks`` [n] int64 is another than ``look``.

    >>> differing_bits(0b101, np.array([0b101, 0b1, -1]))
    array([ 0,  1, 62], dtype=uint8)
    """
    return np.bitwise_count(np.bitwise_xor(looks, np.int64(look)).view(np.uint64))
