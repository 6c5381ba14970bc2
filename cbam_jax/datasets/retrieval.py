"""What every dataset is opened as: columns in memory, encoded images by random access."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from cbam_jax import InputError


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


def decode_image(encoded: bytes, *, name: str = "an image") -> np.ndarray:
    """Decodes an image file (JPEG, PNG, WebP, and whatever else OpenCV reads).

    Greyscale is repeated to three channels and CMYK converted. JPEGs are turned as their EXIF
    orientation says, so boxes are in pixels of the turned image. Transparent pixels of PNG and WebP
    are laid over white, as shops show cut-out products; dropping alpha would show the hidden
    colour. 16-bit channels are reduced to 8.

    Args:
        encoded: the bytes of the file.
        name: what the error message calls the image.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        InputError: the bytes are not a complete image.

    Example:
        >>> import cv2, numpy as np
        >>> encoded = cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes()
        >>> decode_image(encoded).shape
        (4, 6, 3)
    """
    flag = cv2.IMREAD_UNCHANGED if _may_be_transparent(encoded) else cv2.IMREAD_COLOR_RGB
    image = _decode(encoded, flag)
    if image is None:
        raise InputError(
            f"{name} cannot be decoded ({len(encoded)} bytes): replace the file, "
            "or prepare the dataset with on_bad_image='skip'"
        )
    return _over_white(image) if flag == cv2.IMREAD_UNCHANGED else image


def is_decodable(encoded: bytes) -> bool:
    """Whether :func:`decode_image` would succeed, several times faster for a JPEG.

    The whole file is read, so truncation is found, but pixels are reconstructed at an eighth of the
    resolution; in full only where that fails, as it does for images of less than 8 px.
    """
    flags = (cv2.IMREAD_REDUCED_COLOR_8, cv2.IMREAD_COLOR_RGB)
    return any(_decode(encoded, flag) is not None for flag in flags)


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
    image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA).astype(np.float32)
    color, alpha = image[..., :3], image[..., 3:] / np.float32(255)
    return np.rint(color * alpha + 255 * (1 - alpha)).astype(np.uint8)
