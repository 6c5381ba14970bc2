"""Retrieval metrics from hits alone: NumPy arrays in, floats out, summed in float64.

``matches[i, j]`` says whether the item at rank j + 1 of query i is relevant, ``num_relevant[i]``
how many relevant items the gallery holds for it (R), whatever was retrieved. Three conventions of
mAP@K are in use and differ a lot, so each has a name of its own; `METRIC_DEFINITIONS` tells them
apart, and every printed table should quote it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

METRIC_DEFINITIONS: Mapping[str, str] = {
    "map@K": "mean over queries of (sum of P_i at hit ranks i <= K) / (hits among the first K); "
    "0 without hits (the paper's eq. 5 to 7)",
    "map_min@K": "the same sum / min(K, R), R = relevant items in the gallery",
    "map_all@K": "the same sum / R",
    "precision@K": "hits among the first K / K",
    "recall@K": "share of queries with a hit among the first K (CMC)",
    "map@R": "(sum of P_i at hit ranks i <= R) / R",
    "r_precision": "hits among the first R / R",
    "mrr": "1 / rank of the first hit among those retrieved; 0 without a hit",
    "num_queries": "number of queries, those left out included",
    "num_left_out": "queries without a relevant item in the gallery, left out of every mean",
}
_ROWS = 1024


def retrieval_metrics(
    matches: ArrayLike, num_relevant: ArrayLike, ks: Sequence[int] = (5, 10, 20)
) -> dict[str, float]:
    """Means of all metrics over the queries that have a relevant item.

    With hits h_i in {0, 1} at rank i and P_i = (h_1 + ... + h_i) / i, the metrics are those of
    `METRIC_DEFINITIONS`: ``map@K`` as in the paper, ``map_min@K``, ``map_all@K`` (for K the whole
    ranking, scikit-learn's average precision), ``precision@K``, ``recall@K``, ``mrr``, ``map@R``
    and ``r_precision``. The last two look at the first R ranks: they are left out of the result
    where the ranking is shorter than the largest R, since they would come out too low.

    Args:
      matches: ``[q, k]`` bool, nearest first; False where a row has no item left (index -1).
      num_relevant: ``[q]`` integers, relevant items in the gallery, ignored ones not counted.
      ks: The K to report, at most k each.

    Returns:
      A dict of floats, with ``num_queries`` and ``num_left_out``. A mean over no query is NaN.

    Raises:
      ValueError: For wrong shapes or dtypes, a K out of range, or more hits than relevant items.

    Example:
      >>> metrics = retrieval_metrics([[True, False, True, False, False]], [3], ks=(5,))
      >>> {name: round(value, 4) for name, value in metrics.items() if name.startswith("map")}
      {'map@5': 0.8333, 'map_min@5': 0.5556, 'map_all@5': 0.5556, 'map@R': 0.5556}
    """
    per_query = per_query_metrics(matches, num_relevant, ks)
    return _means(per_query, np.asarray(num_relevant) > 0)


def per_query_metrics(
    matches: ArrayLike, num_relevant: ArrayLike, ks: Sequence[int] = (5, 10, 20)
) -> dict[str, np.ndarray]:
    """The metrics of `retrieval_metrics` for each query.

    Args:
      matches: ``[q, k]`` bool.
      num_relevant: ``[q]`` integers.
      ks: The K to report, at most k each.

    Returns:
      A dict of ``[q]`` float64 arrays, NaN for the queries without a relevant item.

    Raises:
      ValueError: As `retrieval_metrics` does.

    Example:
      >>> values = per_query_metrics([[False, True], [False, False]], [1, 0], ks=(2,))
      >>> values["map@2"].tolist(), values["precision@2"].tolist()
      ([0.5, nan], [0.5, nan])
    """
    matches, num_relevant = _checked(matches, num_relevant, ks)
    # Blocks of queries: the cumulative sums of 10,000 full rankings would take gigabytes.
    starts = range(0, max(len(matches), 1), _ROWS)
    complete = int(num_relevant.max(initial=0)) <= matches.shape[1]
    blocks = [
        _block(matches[i : i + _ROWS], num_relevant[i : i + _ROWS], ks, complete) for i in starts
    ]
    values = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    for value in values.values():
        value[num_relevant == 0] = np.nan
    return values


def per_category_metrics(
    matches: ArrayLike,
    num_relevant: ArrayLike,
    categories: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
) -> dict:
    """The metrics of `retrieval_metrics` for the queries of each category.

    Args:
      matches: ``[q, k]`` bool.
      num_relevant: ``[q]`` integers.
      categories: ``[q]``, the category of each query (integers or strings).
      ks: The K to report, at most k each.

    Returns:
      Category -> metrics, in ascending order of the categories.

    Raises:
      ValueError: As `retrieval_metrics` does, or if ``categories`` has another length.

    Example:
      >>> table = per_category_metrics([[True], [False]], [1, 1], ["coat", "dress"], ks=(1,))
      >>> {category: metrics["precision@1"] for category, metrics in table.items()}
      {'coat': 1.0, 'dress': 0.0}
    """
    per_query = per_query_metrics(matches, num_relevant, ks)
    categories, counted = np.asarray(categories), np.asarray(num_relevant) > 0
    if categories.shape != counted.shape:
        raise ValueError(f"categories have shape {categories.shape}, expected {counted.shape}")
    table = {}
    for category in np.unique(categories):
        rows = categories == category
        chosen = {name: values[rows] for name, values in per_query.items()}
        table[category.item()] = _means(chosen, counted[rows])
    return table


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries.

    Queries are drawn with replacement ``resamples`` times (Efron and Tibshirani 1993, chapter 13).
    NaN values, the queries left out, are not drawn. The same seed gives the same interval.

    Args:
      values: ``[q]``, one metric of `per_query_metrics`.
      confidence: Between 0 and 1.
      resamples: How many means to draw.
      seed: Of NumPy's default generator.

    Returns:
      (low, high), in the unit of the values; NaN without any value.

    Raises:
      ValueError: If ``values`` is not ``[q]``, or for a confidence or resamples out of range.

    Example:
      >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
      >>> round(low, 2), round(high, 2)
      (0.4, 0.6)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"bootstrap_interval: values of shape {values.shape}, confidence {confidence}, "
            f"resamples {resamples}; expected [q], between 0 and 1, at least 1"
        )
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    # Blocks of about a million draws, which stay in the cache's neighbourhood.
    rows = max(1, 2**20 // len(values))
    means = np.concatenate(
        [
            values[generator.integers(len(values), size=(min(rows, resamples - i), len(values)))]
            .mean(axis=1)
            for i in range(0, resamples, rows)
        ]
    )  # fmt: skip
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def t_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent measurements, such as one run a seed.

    mean -+ t s / sqrt(n), s the standard deviation with n - 1 in its divisor, t the quantile of
    Student's distribution with n - 1 degrees of freedom (Student 1908). It holds for values that
    are normally distributed, and covers what varies between them and nothing else: for runs of
    several seeds on one split the training, not the choice of queries. Of differences between
    pairs, such as two models' of one seed, it is the paired t interval.

    Args:
      values: ``[n]``.
      confidence: Between 0 and 1.

    Returns:
      (low, high), in the unit of the values; NaN for fewer than two values, which tell nothing of
      their spread.

    Raises:
      ValueError: If ``values`` is not ``[n]``, or for a confidence out of range.

    Example:
      >>> low, high = t_interval([0.60, 0.62, 0.67])
      >>> round(low, 3), round(high, 3)
      (0.54, 0.72)
    """
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not 0 < confidence < 1:
        raise ValueError(
            f"t_interval: values of shape {values.shape}, confidence {confidence}; expected [n], "
            "between 0 and 1"
        )
    if len(values) < 2:
        return float("nan"), float("nan")
    quantile = stdtrit(len(values) - 1, (1 + confidence) / 2)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def label_matches(
    indices: ArrayLike, query_labels: ArrayLike, gallery_labels: ArrayLike
) -> np.ndarray:
    """Which retrieved items have the query's label.

    Args:
      indices: ``[q, k]`` integers into the gallery, -1 where a row has no item left.
      query_labels: ``[q]``, integers or strings.
      gallery_labels: ``[n]``, likewise.

    Returns:
      ``[q, k]`` bool, False at index -1.

    Example:
      >>> label_matches([[0, 2, -1]], [7], [7, 8, 8]).tolist()
      [[True, False, False]]
    """
    indices, query_labels = np.asarray(indices), np.asarray(query_labels)
    gallery_labels = np.asarray(gallery_labels)
    return (gallery_labels[indices] == query_labels[:, None]) & (indices >= 0)


def count_relevant(
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    query_in_gallery: ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
) -> np.ndarray:
    """How many gallery items have each query's label, not counting the ignored ones.

    The counterpart of what `cbam_jax.search.search` ignores: the query itself, or its whole group.

    Args:
      query_labels: ``[q]``, integers or strings.
      gallery_labels: ``[n]``, likewise.
      query_in_gallery: ``[q]`` bool or one bool, whether the query itself is in the gallery and
        ignored; unused with groups, since a query is of its own group.
      query_group: ``[q]``, or None.
      gallery_group: ``[n]``, or None; items with the query's group are ignored.

    Returns:
      ``[q]`` int64, R of the metrics.

    Example:
      >>> count_relevant([7, 8], [7, 8, 8], query_in_gallery=True).tolist()
      [0, 1]
    """
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    counts = _count(query_labels[:, None], gallery_labels[:, None])
    if query_group is None or gallery_group is None:
        return counts - np.asarray(query_in_gallery, np.int64)
    # Labels and groups as integers, so that pairs of them can be counted as rows of a matrix.
    label = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)[1]
    groups = np.concatenate([np.asarray(query_group), np.asarray(gallery_group)])
    pair = np.stack([label, np.unique(groups, return_inverse=True)[1]], axis=1)
    return counts - _count(pair[: len(query_labels)], pair[len(query_labels) :])


