"""Lower bounds of distances: a product, less the largest error that it may have."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.distances import l2_normalize
from cbam_jax.search.order import INFINITE, reordered
from cbam_jax.search.shards import largest_magnitude, view_of
from cbam_jax.search.sums import lane_sum
from cbam_jax.search.types import Queries, Shard

_BALANCE = 512.0  # About the norm of an embedding over that of its rounding error in bfloat16.
_ROUNDING = float(np.finfo(np.float32).eps) / 2
_SMALLEST, LARGEST = 2.0**-60, 2.0**80  # Squared norms that need no scaling.
_FLUSHED = 2.0**-126  # Numbers below it may be computed as 0, as XLA does on a CPU.
_SAME = 16 * _ROUNDING  # Distances this near, as a share, may be the same in float32.
_FAINT = 2.0**-100  # Rows of smaller numbers have no direction that is known.


class Preparation(NamedTuple):
    """How embeddings are made ready for the product: less ``center``, times ``scale``.

    With ``directions`` [d, r] the product is of r + 1 numbers: see `_projected`.
    """

    center: np.ndarray | jax.Array | None
    scale: np.float32 | jax.Array
    metric: str
    dtype: str
    directions: np.ndarray | jax.Array | None = None


def preparation_of(
    queries: Queries, shards: Sequence[Shard], metric: str, dtype: str
) -> Preparation:
    """A centre near the gallery's mean, and a scale that leaves no number above 4.

    The centre shortens the norms, and the rounding errors with them; any would be right. Where it
    would shorten them little and no square leaves float32's range, embeddings stay as they are.
    """
    center, scale = center_of(shards, metric, 0.25), np.float32(1)
    if not usual_size(queries, shards):
        peak = max(largest_magnitude(x) for x in (queries.rows, *(s.rows for s in shards)))
        # A power of two scales exactly; one below 2^-126 may be computed as 0.
        scale = np.float32(2.0 ** -float(np.clip(np.frexp(peak)[1], -100, 126)))
        center = np.zeros(queries.rows.shape[1], np.float32) if center is None else center
    return Preparation(center, scale, metric, dtype)


def center_of(shards: Sequence[Shard], metric: str, share: float) -> np.ndarray | None:
    """A centre near the gallery's mean, [d], if that has this share of the squared norms."""
    if not metric.endswith("euclidean"):
        return None
    sample = sampled_rows(shards, 16)
    with np.errstate(over="ignore", invalid="ignore"):  # Numbers may not be finite.
        mean = sample.mean(axis=0)
        far = np.sum(mean**2) > share * np.mean(np.sum(sample**2, axis=1))
        return mean.astype(np.float32) if far else None


def usual_size(queries: Queries, shards: Sequence[Shard]) -> bool:
    """Whether embeddings need no scaling."""
    return usual(max(float(np.max(s)) for s in (queries.squares, *(s.squares for s in shards))))


def usual(largest: float) -> bool:
    """Whether embeddings need no scaling, by the largest squared norm."""
    return _SMALLEST < largest < LARGEST


