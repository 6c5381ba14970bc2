"""Pictures of clothes, drawn: any one of them from four numbers, in a few milliseconds.

A garment is cut (:mod:`cbam_jax.datasets.garment_shapes`), dyed and laid flat on a canvas of twice
the image's size. A view then bends, turns and places it, in front of a plain background (a shop's
photo) or a cluttered one (a customer's), behind occluders, in some light. The colours and the
textile are drawn before, and independently of, the category's own numbers: only the cut tells one
category from another.
"""

from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np

from cbam_jax.datasets.garment_shapes import CUTS, Shape

CATEGORIES = tuple(CUTS)
TEXTILES = ("plain", "stripes", "checks", "dots", "print", "melange")
DOMAINS = ("shop", "consumer")

_TILE = 64  # side of the repeated piece of textile, in pixels
_REPEATS = 7  # of the tile, enough for the canvas in any direction
_NEUTRAL = 160  # the grey of the fold map that leaves a colour as it is
_SKINS = ((236, 200, 178), (214, 168, 138), (160, 112, 82), (104, 70, 52))


@dataclass(frozen=True)
class _Style:
    """An item's colours ("main", "second", "trim", ...) and its textile."""

    colours: dict[str, np.ndarray]
    textile: str
    cloth: np.ndarray  # uint8 [448, 448, 3]: a tile, seven times in both directions
    angle: float


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
    style = _style(cut)
    flat = _lay_flat(CUTS[category](cut, pose), style, 2 * image_size)
    rgba = _photograph(flat, camera, image_size, domain)
    image, mask = _compose(rgba, scene, domain, clutter if domain == "consumer" else 0.0)
    return {
        "image": image, "mask": mask, "bbox": _extent(mask),
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


def _extent(mask: np.ndarray) -> np.ndarray:
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(x):
        return np.zeros(4, np.float32)
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], np.float32)


# ---------------------------------------------------------------------------------- the textile


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours as clothes have them: one in three a neutral, the others any hue. uint8 [n, 3]."""
    random = rng.random((count, 4))
    hsv = random[:, :3] * (180, 155, 175) + (0, 60, 60)
    neutral = random[:, 3] < 0.35
    hsv[neutral, 1] *= 0.2
    return cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0]


def _colour(rng: np.random.Generator) -> np.ndarray:
    return _colours(rng, 1)[0]


def _contrasting(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of four random colours the one that is furthest from the given one."""
    candidates = _colours(rng, 4)
    return candidates[np.abs(candidates.astype(int) - colour).sum(1).argmax()]


def _style(rng: np.random.Generator) -> _Style:
    main = _colour(rng)
    second, trim = _contrasting(main, rng), _contrasting(main, rng)
    colours = {
        "main": main, "second": second, "trim": trim, "button": trim,
        "lining": (0.45 * main + 20).astype(np.uint8), "metal": np.array((196, 190, 176), np.uint8),
    }  # fmt: skip
    textile = str(rng.choice(TEXTILES, p=(0.3, 0.18, 0.16, 0.12, 0.16, 0.08)))
    angle = float(rng.choice((0.0, 0.0, np.pi / 2, np.pi / 4)))
    tile = _TEXTILES[textile](main, second, trim, rng)
    return _Style(colours, textile, cv2.repeat(tile, _REPEATS, _REPEATS), angle)


def _plain(main, second, trim, rng) -> np.ndarray:
    return np.full((_TILE, _TILE, 3), main, np.uint8)


def _stripe_map(rng) -> np.ndarray:
    """0, 1 or 2, the colour of each row of a striped tile."""
    count, width = rng.choice((2, 3, 4, 6)), rng.uniform(0.2, 0.6)
    phase = (np.arange(_TILE) * count / _TILE) % 1.0
    stripes = (phase < width).astype(int)
    if rng.random() < 0.4:
        stripes[np.abs(phase - (1 + width) / 2) < 0.09] = 2
    return stripes


def _stripes(main, second, trim, rng) -> np.ndarray:
    rows = np.stack([main, second, trim])[_stripe_map(rng)]
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (_TILE, _TILE, 3)))


def _checks(main, second, trim, rng) -> np.ndarray:
    rows = np.stack([main, second, trim])[_stripe_map(rng)].astype(np.float32)
    return ((rows[:, None] + rows[None]) / 2).astype(np.uint8)


