"""Along which directions, and how many, a projected gallery tells neighbours from others.

Embeddings of real photos are correlated: a few principal directions hold most of what tells them
apart, and their coordinates along those, with the length of the rest, bound distances well (see
`bounds`). Any directions are right; these are the eigenvectors of a sample's second moments. How
many is tried: of some rows' k-th distances, how many other rows' bounds are below.
"""

from typing import NamedTuple

import numpy as np

from cbam_jax.search.bounds import Preparation
from cbam_jax.search.groups import group_size

RUNS = 1024  # Of 16 rows, of each of which four teach directions: neighbours may be alike.
_LOOKED_AT = 64  # Rows that tell whether there is any correlation: a millisecond.
_CORRELATED = 0.25  # Effective dimensions over all, up to which projections are tried.
_STEP = 64  # Widths that are tried are multiples of it, less the length of the rest.
# What measuring a pair costs over the share of a pair in a product, by dtype: seen on two CPUs.
_PAIR = {"bfloat16": 150.0, "float32": 80.0}
_WORTH_WHILE = 0.6  # Of the cost of a product with whole embeddings, up to which a projection pays.
_ROUNDING = 0.01  # By which roundings widen bounds, about, in squared norms.


class Choice(NamedTuple):
    """Directions [d, r] float32, and of each k that was tried the candidates beyond it."""

    directions: np.ndarray
    candidates: tuple[tuple[int, int], ...]


def correlated(sample: np.ndarray) -> bool:
    """Whether rows are long and vary in few directions, by the inner products of some of them.

    Of independent rows their mean square over that of the norms is 1 / d where all directions are
    alike, and 1 / e with e effective dimensions.
    """
    if sample.shape[1] < 2 * _STEP:
        return False
    x = sample[:: -(-len(sample) // _LOOKED_AT)].astype(np.float32)
    x = x - x.mean(axis=0)
    # Not x @ x.T: a BLAS's threads spin on for some 30 ms, on the cores that the search needs.
    products = np.einsum("id,jd->ij", x, x).astype(np.float64)
    own = np.diag(products)
    others = products[~np.eye(len(x), dtype=bool)]
    return bool(np.mean(others**2) * x.shape[1] * _CORRELATED > np.mean(own) ** 2 > 0)


def principal_directions(sample: np.ndarray) -> np.ndarray:
    """The eigenvectors of the second moments of rows, the largest first; [d, d] float64."""
    return np.linalg.eigh(sample.T @ sample)[1][:, ::-1]


def contraction(directions: np.ndarray) -> np.ndarray:
    """As float32, shortened by so much that no rounding makes the norm of a projection above 1."""
    # Rounding moves columns by at most 2^-24 of their length, and r of them by sqrt(r) of that.
    return (directions * (1 - 2.0**-16)).astype(np.float32)


def choose(
    sample: np.ndarray,
    tried: np.ndarray,
    kth: np.ndarray,
    ks: list[int],
    n: int,
    settings: Preparation,
) -> Choice | None:
    """The width that costs least, None where no projection pays.

    ``sample`` are prepared rows of a gallery of n items, ``tried`` [t] those whose distances to
    their ``ks``-th neighbours are ``kth`` [t, len(ks)]. The middle k decides.
    """
    d, dtype = sample.shape[1], settings.dtype
    widths = range(_STEP - 1, d // 2, _STEP)
    directions = principal_directions(sample)
    limit = {"euclidean": kth**2, "squared_euclidean": kth}.get(settings.metric, 2 * kth)
    squared = settings.metric != "inner_product"
    along = sample @ directions[:, : widths[-1]]
    below = np.stack([_below(sample, along[:, :r], tried, limit, squared) for r in widths])
    # [widths, t, ks]: of the mean depends the cost, of nine tenths how many are kept.
    costs = (np.array(widths) + 1) / d + _PAIR[dtype] * _measured(below[:, :, len(ks) // 2], n)
    best = int(np.argmin(costs))
    if costs[best] > _WORTH_WHILE:
        return None
    most = np.quantile(below[best], 0.9, axis=0) * n
    return Choice(
        contraction(directions[:, : widths[best]]),
        tuple(
            (k, _rounded_up(count, 32))
            for k, count in zip(ks, most.tolist(), strict=True)
            if costs[best] + _PAIR[dtype] * count / n < 1
        ),
    )


def _measured(below: np.ndarray, n: int) -> np.ndarray:
    """The share of all pairs that are measured, in the mean, by the share below of [..., t] rows.

    Where two are in one group, the whole group is measured.
    """
    size = group_size(max(1, int(np.median(below) * n)), n)
    return np.mean(below + (size - 1) * size / 2 * below**2, axis=-1)


def _below(
    sample: np.ndarray,
    along: np.ndarray,
    tried: np.ndarray,
    limit: np.ndarray,
    squared: bool,
) -> np.ndarray:
    """The share of the sample, with its coordinates, whose bounds are below each limit [t, ks].

    Of the squared distance, or else of -2 times the inner product.
    """
    squares = np.sum(sample**2, axis=1)
    beyond = np.sqrt(np.maximum(squares - np.sum(along**2, axis=1), 0.0))
    products = along[tried] @ along.T + beyond[tried, None] * beyond
    squares = squares[tried, None] + squares
    bounds = (squared - _ROUNDING / 2) * squares - 2 * products
    # Rows beside the tried one, in its run, are no sample of the others.
    bounds[np.arange(len(sample)) // 4 == tried[:, None] // 4] = np.inf
    return np.mean(bounds[:, :, None] <= limit[:, None, :], axis=1)


def _rounded_up(count: float, step: int) -> int:
    return int(-(-max(count, 1) // step)) * step