def sampled_rows(shards: Sequence[Shard], runs: int) -> np.ndarray:
    """``runs`` runs of 16 rows of each shard, float64; fewer where they would overlap.

    Runs, since single rows would bring a whole file into memory.
    """
    starts = [
        (s, i) for s in shards for i in range(0, len(s.rows), max(16, -(-len(s.rows) // runs)))
    ]
    return np.concatenate([np.asarray(view_of(s)[i : i + 16], np.float64) for s, i in starts])


def prepared(
    x: np.ndarray | jax.Array, squares: np.ndarray | jax.Array, preparation: Preparation
) -> tuple[Any, Any]:
    """Embeddings as the product takes them, [m, d], and their share of the lower bounds, [m].

    A bound is the product, times -2 or -1, plus the shares of both sides. A float32 dot product of
    width d is off by at most (d u) |x| |y| with u = 2^-24, in whatever order it is summed (Higham
    2002, section 3.1), and |x| |y| <= (|x|^2 + |y|^2) / 2 splits that between both sides. Squares
    are off by as much again; 32 u more cover the roundings of centring and adding up. Products of
    bfloat16 are off by more, see `_rounded`, and accelerators add them up less strictly. Those of
    float64 have the same bounds with its own u.
    """
    center, scale, metric, dtype, directions = preparation
    if dtype == "float64":
        return _doubled(x, scale, metric=metric)
    unit = (1 if dtype == "float32" else 2) * _ROUNDING
    error = product_error(x.shape[1], unit)
    if directions is not None:
        error += 2.1 * (x.shape[1] + 16) * directions.shape[1] ** 0.5 * unit
    if metric != "cosine" and center is None and directions is None and dtype == "float32":
        return x, squares * _factor(error, metric)
    arrays = x, squares, center, scale, directions
    return _prepared(*arrays, error=error, metric=metric, dtype=dtype)


def _factor(error: float, metric: str) -> np.float32:
    """The share of the bounds over the squared norm."""
    half = {"inner_product": -error / 2, "cosine": 0.5 - error}
    return np.float32(half.get(metric, 1 - error))


@functools.partial(jax.jit, static_argnames=("error", "metric", "dtype"))
def _prepared(x, squares, center, scale, directions, *, error, metric, dtype):
    """`prepared` as one program, of anything but embeddings that stay as they are."""
    if metric == "cosine":
        # Normalising is off by up to (d / 2) u in itself, on both sides.
        unknown = faint(x)
        x, squares = _normalized(x), jnp.ones(len(x), jnp.float32)
        x = jnp.where(unknown[:, None], 0.0, x)
    elif center is not None:
        x, squares = _moved(x, center, scale)
    share = squares * _factor(error, metric)
    if metric == "cosine":
        share = jnp.where(unknown, -1.0, share)
    if directions is not None:
        x, squares = _projected(x, squares, directions, np.float32(1 + error))
    if dtype == "bfloat16":
        x, lost = _rounded(x, squares)
        share = share - lost * np.float32(2 if metric.endswith("euclidean") else 1)
    return x, share


def product_error(width: int, unit: float = _ROUNDING) -> float:
    """By how much a product and its squares are off at most, as a share of the squared norms."""
    return (2 * width + 32) * unit


def _projected(
    x: jax.Array, squares: jax.Array, directions: jax.Array, more: np.float32
) -> tuple[jax.Array, jax.Array]:
    """The r coordinates of x along the directions, and how far x is from all of them, [m, r + 1].

    And the squared norms of that. It is a product with P [d, r], whose norm is at most 1. Then
    |Px|^2 + |Sx|^2 = |x|^2 for some S, and <x, y> = <Px, Py> + <Sx, Sy> <= <Px, Py> + |Sx| |Sy|:
    the product of what is returned, which therefore bounds a distance from below. Columns of P are
    no longer than 1, so each coordinate is off by at most (d u) |x|, all together by
    h |x| with h = sqrt(r) d u. That is 2 h |x| |y| for a product, and 2 h |x|^2 for |Px|^2, above
    which the second norm is rounded up: ``more`` is 1 + 2 h and the errors of squares.
    """
    along = jnp.matmul(x.astype(jnp.float32), directions, precision=jax.lax.Precision.HIGHEST)
    lengths = squares * more
    beyond = jnp.sqrt(jnp.maximum(lengths - lane_sum(along * along), 0.0)) * (1 + 2.0**-20)
    return jnp.concatenate([along, beyond[:, None]], axis=1), lengths


def _rounded(x: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as bfloat16, and its share of what the inner products with others may lose by that.

    <x, y> - <x', y'> = <x - x', y> + <x', y - y'>, at most |x - x'| |y| + |x'| |y - y'|. And
    |x - x'| |y| <= (b |x - x'|^2 + |y|^2 / b) / 2, tight where b is |y| / |x - x'|, holds for any b
    and splits it between both sides. 0.505 in place of 1/2 covers roundings, that of x' included.
    """
    x = x.astype(jnp.float32)
    near = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)
    # The barrier keeps XLA from leaving out the conversion to bfloat16 and back, and on a CPU from
    # writing the differences to memory.
    near = jax.lax.optimization_barrier(near)
    lost = _BALANCE * lane_sum(jnp.square(x - near.astype(jnp.float32))) + squares / _BALANCE
    return near, 0.505 * lost


def faint(x: jax.Array) -> jax.Array:
    """Which rows [m] are not zero, but so small that their direction may be lost."""
    # By their bits: comparisons of numbers may take them for 0 as well.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    largest = jnp.max(bits, axis=1)
    return (largest > 0) & (largest < np.float32(_FAINT).view(np.int32))


def _normalized(x: jax.Array) -> jax.Array:
    # Where float32 might not hold the length of rows, they are scaled.
    x = x.astype(jnp.float32)
    large = jnp.max(jnp.abs(x), axis=1, keepdims=True) > np.float32(LARGEST)
    x = x * jnp.where(large, np.float32(1 / LARGEST), np.float32(1))
    return l2_normalize(x, eps=float(np.finfo(np.float32).tiny))


def _moved(x: jax.Array, center: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Scaled first: a difference of two numbers near float32's end would overflow.
    x = x.astype(jnp.float32) * scale - (center * scale)[None, :]
    return x, lane_sum(x * x)


@functools.partial(jax.jit, static_argnames="metric")
def _doubled(x: jax.Array, scale: jax.Array, metric: str) -> tuple[jax.Array, jax.Array]:
    """Embeddings and their share of the bounds in float64, whose range needs no centre."""
    unknown = faint(x)
    x = x.astype(jnp.float64) * scale.astype(jnp.float64)
    squares = lane_sum(x * x)
    error = (2 * x.shape[1] + 64) * float(np.finfo(np.float64).eps)
    if metric == "cosine":
        x = x / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))[:, None]
        return jnp.where(unknown[:, None], 0.0, x), jnp.where(unknown, -1.0, 0.5 - error)
    return x, squares * (-error if metric == "inner_product" else 1 - error)


def rounded_down(bounds: jax.Array) -> jax.Array:
    """float64 as float32 that is not above, and finite."""
    lower = bounds - jnp.abs(bounds) * 2.0**-23
    largest = float(np.finfo(np.float32).max)
    return jnp.clip(lower, -largest, largest).astype(jnp.float32)


def bound_distances(
    bounds: np.ndarray, own_share: np.ndarray, preparation: Preparation
) -> np.ndarray:
    """Lower bounds [q, m], from integers, in the unit of the distances, as float32."""
    metric, scale = preparation.metric, float(preparation.scale)
    values = reordered(bounds).view(np.float32).astype(np.float64)
    values[bounds >= INFINITE] = np.inf
    values = values + own_share[:, None] - _underflow(scale)
    if metric != "cosine":
        values /= scale**2
    if metric == "euclidean":
        values = np.sqrt(np.maximum(values, 0.0))
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def distance_bounds(
    distances: np.ndarray, own_share: np.ndarray, preparation: Preparation
) -> np.ndarray:
    """The integers [q] up to which lower bounds may be those of such distances, or nearer ones."""
    metric, scale = preparation.metric, float(preparation.scale)
    values = as_near(distances)
    if metric == "euclidean":
        values = values**2
    if metric != "cosine":
        values *= scale**2
    values += _underflow(scale) - own_share
    with np.errstate(over="ignore"):
        bounds = np.nextafter(values.astype(np.float32), np.float32(np.inf))
    return np.minimum(reordered(bounds.view(np.int32)), INFINITE - 1)


def as_near(distances: np.ndarray) -> np.ndarray:
    """The largest distances, float64, that may be the same once they are rounded to float32."""
    values = np.maximum(distances.astype(np.float64), np.finfo(np.float32).min)
    return values + _SAME * np.abs(values)


def _underflow(scale: float) -> float:
    """What covers numbers that underflow: once the scale is applied, and before.

    There d numbers off by e move |x - y|^2 by no more than its rounding error in float64 and
    d e^2 / 2^-50.
    """
    return max(1e-30, 2.0**70 * (_FLUSHED * scale) ** 2)
