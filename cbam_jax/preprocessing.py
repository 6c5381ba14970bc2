"""How an image is cut and scaled for a model: data that travels with the model, not code.

``cbam_jax.data`` does the cutting, on the host, and ``EmbeddingModel.preprocess`` the scaling, on
the device.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from cbam_jax import InputError
from cbam_jax.foreign_files import shown

# Mean and standard deviation of ImageNet's pixels in [0, 1], as torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZES = ("crop", "squash", "letterbox")
INTERPOLATIONS = ("bilinear", "bicubic")
# What scaling can be meant, of pixels in [0, 1]: a mean of 0 and a deviation of 1 / 255 undo that.
_MEANS, _DEVIATIONS = (0, 1), (0.001, 10)
_LONGEST = 1 << 14  # Pixels of a short side: of a strip's long one there are many times as many.
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a photo to a model's pixels.

    The photo is resized and cut or padded to a square, and pixels in [0, 1], less ``mean``, are
    divided by ``std``.

    Attributes:
        image_size: side of the square that the model sees, in pixels.
        crop_fraction: of ``"crop"`` alone: side of that square over the resized image's short side,
            in (0, 1].
        mean: of the pixels in [0, 1], by channel: red, green, blue.
        std: their standard deviation.
        resize: ``"crop"``: the short side becomes ``round(image_size / crop_fraction)`` pixels, and
            the central square is cut out. ``"squash"``: both sides become ``image_size``.
            ``"letterbox"``: the long side does, and what is missing is ``pad_color``, so that
            nothing is cut off.
        interpolation: ``"bilinear"``, after halving by the mean of 2 x 2 as often as that leaves
            more than is needed; or ``"bicubic"``, antialiased, as Pillow does it, for models that
            were trained with it.
        pad_color: red, green and blue of the border of ``"letterbox"``, each from 0 to 255.

    Raises:
        InputError: for a value out of range.

    >>> Preprocessing(224).short_side
    256
    """

    image_size: int
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "crop"
    interpolation: str = "bilinear"
    pad_color: tuple[int, ...] = (127, 127, 127)

    def __post_init__(self) -> None:
        """Check the values."""
        if type(self.image_size) is not int or self.image_size < 1:
            raise InputError(f"image_size={self.image_size}: give a positive number of pixels")
        if not 0 < self.crop_fraction <= 1:
            raise InputError(f"crop_fraction={self.crop_fraction}: give a fraction in (0, 1]")
        if self.image_size / self.crop_fraction > _LONGEST:
            raise InputError(
                f"image_size={self.image_size}, crop_fraction={self.crop_fraction}: photos would "
                f"be resized to more than {_LONGEST} pixels: give a smaller size, or a larger "
                "fraction"
            )
        try:
            checked_scaling(self.mean, self.std)
        except ValueError as error:
            raise InputError(str(error)) from error
        for name, choices in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in choices:
                value = repr(getattr(self, name))[:80]
                raise InputError(f"{name}={value}: choose one of {', '.join(choices)}")
        color = self.pad_color
        if len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
            raise InputError(
                f"pad_color={str(color)[:80]}: give red, green and blue, each from 0 to 255"
            )

    @property
    def short_side(self) -> int:
        """Pixels of the resized image's short side."""
        return round(self.image_size / self.crop_fraction)

    @property
    def floors(self) -> bool:
        """Whether the resized long side is cut off to whole pixels, not rounded.

        torchvision, timm and transformers do so, which moves the pixels of half of all photos, and
        ``"bicubic"`` with ``"crop"`` is theirs.
        """
        return (self.resize, self.interpolation) == ("crop", "bicubic")

    @property
    def version(self) -> int:
        """Of the code that decodes, cuts and scales: another where a file gives other pixels."""
        return _VERSION + self.floors

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them, of the latter three those that are not the default.

        So what was written before there were these is the same still.
        """
        latter = ("resize", "interpolation", "pad_color")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        fields = dataclasses.asdict(self)
        return {n: value for n, value in fields.items() if n not in latter or value != default[n]}

    @classmethod
    def from_dict(
        cls,
        fields: Mapping[str, Any],
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> "Preprocessing":
        """Read what ``to_dict`` gave; what else stands there, or is missing, changes nothing.

        Args:
            fields: as JSON has them.
            mean: that of the model, which the field has to be where it is given.
            std: likewise.

        Raises:
            InputError: for a field of another type, or a mean or deviation that is not the model's.
        """
        try:
            size, fraction = fields["image_size"], fields.get("crop_fraction", 0.875)
            if type(fraction) not in (int, float):
                raise TypeError("crop_fraction is no number")
            scaling = tuple(
                tuple(map(float, fields.get(n, ours))) for n, ours in (("mean", mean), ("std", std))
            )
            color = tuple(fields.get("pad_color", cls.pad_color))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"preprocessing {shown(repr(dict(fields)))} cannot be used ({shown(repr(error))})"
            ) from error
        if scaling != (mean, std):
            raise InputError(
                f"preprocessing with mean {shown(str(scaling[0]), 80)} and std "
                f"{shown(str(scaling[1]), 80)}: the model expects {mean} and {std}"
            )
        resize = fields.get("resize", cls.resize)
        interpolation = fields.get("interpolation", cls.interpolation)
        return cls(size, fraction, mean, std, resize, interpolation, color)


def checked_scaling(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a mean and a deviation by channel, of pixels in [0, 1], as numbers.

    Raises:
        ValueError: they are not three numbers each, of 0 to 1 and of 0.001 to 10.

    >>> checked_scaling([0, 0.5, 1], (1, 1, 1))
    ((0.0, 0.5, 1.0), (1.0, 1.0, 1.0))
    """
    for name, given, (least, most) in (("mean", mean, _MEANS), ("std", std, _DEVIATIONS)):
        listed = given if isinstance(given, list | tuple) else ()
        if len(listed) != 3 or not all(_is_within(number, least, most) for number in listed):
            raise ValueError(
                f"{name}={shown(repr(given), 80)}: give three numbers from {least} to {most}"
            )
    return tuple(map(float, mean)), tuple(map(float, std))


def _is_within(number: Any, least: float, most: float) -> bool:
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    return real and least <= number <= most  # pyright: ignore[reportOperatorIssue]


def check_images(images: Any) -> None:
    """Raise ValueError, one line with the remedy, unless images are uint8 RGB [b, h, w, 3].

    >>> import numpy as np
    >>> check_images(np.zeros((2, 3, 8, 8), np.uint8))
    Traceback (most recent call last):
    ValueError: images are uint8 [2, 3, 8, 8], expected uint8 RGB [b, h, w, 3]: move the channels \
last, transpose(0, 2, 3, 1)
    """
    shape, dtype = tuple(getattr(images, "shape", ())), str(getattr(images, "dtype", type(images)))
    if len(shape) == 4 and shape[-1] == 3 and dtype == "uint8":
        return
    if len(shape) == 4 and shape[1] == 3 and shape[-1] != 3:
        remedy = "move the channels last, transpose(0, 2, 3, 1)"
    elif len(shape) == 3:
        remedy = "add the batch axis, images[None]"
    elif len(shape) == 4 and shape[-1] == 3:
        remedy = "give pixels from 0 to 255 as uint8; floats in [0, 1] are multiplied by 255 first"
    else:
        remedy = "give a batch of RGB images of one size"
    raise ValueError(f"images are {dtype} {list(shape)}, expected uint8 RGB [b, h, w, 3]: {remedy}")
