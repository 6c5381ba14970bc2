"""How embeddings lie: which pass to begin with, so that its bounds can tell neighbours apart.

The better a model is trained, the tighter its clusters, and the errors of a product are a share of
the embeddings' norms, not of the short distances within a cluster. Where a pass would prove
nothing, its product is saved. A wrong guess costs time alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cbam_jax.search.bounds import Preparation, prepared
from cbam_jax.search.types import Queries

_SAMPLE = 128  # Queries that are looked at: 2 ms.
_CLUSTERED = 0.25  # Distances (squared) below this share of their mean are within a cluster.
# Of the nearest: three times as far as they are, there are few of other clusters.
_TIGHT = 0.1
# Error up to which a pass proves about half of the queries or more, in standard deviations of the
# distances within a cluster: seen on clusters of 500 to 2,500 items, where k is 20.
_BEARABLE = {"bfloat16": 0.5, "float32": 0.3}


class Spread(NamedTuple):
    """Some queries, and their squared distances (of unit vectors, if cosine) to each other."""

    sample: Queries
    distances: np.ndarray


def spread_of(queries: Queries, metric: str) -> Spread | None:
    """How some of the queries lie; None where they are too few to tell."""
    if len(queries.rows) < _SAMPLE or metric == "inner_product":
        return None
    sample = queries.taken(np.linspace(0, len(queries.rows) - 1, _SAMPLE).astype(int))
    x = sample.rows.astype(np.float64)
    if metric == "cosine":
        squares = np.sum(x * x, axis=1, keepdims=True)
        x = x / np.sqrt(np.where(squares > 0, squares, 1.0))
    return Spread(sample, squared_distances(x))


def first_useful(passes: Sequence[str], spread: Spread | None, preparation: Preparation) -> str:
    """The first of ``passes`` that is likely to prove something, the last if none is.

    Queries stand for the gallery: where the nearest of a few of them are much nearer than most,
    they are in clusters, and the spread of the distances within a cluster, beside the error of the
    bounds, says whether neighbours can be told apart.
    """
    if spread is None or not preparation.metric.endswith("euclidean"):
        return passes[0]
    others = if_clustered(spread.distances, _CLUSTERED)
    if others is None:
        return passes[0]
    within = float(np.std(others[others < _CLUSTERED * others.mean()]))
    for dtype in passes[:-1]:
        error = _error(spread.sample, preparation._replace(dtype=dtype))
        if error < _BEARABLE[dtype] * within:
            return dtype
    return passes[-1]


def cluster_radius(spread: Spread | None) -> float | None:
    """The squared distance up to which queries are in one cluster; None if there are none."""
    others = None if spread is None else if_clustered(spread.distances)
    return None if others is None else _CLUSTERED * float(others.mean())


def squared_distances(x: np.ndarray) -> np.ndarray:
    """Between rows; of each to itself infinite."""
    squares = np.sum(x * x, axis=1)
    # Not x @ x.T: a BLAS's threads spin on for some 30 ms, on the cores that the search needs.
    distances = squares[:, None] + squares[None, :] - 2 * np.vecdot(x[:, None], x[None, :])
    np.fill_diagonal(distances, np.inf)
    return distances


def if_clustered(distances: np.ndarray, share: float = _TIGHT) -> np.ndarray | None:
    """The finite distances, if half of the nearest are below a share of their mean."""
    others = distances[np.isfinite(distances)]
    clustered = np.median(distances.min(axis=1)) < share * others.mean()
    return others if clustered else None


def _error(sample: Queries, preparation: Preparation) -> float:
    """By how much a bound is below the squared distance, about, in the distances' unit."""
    x, share = (np.asarray(a, np.float64) for a in prepared(*sample[:2], preparation))
    lost = np.sum(x * x, axis=1) - share
    return 2 * float(np.mean(lost)) / float(preparation.scale) ** 2
