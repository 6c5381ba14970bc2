"""Image files: what kind of file it is, how large, whether it is whole, and its pixels.

Photos are decoded by OpenCV, at a fraction of the size where less is needed. It reads transparency
and EXIF orientation of some formats and not of others, so files of other formats that may have one
of them are Pillow's, and the rule is the same for all: turned as EXIF says, laid over white.
"""

import contextlib
import functools
import io
import logging
import os
import struct
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.image_headers import (
    check_pixels,
    claimed_sizes,
    has_too_many_scans,
    holds_less_than_it_claims,
    image_format,
    is_packed_otherwise,
    keeps_coefficients,
    most_pixels,
    png_of_pixels_alone,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# What OpenCV tells of a damaged image names no file, and what is told here does.
if "OPENCV_LOG_LEVEL" not in os.environ:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

HEAD = 64  # bytes at the beginning of a file that tell its format
HEIC_REMEDY = "HEIC, which is read after pip install 'cbam_jax[heic]'"

_JPEG = b"\xff\xd8"
_AT_ONCE = 1 << 16  # Pixels that are converted at once, and laid over white in float32.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
# Bytes that decoding holds of a pixel, at most, as measured: three of the result, three of a copy
# that OpenCV makes of it, and the pixels as Pillow has them, or a decoder before it.
_USUAL = 8
_HELD = {
    "PNG": 10, "GIF": 8, "TIFF": 16, "HEIC": 16, "AVIF": 20, "WebP": 20, "JPEG 2000": 28,
    "JPEG": 12, "PNM": 16, "Radiance": 16,
}  # fmt: skip
# Neither transparent nor turned, or both by OpenCV; None: of no known format.
_BY_OPENCV = (None, "JPEG", "PNM", "Radiance", "Sun raster")
# 16 bits and more a pixel, which Pillow keeps where OpenCV scales them to 8.
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# By reduction; each is IMREAD_REDUCED_COLOR_*, with RGB in place of BGR.
_COLOR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


def decode_image(encoded: bytes, *, name: str = "an image", reduction: int = 1) -> np.ndarray:
    """Decodes an image file: JPEG, PNG, WebP, AVIF, GIF, TIFF and others; HEIC with an extra.

    One rule for all formats: greyscale is repeated to three channels and CMYK converted; the image
    is turned as its EXIF orientation says, so boxes are in pixels of the turned image; transparent
    pixels are laid over white, as shops show cut-out products, where dropping alpha would show the
    hidden colour; 16-bit channels are reduced to 8; of an animation it is the first frame.

    Args:
        encoded: the bytes of the file.
        name: what the error message calls the image.
        reduction: 2, 4 or 8 to decode a JPEG at that fraction of its sides, rounded up, in 1/2 to
            1/4 of the time: libjpeg leaves out the frequencies that shrinking would remove. Other
            formats come in full size.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        InputError: the bytes are not a complete image, or HEIC without ``cbam_jax[heic]``, or
            claim more than 2**27 pixels (``$CBAM_JAX_MAX_PIXELS`` sets another limit), or fewer
            whose decoding would take as much memory, which are not decoded: see `affordable`.

    Example:
        >>> import cv2, numpy as np
        >>> encoded = cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes()
        >>> decode_image(encoded).shape
        (4, 6, 3)
    """
    check_pixels(_claimed_sizes(encoded), name, affordable(encoded, most_pixels()))
    image = None if _is_hollow(encoded) else _pixels(encoded, reduction)
    if image is None and not_installed(image_format(encoded)):
        raise InputError(f"{name} is {HEIC_REMEDY}")
    if image is None:
        raise InputError(
            f"{name} cannot be decoded ({len(encoded)} bytes): replace the file, or leave it out"
        )
    return image


def not_installed(kind: str | None) -> bool:
    """Whether a format is one that an extra would read."""
    return kind == "HEIC" and not _reads_heic()


def is_cut_off(file: BinaryIO) -> bool | None:
    """Whether an image file lacks its end, as half-copied ones do; None where only decoding tells.

    It costs a few short reads, at the beginning and at the end.

    >>> is_cut_off(io.BytesIO(b"GIF89a...;")), is_cut_off(io.BytesIO(b"GIF89a..."))
    (False, None)
    """
    head, size = _read_at(file, 0, HEAD), file.seek(0, os.SEEK_END)
    kind = image_format(head)
    if kind == "WebP":
        return size < int.from_bytes(head[4:8], "little") + 8
    if kind == "BMP":
        return size < int.from_bytes(head[2:6], "little")
    if kind in ("AVIF", "HEIC"):
        return _lacks_box(file, size)
    # Where something else stands at the end, another program may have added it.
    end = _ENDS.get(kind or "")
    return False if end and _read_at(file, max(size - len(end), 0), len(end)) == end else None


def _lacks_box(file: BinaryIO, size: int) -> bool | None:
    """Whether the boxes, each of which begins with its length, go on beyond the file's end."""
    place = 0
    while place < size:
        header = _read_at(file, place, 16)
        length = int.from_bytes(header[:4])
        if length == 1:  # the length follows, in eight bytes
            length = int.from_bytes(header[8:])
        if length < 8:  # 0: up to the end
            return None
        place += length
    return place > size


def _read_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of :func:`decode_image`'s result, read from a JPEG's headers in 3 us.

    None for what is no JPEG, or one whose headers are damaged.

    Example:
        >>> jpeg_size(cv2.imencode(".jpg", np.zeros((40, 30, 3), np.uint8))[1].tobytes())
        (40, 30)
    """
    if encoded[:2] != _JPEG:
        return None
    place, turned = 2, False
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker, length = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame, not a table
            height, width = struct.unpack_from(">HH", encoded, place + 5)
            return (width, height) if turned else (height, width)
        if marker == 0xE1:
            turned = turned or _exif_orientation(encoded[place + 4 : place + 2 + length]) >= 5
        place += 1 if marker == 0xFF else 2 + length  # 0xFF may be repeated as filler
    return None


def image_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of :func:`decode_image`'s result; None where it cannot be decoded.

    From the headers of a JPEG, and of what is neither turned nor transparent; else by decoding.

    >>> image_size(cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes())
    (4, 6)
    """
    size = jpeg_size(encoded)
    if size is None and not _may_need_more(encoded):
        size = next(iter(claimed_sizes(encoded)), None)
    if size is None and is_decodable(encoded):
        height, width, _ = decode_image(encoded).shape
        size = height, width
    return size


def _exif_orientation(segment: bytes) -> int:
    """The orientation of a JPEG's EXIF segment, 1 to 8; from 5 on, height and width change places.

    1 where it has none.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(segment[6:10])
    if segment[:6] != b"Exif\0\0" or order is None:
        return 1
    tiff = segment[6:]
    with contextlib.suppress(struct.error):  # cut off
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112 and kind == 3 and number == 1:
                return value
    return 1


def is_decodable(encoded: bytes) -> bool:
    """Whether :func:`decode_image` would succeed, several times faster for a JPEG.

    The whole file is read, so truncation is found, but pixels are reconstructed at an eighth of the
    resolution; in full only where that fails, as it does for images of less than 8 px.
    """
    try:
        check_pixels(_claimed_sizes(encoded), "an image", affordable(encoded, most_pixels()))
    except InputError:
        return False
    reductions = (8, 1) if encoded[:2] == _JPEG else (1,)
    return not _is_hollow(encoded) and any(
        _pixels(encoded, reduction) is not None for reduction in reductions
    )


def _is_hollow(encoded: bytes) -> bool:
    """Whether a JPEG or PNG has fewer bytes than any of its size, or a JPEG goes over it for ever.

    Or a TIFF is compressed as nothing here reads.

    A JPEG's block of 8 x 8 pixels takes a bit at least, of Huffman's code; what is not there would
    be decoded as grey.
    """
    size = jpeg_size(encoded)
    if size is None:
        return holds_less_than_it_claims(encoded) or is_packed_otherwise(encoded)
    return size[0] * size[1] > 1024 * len(encoded) or has_too_many_scans(encoded, *size)


def affordable(encoded: bytes, most: int) -> int:
    """How many pixels of a file's kind take no more memory to decode than ``most`` usual ones.

    As many, of nearly all photos. Pixels with transparency take more, and decoders that keep
    all they read, in numbers of more than a byte, take more still.

    >>> affordable(cv2.imencode(".jpg", np.zeros((4, 6, 3), np.uint8))[1].tobytes(), 1000)
    1000
    >>> affordable(cv2.imencode(".png", np.zeros((4, 6, 4), np.uint8))[1].tobytes(), 1000)
    800
    """
    kind = image_format(encoded[:HEAD])
    # Of a WebP of several frames the canvas is kept.
    moves = encoded[12:16] == b"VP8X" and int.from_bytes(encoded[20:21]) & 0x02
    usual = kind in ("PNG", "WebP") and not (moves or _may_need_more(encoded))
    usual = usual or (kind == "JPEG" and not keeps_coefficients(encoded))
    return most if usual else most * _USUAL // _HELD.get(kind or "", _USUAL)


def _claimed_sizes(encoded: bytes) -> Iterable[tuple[int, int]]:
    size = jpeg_size(encoded)
    return claimed_sizes(encoded) if size is None else (size,)


def _pixels(encoded: bytes, reduction: int) -> np.ndarray | None:
    """The image, uint8 [h, w, 3], or None where the bytes are no complete one."""
    image = None
    if _may_need_more(encoded):
        try:
            image = _by_pillow(encoded)
        except Exception:  # Of a damaged file Pillow's readers raise errors of any kind.
            return None
    return _by_opencv(encoded, reduction) if image is None else image


def _may_need_more(encoded: bytes) -> bool:
    """Whether a file may be transparent or turned in a way that OpenCV does not serve."""
    kind = image_format(encoded)
    if kind == "PNG" and len(encoded) > 25:
        # Colour types 4 and 6 have alpha; any other may have it in a chunk, and type 3 often does.
        return encoded[25] in (4, 6) or b"tRNS" in encoded or b"eXIf" in encoded
    if kind == "WebP" and len(encoded) > 24:
        # Flags of alpha and EXIF in the extended header, one of alpha in the lossless one.
        extended, lossless = encoded[12:16] == b"VP8X", encoded[12:16] == b"VP8L"
        return bool(extended and encoded[20] & 0x18) or bool(lossless and encoded[24] & 0x10)
    return kind not in _BY_OPENCV


def _by_pillow(encoded: bytes) -> np.ndarray | None:
    """The image by the one rule; None where OpenCV reads it and Pillow does not, or less well."""
    from PIL import Image, ImageOps, UnidentifiedImageError  # Late: few files need it.

    _reads_heic()
    if image_format(encoded) == "PNG" and _ENDS["PNG"] not in encoded:
        raise ValueError("cut off, which Pillow does not mind near the end")
    try:
        opened = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        return None
    with opened:
        if opened.mode in _DEEP:
            return None
        ImageOps.exif_transpose(opened, in_place=True)
        return _over_white(opened)


@functools.cache
def _reads_heic() -> bool:
    """Let Pillow read HEIC, where the extra is installed, and keep its remarks to itself."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Of tags that nobody here reads.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _by_opencv(encoded: bytes, reduction: int) -> np.ndarray | None:
    if image_format(encoded[:HEAD]) == "PNG":
        encoded = png_of_pixels_alone(encoded) or b""
    if not encoded:  # OpenCV asserts instead of returning None
        return None
    flag = _COLOR[reduction if encoded[:2] == _JPEG else 1]
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
    except cv2.error:  # e.g. a header that claims more pixels than OpenCV allows
        return None


def _over_white(image: "Image") -> np.ndarray:
    """Pillow's image, uint8 [h, w, 3]; by strips, since each conversion makes a copy."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    result = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _AT_ONCE // image.width)
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        part = np.asarray(strip.convert(mode))
        result[start : start + rows] = _laid_over_white(part) if mode == "RGBA" else part
    return result


def _laid_over_white(part: np.ndarray) -> np.ndarray:
    part = part.astype(np.float32)
    color, alpha = part[..., :3], part[..., 3:] / np.float32(255)
    return np.rint(color * alpha + 255 * (1 - alpha))