def _dots(main, second, trim, rng) -> np.ndarray:
    tile, step = _plain(main, second, trim, rng), int(rng.choice((16, 32)))
    radius = int(step * rng.uniform(0.16, 0.28) * 16)
    for y in range(0, _TILE + 1, step // 2):
        for x in range((y // (step // 2)) % 2 * step // 2, _TILE + 1, step):
            cv2.circle(tile, (x * 16, y * 16), radius, second.tolist(), -1, shift=4)
    return tile


def _print(main, second, trim, rng) -> np.ndarray:
    """Flowers or leaves, scattered; drawn nine times each so that the tile repeats."""
    tile, flower = _plain(main, second, trim, rng), rng.random() < 0.5
    for colour in (second, trim, second, trim):
        x, y = rng.integers(0, _TILE, 2)
        size, turn = int(rng.integers(6, 12)), rng.uniform(0, 180)
        for centre in [(x + i, y + j) for i in (-_TILE, 0, _TILE) for j in (-_TILE, 0, _TILE)]:
            cv2.ellipse(tile, centre, (size, size // 3), turn, 0, 360, colour.tolist(), -1)
            if flower:
                cv2.ellipse(tile, centre, (size, size // 3), turn + 60, 0, 360, colour.tolist(), -1)
                cv2.ellipse(
                    tile, centre, (size, size // 3), turn + 120, 0, 360, colour.tolist(), -1
                )
                cv2.circle(tile, centre, 2, main.tolist(), -1)
    return tile


def _melange(main, second, trim, rng) -> np.ndarray:
    grain = cv2.resize(rng.random((_TILE, _TILE // 4), np.float32), (_TILE, _TILE))[..., None]
    return (main + (second.astype(np.float32) - main) * 0.45 * grain).astype(np.uint8)


_TEXTILES = {
    "plain": _plain, "stripes": _stripes, "checks": _checks,
    "dots": _dots, "print": _print, "melange": _melange,
}  # fmt: skip


def _weave(style: _Style, angle: float, box: tuple[int, int, int, int], canvas: int) -> np.ndarray:
    """The textile, turned by ``angle``, on one rectangle (x, y, width, height) of the canvas."""
    x, y, width, height = box
    scale = 4 * _TILE / canvas
    c, s = scale * np.cos(angle + style.angle), scale * np.sin(angle + style.angle)
    turn = np.array([[c, s], [-s, c]])
    corners = turn @ ((x, x + width, x, x + width), (y, y, y + height, y + height))
    # Into the first tile. cv2.BORDER_WRAP on a single tile gives the same, three times slower.
    start = turn @ (x, y) - _TILE * np.floor(corners.min(1) / _TILE)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(style.cloth, np.column_stack([turn, start]), (width, height), flags=flags)


# ------------------------------------------------------------------------------- the flat garment


def _lay_flat(shapes: list[Shape], style: _Style, canvas: int) -> _Flat:
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
    colour = cv2.multiply(colour, _three(shade), scale=1 / _NEUTRAL)
    # The camera samples this canvas; unfiltered, its edges would come out as stairs.
    rgba = cv2.GaussianBlur(cv2.merge([colour, cover]), (3, 3), 0)
    return _Flat(rgba, (high - low) * unit / canvas)


def _crease(folds: np.ndarray, at: np.ndarray, shape: Shape, unit: float) -> None:
    if shape.stroke:
        width = max(1, round(shape.stroke * unit / 2))
        cv2.polylines(folds, [at // 2], False, _NEUTRAL * shape.tone, width, shift=4)
    else:
        cv2.fillPoly(folds, [at // 2], _NEUTRAL * shape.tone, shift=4)


def _stitch(colour, cover, at: np.ndarray, shape: Shape, style: _Style, unit: float) -> None:
    """A line: a seam in a darker shade of the garment, or a cord, a trim, an edge."""
    seam = shape.paint == "seam"
    ink = style.colours["main"] * 0.5 if seam else style.colours[shape.paint] * shape.tone
    width = max(1, round(shape.stroke * unit))
    cv2.polylines(colour, [at], False, ink.clip(0, 255).tolist(), width, cv2.LINE_AA, 4)
    if not seam:
        cv2.polylines(cover, [at], False, 255, width, cv2.LINE_AA, 4)


def _patch(colour, cover, folds, at: np.ndarray, shape: Shape, style: _Style) -> None:
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
    cv2.copyTo(_weave(style, shape.angle, box, colour.shape[0]), piece, part)


# ------------------------------------------------------------------------------------- the camera


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


def _compose(
    rgba: np.ndarray, rng: np.random.Generator, domain: str, clutter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Background, shadow, garment, occluders, light, and the camera's noise."""
    size = rgba.shape[0]
    shop = domain == "shop"
    background = _studio(rng, size) if shop else _room(rng, size, clutter)
    dx, dy = rng.uniform(-0.03, 0.03) * size, rng.uniform(0.01, 0.05) * size
    shadow = cv2.warpAffine(rgba[..., 3], np.array([[1, 0, dx], [0, 1, dy]]), (size, size))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.025 * size)
    strength = rng.uniform(0.15, 0.35) / 255
    cover = rgba[..., 3].astype(np.float32) / 255
    behind = _three((1 - strength * shadow.astype(np.float32)) * (1 - cover))
    image = cv2.multiply(background, behind) + rgba[..., :3]
    image, seen = _occlude(image, cover, rng, clutter)
    image = _light(image, rng, 0.2 if shop else 1.0)
    return _sensor(image, rng, shop), seen >= 0.5


def _three(grey: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def _studio(rng: np.random.Generator, size: int) -> np.ndarray:
    """Nearly white, a little darker towards the floor. float32 [size, size, 3]."""
    tint = rng.uniform(228, 252) + rng.uniform(-5, 5, 3)
    ramp = np.linspace(1.0, rng.uniform(0.93, 1.0), size, dtype=np.float32)
    ramp = ramp[:, None, None] * tint.astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(ramp, (size, size, 3)))


# -------------------------------------------------------------------------------------- the scene


def _room(rng: np.random.Generator, size: int, clutter: float) -> np.ndarray:
    """A wall and a floor with things in them; one even colour where clutter is 0."""
    wall = _paint(rng) * 0.55 + 100
    image = np.full((size, size, 3), wall, np.uint8)
    if clutter == 0.0:
        return image.astype(np.float32)
    _wall_and_floor(image, rng, clutter)
    for _ in range(rng.binomial(10, 0.15 + 0.75 * clutter)):
        _THINGS[rng.integers(len(_THINGS))](image, rng, size)
    blur = rng.uniform(0.004, 0.012) * size
    plain = np.full_like(image, wall)
    # Little clutter is also pale: the things fade into the wall.
    image = cv2.addWeighted(image, min(1.0, 0.4 + clutter), plain, max(0.0, 0.6 - clutter), 0)
    return cv2.GaussianBlur(image, (0, 0), blur).astype(np.float32)


def _wall_and_floor(image: np.ndarray, rng: np.random.Generator, clutter: float) -> None:
    size = image.shape[0]
    if rng.random() < 0.3 + 0.4 * clutter:
        image[:] = cv2.addWeighted(image, 0.6, _pattern(rng, size), 0.4, 0)
    horizon = int(rng.uniform(0.55, 0.95) * size)
    floor = _paint(rng) * 0.7 + 40
    image[horizon:] = floor
    for x in range(0, size * 2, max(4, size // 9)):
        foot = (int(2.2 * (x - size)) + size // 2, size)
        cv2.line(image, (x - size // 2, horizon), foot, (floor * 0.75).tolist(), 1)
    cv2.line(image, (0, horizon), (size, horizon), (floor * 0.6).tolist(), max(1, size // 48))


def _paint(rng: np.random.Generator) -> np.ndarray:
    """A colour as walls and furniture have them: duller than clothes. uint8 [3]."""
    colour = _colour(rng).astype(float)
    grey = colour.mean() * rng.uniform((0.9, 0.9, 0.8), (1.15, 1.0, 1.0))
    return (0.45 * colour + 0.55 * grey).clip(0, 255).astype(np.uint8)


def _pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """Wallpaper, or cloth of the very kinds that garments are made of. uint8 [size, size, 3]."""
    main = _colour(rng)
    kind = TEXTILES[rng.integers(len(TEXTILES))]
    tile = _TEXTILES[kind](main, _contrasting(main, rng), _colour(rng), rng)
    return cv2.resize(np.tile(tile, (2, 2, 1)), (size, size), interpolation=cv2.INTER_AREA)


def _frame(image, rng, size) -> None:
    """A picture, a window or a door."""
    x, y = rng.uniform(-0.1, 0.9, 2) * size
    width, height = rng.uniform(0.12, 0.4) * size, rng.uniform(0.15, 0.7) * size
    a, b = (int(x), int(y)), (int(x + width), int(y + height))
    cv2.rectangle(image, a, b, _paint(rng).tolist(), -1)
    cv2.rectangle(image, a, b, _paint(rng).tolist(), max(1, size // 40))


def _furniture(image, rng, size) -> None:
    """A slanted box: a bed, a shelf, a table."""
    centre, extent = rng.uniform(0, size, 2), rng.uniform(0.1, 0.4, 2) * size
    corners = cv2.boxPoints((centre.tolist(), extent.tolist(), rng.normal(0, 25))).astype(np.int32)
    colour = _paint(rng)
    cv2.fillPoly(image, [corners], colour.tolist())
    cv2.polylines(image, [corners], True, (colour * 0.6).tolist(), max(1, size // 64))


def _cloth(image, rng, size) -> None:
    """A heap of some other textile."""
    angles = np.linspace(0, 2 * np.pi, 9, endpoint=False)
    radius = rng.uniform(0.1, 0.28) * size * rng.uniform(0.6, 1.3, 9)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = rng.uniform(0, size, 2) + radius[:, None] * circle
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 255)
    cv2.copyTo(_pattern(rng, size), mask, image)


def _plant(image, rng, size) -> None:
    """Leaves from one stem."""
    x, y = (rng.uniform(0, size, 2)).astype(int).tolist()
    green = np.array((60, 110, 60)) + rng.uniform(-35, 35, 3)
    for turn in rng.uniform(0, 360, 7):
        axes = (int(rng.uniform(0.06, 0.16) * size), int(0.03 * size))
        c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
        centre = (int(x + axes[0] * c), int(y + axes[0] * s))
        cv2.ellipse(image, centre, axes, turn, 0, 360, (green * rng.uniform(0.7, 1.2)).tolist(), -1)


def _lamp(image, rng, size) -> None:
    """Something round."""
    x, y = rng.uniform(0, size, 2).astype(int).tolist()
    axes = (rng.uniform(0.05, 0.18, 2) * size).astype(int).tolist()
    cv2.ellipse(image, (x, y), axes, 0, 0, 360, _colour(rng).tolist(), -1)


_THINGS = (_frame, _furniture, _cloth, _plant, _lamp)


# ----------------------------------------------------------------------- occluders, light, sensor


def _occlude(image, alpha, rng: np.random.Generator, clutter: float):
    """Puts hands, bags and bars in front; returns the image and what is still seen of alpha."""
    size = image.shape[0]
    box = _extent(alpha > 0.5)
    for _ in range(rng.binomial(3, 0.7 * clutter)):
        layer = np.zeros_like(alpha, np.uint8)
        colours = np.zeros_like(image)
        _OCCLUDERS[rng.integers(len(_OCCLUDERS))](layer, colours, rng, box, size)
        cover = layer.astype(np.float32) / 255
        image = cv2.multiply(image, _three(1 - cover)) + cv2.multiply(colours, _three(cover))
        alpha = alpha * (1 - cover)
    return image, alpha


def _border_point(rng, box: np.ndarray) -> np.ndarray:
    """A place on the left, right or lower edge of the box."""
    x1, y1, x2, y2 = box
    side, t = rng.integers(3), rng.uniform(0.15, 0.95)
    if side == 2:
        return np.array([x1 + t * (x2 - x1), y2])
    return np.array([(x1, x2)[side], y1 + t * (y2 - y1)])


def _hand(layer, colours, rng, box, size) -> None:
    """A forearm that comes in from outside and four fingers."""
    tip = _border_point(rng, box)
    centre = (box[:2] + box[2:]) / 2
    along = (centre - tip) / max(np.hypot(*(centre - tip)), 1e-6)
    tip, across = tip + along * 0.06 * size, np.array((-along[1], along[0]))
    colours[:] = (np.array(_SKINS[rng.integers(4)]) * rng.uniform(0.85, 1.05)).clip(0, 255)
    wide = 0.045 * size
    wrist = tip - along * 0.08 * size
    _thick(layer, wrist, wrist - along * size, wide * 1.5)
    _thick(layer, wrist, tip - along * 0.03 * size, wide * 1.9)
    for k in range(4):
        start = tip - along * 0.03 * size + across * (k - 1.5) * wide * 0.55
        _thick(layer, start, start + along * rng.uniform(0.03, 0.07) * size, wide * 0.5)


def _thick(layer, start, end, width) -> None:
    a, b = np.rint(start * 16).astype(int).tolist(), np.rint(end * 16).astype(int).tolist()
    cv2.line(layer, a, b, 255, max(1, round(width)), cv2.LINE_AA, 4)


def _bag(layer, colours, rng, box, size) -> None:
    """A handbag: a rounded body, a flap, and a handle."""
    x, y = np.rint(_border_point(rng, box)).astype(int).tolist()
    w, h = np.rint(rng.uniform((0.09, 0.07), (0.15, 0.12)) * size).astype(int).tolist()
    colour = _colour(rng)
    colours[:] = colour
    cv2.ellipse(
        layer, (x, y - h), (w * 2 // 3, h), 0, 180, 360, 255, max(1, size // 36), cv2.LINE_AA
    )
    cv2.rectangle(layer, (x - w, y - h // 2), (x + w, y + h), 255, -1)
    cv2.ellipse(layer, (x, y - h // 2), (w, h // 2), 0, 0, 360, 255, -1, cv2.LINE_AA)
    cv2.ellipse(layer, (x, y + h), (w, h // 4), 0, 0, 360, 255, -1, cv2.LINE_AA)
    cv2.ellipse(colours, (x, y - h // 2), (w, h), 0, 0, 180, (colour * 0.75).tolist(), -1)
    cv2.circle(colours, (x, y + h // 2), max(1, size // 50), (200, 190, 150), -1)


def _bar(layer, colours, rng, box, size) -> None:
    """A rail, a pole or the edge of a door."""
    colours[:] = _paint(rng)
    t, tilt, width = rng.uniform(0.1, 0.9), rng.normal(0, 0.08), rng.uniform(0.02, 0.07) * size
    tilt *= size
    if rng.random() < 0.6:
        x = box[0] + t * (box[2] - box[0])
        _thick(layer, np.array([x - tilt, -9]), np.array([x + tilt, size + 9]), width)
    else:
        y = box[1] + t * (box[3] - box[1])
        _thick(layer, np.array([-9, y - tilt]), np.array([size + 9, y + tilt]), width)


_OCCLUDERS = (_hand, _hand, _bag, _bag, _bar)


def _light(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Gain, a ramp in some direction, and a colour temperature."""
    size = image.shape[0]
    gain = np.exp(rng.normal(-0.02, 0.12 * strength))
    warmth, slope = rng.normal(0, 0.07 * strength), rng.normal(0, 0.14 * strength, 2)
    at = np.linspace(-1, 1, size, dtype=np.float32)
    ramp = (gain * (1 + slope[0] * at[:, None] + slope[1] * at)).astype(np.float32)
    return cv2.multiply(image, cv2.merge([ramp * (1 + warmth), ramp, ramp * (1 - warmth)]))


def _sensor(image: np.ndarray, rng: np.random.Generator, shop: bool) -> np.ndarray:
    """Rounds to bytes; a consumer's photo is also blurred, noisy and compressed."""
    if shop:
        return np.clip(image, 0, 255).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9) * image.shape[0] / 128)
    # The difference of two random bytes: nearly normal, of deviation 104.5, and quickly drawn.
    random = np.frombuffer(rng.bytes(2 * image.size), np.uint8).reshape(2, *image.shape)
    noise = cv2.subtract(random[0], random[1], dtype=cv2.CV_32F)
    image = cv2.scaleAdd(noise, rng.uniform(1, 6) / 104.5, image)
    return _compressed(np.clip(image, 0, 255).astype(np.uint8), int(rng.integers(45, 90)))


def _compressed(image: np.ndarray, quality: int) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


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
        cv2.putText(
            label,
            category,
            (4, image_size // 2),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.42,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
        options: dict = {"image_size": image_size, "clutter": clutter, "domain": domain}
        row = [
            draw_garment(seed=seed, category=category, item=item, view=view, **options)["image"]
            for item in range(items)
            for view in range(views)
        ]
        rows.append(np.concatenate([label, *row], axis=1))
    return np.concatenate(rows)
