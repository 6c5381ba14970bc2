"""Colours and textiles: what a garment is made of, and the wallpaper behind it."""

from dataclasses import dataclass

import cv2
import numpy as np

TEXTILES = ("plain", "stripes", "checks", "dots", "print", "melange")

_TILE = 64  # side of the repeated piece of textile, in pixels
_REPEATS = 7  # of the tile, enough for the canvas in any direction


@dataclass(frozen=True)
class Style:
    """An item's colours ("main", "second", "trim", ...) and its textile."""

    colours: dict[str, np.ndarray]
    textile: str
    cloth: np.ndarray  # uint8 [448, 448, 3]: a tile, seven times in both directions
    angle: float


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours as clothes have them: one in three a neutral, the others any hue. uint8 [n, 3]."""
    random = rng.random((count, 4))
    hsv = random[:, :3] * (180, 155, 175) + (0, 60, 60)
    neutral = random[:, 3] < 0.35
    hsv[neutral, 1] *= 0.2
    return cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0]


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """One of these, uint8 [3]."""
    return _colours(rng, 1)[0]


def _contrasting(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of four random colours the one that is furthest from the given one."""
    candidates = _colours(rng, 4)
    return candidates[np.abs(candidates.astype(int) - colour).sum(1).argmax()]


def make_style(rng: np.random.Generator) -> Style:
    """An item's colours, drawn at random, and its textile."""
    main = random_colour(rng)
    second, trim = _contrasting(main, rng), _contrasting(main, rng)
    colours = {
        "main": main, "second": second, "trim": trim, "button": trim,
        "lining": (0.45 * main + 20).astype(np.uint8), "metal": np.array((196, 190, 176), np.uint8),
    }  # fmt: skip
    textile = str(rng.choice(TEXTILES, p=(0.3, 0.18, 0.16, 0.12, 0.16, 0.08)))
    angle = float(rng.choice((0.0, 0.0, np.pi / 2, np.pi / 4)))
    tile = _TEXTILES[textile](main, second, trim, rng)
    return Style(colours, textile, cv2.repeat(tile, _REPEATS, _REPEATS), angle)


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
            for petal in (turn, turn + 60, turn + 120)[: 3 if flower else 1]:
                cv2.ellipse(tile, centre, (size, size // 3), petal, 0, 360, colour.tolist(), -1)
            if flower:
                cv2.circle(tile, centre, 2, main.tolist(), -1)
    return tile


def _melange(main, second, trim, rng) -> np.ndarray:
    grain = cv2.resize(rng.random((_TILE, _TILE // 4), np.float32), (_TILE, _TILE))[..., None]
    return (main + (second.astype(np.float32) - main) * 0.45 * grain).astype(np.uint8)


_TEXTILES = {
    "plain": _plain, "stripes": _stripes, "checks": _checks,
    "dots": _dots, "print": _print, "melange": _melange,
}  # fmt: skip


def weave(style: Style, angle: float, box: tuple[int, int, int, int], canvas: int) -> np.ndarray:
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


def random_pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """Wallpaper, or cloth of the very kinds that garments are made of. uint8 [size, size, 3]."""
    main = random_colour(rng)
    kind = TEXTILES[rng.integers(len(TEXTILES))]
    tile = _TEXTILES[kind](main, _contrasting(main, rng), random_colour(rng), rng)
    return cv2.resize(np.tile(tile, (2, 2, 1)), (size, size), interpolation=cv2.INTER_AREA)
