"""Which pass to begin with: one whose bounds can tell the k-th nearest from those behind it.

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
    sample = queries.taken(np.linspace(0, len(queries.rows) - 1, _SAMPLE).astype(int))
    spread = _spread_within_clusters(sample.rows)
    if spread is None:
        return passes[0]
    for dtype in passes[:-1]:
        error = _error(sample, preparation._replace(dtype=dtype))
        if error < _BEARABLE[dtype] * spread:
            return dtype
    return passes[-1]


def _spread_within_clusters(x: np.ndarray) -> float | None:
    """Standard deviation of the squared distances within clusters; None if there are none."""
    x = x.astype(np.float64)
    squares = np.sum(x * x, axis=1)
    # Not x @ x.T: a BLAS's threads spin on for some 30 ms, on the cores that the search needs.
    distances = squares[:, None] + squares[None, :] - 2 * np.einsum("id,jd->ij", x, x)
    np.fill_diagonal(distances, np.inf)
    others = distances[np.isfinite(distances)]
    nearest = distances.min(axis=1)
    if not np.median(nearest) < _CLUSTERED * others.mean():
        return None
    return float(np.std(others[others < _CLUSTERED * others.mean()]))


def _error(sample: Queries, preparation: Preparation) -> float:
    """By how much a bound is below the squared distance, about, in the distances' unit."""
    x, share = (np.asarray(a, np.float64) for a in prepared(*sample[:2], preparation))
    lost = np.sum(x * x, axis=1) - share
    return 2 * float(np.mean(lost)) / float(preparation.scale) ** 2
