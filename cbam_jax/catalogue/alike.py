"""Why two photos are alike to a model: each with the heat of where their similarity comes from.

The heat is `gradcam.pair_maps`', of what the model sees of each photo: its box, cut and resized as
the model's preprocessing says. The photos are shown in the same cut, at a size to be looked at.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from cbam_jax import InputError

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

_SIDE = 448  # Pixels of a picture's side, about: a multiple of the model's own.


class Photo(NamedTuple):
    """A photo's file, and the part of it that is meant: ``x1, y1, x2, y2``, None: all of it."""

    content: bytes
    box: Sequence[float] | None = None
    name: str = "the photo"


class Alike(NamedTuple):
    """Two photos, uint8 [s, s, 3], and the heat of each, float32 [s, s] in [0, 1].

    Heat is all zero where nothing stands out, as between a photo and itself.
    """

    query: np.ndarray
    result: np.ndarray
    query_heat: np.ndarray
    result_heat: np.ndarray

    @property
    def empty(self) -> bool:
        """Whether no place of either stands out."""
        return not (self.query_heat.any() or self.result_heat.any())


def pair_heat(embedder: "Embedder", query: Photo, result: Photo) -> Alike:
    """Return where either of two photos is like the other, by a model.

    The programs are compiled the first time, which takes seconds.

    Raises:
        InputError: a photo cannot be decoded, its box holds no pixel, or the model is a program.
    """
    from cbam_jax import gradcam  # Late, as it loads what computes.

    model, side = embedder.model, embedder.preprocessing.image_size
    if not hasattr(model, "features"):
        raise InputError(
            "a program has no maps to look at: give the model it was exported from, --model=RUN"
        )
    inputs = [model.preprocess(_cut(embedder, p, side)[None]) for p in (query, result)]
    heats = [np.asarray(maps.heat[0]) for maps in gradcam.pair_maps(model, *inputs)]
    larger = max(1, round(_SIDE / side)) * side
    pictures = [_cut(embedder, photo, larger) for photo in (query, result)]
    size = (larger, larger)
    return Alike(*pictures, *(cv2.resize(h, size, interpolation=cv2.INTER_LINEAR) for h in heats))


def overlaid(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A photo, uint8 [h, w, 3], with its heat [h, w] laid over it: blue for 0, red for 1.

    Where the heat is all zero it is the photo, in paler colours.

    >>> overlaid(np.full((1, 2, 3), 200, np.uint8), np.float32([[0, 1]]))[0].argmax(axis=-1)
    array([2, 0])
    """
    if not heat.any():
        return image // 2 + 128
    levels = np.rint(255 * heat).astype(np.uint8)
    color = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(image, 0.5, color, 0.5, 0)


def _cut(embedder: "Embedder", photo: Photo, side: int) -> np.ndarray:
    from cbam_jax.data import cut_file

    geometry = dataclasses.replace(embedder.preprocessing, image_size=side)
    return cut_file(photo.content, geometry, box=photo.box, name=photo.name)
