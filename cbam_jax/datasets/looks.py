"""How an image looks in 64 bits, so that copies at another size or quality are found."""

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.decoding import decode_image, jpeg_size


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


def shrunk(image: np.ndarray, longest: int) -> np.ndarray:
    """An image, uint8 [h, w, 3], of at most ``longest`` pixels a side; none is enlarged.

    >>> shrunk(np.zeros((30, 60, 3), np.uint8), 20).shape
    (10, 20, 3)
    """
    height, width = fitted_size(image.shape[0], image.shape[1], longest)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def fitted_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """The height and width of an image whose longer side is ``longest`` pixels, or its own.

    >>> fitted_size(30, 60, 20), fitted_size(3, 6, 20), fitted_size(1, 9000, 20)
    ((10, 20), (3, 6), (1, 20))
    """
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def differing_bits(look: int, looks: np.ndarray) -> np.ndarray:
    """In how many of 64 bits each of ``looks`` [n] int64 is another than ``look``.

    >>> differing_bits(0b101, np.array([0b101, 0b1, -1]))
    array([ 0,  1, 62], dtype=uint8)
    """
    return np.bitwise_count(np.bitwise_xor(looks, np.int64(look)).view(np.uint64))
