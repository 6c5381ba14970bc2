"""Pictures of clothes, drawn: any one of them from four numbers, in a few milliseconds.

A garment is cut (:mod:`cbam_jax.datasets.garments.shapes`), dyed and laid flat on a canvas of twice
the image's size. A view then bends, turns and places it, in front of a plain background (a shop's
photo) or a cluttered one (a customer's), behind occluders, in some light. The colours and the
textile are drawn before, and independently of, the category's own numbers: only the cut tells one
category from another.
"""

from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np

from cbam_jax.datasets.garments.scene import compose, extent, grey_to_rgb
from cbam_jax.datasets.garments.shapes import CUTS, Shape
from cbam_jax.datasets.garments.textiles import Style, make_style, weave

CATEGORIES = tuple(CUTS)
DOMAINS = ("shop", "consumer")

_NEUTRAL = 160  # the grey of the fold map that leaves a colour as it is


@dataclass(frozen=True)
class _Flat:
    """A garment laid flat: colours, zero outside, and its coverage as a fourth channel."""

    rgba: np.ndarray  # uint8 [canvas, canvas, 4]
    size: np.ndarray  # width and height of the garment as a fraction of the canvas


def draw_garment(
    *,
    seed: int,
    category: str,
    item: int,
    view: int,
    image_size: int = 128,
    clutter: float = 0.5,
    domain: str | None = None,
) -> dict[str, Any]:
    """Draws one view of one item.

    The picture is a function of the arguments alone. ``item`` settles the cut, the colours and the
    textile, ``view`` the pose, the camera, the light and the scene; neither ``clutter`` nor
    ``domain`` changes the garment's cut, pose or textile. Bytes may differ between versions of
    NumPy and OpenCV.

    Args:
      seed: the world; another seed gives other items.
      category: one of ``CATEGORIES``.
      item: number of the item in its category, from 0.
      view: number of the view of the item, from 0.
      image_size: side of the square image in pixels, at least 32.
      clutter: 0 (plain background, nothing in front) to 1 (heavy); only "consumer" uses it.
      domain: "shop", "consumer", or None: even views are of the shop, odd ones of a consumer.

    Returns:
      ``image`` uint8 ``[s, s, 3]`` RGB; ``mask`` bool ``[s, s]``, where the garment is seen;
      ``bbox`` float32 ``[4]``, the mask's extent ``x1, y1, x2, y2`` in pixels, ends exclusive;
      ``category``, ``domain`` and ``textile``.

    Raises:
      ValueError: for an unknown category or domain, or a number out of its range.

    >>> drawn = draw_garment(seed=0, category="dress", item=3, view=1, image_size=64)
    >>> drawn["image"].shape, drawn["image"].dtype, drawn["domain"]
    ((64, 64, 3), dtype('uint8'), 'consumer')
    >>> x1, y1, x2, y2 = drawn["bbox"].astype(int)
    >>> bool(drawn["mask"][y1:y2, x1:x2].sum() == drawn["mask"].sum())
    True
    """
    domain = DOMAINS[view % 2] if domain is None else domain
    _check(category, domain, item, view, image_size, clutter)
    number = CATEGORIES.index(category)
    cut = _generator(seed, number, item)
    pose, camera, scene = (_generator(seed, number, item, view, k) for k in range(3))
    style = make_style(cut)
    flat = _lay_flat(CUTS[category](cut, pose), style, 2 * image_size)
    rgba = _photograph(flat, camera, image_size, domain)
    image, mask = compose(rgba, scene, domain, clutter if domain == "consumer" else 0.0)
    return {
        "image": image, "mask": mask, "bbox": extent(mask),
        "category": category, "domain": domain, "textile": style.textile,
    }  # fmt: skip


def _check(category, domain, item, view, image_size, clutter) -> None:
    if category not in CUTS:
        raise ValueError(f"category {category!r} is none of {', '.join(CATEGORIES)}")
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is neither 'shop' nor 'consumer'")
    if not 0.0 <= clutter <= 1.0:
        raise ValueError(f"clutter {clutter} is not in [0, 1]")
    if image_size < 32:
        raise ValueError(f"image_size {image_size} is below 32 pixels")
    if item < 0 or view < 0:
        raise ValueError(f"item {item} or view {view} is negative")


