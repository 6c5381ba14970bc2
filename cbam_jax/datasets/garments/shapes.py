"""The cut of clothes as polygons: one function a category, from random numbers to shapes.

A garment is a list of :class:`Shape`, drawn in order. Coordinates are in half shoulder widths,
x to the right and y downwards, with the neck (or the waist of trousers and skirts) at the origin.
Two streams of random numbers enter: ``cut`` belongs to the item (lengths, widths, neckline,
details) and is the same in every view of it; ``pose`` belongs to the view (arms, legs, folds).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """A filled polygon or, where ``stroke`` is positive, a line of that width.

    ``paint`` is "main", "second" or "trim" (the item's textile and its two other colours),
    "lining" (the inside), "seam" (a thin darker line) or "fold" (soft shading only).
    ``angle`` turns the textile with the limb, in radians; ``tone`` scales the brightness.
    """

    points: np.ndarray  # [n, 2]
    paint: str = "main"
    angle: float = 0.0
    tone: float = 1.0
    stroke: float = 0.0


@dataclass(frozen=True)
class Torso:
    """The outline of a bodice and the places where other parts are sewn on."""

    outline: np.ndarray
    neckline: np.ndarray
    neck: np.ndarray
    shoulder: np.ndarray
    armpit: np.ndarray
    hem: np.ndarray


@functools.cache
def _catmull_rom(count: int) -> np.ndarray:
    """The matrix that samples the spline through ``count`` points, six times a segment."""
    t = np.linspace(0.0, 1.0, 6, endpoint=False)
    basis = [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]
    matrix = np.zeros((6 * (count - 1) + 1, count + 2))
    for k in range(count - 1):
        matrix[6 * k : 6 * k + 6, k : k + 4] = 0.5 * np.stack(basis, axis=1)
    matrix[-1, count] = 1
    # The neighbours that the first and the last point lack are their reflections: 2 p0 - p1.
    ends = np.eye(count + 2, count, k=-1)
    ends[0, :2], ends[-1, -2:] = (2, -1), (-1, 2)
    return matrix @ ends


def curve(*points: tuple[float, float] | np.ndarray) -> np.ndarray:
    """A smooth line [n, 2] through the points (Catmull-Rom spline).

    >>> curve((0, 0), (1, 1), (2, 0))[[0, 6, 12]].tolist()
    [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]
    """
    return _catmull_rom(len(points)) @ np.array(points, float)


def mirrored(half: np.ndarray) -> np.ndarray:
    """Closes the right half of an outline with its mirror image."""
    return np.concatenate([half, half[::-1] * (-1, 1)])


def both_sides(points: np.ndarray, **options) -> list[Shape]:
    """The shape on the right and its mirror image on the left."""
    return [Shape(points, **options), Shape(points * (-1, 1), **options)]


def _across(half: np.ndarray) -> np.ndarray:
    """The line from the right end of ``half``, which begins in the middle, to the left one."""
    return np.concatenate([half[::-1], half * (-1, 1)])


def _sewn_on(points: np.ndarray, paint: str, *, tone=1.0, stroke=0.03) -> list[Shape]:
    """A piece of cloth on both sides, and the seam around it."""
    cloth = both_sides(points, paint=paint, tone=tone)
    return cloth + both_sides(points, paint="seam", stroke=stroke)


def _neckline(kind: str, width: float, depth: float) -> np.ndarray:
    if kind == "v":
        return curve((0, depth), (width * 0.6, depth * 0.48), (width, 0))
    if kind == "square":
        return curve((0, depth), (width * 0.5, depth), (width * 0.86, depth * 0.94), (width, 0))
    t = np.linspace(0, np.pi / 2, 9)
    return np.stack([width * np.sin(t), depth * np.cos(t)], axis=1)


def _torso(
    *, neck=0.42, depth=0.3, slope=0.25, shoulder=1.0, chest=0.95, armpit=1.0, waist=0.9, hem=0.95,
    length=2.7, kind="crew", sag=0.06, inset=0.1, middle=0.5,
) -> Torso:  # fmt: skip
    """A bodice: neckline, shoulder, armhole, side, hem, and the other half."""
    neckline = _neckline(kind, neck, depth)
    armhole = curve(
        (shoulder, slope),
        (min(shoulder, chest) - inset, 0.45 * slope + 0.55 * armpit),
        (chest, armpit),
    )
    side = curve((chest, armpit), (waist, armpit + middle * (length - armpit)), (hem, length))
    bottom = curve((hem, length), (hem * 0.55, length + 0.75 * sag), (0, length + sag))
    outline = mirrored(np.concatenate([neckline, armhole, side, bottom]))
    points = [
        np.array(p, float) for p in [(neck, 0), (shoulder, slope), (chest, armpit), (hem, length)]
    ]
    return Torso(outline, _across(neckline), *points)


def _back_of_neck(torso: Torso, depth: float) -> Shape:
    x, y = torso.neck
    top = curve((-x, y), (-x * 0.6, y + 0.07), (0, y + 0.1), (x * 0.6, y + 0.07), (x, y))
    return Shape(np.concatenate([top, [(x, depth + 0.05), (-x, depth + 0.05)]]), "lining")


def _bodice(torso: Torso, pose, depth: float, paint: str = "main") -> list[Shape]:
    folds = _folds(pose, torso.armpit[0] * 0.8, torso.armpit[1] * 1.1, torso.hem[1], count=4)
    return [_back_of_neck(torso, depth), Shape(torso.outline, paint), *folds]


def _folds(
    pose: Rng, width: float, top: float, bottom: float, *, count: int, flare=1.0
) -> list[Shape]:
    """Soft folds that widen between two heights, a light one beside each dark one."""
    shapes = []
    for x in pose.uniform(-width, width, count):
        lean, start, end = pose.uniform((-0.2, 0.0, 0.7), (0.2, 0.45, 1.0))
        y = top + (bottom - top) * np.array([start, (start + end) / 2, end])
        wide = pose.uniform(0.06, 0.14)
        line = curve((x, y[0]), (x * (1 + flare) / 2 + lean, y[1]), (x * flare + lean / 2, y[2]))
        for tone, shift in ((1.14, wide), (0.76, -wide)):
            shapes.append(_wedge(line, shift, tone))
    return shapes


def _wedge(line: np.ndarray, width: float, tone: float) -> Shape:
    """A fold along a line: nothing at its start, ``width`` wide (to the right) at its end."""
    edge = line + np.linspace(0, 1, len(line))[:, None] * (width, 0)
    return Shape(np.concatenate([line, edge[::-1]]), "fold", tone=tone)


def _band(a: np.ndarray, b: np.ndarray, depth: np.ndarray, paint: str, angle=0.0) -> list[Shape]:
    """A ribbed band from a to b, ``depth`` deep: cuffs and hems of knitwear."""
    band = Shape(np.stack([a, b, b + depth, a + depth]), paint, angle, tone=0.93)
    at = np.linspace(0, 1, 2 + int(np.hypot(*(b - a)) / 0.16))[1:-1, None]
    ribs = [Shape(np.stack([p, p + depth]), "seam", stroke=0.02) for p in a + at * (b - a)]
    return [band, *ribs]


def _hem_band(width: float, top: float, depth: float, paint: str) -> list[Shape]:
    left, right = np.array((-width, top)), np.array((width, top))
    return _band(left, right, np.array((0, depth)), paint)


def _sleeves(torso: Torso, pose: Rng, **form) -> list[Shape]:
    """Two sleeves, each at its own angle from the vertical; ``form`` is :func:`_sleeve`'s."""
    return _sleeve(torso, pose, -1, **form) + _sleeve(torso, pose, 1, **form)


def _sleeve(
    torso: Torso, pose: Rng, side: int, *,
    length: float, cuff: float, angle: float, paint="main", band="", rib=0.22,
) -> list[Shape]:  # fmt: skip
    """The sleeve of one side, -1 or 1; ``band`` is the paint of its cuff, if any."""
    start = (torso.shoulder + torso.armpit) / 2
    reach = np.hypot(*(torso.shoulder - torso.armpit)) / 2
    upper = angle + pose.uniform(-0.16, 0.2)
    lower = upper + (pose.uniform(-0.3, 0.25) if length > 1.2 else 0.0)
    down, out = _directions(upper)
    down2, out2 = _directions(lower)
    elbow = start + down * length * 0.5
    wrist = elbow + down2 * length * 0.5
    wide = 0.52 * reach + 0.5 * cuff
    outer = curve(torso.shoulder, elbow + out * wide, wrist + out2 * cuff)
    inner = curve(wrist - out2 * cuff, elbow - out * wide, torso.armpit)
    inside = [(0.7 * torso.armpit[0], torso.armpit[1]), (0.7 * torso.shoulder[0], 0.3)]
    flip, grain = np.array((side, 1.0)), -side * (upper + lower) / 2
    shapes = [Shape(np.concatenate([outer, inner, inside]) * flip, paint, grain)]
    for at in pose.uniform(0.25, 0.9, 3) if length > 1.2 else ():
        fold = start + down * length * at
        end = fold + out * wide * pose.uniform(-0.3, 0.8)
        line = curve(fold - out * wide, fold + down * 0.06, end)
        shapes.append(Shape(line * flip, "fold", tone=0.74, stroke=0.08))
    if band:
        corner = (wrist + out2 * cuff * 1.06) * flip, (wrist - out2 * cuff * 1.06) * flip
        return shapes + _band(*corner, depth=-down2 * rib * flip, paint=band, angle=grain)
    hem = np.stack([wrist + out2 * cuff, wrist - out2 * cuff]) - down2 * 0.1
    return [*shapes, Shape(hem * flip, "seam", stroke=0.025)]


def _directions(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Along a limb and across it, for a limb that hangs at ``angle`` from the vertical."""
    along = np.array((np.sin(angle), np.cos(angle)))
    return along, np.array((along[1], -along[0]))


def _legs(pose: Rng, *, top=0.0, rise=1.1, **form) -> list[Shape]:
    """Two legs from the waist down, and the seam between them; ``form`` is :func:`_leg`'s."""
    legs = [shape for side in (-1, 1) for shape in _leg(pose, side, top=top, rise=rise, **form)]
    middle = curve((0, top), (0.02, top + rise * 0.6), (0, top + rise))
    return [*legs, Shape(middle, "seam", stroke=0.03)]


def _leg(
    pose: Rng, side: int, *, top: float, rise: float,
    waist=0.8, hip=1.0, length=3.4, knee=0.42, ankle=0.34, spread=0.08,
) -> list[Shape]:  # fmt: skip
    """The leg of one side, -1 or 1, spread by the pose, with creases at crotch and knee."""
    along, across = _directions(spread + pose.uniform(-0.05, 0.12))
    start = np.array((hip * 0.52, top + rise))
    middle, end = start + along * length * 0.45, start + along * length
    outer = curve(
        (waist, top), (hip, top + 0.6 * rise), middle + across * knee, end + across * ankle
    )
    inner = curve(end - across * ankle, middle - across * knee, (0.03, top + rise))
    outline = np.concatenate([outer, inner, [(-0.04, top + rise - 0.1), (-0.04, top)]])
    flip, grain = np.array((side, 1.0)), -side * np.arctan2(along[0], along[1])
    crotch = curve((0.02, top + rise), (0.2, top + rise + 0.12), (hip * 0.6, top + rise + 0.05))
    shapes = [Shape(outline * flip, "main", grain)]
    shapes += [Shape(crotch * flip, "fold", tone=0.7, stroke=0.09)]
    for at in pose.uniform(0.3, 0.95, 3):
        fold = start + along * length * at
        line = curve(fold - across * knee, fold + along * 0.1, fold + across * knee * 0.4)
        shapes.append(Shape(line * flip, "fold", tone=pose.choice((0.75, 1.15)), stroke=0.08))
    if length > 2:
        crease = np.stack([start + along * 0.4, end - along * 0.1])
        shapes.append(Shape(crease * flip, "fold", tone=1.15, stroke=0.14))
    hem = np.stack([end + across * ankle, end - across * ankle]) - along * 0.1
    return [*shapes, Shape(hem * flip, "seam", stroke=0.025)]


def _waistband(width: float, top: float, depth: float, paint: str) -> list[Shape]:
    upper = curve((-width, top), (0, top + 0.05), (width, top))
    lower = curve(
        (width * 1.04, top + depth), (0, top + depth + 0.05), (-width * 1.04, top + depth)
    )
    inside = curve((-width, top), (0, top - 0.05), (width, top))
    back = np.concatenate([inside, upper[::-1]])
    return [
        Shape(back, "lining"),
        Shape(np.concatenate([upper, lower]), paint, tone=0.94),
        Shape(lower, "seam", stroke=0.03),
    ]


def _disc(x: float, y: float, radius: float, paint: str) -> Shape:
    t = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    return Shape(np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1), paint)


def _buttons(x: float, top: float, bottom: float, count: int) -> list[Shape]:
    return [_disc(x, y, 0.05, "button") for y in np.linspace(top, bottom, count)]


def _pocket(x: float, y: float, width: float, height: float, paint="main") -> list[Shape]:
    corners = [(-1, 0), (1, 0), (1, 0.75), (0.6, 1), (-0.6, 1), (-1, 0.75), (-1, 0)]
    points = np.array(corners) * (width / 2, height) + (x, y)
    return _seamed(points, paint, tone=0.95)


def _seamed(points: np.ndarray, paint="main", *, tone=1.0, stroke=0.03) -> list[Shape]:
    """A piece of cloth and the seam around it."""
    return [Shape(points, paint, tone=tone), Shape(points, "seam", stroke=stroke)]


def _slit(*points: tuple[float, float]) -> list[Shape]:
    """The opening of a pocket on both hips."""
    return both_sides(curve(*points), paint="seam", stroke=0.045)


def _collar(neck: float, depth: float, spread: float, drop: float, paint: str) -> list[Shape]:
    """Two pointed leaves of a shirt collar around the neck."""
    leaf = np.concatenate(
        [
            curve((0.02, depth), (neck * 0.65, depth * 0.35), (neck * 0.98, -0.1)),
            curve((neck * 0.5, -0.2), (0, -0.17))[:1],
            curve(
                (neck + 0.1, 0.04),
                (neck * 0.95 + spread, drop * 0.55),
                (spread + 0.1, depth + drop),
            ),
        ]
    )
    stand = curve((-neck, -0.08), (0, -0.2), (neck, -0.08))
    inside = np.concatenate([stand, [(neck, 0.1), (0, depth), (-neck, 0.1)]])
    return [
        Shape(inside, "lining"),
        *_sewn_on(leaf, paint),
    ]


def _armholes(torso: Torso) -> list[Shape]:
    """The seam between sleeve and bodice."""
    (x, y), (chest, armpit) = torso.shoulder, torso.armpit
    seam = curve((x, y), (min(x, chest) - 0.1, 0.45 * y + 0.55 * armpit), (chest, armpit))
    return both_sides(seam, paint="seam", stroke=0.03)


def _sleeved(torso: Torso, pose: Rng, depth: float, **sleeves) -> list[Shape]:
    """A bodice with a neckline of that depth, and :func:`_sleeves`."""
    return _sleeves(torso, pose, **sleeves) + _bodice(torso, pose, depth) + _armholes(torso)


def _neckband(torso: Torso, paint: str, width: float) -> Shape:
    return Shape(torso.neckline, paint, tone=0.9, stroke=width)


def _emblem(cut, y: float) -> list[Shape]:
    """A picture on the chest, of some items only."""
    kind, size = cut.integers(5), cut.uniform(0.22, 0.42)
    if kind == 0:
        return [_disc(0, y, size, "second")]
    if kind == 1:
        t = np.linspace(0, 2 * np.pi, 11)[:-1]
        radius = size * np.where(np.arange(10) % 2, 0.5, 1.1)
        return [Shape(np.stack([radius * np.sin(t), y - radius * np.cos(t)], axis=1), "second")]
    if kind == 2:
        box = np.array([(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)]) * size + (0, y)
        return [Shape(box, "second"), _disc(0, y, size * 0.3, "trim")]
    return []


def t_shirt(cut: Rng, pose: Rng) -> list[Shape]:
    """Short sleeves, a neckband."""
    depth = cut.uniform(0.24, 0.42)
    torso = _torso(
        neck=cut.uniform(0.38, 0.5), depth=depth, kind=cut.choice(("crew", "crew", "v")),
        waist=cut.uniform(0.82, 0.98), hem=cut.uniform(0.9, 1.06), length=cut.uniform(2.45, 3.0),
    )  # fmt: skip
    sleeve = cut.choice(("main", "main", "second"))
    shapes = _sleeved(
        torso, pose, depth, length=cut.uniform(0.75, 1.05), cuff=cut.uniform(0.36, 0.46),
        angle=cut.uniform(0.6, 0.85), paint=sleeve,
    )  # fmt: skip
    shapes += [_neckband(torso, cut.choice(("main", "trim")), 0.1)]
    shapes += _pocket(0.45, 0.85, 0.42, 0.42) if cut.random() < 0.3 else _emblem(cut, 1.25)
    return [*shapes, *_hem_seam(torso)]


def _hem_seam(torso: Torso) -> list[Shape]:
    x, y = torso.hem
    return [Shape(curve((-x, y - 0.1), (0, y - 0.04), (x, y - 0.1)), "seam", stroke=0.025)]


def long_sleeve(cut: Rng, pose: Rng) -> list[Shape]:
    """A t-shirt with sleeves to the wrist."""
    depth = cut.uniform(0.24, 0.45)
    torso = _torso(
        neck=cut.uniform(0.38, 0.52), depth=depth, kind=cut.choice(("crew", "v", "crew")),
        waist=cut.uniform(0.78, 0.92), hem=cut.uniform(0.86, 1.0), length=cut.uniform(2.5, 3.0),
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, depth, length=cut.uniform(2.1, 2.5), cuff=cut.uniform(0.17, 0.23),
        angle=cut.uniform(0.22, 0.4), paint=cut.choice(("main", "main", "second")),
    )  # fmt: skip
    shapes += [_neckband(torso, cut.choice(("main", "trim")), 0.09)]
    return [*shapes, *(_emblem(cut, 1.25) if cut.random() < 0.4 else []), *_hem_seam(torso)]


def shirt(cut: Rng, pose: Rng) -> list[Shape]:
    """A collar, a row of buttons, cuffs and a hem that is longer in the middle."""
    length = cut.uniform(2.7, 3.1)
    torso = _torso(
        depth=0.34, kind="v", neck=0.4, waist=cut.uniform(0.82, 0.95), hem=cut.uniform(0.9, 1.02),
        length=length - 0.3, sag=0.38,
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, 0.34, length=cut.uniform(2.0, 2.4), cuff=cut.uniform(0.2, 0.26),
        angle=cut.uniform(0.22, 0.42), band=cut.choice(("main", "trim")),
    )  # fmt: skip
    placket = np.array([(-0.1, 0.3), (0.1, 0.3), (0.1, length + 0.06), (-0.1, length + 0.06)])
    shapes += [Shape(placket, cut.choice(("main", "main", "trim")), tone=0.97)]
    shapes += both_sides(placket[1:3], paint="seam", stroke=0.025)
    shapes += _buttons(0, 0.45, length - 0.3, int(cut.integers(5, 8)))
    for x in [(), (0.48,), (-0.48, 0.48)][cut.integers(3)]:
        shapes += _pocket(x, 0.85, 0.42, 0.46)
    return shapes + _collar(
        0.42, 0.32, cut.uniform(0.2, 0.34), cut.uniform(0.2, 0.34), cut.choice(("main", "trim"))
    )


def sweater(cut: Rng, pose: Rng) -> list[Shape]:
    """A roll-neck of thick knit: ribbed neck, hem and cuffs, wide sleeves."""
    length, rib = cut.uniform(2.3, 2.7), cut.choice(("main", "trim"))
    torso = _torso(
        neck=0.42, depth=0.1, shoulder=1.12, slope=0.34, chest=cut.uniform(1.0, 1.12), armpit=1.2,
        waist=cut.uniform(1.02, 1.15), hem=0.95, length=length,
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, 0.1, length=cut.uniform(1.9, 2.2), cuff=cut.uniform(0.24, 0.3),
        angle=cut.uniform(0.3, 0.5), band=rib, rib=0.3,
    )  # fmt: skip
    shapes += _hem_band(0.97, length - 0.2, 0.3, rib)
    height, width = cut.uniform(0.4, 0.62), cut.uniform(0.42, 0.5)
    roll = curve((width, 0.2), (width * 0.98, -height * 0.4), (width * 0.94, -height))
    rim = curve((width * 0.94, -height), (0, -height + 0.12), (-width * 0.94, -height))
    inside = np.concatenate(
        [rim, curve((-width * 0.94, -height), (0, -height - 0.1), (width * 0.94, -height))]
    )
    tube = np.concatenate(
        [roll, rim, (roll * (-1, 1))[::-1], curve((-width, 0.2), (0, 0.3), (width, 0.2))]
    )
    shapes += [Shape(inside, "lining"), Shape(tube, rib, tone=0.95)]
    shapes += [
        Shape(curve((-width, -0.1), (0, 0.02), (width, -0.1)), "fold", tone=0.62, stroke=0.1)
    ]
    cable = [
        Shape(curve((x, 0.45), (x, 1.2), (x, length - 0.25)), "fold", tone=0.75, stroke=0.06)
        for x in (-0.5, -0.3, 0.3, 0.5)
    ]
    return shapes + (cable if cut.random() < 0.5 else [])


def hoodie(cut: Rng, pose: Rng) -> list[Shape]:
    """A hood behind the neck, cords, a pouch pocket or a zip, ribbed hem and cuffs."""
    length, rib = cut.uniform(2.4, 2.8), cut.choice(("main", "trim"))
    torso = _torso(
        neck=0.5, depth=0.42, shoulder=1.05, slope=0.3, chest=1.0, armpit=1.1, waist=1.04, hem=0.98,
        length=length,
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, 0.42, length=cut.uniform(2.0, 2.3), cuff=0.24, angle=cut.uniform(0.26, 0.45),
        band=rib, paint=cut.choice(("main", "main", "second")),
    )  # fmt: skip
    height, width = cut.uniform(0.75, 1.0), cut.uniform(0.66, 0.8)
    shapes += _hood(height, width)
    shapes += _hem_band(0.98, length - 0.18, 0.28, rib)
    pouch = np.concatenate(
        [
            curve((0.36, length - 0.95), (0.52, length - 0.6), (0.72, length - 0.45)),
            [(0.72, length - 0.2)],
        ]
    )
    shapes += _seamed(mirrored(pouch), tone=0.95)
    if cut.random() < 0.45:
        shapes += [Shape(np.array([(0, 0.6), (0, length + 0.1)]), "trim", stroke=0.07)]
    cord = cut.uniform(0.4, 0.7)
    return shapes + both_sides(
        curve((0.14, 0.55), (0.2, 0.6 + cord / 2), (0.17, 0.6 + cord)), paint="trim", stroke=0.05
    )


def _hood(height: float, width: float) -> list[Shape]:
    """A hood that hangs behind the neck, its inside, and where it is sewn on in front."""
    hood = curve(
        (0, -height), (width * 0.62, -height * 0.88), (width, -height * 0.3), (width * 0.92, 0.2),
        (0.3, 0.5),
    )  # fmt: skip
    face = curve(
        (0, -height * 0.72), (width * 0.46, -height * 0.55), (width * 0.6, -0.1), (0.36, 0.3),
        (0, 0.46),
    )  # fmt: skip
    collar = curve((width * 0.92, 0.18), (0.5, 0.42), (0.02, 0.66))
    front = np.concatenate([collar, curve((0, 0.46), (0.36, 0.3), (width * 0.6, -0.1))])
    return [
        Shape(mirrored(hood)),
        *_seamed(mirrored(face), "lining", stroke=0.04),
        *both_sides(front, paint="main"),
        *both_sides(collar, paint="seam", stroke=0.035),
    ]


def _open_front(length: float, neck: float, gap: float, flare: float) -> Shape:
    """What shows between two fronts that are not closed: the lining."""
    half = curve(
        (neck * 0.8, 0.1), (gap * 0.7, 1.0), (gap, length * 0.6), (gap + flare, length + 0.02)
    )
    return Shape(mirrored(half), "lining")


def jacket(cut: Rng, pose: Rng) -> list[Shape]:
    """Short and open in front, a standing collar, a zip edge and a wide ribbed waist."""
    length, rib = cut.uniform(2.05, 2.35), cut.choice(("trim", "second", "main"))
    torso = _torso(
        neck=0.44, depth=0.2, shoulder=1.08, slope=0.28, chest=1.05, armpit=1.1,
        waist=cut.uniform(1.05, 1.15), hem=0.98, length=length, sag=0.0,
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, 0.2, length=cut.uniform(2.0, 2.25), cuff=0.25, angle=cut.uniform(0.34, 0.55),
        band=rib, paint=cut.choice(("main", "second")),
    )  # fmt: skip
    shapes += _hem_band(0.99, length - 0.16, 0.32, rib)
    gap = cut.uniform(0.16, 0.34)
    opening = _open_front(length + 0.16, 0.44, gap, 0.04)
    edge = opening.points[: len(opening.points) // 2]
    shapes += [opening, *both_sides(edge, paint="metal", stroke=0.07)]
    collar = np.concatenate(
        [
            curve((0.5, 0.1), (0.48, -0.14), (0.34, -0.3)),
            curve((0.2, -0.22), (0.24, 0.1), (0.3, 0.42)),
        ]
    )
    back = curve((0.34, -0.3), (0, -0.2), (-0.34, -0.3))
    shapes += [Shape(np.concatenate([back, [(-0.3, 0.2), (0.3, 0.2)]]), "lining")]
    shapes += _sewn_on(collar, rib)
    if cut.random() < 0.5:
        shapes += _pocket(-0.62, 0.8, 0.44, 0.42) + _pocket(0.62, 0.8, 0.44, 0.42)
    return shapes + _slit((0.5, length - 0.85), (0.66, length - 0.6), (0.76, length - 0.35))


def coat(cut: Rng, pose: Rng) -> list[Shape]:
    """Long, with lapels, buttons and often a belt."""
    length, flare = cut.uniform(4.1, 5.0), cut.uniform(1.1, 1.45)
    waist = cut.uniform(0.86, 1.0)
    torso = _torso(
        neck=0.4, depth=0.2, shoulder=1.06, slope=0.26, chest=1.0, armpit=1.1, waist=waist,
        hem=flare, length=length, middle=0.34,
    )  # fmt: skip
    shapes = _sleeved(
        torso, pose, 0.2, length=cut.uniform(2.2, 2.5), cuff=cut.uniform(0.26, 0.32),
        angle=cut.uniform(0.16, 0.32),
    )  # fmt: skip
    shapes += _folds(pose, 0.8, 2.4, length, count=4, flare=flare)
    depth, double = cut.uniform(1.0, 1.7), cut.random() < 0.5
    overlap = 0.28 if double else 0.06
    shapes += [
        Shape(
            curve((overlap, depth), (overlap, 3.0), (overlap * 1.2, length + 0.04)),
            "seam",
            stroke=0.05,
        )
    ]
    shapes += _lapels(depth, cut.choice(("main", "main", "trim")))
    for x in (-overlap, overlap) if double else (0.0,):
        shapes += _buttons(x, depth + 0.12, 2.9, 3)
    shapes += _slit((0.5, 2.55), (0.62, 2.8), (0.74, 3.05))
    if cut.random() < 0.5:
        at = 1.1 + 0.34 * (length - 1.1) - 0.1
        shapes += _belt(waist * 1.01, at, cut.choice(("trim", "main")))
    return shapes


def _lapels(depth: float, paint: str) -> list[Shape]:
    """Two lapels that meet at ``depth``, and what shows between them: the lining."""
    inside = np.array([(-0.42, -0.1), (0.42, -0.1), (0, depth)])
    lapel = np.concatenate(
        [
            curve((0.42, -0.16), (0.28, 0.35), (0.0, depth)),
            curve((0.0, depth), (0.4, depth * 0.74), (0.72, 0.62)),
            [(0.5, 0.5), (0.78, 0.42)],
            curve((0.78, 0.42), (0.64, 0.1), (0.42, -0.16)),
        ]
    )
    return [Shape(inside, "lining"), *_sewn_on(lapel, paint, tone=1.06, stroke=0.035)]


def _belt(width: float, y: float, paint: str) -> list[Shape]:
    upper, lower = (
        curve((-width, y), (0, y + 0.06), (width, y)),
        curve((width, y + 0.17), (0, y + 0.23), (-width, y + 0.17)),
    )
    buckle = np.array([(-0.12, y), (0.12, y), (0.12, y + 0.28), (-0.12, y + 0.28), (-0.12, y)])
    return [
        Shape(np.concatenate([upper, lower]), paint, tone=0.8),
        Shape(buckle, "metal", stroke=0.05),
    ]


def waistcoat(cut: Rng, pose: Rng) -> list[Shape]:
    """No sleeves, a deep V, buttons and two points at the hem."""
    length, depth = cut.uniform(2.2, 2.6), cut.uniform(0.95, 1.35)
    neckline = curve((0, depth), (0.26, depth * 0.5), (0.4, 0.0))
    armhole = curve((0.82, 0.2), (0.66, 0.62), (0.74, 0.98), (0.94, 1.2))
    side = curve(
        (0.94, 1.2), (cut.uniform(0.78, 0.9), 1.75), (cut.uniform(0.86, 0.96), length - 0.2)
    )
    point = cut.uniform(0.25, 0.4)
    bottom = np.array([(0.34, length + point), (0.0, length + 0.02)])
    outline = mirrored(np.concatenate([neckline, armhole, side, bottom]))
    back = np.array(
        [
            (-0.4, 0),
            (0, 0.1),
            (0.4, 0),
            (0.74, 1.2),
            (0.6, length - 0.1),
            (-0.6, length - 0.1),
            (-0.74, 1.2),
        ]
    )
    shapes = [Shape(back, "lining"), Shape(outline), *_folds(pose, 0.7, 1.3, length, count=3)]
    shapes += [Shape(np.array([(0.0, depth), (0.0, length)]), "seam", stroke=0.05)]
    shapes += _buttons(-0.07, depth + 0.12, length - 0.15, int(cut.integers(3, 6)))
    welt = np.array(
        [(0.34, length - 0.55), (0.72, length - 0.62), (0.72, length - 0.48), (0.34, length - 0.41)]
    )
    shapes += both_sides(welt, paint=cut.choice(("main", "trim")), tone=0.86)
    if cut.random() < 0.5:
        lapel = np.concatenate([neckline, [(0.5, 0.1), (0.52, 0.5), (0.36, 0.62)]])
        shapes += _sewn_on(lapel, "trim")
    return (
        shapes
        + both_sides(neckline, paint="seam", stroke=0.04)
        + both_sides(armhole, paint="seam", stroke=0.04)
    )


def tank(cut: Rng, pose: Rng) -> list[Shape]:
    """Two straps, a low neckline, deep armholes, a narrow body."""
    depth, strap = cut.uniform(0.55, 0.85), cut.uniform(0.1, 0.22)
    neck = cut.uniform(0.4, 0.52)
    torso = _torso(
        neck=neck, depth=depth, slope=0.04, shoulder=neck + strap, chest=0.82, armpit=1.1,
        inset=0.16, waist=cut.uniform(0.68, 0.8), hem=cut.uniform(0.78, 0.98),
        length=cut.uniform(2.3, 2.9), kind=cut.choice(("crew", "crew", "square", "v")),
    )  # fmt: skip
    rim = curve((-neck * 1.05, depth * 0.3), (0, depth * 0.7), (neck * 1.05, depth * 0.3))
    inside = np.concatenate([rim, [(neck, depth + 0.1), (-neck, depth + 0.1)]])
    trim = cut.choice(("main", "trim"))
    shapes = [Shape(inside, "lining"), *_bodice(torso, pose, -0.2)[1:]]
    shapes += [Shape(torso.neckline[1:-1], trim, tone=0.9, stroke=0.07)]
    (x, y), (chest, armpit) = torso.shoulder, torso.armpit
    hole = curve((x, y), (min(x, chest) - 0.16, 0.45 * y + 0.55 * armpit), (chest, armpit))
    shapes += both_sides(hole[1:] - (0.02, 0), paint=trim, tone=0.9, stroke=0.06)
    return [*shapes, *(_emblem(cut, 1.45) if cut.random() < 0.4 else []), *_hem_seam(torso)]


def poncho(cut: Rng, pose: Rng) -> list[Shape]:
    """One wide piece over both arms, with fringes."""
    width, length, drop = cut.uniform(1.9, 2.4), cut.uniform(2.2, 2.8), cut.uniform(0.0, 0.7)
    neck, depth = 0.4, cut.uniform(0.2, 0.5)
    neckline = _neckline(cut.choice(("crew", "v")), neck, depth)
    shoulder = curve((neck, 0.0), (0.95, 0.3), (width * 0.8, length * 0.55), (width, length - drop))
    hem = curve(
        (width, length - drop), (width * 0.5, length - drop * 0.3 + 0.1), (0, length + 0.15)
    )
    outline = mirrored(np.concatenate([neckline, shoulder, hem]))
    bottom = np.concatenate([hem, (hem * (-1, 1))[::-1]])
    shapes = [
        Shape(np.array([(-neck, 0), (0, 0.1), (neck, 0), (neck, depth), (-neck, depth)]), "lining")
    ]
    if cut.random() < 0.7:
        tips = pose.uniform((-0.05, 0.2), (0.05, 0.3), (len(bottom), 2))
        shapes += [
            Shape(np.stack([p, p + t]), "trim", stroke=0.06)
            for p, t in zip(bottom, tips, strict=True)
        ]
    shapes += [
        Shape(outline),
        *_folds(pose, 0.7, 0.6, length, count=6, flare=cut.uniform(1.8, 2.4)),
    ]
    for at in [(), (0.82,), (0.7, 0.85)][cut.integers(3)]:
        shapes += [Shape(bottom * (at**0.5, at), cut.choice(("second", "trim")), stroke=0.13)]
    if cut.random() < 0.5:
        roll = np.concatenate(
            [
                curve((0.42, 0.22), (0.4, -0.1), (0.38, -0.35)),
                curve((-0.38, -0.35), (-0.4, -0.1), (-0.42, 0.22)),
                curve((-0.42, 0.22), (0, 0.36), (0.42, 0.22)),
            ]
        )
        return shapes + _seamed(roll, tone=0.92)
    return [
        *shapes,
        Shape(_across(neckline), "trim", stroke=0.09),
    ]


def _skirt(
    cut, pose, *, top: float, waist: float, hem: float, length: float, count: int
) -> list[Shape]:
    """A skirt from ``top``: sides that flare, a hem that waves, folds that radiate."""
    bottom, bulge = top + length, cut.uniform(0.25, 0.5)
    side = curve((waist, top), (waist + (hem - waist) * bulge, top + 0.35 * length), (hem, bottom))
    x = np.linspace(hem, -hem, 33)
    wave = (
        cut.uniform(0.02, 0.07)
        * (hem / waist - 0.8)
        * np.cos(x / hem * np.pi * count + pose.uniform(0, 2))
    )
    arc = np.stack([x, bottom + 0.16 * (hem - waist) * (1 - (x / hem) ** 2) + wave], axis=1)
    outline = np.concatenate([side, arc, (side * (-1, 1))[::-1]])
    folds = _folds(pose, waist * 0.9, top + 0.15, bottom, count=count + 2, flare=hem / waist)
    return [Shape(outline), *folds, Shape(arc - (0, 0.1), "seam", stroke=0.025)]


def dress(cut: Rng, pose: Rng) -> list[Shape]:
    """A bodice and a flared skirt in one."""
    waist, at, depth = cut.uniform(0.6, 0.72), cut.uniform(1.75, 2.1), cut.uniform(0.3, 0.7)
    kind = cut.integers(3)
    shoulder = (0.62, 0.95, 0.95)[kind]
    torso = _torso(
        neck=0.46 if kind else 0.48, depth=depth, shoulder=shoulder,
        slope=0.08 if kind == 0 else 0.24, chest=0.84, armpit=1.05, waist=(waist + 0.84) / 2 - 0.02,
        hem=waist, length=at, sag=0.0, kind=cut.choice(("crew", "v", "square")),
        inset=0.14 if kind == 0 else 0.08,
    )  # fmt: skip
    length = cut.uniform(1.9, 3.2)
    skirt = _skirt(
        cut, pose, top=at - 0.05, waist=waist, hem=cut.uniform(1.15, 2.0), length=length,
        count=int(cut.integers(3, 6)),
    )  # fmt: skip
    long = cut.random() < 0.5
    shapes = []
    if kind == 2:
        shapes = _sleeves(
            torso, pose, length=2.1 if long else 0.75, cuff=0.2 if long else 0.36,
            angle=0.4 if long else 0.6,
        )  # fmt: skip
    shapes += skirt + _bodice(torso, pose, depth)
    shapes += [_neckband(torso, cut.choice(("main", "trim")), 0.07)]
    if cut.random() < 0.5:
        shapes += _belt(waist * 1.03, at - 0.12, cut.choice(("trim", "second")))
    return [
        *shapes,
        Shape(curve((-waist, at), (0, at + 0.05), (waist, at)), "fold", tone=0.7, stroke=0.08),
    ]


def jumpsuit(cut: Rng, pose: Rng) -> list[Shape]:
    """A bodice and long trousers in one."""
    waist, at, depth = cut.uniform(0.7, 0.8), 2.0, cut.uniform(0.3, 0.75)
    sleeved = cut.random() < 0.6
    torso = _torso(
        neck=0.44, depth=depth, shoulder=0.98 if sleeved else 0.66, slope=0.22 if sleeved else 0.08,
        chest=0.9, armpit=1.05, waist=0.8, hem=waist, length=at, sag=0.0,
        kind=cut.choice(("crew", "v")),
    )  # fmt: skip
    shapes = []
    if sleeved:
        long = cut.random() < 0.5
        shapes = _sleeves(
            torso, pose, length=2.2 if long else 0.8, cuff=0.2 if long else 0.38,
            angle=0.34 if long else 0.6,
        )  # fmt: skip
    shapes += _legs(
        pose, top=at - 0.08, waist=waist, hip=cut.uniform(0.92, 1.0), rise=1.0,
        length=cut.uniform(2.7, 3.2), knee=cut.uniform(0.4, 0.5), ankle=cut.uniform(0.3, 0.62),
        spread=0.07,
    )  # fmt: skip
    shapes += _bodice(torso, pose, depth)
    shapes += [_neckband(torso, cut.choice(("main", "trim")), 0.08)]
    shapes += [
        Shape(np.array([(0, depth), (0, at + 0.8)]), cut.choice(("seam", "metal")), stroke=0.05)
    ]
    shapes += _slit((0.58, at + 0.2), (0.74, at + 0.4), (0.9, at + 0.6))
    return shapes + _belt(waist * 1.04, at - 0.14, cut.choice(("trim", "main", "second")))


def dungarees(cut: Rng, pose: Rng) -> list[Shape]:
    """A bib on two straps, and trousers, long or short."""
    bib, top = cut.uniform(0.52, 0.68), cut.uniform(0.7, 0.9)
    length = cut.choice((cut.uniform(2.4, 2.8), cut.uniform(0.6, 1.0)), p=(0.7, 0.3))
    hip, waist = cut.uniform(1.08, 1.2), cut.uniform(0.9, 1.0)
    ankle = cut.uniform(0.36, 0.56) if length > 2 else 0.58
    strap = curve(
        (bib - 0.1, top + 0.1), (bib - 0.07, 0.35), (bib * 0.85, -0.1), (bib * 0.72, -0.28)
    )
    back = curve((bib * 0.72, -0.28), (bib * 0.5, 0.0), (bib * 0.3, 0.7))
    panel = np.array([(bib * 0.45, 0.62), (waist, 1.9)])
    shapes = [*both_sides(back, paint="lining", stroke=0.2), Shape(mirrored(panel), "lining")]
    shapes += both_sides(strap, paint=cut.choice(("main", "trim")), tone=0.95, stroke=0.2)
    shapes += _legs(
        pose, top=1.9, waist=waist, hip=hip, rise=1.1, length=length, knee=0.52, ankle=ankle
    )
    front = curve((bib, top), (bib + 0.05, 1.35), (waist, 1.72))
    panel = mirrored(np.concatenate([[(0, top)], front, curve((waist, 1.95), (0, 2.05))]))
    shapes += [
        Shape(panel),
        Shape(np.array([(-bib, top + 0.1), (bib, top + 0.1)]), "seam", stroke=0.03),
    ]
    shapes += _waistband(waist, 1.82, 0.18, cut.choice(("main", "trim")))[1:]
    shapes += both_sides(_disc(bib - 0.1, top + 0.08, 0.09, "metal").points, paint="metal")
    shapes += _pocket(0, 1.12, 0.6, 0.48, cut.choice(("main", "second")))
    return shapes + _slit((0.5, 2.05), (0.62, 2.32), (hip * 0.96, 2.42))


def skirt(cut: Rng, pose: Rng) -> list[Shape]:
    """A waistband and a skirt, from straight to full circle."""
    waist = cut.uniform(0.7, 0.82)
    hem, length = waist * cut.uniform(1.15, 2.3), cut.uniform(1.5, 3.2)
    shapes = _skirt(
        cut, pose, top=0.0, waist=waist, hem=hem, length=length, count=int(cut.integers(3, 7))
    )
    if cut.random() < 0.4:
        at = np.linspace(-0.85, 0.85, int(cut.integers(5, 10)))
        shapes += [
            Shape(np.array([(x * waist, 0.1), (x * hem, length)]), "seam", stroke=0.04) for x in at
        ]
    if cut.random() < 0.3:
        shapes += _buttons(0, 0.4, length - 0.25, 5)
    return shapes + _waistband(
        waist, -0.1, cut.uniform(0.18, 0.3), cut.choice(("main", "trim", "second"))
    )


def trousers(cut: Rng, pose: Rng) -> list[Shape]:
    """A waistband, a fly, pockets and two long legs."""
    waist, hip = cut.uniform(0.72, 0.82), cut.uniform(0.92, 1.02)
    shapes = _legs(
        pose, waist=waist, hip=hip, rise=cut.uniform(1.0, 1.25), length=cut.uniform(3.0, 3.6),
        knee=cut.uniform(0.36, 0.48), ankle=cut.uniform(0.24, 0.62),
    )  # fmt: skip
    return shapes + _trouser_details(cut, waist, hip)


def _trouser_details(cut, waist: float, hip: float) -> list[Shape]:
    shapes = _slit((0.45, 0.1), (0.55, 0.4), (hip * 0.93, 0.5))
    shapes += [Shape(curve((0.14, 0.1), (0.14, 0.5), (0.0, 0.75)), "seam", stroke=0.03)]
    shapes += _waistband(waist, -0.1, cut.uniform(0.16, 0.24), cut.choice(("main", "main", "trim")))
    if cut.random() < 0.35:
        return shapes + _belt(waist * 1.03, -0.09, "trim")
    return [*shapes, _disc(0.02, 0.03, 0.055, "metal")]


def shorts(cut: Rng, pose: Rng) -> list[Shape]:
    """Trousers that end above the knee."""
    waist, hip, length = cut.uniform(0.72, 0.82), cut.uniform(0.95, 1.06), cut.uniform(0.6, 1.3)
    wide = cut.uniform(0.48, 0.6)
    shapes = _legs(
        pose, waist=waist, hip=hip, length=length, knee=wide * 0.98, ankle=wide, spread=0.14
    )
    shapes += _trouser_details(cut, waist, hip)
    if cut.random() < 0.4:
        shapes += both_sides(
            curve((0.05, 0.1), (0.12, 0.35), (0.1, 0.6)), paint="trim", stroke=0.045
        )
    return shapes


CUTS: dict[str, Callable[[Rng, Rng], list[Shape]]] = {
    "t_shirt": t_shirt,
    "long_sleeve": long_sleeve,
    "shirt": shirt,
    "sweater": sweater,
    "hoodie": hoodie,
    "jacket": jacket,
    "coat": coat,
    "waistcoat": waistcoat,
    "tank": tank,
    "poncho": poncho,
    "dress": dress,
    "jumpsuit": jumpsuit,
    "dungarees": dungarees,
    "skirt": skirt,
    "trousers": trousers,
    "shorts": shorts,
}
