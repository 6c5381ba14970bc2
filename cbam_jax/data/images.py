"""One image as a model expects it: its part cut out, resized, its centre; uint8 throughout.

The one place where images are cut for evaluation, whether they come from a dataset
(:func:`eval_image`), from a file (:func:`cut_file`) or as pixels (:func:`cut_pixels`).

Images are decoded by OpenCV (:func:`cbam_jax.datasets.decode_image`): on photos of 400 x 533 pixels
it is three times as fast as Pillow, with the same pixels, and a tenth slower than simplejpeg, which
reads JPEG only (``benchmarks/decode.py``). Where a JPEG is shrunk to less than half anyway, it is
decoded at 1/2, 1/4 or 1/8 (:func:`decode_resized`).
"""

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax import InputError
from cbam_jax.datasets import RetrievalDataset, decode_image, jpeg_size
from cbam_jax.preprocessing import Preprocessing

Part = tuple[int, int, int, int]  # top, left, height and width in pixels
_LONGEST = 16  # Long side over short side, of what is resized before its centre is cut out.


def eval_image(
    dataset: RetrievalDataset,
    index: int,
    *,
    crop_to_box: bool = False,
    **geometry: Any,
) -> np.ndarray:
    """One image as :func:`eval_batches` delivers it, uint8 [s, s, 3].

    ``geometry`` is ``image_size`` and, where they are not the default, other fields of
    :class:`cbam_jax.preprocessing.Preprocessing`.

    Raises:
        InputError: the image cannot be read, or its box holds no pixel.
    """
    name, box = image_name(dataset, index), image_box(dataset, index, crop_to_box)
    return cut_file(dataset.encoded(index), Preprocessing(**geometry), box=box, name=name)


def cut_file(
    encoded: bytes,
    preprocessing: Preprocessing,
    *,
    box: ArrayLike | None = None,
    name: str = "an image",
) -> np.ndarray:
    """One image file as a model expects it.

    Args:
        encoded: the bytes of the file.
        preprocessing: how it is cut and resized.
        box: x1, y1, x2, y2 in pixels of the decoded image; only what is inside is used. None: all.
        name: what the error message calls the image.

    Returns:
        uint8 [s, s, 3], s = ``preprocessing.image_size``.

    Raises:
        InputError: the image cannot be decoded, or its box holds no pixel.
    """
    part = _seen_of(box, name, preprocessing)
    return cut_part(encoded, preprocessing, part=part, name=name)


def cut_part(
    encoded: bytes,
    preprocessing: Preprocessing,
    *,
    part: Callable[[int, int], Part],
    name: str,
) -> np.ndarray:
    """As :func:`cut_file`, of a part of the image that is chosen by its height and width."""
    size = functools.partial(_fit, preprocessing)
    interpolation = preprocessing.interpolation
    image = decode_resized(encoded, part=part, size=size, interpolation=interpolation, name=name)
    return _squared(image, preprocessing)


def cut_pixels(
    image: np.ndarray,
    preprocessing: Preprocessing,
    *,
    box: ArrayLike | None = None,
    name: str = "an image",
) -> np.ndarray:
    """As :func:`cut_file`, of a decoded image, uint8 [h, w, 3] or, for a mask, [h, w].

    The pixels are those of ``cut_file`` but for a JPEG of more than twice the size, which that
    decodes at a fraction: of photos of 400 x 533 pixels the two differ by 1.4 to 2.2 grey levels in
    the mean at 48 to 160 pixels, and not at all at 224.

    Example:
        >>> cut_pixels(np.zeros((40, 30, 3), np.uint8), Preprocessing(14)).shape
        (14, 14, 3)
    """
    image = _cut(image, *_seen_of(box, name, preprocessing)(*image.shape[:2]))
    size = _fit(preprocessing, *image.shape[:2])
    return _squared(resize(image, *size, preprocessing.interpolation), preprocessing)


