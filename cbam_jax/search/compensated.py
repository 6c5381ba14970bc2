"""Distances as exact as float64's, computed by float32 numbers alone.

Inside `jax.jit` there is no float64 unless all of the program has it. So a sum is carried as three
float32 numbers, each the rounding error of the one before (Ogita, Rump and Oishi 2005, algorithm
4.8 with K = 3), and a product as four that are exact, of halves with 12 bits. A compiler may fuse
a product with the addition behind it, which leaves out the product's rounding: products without
one are the same either way, and no other product here feeds what depends on its rounding. It may
not reorder additions, and XLA does not. So the results are off by some 2^-46 of themselves (a sum
with cancellation by less than float64's): rounded to float32 they are those of float64, but for
about one in a million.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

_SAME_DIRECTION = 1e-27  # Cosine distances up to this are roundings of 0.


def compensated_distances(x: jax.Array, y: jax.Array, metric: str) -> jax.Array:
    """Distances over the last axis of float32 arrays that broadcast, float32.

    Infinite where float32's range ends, NaN where a number is NaN.
    """
    if metric == "inner_product":
        return _positive_zero(-_inner_product(x, y))
    if metric == "cosine":
        return _cosine_distance(x, y)
    return _euclidean(x, y, squared=metric == "squared_euclidean")


def _euclidean(x: jax.Array, y: jax.Array, squared: bool) -> jax.Array:
    # Powers of two scale exactly. Where numbers are tiny, so that what a difference loses to
    # rounding is not below float32's range; and so that no square leaves it.
    tiny = jnp.maximum(exponent_of(x), exponent_of(y)) < -60
    lift = jnp.where(tiny, jnp.int32(64), jnp.int32(0))
    x, y = (scaled(a, lift[..., None]) for a in (x, y))
    difference, lost = _two_sum(x, -y)
    exponent = exponent_of(difference)
    z, e = (scaled(a, -exponent[..., None]) for a in (difference, lost))
    high, low = _total([*_products(z, z), 2 * z * e])
    if not squared:
        high, low = _root(high, low)
        # To 20 bits, all that is known: halfway between two numbers is then exactly halfway, as
        # where rows differ in one coordinate alone, and rounded to the even one as by float64.
        low = _rounded(low, 20)
    exact = scaled(high + low, (exponent - lift) * (2 if squared else 1))
    finite = jnp.all(jnp.isfinite(difference), axis=-1)
    return jnp.where(finite, exact, jnp.sum(jnp.abs(difference), axis=-1))


def _inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    of_x, of_y = exponent_of(x), exponent_of(y)
    high, low = _total(_products(scaled(x, -of_x[..., None]), scaled(y, -of_y[..., None])))
    exact = scaled(high + low, of_x + of_y)
    finite = jnp.all(jnp.isfinite(x) & jnp.isfinite(y), axis=-1)
    return jnp.where(finite, exact, jnp.sum(x * y, axis=-1))


def _cosine_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """1 - cos = |z|^2 / (2 |x|^2 |y|^2) with z = |y| x - |x| y, without cancellation."""
    finite = jnp.all(jnp.isfinite(x) & jnp.isfinite(y), axis=-1)
    x, y = (scaled(a, -exponent_of(a)[..., None]) for a in (x, y))
    xx, yy = _total(_products(x, x)), _total(_products(y, y))
    (a, a_low), (b, b_low) = (tuple(r[..., None] for r in _root(*s)) for s in (yy, xx))
    # Term by term, so that equal vectors cancel exactly.
    both = zip(_products(x, a), _products(y, b), strict=True)
    z, lost = _compensated(t for pair in both for t in (pair[0], -pair[1]))
    z, lost = _two_sum(z, lost + (x * a_low - y * b_low))
    top = _total([*_products(z, z), 2 * z * lost])
    bottom = _compensated([*_products(xx[0], yy[0]), xx[0] * yy[1] + xx[1] * yy[0]])
    half = _quotient(top, bottom) / 2
    half = jnp.where(half > _SAME_DIRECTION, half, 0.0)
    half = jnp.where((xx[0] > 0) & (yy[0] > 0), half, 1.0)
    return jnp.where(finite, half, jnp.nan)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b and its rounding error, exactly (Knuth 1969)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _products(a: jax.Array, b: jax.Array) -> list[jax.Array]:
    """Four numbers without a rounding error whose sum is a times b, the largest first."""
    a, a_low = _halves(a)
    b, b_low = _halves(b)
    return [a * b, a * b_low, a_low * b, a_low * b_low]


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first 12 bits of the mantissas, and the others; by integers, which nothing fuses."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)
    return upper, x - upper


def _compensated(terms: Iterable[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The sum of some arrays, and the sum of its rounding errors."""
    first, *others = terms
    total, lost = first, jnp.zeros_like(first)
    for term in others:
        total, error = _two_sum(total, term)
        lost = lost + error
    return total, lost


def _total(terms: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The sum of all terms over their last axis, and what float32 loses of it."""
    numbers = jnp.concatenate(terms, axis=-1)
    none, zero = jnp.zeros_like(numbers), jnp.zeros((), jnp.float32)

    def add(a, b):
        high, error = _two_sum(a[0], b[0])
        middle, second = _two_sum(a[1], b[1])
        middle, third = _two_sum(middle, error)
        return high, middle, (a[2] + b[2]) + (second + third)

    axis = (numbers.ndim - 1,)
    high, middle, low = jax.lax.reduce((numbers, none, none), (zero, zero, zero), add, axis)
    return _two_sum(high, middle + low)


def _root(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The square root of a sum, and its own error: a step of Newton's method."""
    there = high > 0
    root = jnp.sqrt(jnp.where(there, high, 1.0))
    rest, lost = _compensated([high, *(-p for p in _products(root, root))])
    error = (rest + (lost + low)) * (0.5 / root)
    return jnp.where(there, root, 0.0), jnp.where(there, error, 0.0)


def _quotient(top: tuple[jax.Array, jax.Array], bottom: tuple[jax.Array, jax.Array]) -> jax.Array:
    divisor = jnp.where(bottom[0] > 0, bottom[0], 1.0)
    ratio = top[0] / divisor
    rest, lost = _compensated([top[0], *(-p for p in _products(ratio, divisor))])
    return ratio + (rest + (lost + (top[1] - ratio * bottom[1]))) / divisor


def _rounded(x: jax.Array, bits: int) -> jax.Array:
    """The nearest number with a mantissa of so few bits."""
    unit = 1 << (24 - bits)
    near = jax.lax.bitcast_convert_type(x, jnp.int32) + unit // 2
    return jax.lax.bitcast_convert_type(near & -unit, jnp.float32)


def exponent_of(x: jax.Array) -> jax.Array:
    """That of the largest magnitude over the last axis, within float32's normal range."""
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=-1), jnp.int32)
    return jnp.clip((bits >> 23) - 127, -126, 126)


def scaled(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x 2^exponent, in two steps: the exponents of two arrays together leave float32's range."""
    half = exponent >> 1
    return x * power_of_two(half) * power_of_two(exponent - half)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Of an exponent within float32's normal range, exactly."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _positive_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0.0, x)
