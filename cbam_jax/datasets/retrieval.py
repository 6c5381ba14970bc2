"""What every dataset is opened as: columns in memory, encoded images by random access."""

import contextlib
import dataclasses
import struct
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.image_headers import check_pixels, claimed_sizes


@dataclasses.dataclass(frozen=True)
class RetrievalDataset:
    """One split of an image retrieval dataset: its columns, and its images by random access.

    Two images are *similar* when their ``label`` is equal. Evaluation searches each image of
    ``is_query`` among the images of ``is_gallery``. The object can be pickled, so worker processes
    read images themselves.

    Attributes:
        name: the dataset, as it was asked for.
        split: the split, as it was asked for.
        label: int32 [n], ``0 <= label < len(label_names)``. A split need not hold every label.
        label_names: the name of each label.
        id: str [n], unique; for files, the path.
        is_query: bool [n].
        is_gallery: bool [n].
        item: int64 [n], equal for images of one product; None when the dataset has none.
        series: int64 [n], equal for images of one shoot of a product; None likewise.
        bbox: float32 [n, 4], ``x1, y1, x2, y2`` of the garment in pixels of the decoded image;
            None likewise.
        images: ``images[index]`` is the encoded file of an image.
        masks: ``masks[index]`` is the encoded file of an image's mask, grey, of the decoded image's
            size, and at least 128 where the garment is seen; None when the dataset has none.
    """

    name: str
    split: str
    label: np.ndarray
    label_names: tuple[str, ...]
    id: np.ndarray
    is_query: np.ndarray
    is_gallery: np.ndarray
    item: np.ndarray | None
    series: np.ndarray | None
    bbox: np.ndarray | None
    images: Sequence[bytes] = dataclasses.field(repr=False)
    masks: Sequence[bytes] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.label)

    def encoded(self, index: int) -> bytes:
        """The encoded file (JPEG, PNG, WebP) of one image.

        Raises:
            InputError: a file that was there when the dataset was opened cannot be read.
        """
        return self.images[int(index)]

    def image(self, index: int) -> np.ndarray:
        """One decoded image, uint8 [h, w, 3], RGB; see :func:`decode_image`.

        Raises:
            InputError: names the image and the remedy.
        """
        return decode_image(self.encoded(index), name=f"{self.id[index]} of {self.name}")

    def mask(self, index: int) -> np.ndarray:
        """Where the garment is, bool [h, w]: the dataset's mask, or else the pixels of its box.

        A pixel on the edge of the box belongs to it; none does where the box is missing (NaN).

        Raises:
            InputError: the dataset has neither, or the file cannot be read.
        """
        if self.masks is not None:
            encoded, name = self.masks[int(index)], f"the mask of {self.id[index]} of {self.name}"
            return decode_image(encoded, name=name)[..., 0] >= 128
        if self.bbox is None:
            raise InputError(
                f"{self.name} has neither masks nor boxes to tell where the garment is: use a "
                "dataset that has, such as synthetic_garments or a CSV with x1,y1,x2,y2"
            )
        mask = np.zeros(self.image(index).shape[:2], bool)
        box = self.bbox[index]
        if not np.isnan(box).any():
            left, top = np.floor(np.maximum(box[:2], 0)).astype(int)
            right, bottom = np.ceil(np.maximum(box[2:], 0)).astype(int)
            mask[top:bottom, left:right] = True
        return mask


_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_AT_ONCE = 1 << 20  # Pixels that are computed with in float32, of a large image.


# By reduction; each is IMREAD_REDUCED_COLOR_*, with RGB in place of BGR.
_COLOR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


def decode_image(encoded: bytes, *, name: str = "an image", reduction: int = 1) -> np.ndarray:
    """Decodes an image file (JPEG, PNG, WebP, and whatever else OpenCV reads).

    Greyscale is repeated to three channels and CMYK converted. JPEGs are turned as their EXIF
    orientation says, so boxes are in pixels of the turned image. Transparent pixels of PNG and WebP
    are laid over white, as shops show cut-out products; dropping alpha would show the hidden
    colour. 16-bit channels are reduced to 8.

    Args:
        encoded: the bytes of the file.
        name: what the error message calls the image.
        reduction: 2, 4 or 8 to decode a JPEG at that fraction of its sides, rounded up, in 1/2 to
            1/4 of the time: libjpeg leaves out the frequencies that shrinking would remove. Other
            formats come in full size.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        InputError: the bytes are not a complete image, or claim more than 2**27 pixels
            (``$CBAM_JAX_MAX_PIXELS`` sets another limit), which are not decoded.

    Example:
        >>> import cv2, numpy as np
        >>> encoded = cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes()
        >>> decode_image(encoded).shape
        (4, 6, 3)
    """
    check_pixels(_claimed_sizes(encoded), name)
    flag = _COLOR[reduction if encoded[:2] == _JPEG else 1]
    if _may_be_transparent(encoded):
        flag = cv2.IMREAD_UNCHANGED
    image = None if _is_hollow(encoded) else _decode(encoded, flag)
    if image is None:
        raise InputError(
            f"{name} cannot be decoded ({len(encoded)} bytes): replace the file, or leave it out "
            "(of a dataset with on_bad_image='skip')"
        )
    return _over_white(image) if flag == cv2.IMREAD_UNCHANGED else image


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
        check_pixels(_claimed_sizes(encoded), "an image")
    except InputError:
        return False
    return not _is_hollow(encoded) and any(
        _decode(encoded, _COLOR[reduction]) is not None for reduction in (8, 1)
    )


def _is_hollow(encoded: bytes) -> bool:
    """Whether a JPEG has fewer bytes than any of its size: the rest would be decoded as grey.

    A block of 8 x 8 pixels takes a bit at least, of Huffman's code.
    """
    size = jpeg_size(encoded)
    return size is not None and size[0] * size[1] > 1024 * len(encoded)


def _claimed_sizes(encoded: bytes) -> Iterable[tuple[int, int]]:
    size = jpeg_size(encoded)
    return claimed_sizes(encoded) if size is None else (size,)


def _decode(encoded: bytes, flag: int) -> np.ndarray | None:
    if not encoded:  # OpenCV asserts instead of returning None
        return None
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
    except cv2.error:  # e.g. a header that claims more pixels than OpenCV allows
        return None


def _may_be_transparent(encoded: bytes) -> bool:
    # PNG: colour types 4 and 6 have alpha, type 3 a palette that may have it. WebP: a flag in VP8X,
    # a bit in VP8L.
    if encoded[:8] == _PNG and len(encoded) > 25:
        return encoded[25] in (3, 4, 6)
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" and len(encoded) > 24:
        extended, lossless = encoded[12:16] == b"VP8X", encoded[12:16] == b"VP8L"
        return bool(extended and encoded[20] & 0x10) or bool(lossless and encoded[24] & 0x10)
    return False


def _over_white(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        image = (image // 257).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    result = np.empty((*image.shape[:2], 3), np.uint8)
    rows = max(1, _AT_ONCE // image.shape[1])
    for start in range(0, len(image), rows):
        part = cv2.cvtColor(image[start : start + rows], cv2.COLOR_BGRA2RGBA).astype(np.float32)
        color, alpha = part[..., :3], part[..., 3:] / np.float32(255)
        result[start : start + rows] = np.rint(color * alpha + 255 * (1 - alpha))
    return result
