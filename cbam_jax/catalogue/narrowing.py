"""Which photos may be among the nearest, told by a fifth of their embeddings' numbers.

Embeddings of photos are correlated. Along a few directions P that hold most of what tells them
apart, and with the length of the rest, |x - y|^2 >= |x|^2 + |y|^2 - 2 (<Px, Py> + |rest| |rest|).
What that leaves of a large catalogue is measured as always: the answer is the same, and a query
reads a fifth of the bytes. `cbam_jax.search.prepare` does so for searches of many queries; this is
NumPy alone, so that a catalogue is searched without JAX, and nothing is compiled.
"""

from typing import Any, NamedTuple

import numpy as np

_WORTH_WHILE = 2**25  # Numbers of a gallery from which it is narrowed: 128 MiB.
_SAMPLE, _TRIED = 2048, 64  # Rows that directions are learned from, and that are asked for.
_MOST = 0.1  # Of the sample, that bounds may leave, for the directions to be kept.
_STEP, _PART = 64, 5  # A width is a multiple, less 1, about a fifth of all numbers.
_K = 12  # Neighbours that are usually asked for.
_ROWS = 4096  # At a time.
_ROUNDING = 2.0**-24


class Narrow(NamedTuple):
    """Directions [d, r] and what `projected` makes of each embedding, [n, r + 1]; float32.

    The directions are orthogonal, and no longer than 1.
    """

    directions: np.ndarray
    along: np.ndarray


def narrow(embeddings: np.ndarray, squares: np.ndarray) -> Narrow | None:
    """Directions along which embeddings [n, d] are told apart; None where that would not pay.

    Args:
        embeddings: [n, d] float32.
        squares: their squared norms, [n] float32.
    """
    n, d = embeddings.shape
    width = round(d / _PART / _STEP) * _STEP - 1
    if n * d < _WORTH_WHILE or width < 1:
        return None
    # Runs of rows: single ones would bring a whole file into memory.
    starts = np.linspace(0, n - 16, _SAMPLE // 16).astype(int)
    places = np.unique(starts[:, None] + np.arange(16))
    sample = embeddings[places]
    directions = _directions(sample, width)
    some = Narrow(directions, projected(sample, squares[places], directions))
    if _share_left(some, sample, squares[places], n) > _MOST:
        return None
    parts = (slice(i, i + _ROWS) for i in range(0, n, _ROWS))
    along = [projected(embeddings[part], squares[part], directions) for part in parts]
    return Narrow(directions, np.concatenate(along))


def _directions(sample: np.ndarray, width: int) -> np.ndarray:
    """About the principal directions: two steps from random ones. Any are right."""
    found = np.random.default_rng(0).standard_normal((sample.shape[1], width), np.float32)
    for _ in range(2):
        found = sample.T @ (sample @ found)
        found /= np.abs(found).max(axis=0) + np.float32(1e-30)
    # Shortened, so that rounded to float32 they make nothing longer.
    return (np.linalg.qr(found.astype(np.float64))[0] * (1 - 2.0**-16)).astype(np.float32)


def projected(x: np.ndarray, squares: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Numbers along the directions, and the length of the rest, rounded up; [n, r + 1] float32.

    A number is off by at most (d u) |x|, with u = 2^-24, r of them by h |x| with h = sqrt(r) d u,
    and their squares by 2.1 h |x|^2.
    """
    along = x @ directions
    own = np.einsum("ij,ij->i", along, along, dtype=np.float64)
    beyond = np.sqrt(np.maximum(squares.astype(np.float64) * (1 + _error(directions)) - own, 0))
    return np.column_stack([along, (beyond * (1 + 2.0**-20)).astype(np.float32)])


def _error(directions: np.ndarray) -> float:
    """By which part of the squared norms a bound may be off: numbers, products and sums."""
    d, r = directions.shape
    return (2.1 * r**0.5 * (d + 16) + 2 * (d + r + 64)) * _ROUNDING


def lower_bounds(
    product: np.ndarray, own: Any, squares: np.ndarray, directions: np.ndarray
) -> np.ndarray:
    """Of squared distances, by the inner products of what `projected` makes of both sides.

    Args:
        product: of one query, [m], or of several, [q, m].
        own: their squared norms: a number, or [q, 1].
        squares: of the gallery's rows, [m] or [1, m].
        directions: [d, r], that both sides were projected along.
    """
    lengths = np.float32(own) + squares
    return lengths * np.float32(1 - _error(directions)) - 2 * product - np.float32(1e-30)


def may_be_nearest(
    query: np.ndarray, lower: np.ndarray, gallery: np.ndarray, places: np.ndarray, k: int
) -> np.ndarray:
    """Which of the places may be among the k nearest, in any rounding of ties.

    Args:
        query: [d] float32.
        lower: of the places the `lower_bounds`, [m].
        gallery: [n, d] float32.
        places: [m] ascending.
        k: at most m.
    """
    lowest = np.argpartition(lower, k - 1)[:k]
    difference = gallery[places[lowest]].astype(np.float64) - query
    kth = np.max(np.einsum("ij,ij->i", difference, difference))
    return places[lower <= np.float32(kth * (1 + 2.0**-20) + 1e-30)]


def _share_left(some: Narrow, sample: np.ndarray, squares: np.ndarray, n: int) -> float:
    """Of the rows of a sample of n, as queries, the share of the others that bounds leave."""
    tried = np.linspace(0, len(sample) - 1, _TRIED).astype(int)
    distances = squares[tried, None] + squares - 2 * (sample[tried] @ sample.T)
    products = some.along[tried] @ some.along.T
    # Rows beside the tried one, in its run, are no sample of the others.
    distances[np.arange(len(sample)) // 16 == tried[:, None] // 16] = np.inf
    # As near as the k-th of all is the first of so few.
    k = max(1, round(_K * len(sample) / n))
    kth = np.partition(distances, k - 1, axis=1)[:, k - 1]
    own, others = squares[tried, None], squares[None]
    lower = lower_bounds(products, own, others, some.directions)
    return float(np.mean((lower <= kth[:, None]) & (distances < np.inf)))
