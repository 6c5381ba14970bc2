"""How embeddings lie: which pass to begin with, so that its bounds can tell neighbours apart.

The better a model is trained, the tighter its clusters, and the errors of a product are a share of
the embeddings' norms, not of the short distances within a cluster. Where a pass would prove
nothing, its product is saved. A wrong guess costs time alone.
"""

from collections.abc import Sequence

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


def first_useful(passes: Sequence[str], queries: Queries, preparation: Preparation) -> str:
    """The first of ``passes`` that is likely to prove something, the last if none is.

    Queries stand for the gallery: where the nearest of a few of them are much nearer than most,
    they are in clusters, and the spread of the distances within a cluster, beside the error of the
    bounds, says whether neighbours can be told apart.
    """
    if not preparation.metric.endswith("euclidean") or len(queries.rows) < _SAMPLE:
        return passes[0]
    sample = queries.taken(_sampled(queries))
    spread = _spread_within_clusters(sample.rows)
    if spread is None:
        return passes[0]
    for dtype in passes[:-1]:
        error = _error(sample, preparation._replace(dtype=dtype))
        if error < _BEARABLE[dtype] * spread:
            return dtype
    return passes[-1]


def cluster_radius(queries: Queries, metric: str) -> float | None:
    """The squared distance (of unit vectors, if cosine) up to which queries are in one cluster.

    None where there are too few queries to tell, or no clusters.
    """
    if len(queries.rows) < _SAMPLE:
        return None
    x = queries.rows[_sampled(queries)].astype(np.float64)
    if metric == "cosine":
        squares = np.sum(x * x, axis=1, keepdims=True)
        x = x / np.sqrt(np.where(squares > 0, squares, 1.0))
    others = distances_if_clustered(x)
    return None if others is None else _CLUSTERED * float(others.mean())


def _sampled(queries: Queries) -> np.ndarray:
    return np.linspace(0, len(queries.rows) - 1, _SAMPLE).astype(int)


def _spread_within_clusters(x: np.ndarray) -> float | None:
    """Standard deviation of the squared distances within clusters; None if there are none."""
    others = distances_if_clustered(x.astype(np.float64), _CLUSTERED)
    return None if others is None else float(np.std(others[others < _CLUSTERED * others.mean()]))


def distances_if_clustered(x: np.ndarray, share: float = _TIGHT) -> np.ndarray | None:
    """Squared distances between rows, if half of the nearest are below a share of their mean."""
    squares = np.sum(x * x, axis=1)
    # Not x @ x.T: a BLAS's threads spin on for some 30 ms, on the cores that the search needs.
    distances = squares[:, None] + squares[None, :] - 2 * np.einsum("id,jd->ij", x, x)
    np.fill_diagonal(distances, np.inf)
    others = distances[np.isfinite(distances)]
    clustered = np.median(distances.min(axis=1)) < share * others.mean()
    return others if clustered else None


def _error(sample: Queries, preparation: Preparation) -> float:
    """By how much a bound is below the squared distance, about, in the distances' unit."""
    x, share = (np.asarray(a, np.float64) for a in prepared(*sample[:2], preparation))
    lost = np.sum(x * x, axis=1) - share
    return 2 * float(np.mean(lost)) / float(preparation.scale) ** 2
