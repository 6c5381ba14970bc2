"""What surrounds a garment: a studio or a room, what is in front of it, the light, the camera."""

import cv2
import numpy as np

from cbam_jax.datasets.garments.textiles import random_colour, random_pattern

_SKINS = ((236, 200, 178), (214, 168, 138), (160, 112, 82), (104, 70, 52))


def compose(
    rgba: np.ndarray, rng: np.random.Generator, domain: str, clutter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Background, shadow, garment, occluders, light, and the camera's noise.

    Args:
        rgba: uint8 [s, s, 4], the garment, colours premultiplied.
        rng: of the scene.
        domain: "shop" or "consumer".
        clutter: 0 to 1.

    Returns:
        uint8 [s, s, 3], and bool [s, s], where the garment is seen.
    """
    size = rgba.shape[0]
    shop = domain == "shop"
    background = _studio(rng, size) if shop else _room(rng, size, clutter)
    dx, dy = rng.uniform(-0.03, 0.03) * size, rng.uniform(0.01, 0.05) * size
    shadow = cv2.warpAffine(rgba[..., 3], np.array([[1, 0, dx], [0, 1, dy]]), (size, size))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.025 * size)
    strength = rng.uniform(0.15, 0.35) / 255
    cover = rgba[..., 3].astype(np.float32) / 255
    behind = grey_to_rgb((1 - strength * shadow.astype(np.float32)) * (1 - cover))
    image = cv2.multiply(background, behind) + rgba[..., :3]
    image, seen = _occlude(image, cover, rng, clutter)
    image = _light(image, rng, 0.2 if shop else 1.0)
    return _sensor(image, rng, shop), seen >= 0.5


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """[h, w] to [h, w, 3], of any dtype that OpenCV knows."""
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def extent(mask: np.ndarray) -> np.ndarray:
    """The box around what is true, float32 [4], x1, y1, x2, y2, ends exclusive; zeros if none."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(x):
        return np.zeros(4, np.float32)
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], np.float32)


def _studio(rng: np.random.Generator, size: int) -> np.ndarray:
    """Nearly white, a little darker towards the floor. float32 [size, size, 3]."""
    tint = rng.uniform(228, 252) + rng.uniform(-5, 5, 3)
    ramp = np.linspace(1.0, rng.uniform(0.93, 1.0), size, dtype=np.float32)
    ramp = ramp[:, None, None] * tint.astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(ramp, (size, size, 3)))


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
        image[:] = cv2.addWeighted(image, 0.6, random_pattern(rng, size), 0.4, 0)
    horizon = int(rng.uniform(0.55, 0.95) * size)
    floor = _paint(rng) * 0.7 + 40
    image[horizon:] = floor
    for x in range(0, size * 2, max(4, size // 9)):
        foot = (int(2.2 * (x - size)) + size // 2, size)
        cv2.line(image, (x - size // 2, horizon), foot, (floor * 0.75).tolist(), 1)
    cv2.line(image, (0, horizon), (size, horizon), (floor * 0.6).tolist(), max(1, size // 48))


def _paint(rng: np.random.Generator) -> np.ndarray:
    """A colour as walls and furniture have them: duller than clothes. uint8 [3]."""
    colour = random_colour(rng).astype(float)
    grey = colour.mean() * rng.uniform((0.9, 0.9, 0.8), (1.15, 1.0, 1.0))
    return (0.45 * colour + 0.55 * grey).clip(0, 255).astype(np.uint8)


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
    cv2.copyTo(random_pattern(rng, size), mask, image)


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
    cv2.ellipse(image, (x, y), axes, 0, 0, 360, random_colour(rng).tolist(), -1)


_THINGS = (_frame, _furniture, _cloth, _plant, _lamp)


def _occlude(image, alpha, rng: np.random.Generator, clutter: float):
    """Puts hands, bags and bars in front; returns the image and what is still seen of alpha."""
    size = image.shape[0]
    box = extent(alpha > 0.5)
    for _ in range(rng.binomial(3, 0.7 * clutter)):
        layer = np.zeros_like(alpha, np.uint8)
        colours = np.zeros_like(image)
        _OCCLUDERS[rng.integers(len(_OCCLUDERS))](layer, colours, rng, box, size)
        cover = layer.astype(np.float32) / 255
        image = cv2.multiply(image, grey_to_rgb(1 - cover)) + cv2.multiply(
            colours, grey_to_rgb(cover)
        )
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
    colour = random_colour(rng)
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