def eval_mask(
    dataset: RetrievalDataset,
    index: int,
    *,
    crop_to_box: bool = False,
    **geometry: Any,
) -> np.ndarray:
    """Where the garment is in :func:`eval_image`'s pixels, bool [s, s]; see ``dataset.mask``.

    A pixel belongs to it when at least half of what it was resized from does.

    Raises:
        InputError: as for :func:`eval_image`; also where the dataset has neither masks nor boxes.
    """
    mask = dataset.mask(index).astype(np.uint8) * np.uint8(255)
    name, box = image_name(dataset, index), image_box(dataset, index, crop_to_box)
    return cut_pixels(mask, Preprocessing(**geometry), box=box, name=name) >= 128


def decode_resized(
    encoded: bytes,
    *,
    part: Callable[[int, int], Part],
    size: Callable[[int, int], tuple[int, int]],
    interpolation: str = "bilinear",
    name: str = "an image",
) -> np.ndarray:
    """A part of an image, resized as :func:`resize` does, decoding no more than that needs.

    Where ``resize`` would halve the part of a JPEG once, twice or three times, the JPEG is decoded
    at 1/2, 1/4 or 1/8 instead, in 1/2 to 1/4 of the time: libjpeg leaves out the frequencies that
    the mean of 2 x 2 would suppress. The result is as near to the area average as by halving
    (benchmarks/decode.py). The part's edges are then rounded to pixels of the reduced image. What
    is resized bicubically is decoded whole.

    Args:
        encoded: the bytes of the file.
        part: height and width of the whole image -> the part, in its pixels.
        size: height and width of the part -> those of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        name: what the error message calls the image.

    Returns:
        uint8 [height, width, 3].

    Raises:
        InputError: the image cannot be decoded.

    Example:
        >>> jpeg = cv2.imencode(".jpg", np.full((400, 300, 3), 7, np.uint8))[1].tobytes()
        >>> part, size = lambda height, width: (8, 0, 96, width), lambda *_: (20, 60)
        >>> decode_resized(jpeg, part=part, size=size).shape
        (20, 60, 3)
    """
    whole = jpeg_size(encoded) if interpolation == "bilinear" else None
    if whole is not None:
        rectangle = part(*whole)
        reduction = _reduction(rectangle, size(*rectangle[2:]))
        image = decode_image(encoded, name=name, reduction=reduction)
        if image.shape[:2] == tuple(-(-side // reduction) for side in whole):
            image = _cut(image, *_reduced(rectangle, reduction))
            return resize(image, *size(*rectangle[2:]))
    # No JPEG, or one whose headers are not what OpenCV makes of them.
    image = decode_image(encoded, name=name)
    rectangle = part(*image.shape[:2])
    return resize(_cut(image, *rectangle), *size(*rectangle[2:]), interpolation)


def _reduction(part: Part, size: tuple[int, int]) -> int:
    """2 to the number of times that :func:`resize` would halve the part, at most 8."""
    height, width, reduction = *part[2:], 1
    while (
        reduction < 8
        and (height // (2 * reduction)) * (width // (2 * reduction)) > size[0] * size[1]
    ):
        reduction *= 2
    return reduction


def _reduced(part: Part, reduction: int) -> Part:
    """The part in pixels of the reduced image; edges are rounded to the nearest."""
    top, left, height, width = part
    edges = (top, left, top + height, left + width)
    top, left, bottom, right = ((edge + reduction // 2) // reduction for edge in edges)
    return top, left, bottom - top, right - left


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Bilinear, halved by the mean of 2 x 2 before while it has more than four pixels for one.

    Bilinear interpolation reads four pixels for one, so beyond that it would skip some (aliasing).
    Halving takes about a fifth of the time of OpenCV's INTER_AREA at other ratios, which costs more
    than decoding (benchmarks/decode.py). It leaves out a last odd row or column. Training and
    evaluation share this rule: features of differently resized images match less well.

    Args:
        image: uint8 [h, w, 3] or [h, w].
        height: of the result, in pixels.
        width: of the result, in pixels.
        interpolation: ``"bicubic"``: by Pillow, antialiased. OpenCV's bicubic skips pixels, and has
            another kernel than the one with which published models were trained.

    Returns:
        uint8 [height, width, 3] or [height, width].
    """
    if interpolation == "bicubic":
        from PIL import Image  # Late: few models need it.

        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized)
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    if rows * columns > height * width:
        halved = cv2.resize(
            image[: 2 * rows, : 2 * columns], (columns, rows), interpolation=cv2.INTER_AREA
        )
        return resize(halved, height, width)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def center_crop(image: np.ndarray, *, image_size: int, crop_fraction: float) -> np.ndarray:
    """Resize the short side to ``round(image_size / crop_fraction)``; cut out the centre.

    Args:
        image: uint8 [h, w, 3] or [h, w].
        image_size: side of the result, in pixels.
        crop_fraction: side of the result / short side of the resized image, in (0, 1].

    Returns:
        uint8 [image_size, image_size, 3] or [image_size, image_size].

    Example:
        >>> center_crop(np.zeros((40, 30, 3), np.uint8), image_size=14, crop_fraction=0.875).shape
        (14, 14, 3)
    """
    preprocessing = Preprocessing(image_size, crop_fraction)
    return _squared(resize(image, *_fit(preprocessing, *image.shape[:2])), preprocessing)


def _fit(preprocessing: Preprocessing, height: int, width: int) -> tuple[int, int]:
    """Height and width to which an image is resized before it is made a square."""
    size = preprocessing.image_size
    if preprocessing.resize == "squash":
        return size, size
    short, long = sorted((height, width))
    if preprocessing.floors:
        # As integers: no float may end just below a whole pixel.
        return preprocessing.short_side * height // short, preprocessing.short_side * width // short
    letterbox = preprocessing.resize == "letterbox"
    scale = size / long if letterbox else preprocessing.short_side / short
    return max(1, round(height * scale)), max(1, round(width * scale))


def _squared(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """A resized image [h, w, 3] or mask [h, w], its centre cut out, or on a border."""
    side = preprocessing.image_size
    if preprocessing.resize != "letterbox":
        return _centre(image, side)
    (height, width), color = image.shape[:2], np.array(preprocessing.pad_color, np.uint8)
    square = np.zeros((side, side, *image.shape[2:]), np.uint8)
    square[:] = color if image.ndim == 3 else 0  # No garment in a mask's border.
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _seen_of(
    box: ArrayLike | None, name: str, preprocessing: Preprocessing
) -> Callable[[int, int], Part]:
    """The part of an image that is resized: of a strip whose ends are cut away, the centre."""
    return (centre_of if preprocessing.resize == "crop" else part_of)(box, name)


def _centre(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    return _cut(image, (height - side) // 2, (width - side) // 2, side, side)


def _cut(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return image[top : top + height, left : left + width]


def image_name(dataset: RetrievalDataset, index: int) -> str:
    """What messages call an image."""
    return f"{dataset.id[index]} of {dataset.name}"


def image_box(dataset: RetrievalDataset, index: int, crop_to_box: bool) -> np.ndarray | None:
    """The box to cut out of an image, None for all of it."""
    return dataset.bbox[index] if crop_to_box and dataset.bbox is not None else None


def part_of(box: ArrayLike | None, name: str) -> Callable[[int, int], Part]:
    """Height and width of an image -> all of it, or what lies in its box, rounded outwards.

    A box that is missing, NaN throughout, is all of it.

    Raises:
        InputError: when called, for a box that holds no pixel.
    """

    def part(height: int, width: int) -> Part:
        corners = np.asarray(np.nan if box is None else box, np.float64)
        if np.isnan(corners).all():
            return 0, 0, height, width
        left, top = np.floor(np.clip(corners[:2], 0, (width, height)))
        right, bottom = np.ceil(np.clip(corners[2:], 0, (width, height)))
        if not (left < right and top < bottom):  # NaN is refused too
            raise InputError(
                f"{name}: the box {corners.tolist()} (x1, y1, x2, y2) holds no pixel of an image "
                f"of {width} x {height}; correct it or set crop_to_box=False"
            )
        return int(top), int(left), int(bottom - top), int(right - left)

    return part


def centre_of(box: ArrayLike | None, name: str) -> Callable[[int, int], Part]:
    """As :func:`part_of`; of a strip more than 16 times as long as wide the centre alone.

    What lies outside would be resized first and cut away then, whatever its size.
    """

    def part(height: int, width: int) -> Part:
        top, left, height, width = part_of(box, name)(height, width)
        longest = _LONGEST * min(height, width)
        rows, columns = min(height, longest), min(width, longest)
        return top + (height - rows) // 2, left + (width - columns) // 2, rows, columns

    return part