def _generator(seed: int, *key: int) -> np.random.Generator:
    # As spawn_key, not as entropy: entropy is padded with zeros, so (1, 2) and (1, 2, 0) are equal.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _lay_flat(shapes: list[Shape], style: Style, canvas: int) -> _Flat:
    """Draws the shapes in order, then multiplies the colours with the folds."""
    points = np.concatenate([s.points for s in shapes if s.paint != "fold"])
    low, high = points.min(0), points.max(0)
    unit = 0.94 * canvas / (high - low).max()
    offset = canvas / 2 - unit * (low + high) / 2
    colour = np.zeros((canvas, canvas, 3), np.uint8)
    cover = np.zeros((canvas, canvas), np.uint8)
    folds = np.full((canvas // 2, canvas // 2), _NEUTRAL, np.uint8)
    for shape in shapes:
        # cv2 takes sixteenths of a pixel (shift=4), so that edges are smooth.
        at = np.rint((shape.points * unit + offset) * 16).astype(np.int32)
        if shape.paint == "fold":
            _crease(folds, at, shape, unit)
        elif shape.stroke:
            _stitch(colour, cover, at, shape, style, unit)
        else:
            _patch(colour, cover, folds, at, shape, style)
    shade = cv2.resize(cv2.GaussianBlur(folds, (0, 0), canvas / 128), (canvas, canvas))
    shade = cv2.multiply(shade, cover, scale=1 / 255)
    colour = cv2.multiply(colour, grey_to_rgb(shade), scale=1 / _NEUTRAL)
    # The camera samples this canvas; unfiltered, its edges would come out as stairs.
    rgba = cv2.GaussianBlur(cv2.merge([colour, cover]), (3, 3), 0)
    return _Flat(rgba, (high - low) * unit / canvas)


def _crease(folds: np.ndarray, at: np.ndarray, shape: Shape, unit: float) -> None:
    if shape.stroke:
        width = max(1, round(shape.stroke * unit / 2))
        cv2.polylines(folds, [at // 2], False, _NEUTRAL * shape.tone, width, shift=4)
    else:
        cv2.fillPoly(folds, [at // 2], _NEUTRAL * shape.tone, shift=4)


def _stitch(colour, cover, at: np.ndarray, shape: Shape, style: Style, unit: float) -> None:
    """A line: a seam in a darker shade of the garment, or a cord, a trim, an edge."""
    seam = shape.paint == "seam"
    ink = style.colours["main"] * 0.5 if seam else style.colours[shape.paint] * shape.tone
    width = max(1, round(shape.stroke * unit))
    cv2.polylines(colour, [at], False, ink.clip(0, 255).tolist(), width, cv2.LINE_AA, 4)
    if not seam:
        cv2.polylines(cover, [at], False, 255, width, cv2.LINE_AA, 4)


def _patch(colour, cover, folds, at: np.ndarray, shape: Shape, style: Style) -> None:
    """One piece of cloth: its textile, its place in the cover, a soft edge in the folds."""
    cv2.fillPoly(cover, [at], 255, cv2.LINE_AA, 4)
    cv2.fillPoly(folds, [at // 2], _NEUTRAL * shape.tone, shift=4)
    edge = max(1, round(0.011 * cover.shape[0]))
    cv2.polylines(folds, [at // 2], True, 0.66 * _NEUTRAL * shape.tone, edge, shift=4)
    if shape.paint != "main" or style.textile == "plain":
        cv2.fillPoly(colour, [at], style.colours[shape.paint].tolist(), shift=4)
        return
    x, y, width, height = cv2.boundingRect(at // 16)
    x, y, right, bottom = max(x, 0), max(y, 0), x + width + 1, y + height + 1
    part = colour[y:bottom, x:right]
    piece = np.zeros(part.shape[:2], np.uint8)
    cv2.fillPoly(piece, [at - (16 * x, 16 * y)], 255, shift=4)
    box = (x, y, part.shape[1], part.shape[0])
    cv2.copyTo(weave(style, shape.angle, box, colour.shape[0]), piece, part)


def _photograph(flat: _Flat, rng: np.random.Generator, size: int, domain: str) -> np.ndarray:
    """Bends, turns, scales and places the garment. uint8 [size, size, 4], colours premultiplied."""
    canvas = flat.rgba.shape[0]
    shop = domain == "shop"
    turn = rng.normal(0, 0.05 if shop else 0.16)
    scale = rng.uniform(0.84, 0.98) if shop else rng.uniform(0.66, 1.0)
    room = np.maximum(1.0 - flat.size * scale, 0.0) / 2 + 0.01
    shift = rng.uniform(-1, 1, 2) * room * (0.5 if shop else 0.9) * canvas
    stretch = rng.normal(0, 0.02 if shop else 0.045)
    bend = rng.normal(0, 0.006 if shop else 0.016, (12, 12, 2)) * canvas
    bend = cv2.GaussianBlur(bend, (0, 0), 1.2) * 2.4
    # The grid reaches two cells beyond the picture, where cv2.resize repeats its border.
    axis = (np.arange(12) - 1.5) * canvas / 8 - canvas / 2
    grid = np.stack(np.meshgrid(axis, axis), axis=-1) - shift
    c, s = np.cos(turn) / scale, np.sin(turn) / scale
    inverse = np.array([[c, s], [-s, c]]) * (1 + stretch, 1 - stretch)
    coarse = (grid @ inverse.T + bend + canvas / 2).astype(np.float32)
    fine = cv2.resize(coarse, (canvas * 12 // 8, canvas * 12 // 8), interpolation=cv2.INTER_LINEAR)
    edge = canvas * 2 // 8
    source = fine[edge : edge + canvas, edge : edge + canvas]
    # cv2's stubs don't know that the second map may be None.
    placed = cv2.remap(flat.rgba, source, cast(Any, None), cv2.INTER_LINEAR, borderValue=0)
    return cv2.resize(placed, (size, size), interpolation=cv2.INTER_AREA)


def contact_sheet(
    *, seed: int = 0, items: int = 4, views: int = 3, image_size: int = 128, clutter: float = 0.5,
    domain: str | None = None, categories: tuple[str, ...] = CATEGORIES,
) -> np.ndarray:  # fmt: skip
    """One labelled row a category, ``items`` times ``views`` columns. uint8 RGB ``[h, w, 3]``.

    >>> contact_sheet(items=1, views=2, image_size=32, categories=("skirt", "coat")).shape
    (64, 160, 3)
    """
    rows = []
    for category in categories:
        label = np.full((image_size, 96, 3), 255, np.uint8)
        style: dict = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "fontScale": 0.42, "color": (0, 0, 0)}
        cv2.putText(label, category, (4, image_size // 2), **style, lineType=cv2.LINE_AA)
        options: dict = {"image_size": image_size, "clutter": clutter, "domain": domain}
        row = [
            draw_garment(seed=seed, category=category, item=item, view=view, **options)["image"]
            for item in range(items)
            for view in range(views)
        ]
        rows.append(np.concatenate([label, *row], axis=1))
    return np.concatenate(rows)
