"""A training image: a random part of it, mirrored, in other colours, with a rectangle erased."""

import math
from typing import Any

import cv2
import numpy as np

from cbam_jax.data.images import Part, cut_part, image_box, image_name, part_of
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.preprocessing import Preprocessing


def train_image(
    dataset: RetrievalDataset,
    index: int,
    rng: np.random.Generator,
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    crop_to_box: bool,
    flip: bool,
    color_jitter: float,
    random_erasing: float,
    resize: str = "crop",
    **geometry: Any,
) -> np.ndarray:
    """One image, augmented as :func:`train_batches` says, uint8 [s, s, 3].

    ``geometry`` is of ``Preprocessing``. What is cropped at random already is squashed.

    Raises:
        InputError: the image cannot be read, or its box holds no pixel.
    """

    name = image_name(dataset, index)
    whole = part_of(image_box(dataset, index, crop_to_box), name)

    def part(height: int, width: int) -> Part:
        top, left, height, width = whole(height, width)
        crop = random_crop(rng, height, width, scale=crop_scale, ratio=crop_ratio)
        return top + crop[0], left + crop[1], *crop[2:]

    resize = "squash" if resize == "crop" else resize
    preprocessing = Preprocessing(image_size, resize=resize, **geometry)
    image = cut_part(dataset.encoded(index), preprocessing, part=part, name=name)
    return augment(image, rng, flip=flip, color_jitter=color_jitter, random_erasing=random_erasing)


def augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    flip: bool,
    color_jitter: float,
    random_erasing: float,
) -> np.ndarray:
    """Mirror, change the colours of and erase from one image, as :func:`train_batches` says.

    Args:
        image: uint8 [h, w, 3].
        rng: drawn from in the order of the arguments.

    Returns:
        uint8 [h, w, 3].
    """
    if flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if color_jitter:
        image = jitter_colors(rng, image, strength=color_jitter)
    if random_erasing and rng.random() < random_erasing:
        image = erase_rectangle(rng, image)
    return image


def random_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Part:
    """A rectangle of random area and aspect: torchvision's RandomResizedCrop.

    The area is uniform in ``scale`` times the image's, width / height is log-uniform in ``ratio``
    and the place is uniform. When ten such rectangles do not fit, it is the greatest in the centre
    whose aspect lies in ``ratio``.

    Returns:
        top, left, height and width in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    # At least one pixel: for a sliver, rounding could give none.
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def jitter_colors(rng: np.random.Generator, image: np.ndarray, *, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation by random factors, in random order.

    Each factor f is uniform in [max(0, 1 - strength), 1 + strength] and blends f x + (1 - f) y,
    where y is 0 for brightness, the image's mean grey for contrast and the pixel's grey for
    saturation (torchvision's ColorJitter without hue; grey is 0.299 R + 0.587 G + 0.114 B).
    Every step rounds to uint8.

    Args:
        rng: draws the order, then a factor a step.
        image: uint8 [h, w, 3].
        strength: at least 0.

    Returns:
        uint8 [h, w, 3].
    """
    for step in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if step == 2:
            grey = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
            image = cv2.addWeighted(image, factor, grey, 1 - factor, 0)
        else:
            other = (0, grey.mean())[step]
            table = np.rint(factor * np.arange(256) + (1 - factor) * other)
            image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
    return image


def erase_rectangle(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Replace a rectangle by uniform noise (Zhong et al., "Random Erasing", 2020).

    Its area is 2 to 33 % of the image's and its height / width log-uniform in [0.3, 3.3], as in
    torchvision. The image comes back unchanged when ten such rectangles do not fit.

    Args:
        rng: draws the rectangle, then the noise.
        image: uint8 [h, w, 3].

    Returns:
        uint8 [h, w, 3].
    """
    height, width, channels = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            image = image.copy()
            noise = rng.integers(256, size=(tall, wide, channels), dtype=np.uint8)
            image[top : top + tall, left : left + wide] = noise
            break
    return image