def _count(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """How often each row of ``queries`` occurs in ``gallery``."""
    rows = np.concatenate([queries, gallery])
    _, inverse = np.unique(rows, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return np.bincount(inverse[len(queries) :], minlength=len(rows))[inverse[: len(queries)]]


def _block(
    matches: np.ndarray, num_relevant: np.ndarray, ks: Sequence[int], complete: bool
) -> dict[str, np.ndarray]:
    hits = np.cumsum(matches, axis=1, dtype=np.int32)
    ranks = np.arange(1, matches.shape[1] + 1)
    # S_k, the sum over the hit ranks up to k of the precision there; the numerator of every mAP.
    sums = np.cumsum(np.where(matches, hits / ranks, 0.0), axis=1)
    relevant = np.maximum(num_relevant, 1)

    values = {}
    for k in ks:
        retrieved, total = hits[:, k - 1], sums[:, k - 1]
        values[f"map@{k}"] = total / np.maximum(retrieved, 1)
        values[f"map_min@{k}"] = total / np.minimum(relevant, k)
        values[f"map_all@{k}"] = total / relevant
        values[f"precision@{k}"] = retrieved / k
        values[f"recall@{k}"] = (retrieved > 0).astype(np.float64)
    if complete:
        rows = np.arange(len(matches))
        values["map@R"] = sums[rows, relevant - 1] / relevant
        values["r_precision"] = hits[rows, relevant - 1] / relevant
    first = np.argmax(matches, axis=1)
    values["mrr"] = np.where(matches.any(axis=1), 1.0 / (first + 1), 0.0)
    return values


def _means(per_query: dict[str, np.ndarray], counted: np.ndarray) -> dict[str, float]:
    means = {
        name: float(values[counted].mean()) if counted.any() else float("nan")
        for name, values in per_query.items()
    }
    left_out = len(counted) - np.count_nonzero(counted)
    return {**means, "num_queries": float(len(counted)), "num_left_out": float(left_out)}


def _checked(
    matches: ArrayLike, num_relevant: ArrayLike, ks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    matches, num_relevant = np.asarray(matches), np.asarray(num_relevant)
    if matches.ndim != 2 or not matches.shape[1] or num_relevant.shape != matches.shape[:1]:
        raise ValueError(
            f"matches have shape {matches.shape} and num_relevant {num_relevant.shape}, "
            "expected [q, k] and [q]"
        )
    if matches.dtype != bool or not np.issubdtype(num_relevant.dtype, np.integer):
        raise ValueError(
            f"matches have dtype {matches.dtype} and num_relevant {num_relevant.dtype}, "
            "expected bool and integers"
        )
    for k in ks:
        if not 1 <= k <= matches.shape[1]:
            raise ValueError(
                f"K is {k}, but matches have {matches.shape[1]} ranks; retrieve more, or pad with "
                "False where the gallery is smaller than K"
            )
    wrong = np.flatnonzero(matches.sum(axis=1) > num_relevant)
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"query {i} has {matches[i].sum()} hits but num_relevant {num_relevant[i]}: "
            "count relevant items with the same items ignored as in the search"
        )
    return matches, num_relevant
