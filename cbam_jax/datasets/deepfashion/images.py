"""DeepFashion's images, and which pixels of them its boxes and landmarks mean."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.decoding import decode_image
from cbam_jax.datasets.deepfashion.layout import Layout
from cbam_jax.foreign_files import read_file

MISSING = "is missing"  # what a Look says of a file that is not there
_SQUARE, _LONG_SIDE = (256, 256), 300  # pixels, of low-resolution images: of In-shop, of others


class Look(NamedTuple):
    """An image file: its size (width, height), None where ``problem`` says why; its SHA-256."""

    size: tuple[int, int] | None
    digest: bytes
    problem: str


def look_at(files: Sequence[Path]) -> Iterator[Look]:
    """Reads and decodes image files on all cores, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 4096):  # map() would queue all of them at once
            yield from pool.map(_look, files[start : start + 4096])


def _look(file: Path) -> Look:
    try:
        encoded = read_file(file)
    except InputError as error:
        return Look(None, b"", f"cannot be read ({error})")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Look(None, b"", MISSING if missing else f"cannot be read ({error.strerror})")
    digest = hashlib.sha256(encoded).digest()
    try:
        height, width = decode_image(encoded).shape[:2]
    except InputError:
        return Look(None, digest, "cannot be decoded")
    return Look((width, height), digest, "")


def low_size(layout: Layout, path: str, size: tuple[float, float]) -> tuple[float, float]:
    """Width and height of the low-resolution image, in whose pixels the lists have their boxes.

    In high resolution it is looked at where it is there; else it is what its authors say: 256 x 256
    for In-shop, and a long side of 300 pixels for the others.
    """
    if not layout.highres:
        return size
    low = _look(layout.images / path).size
    if low is not None:
        return low
    shrink = _LONG_SIDE / max(size)
    return _SQUARE if layout.padded else (size[0] * shrink, size[1] * shrink)


def to_pixels(
    points: np.ndarray, low: tuple[float, float], size: tuple[float, float], *, padded: bool
) -> np.ndarray:
    """Takes points of the low-resolution image to the image of ``size``.

    In-shop's low-resolution images are the high ones shrunk into a square and centred, so that the
    borders of a portrait are no part of it (``padded``). The other benchmarks' are only shrunk.

    Args:
        points: [..., 2], x and y in pixels of the low-resolution image.
        low: its width and height.
        size: width and height of the image that is used.
        padded: whether the low-resolution image has borders.

    Returns:
        float32 [..., 2], pixels of the image that is used; not clipped to it.

    Example:
        >>> corners = np.array([[40.5, 0], [215.5, 256]])  # of a 750 x 1101 photo in 256 x 256
        >>> to_pixels(corners, (256, 256), (750, 1101), padded=True).round().tolist()
        [[-1.0, 0.0], [751.0, 1101.0]]
        >>> to_pixels(corners, (200, 256), (800, 1024), padded=False).tolist()
        [[162.0, 0.0], [862.0, 1024.0]]
    """
    low_array, full = np.array(low, np.float64), np.array(size, np.float64)
    if not padded:
        return (points * (full / low_array)).astype(np.float32)
    scale = np.min(low_array / full)
    return ((points - (low_array - full * scale) / 2) / scale).astype(np.float32)


def pixel_box(
    box: tuple[int, ...] | None,
    low: tuple[float, float],
    size: tuple[float, float],
    *,
    padded: bool,
) -> tuple[np.ndarray, str]:
    """A listed box in pixels of the image of ``size``, inside it, and what was wrong with it.

    Returns:
        float32 [4], x1, y1, x2, y2, which hold a pixel at least; and ``""``, ``"clamped"``, or
        ``"missing"`` or ``"empty"``, where the box is the whole image.

    Example:
        >>> pixel_box((5, 4, 30, 99), (40, 60), (40, 60), padded=False)
        (array([ 5.,  4., 30., 60.], dtype=float32), 'clamped')
        >>> pixel_box((9, 4, 9, 20), (40, 60), (40, 60), padded=False)[1]
        'empty'
    """
    whole = np.array([0, 0, *size], np.float32)
    if box is None:
        return whole, "missing"
    corners = to_pixels(np.array(box).reshape(2, 2), low, size, padded=padded).reshape(4)
    clamped = np.clip(corners, 0, np.tile(whole[2:], 2))
    if not (clamped[0] < clamped[2] and clamped[1] < clamped[3]):
        return whole, "empty"
    return clamped, "" if np.abs(corners - clamped).max() < 1 else "clamped"
