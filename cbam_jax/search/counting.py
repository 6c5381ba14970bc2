"""At which rank the first relevant item is, in a ranking of everything that is never made."""

from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.search import arguments
from cbam_jax.search.exhaustive import double_bounds, exhaustive_search
from cbam_jax.search.pairs import on_device, pair_distances
from cbam_jax.search.shards import split_gallery, squared_norms, view_of
from cbam_jax.search.types import Labels, Queries, Shard, ignores

_BLOCK = (64, 4096)  # Queries and gallery items at a time.


def first_ranks(
    queries: ArrayLike,
    gallery: ArrayLike,
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    *,
    metric: str = "euclidean",
    exclude_self: bool | ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
) -> np.ndarray:
    """The rank of each query's nearest relevant item among the whole gallery, exactly.

    1 plus the number of items that are nearer by (float32 distance, gallery index), the order of
    `search`: they are counted, in float64 where float32 cannot tell, and nothing is sorted. It
    takes O(q n d) operations on the host, so give those queries alone whose first relevant item a
    search has not found. 1 / rank is the reciprocal rank of the whole gallery, `first_rank` of
    `cbam_jax.metrics.retrieval_metrics`.

    Args:
      queries: ``[q, d]``, any float dtype; rounded to float32 first.
      gallery: ``[n, d]``, likewise.
      query_labels: ``[q]`` integers; an item of the same label is relevant.
      gallery_labels: ``[n]`` integers.
      metric: As in `search`, like the rest.
      exclude_self: True, or ``[q]`` integers.
      query_group: ``[q]`` integers, or None.
      gallery_group: ``[n]`` integers, or None.

    Returns:
      ``[q]`` int64, from 1; 0 where the gallery holds no relevant item.

    Raises:
      ValueError: As `search` does.

    Example:
      >>> gallery = np.array([[0.0], [2.0], [3.0], [9.0]], np.float32)
      >>> first_ranks(gallery, gallery, [7, 8, 7, 5], [7, 8, 7, 5], exclude_self=True).tolist()
      [2, 0, 2, 0]
    """
    queries, gallery, own, group = arguments.check_search(
        queries,
        gallery,
        1,
        metric,
        exclude_self=exclude_self,
        query_group=query_group,
        gallery_group=gallery_group,
    )
    q, n = len(queries), len(gallery)
    label = arguments.label_pair(query_labels, gallery_labels, q, n, "labels")
    query = Labels(own, group[0], label[0])
    items = Labels(np.arange(n, dtype=np.int32), group[1], label[1])
    (shard,) = split_gallery(gallery, jax.local_devices()[:1])
    rows = np.asarray(queries).astype(np.float32, copy=False)
    everyone = Queries(rows, squared_norms(rows, "queries"), query)
    nearest, index = exhaustive_search(everyone, [shard], 1, metric, items)
    ranks = np.zeros(q, np.int64)
    for i in range(0, q, _BLOCK[0]):
        part = slice(i, i + _BLOCK[0])
        some = everyone.taken(part)
        ranks[part] = _count_before(some, shard, (nearest[part], index[part]), metric, items)
    return np.where(index[:, 0] >= 0, ranks + 1, 0)


def _count_before(
    queries: Queries,
    shard: Shard,
    limit: tuple[np.ndarray, np.ndarray],
    metric: str,
    items: Labels,
) -> np.ndarray:
    """How many gallery items that a query does not ignore are before its limit, [q] int64."""
    # Here those of other labels count as well.
    x, query = queries.rows, queries.labels._replace(category=None).column()
    count = np.zeros(len(x), np.int64)
    source = view_of(shard)
    for first in range(0, len(source), _BLOCK[1]):
        y = np.asarray(source[first : first + _BLOCK[1]]).astype(np.float32)
        low, high = double_bounds(x, y, metric)
        counted = ~ignores(query, items.taken(slice(first, first + len(y))).row())
        nearer = high < limit[0]
        row, column = np.nonzero(counted & ~nearer & (low <= limit[0]))
        nearer[row, column] = _before(x, shard, row, column + first, limit, metric)
        count += np.count_nonzero(counted & nearer, axis=1)
    return count


def _before(
    x: np.ndarray, shard: Shard, row: np.ndarray, item: np.ndarray, limit: Any, metric: str
) -> np.ndarray:
    """Whether item[i] is before the limit of query row[i], [m] bool."""
    found = item.astype(np.int32)[:, None]
    exact = pair_distances(on_device(x, shard.device), shard, row.astype(np.int32), found, metric)
    at, index = limit[0][row, 0], limit[1][row, 0]
    return (exact[:, 0] < at) | ((exact[:, 0] == at) & (item < index))
