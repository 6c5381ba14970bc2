"""Retrieval metrics from hits alone: NumPy arrays in, floats out, summed in float64.

Inside `jax.jit` they take traced arrays and return such, float32, so that a program can evaluate
itself; what needs the values to know a result's size or order says that it runs on the host.

``matches[i, j]`` says whether the item at rank j + 1 of query i is relevant, ``num_relevant[i]``
how many relevant items the gallery holds for it (R), whatever was retrieved. Three conventions of
mAP@K are in use and differ a lot, so each has a name of its own; `METRIC_DEFINITIONS` tells them
apart, and every printed table should quote it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.relevance import (
    count_relevant,
    label_matches,
    over_any_mesh,
    plain_labels,
    traced,
)

__all__ = [
    "METRIC_DEFINITIONS",
    "bootstrap_interval",
    "count_relevant",
    "label_matches",
    "ndcg",
    "per_category_metrics",
    "per_query_metrics",
    "retrieval_metrics",
    "t_interval",
]
METRIC_DEFINITIONS: Mapping[str, str] = {
    "map@K": "mean over queries of (sum of P_i at hit ranks i <= K) / (hits among the first K); "
    "0 without hits (the paper's eq. 5 to 7)",
    "map_min@K": "the same sum / min(K, R), R = relevant items in the gallery",
    "map_all@K": "the same sum / R",
    "precision@K": "hits among the first K / K",
    "recall@K": "share of queries with a hit among the first K (CMC)",
    "map@R": "(sum of P_i at hit ranks i <= R) / R",
    "r_precision": "hits among the first R / R",
    "mrr": "1 / rank of the first hit; 0 without one among the ranks given",
    "ndcg@K": "DCG among the first K / the DCG of the best order of the gallery; an item's gain is "
    "its grade (linear) or 2^grade - 1 (exp2), divided by log2(rank + 1)",
    "num_queries": "number of queries, those left out included",
    "num_left_out": "queries without a relevant item in the gallery, left out of every mean",
}
_GAINS = ("linear", "exp2")
_ROWS = 1024


def retrieval_metrics(
    matches: ArrayLike,
    num_relevant: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
    *,
    first_rank: ArrayLike | None = None,
) -> dict[str, Any]:
    """Means of all metrics over the queries that have a relevant item.

    With hits h_i in {0, 1} at rank i and P_i = (h_1 + ... + h_i) / i, the metrics are those of
    `METRIC_DEFINITIONS`: ``map@K`` as in the paper, ``map_min@K``, ``map_all@K`` (for K the whole
    ranking, scikit-learn's average precision), ``precision@K``, ``recall@K``, ``mrr``, ``map@R``
    and ``r_precision``. The last two look at the first R ranks: they are left out of the result
    where the ranking is shorter than the largest R, since they would come out too low. So does
    ``mrr`` where a query's first relevant item lies beyond the ranking: give ``first_rank``.

    Args:
      matches: ``[q, k]`` bool, nearest first; False where a row has no item left (index -1).
      num_relevant: ``[q]`` integers, relevant items in the gallery, ignored ones not counted.
      ks: The K to report, at most k each.
      first_rank: ``[q]`` integers, the rank of each query's first relevant item in the whole
        gallery, 0 for none, as `cbam_jax.search.first_ranks` counts it; None: that of the hits.

    Returns:
      A dict of floats, with ``num_queries`` and ``num_left_out``. A mean over no query is NaN. Of
      traced arrays a dict of float32 scalars, in which ``map@R`` and ``r_precision`` are NaN where
      they would be left out.

    Raises:
      ValueError: For wrong shapes or dtypes, a K out of range, or more hits than relevant items
        (of traced arrays the last is not checked).

    Example:
      >>> metrics = retrieval_metrics([[True, False, True, False, False]], [3], ks=(5,))
      >>> {name: round(value, 4) for name, value in metrics.items() if name.startswith("map")}
      {'map@5': 0.8333, 'map_min@5': 0.5556, 'map_all@5': 0.5556, 'map@R': 0.5556}

      A program that evaluates itself, leaving each query out of its own neighbours:

      >>> import jax
      >>> from cbam_jax.search import top_k
      >>> @jax.jit
      ... def evaluate(embeddings, labels):
      ...     _, indices = top_k(embeddings, embeddings, 2, exclude_self=True)
      ...     relevant = count_relevant(labels, labels, query_in_gallery=True)
      ...     return retrieval_metrics(label_matches(indices, labels, labels), relevant, ks=(1, 2))
      >>> metrics = evaluate(np.float32([[0], [1], [3], [7]]), np.array([5, 5, 5, 5]))
      >>> float(metrics["precision@2"]), float(metrics["num_queries"])
      (1.0, 4.0)
    """
    per_query = per_query_metrics(matches, num_relevant, ks, first_rank=first_rank)
    if xp := traced(matches, num_relevant):
        return over_any_mesh(_traced_means, (per_query, xp.asarray(num_relevant) > 0))
    return _means(per_query, np.asarray(num_relevant) > 0)


def per_query_metrics(
    matches: ArrayLike,
    num_relevant: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
    *,
    first_rank: ArrayLike | None = None,
) -> dict[str, Any]:
    """The metrics of `retrieval_metrics` for each query.

    Args:
      matches: ``[q, k]`` bool.
      num_relevant: ``[q]`` integers.
      ks: The K to report, at most k each.
      first_rank: ``[q]`` integers, or None.

    Returns:
      A dict of ``[q]`` float64 arrays (float32 of traced ones), NaN for the queries without a
      relevant item.

    Raises:
      ValueError: As `retrieval_metrics` does.

    Example:
      >>> values = per_query_metrics([[False, True], [False, False]], [1, 0], ks=(2,))
      >>> values["map@2"].tolist(), values["precision@2"].tolist()
      ([0.5, nan], [0.5, nan])
    """
    hits, relevant = _checked(matches, num_relevant, ks)
    if traced(hits, relevant):
        find = functools.partial(_traced_metrics, ks=ks)
        given = (hits, relevant) if first_rank is None else (hits, relevant, first_rank)
        return over_any_mesh(find, given, by_rows=True)
    # Blocks of queries: the cumulative sums of 10,000 full rankings would take gigabytes.
    starts = range(0, max(len(hits), 1), _ROWS)
    complete = int(relevant.max(initial=0)) <= hits.shape[1]
    blocks = [
        _block(np, hits[i : i + _ROWS], relevant[i : i + _ROWS], ks, complete) for i in starts
    ]
    values = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    if first_rank is not None:
        values["mrr"] = _reciprocal(np, first_rank)
    for value in values.values():
        value[relevant == 0] = np.nan
    return values


def _reciprocal(xp: Any, rank: Any) -> Any:
    """1 / rank, 0 for none."""
    real = np.float64 if xp is np else np.float32
    rank = xp.asarray(rank).astype(real)
    return xp.where(rank > 0, 1 / xp.maximum(rank, 1), 0)


def per_category_metrics(
    matches: ArrayLike,
    num_relevant: ArrayLike,
    categories: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
    *,
    first_rank: ArrayLike | None = None,
) -> dict:
    """The metrics of `retrieval_metrics` for the queries of each category; on the host alone.

    Args:
      matches: ``[q, k]`` bool.
      num_relevant: ``[q]`` integers.
      categories: ``[q]``, the category of each query (integers or strings).
      ks: The K to report, at most k each.
      first_rank: ``[q]`` integers, or None.

    Returns:
      Category -> metrics, in ascending order of the categories.

    Raises:
      ValueError: As `retrieval_metrics` does, or if ``categories`` has another length.
      TypeError: For traced arrays.

    Example:
      >>> table = per_category_metrics([[True], [False]], [1, 1], ["coat", "dress"], ks=(1,))
      >>> {category: metrics["precision@1"] for category, metrics in table.items()}
      {'coat': 1.0, 'dress': 0.0}
    """
    _on_host("per_category_metrics", matches, num_relevant, categories)
    per_query = per_query_metrics(matches, num_relevant, ks, first_rank=first_rank)
    categories, counted = plain_labels("categories", categories), np.asarray(num_relevant) > 0
    if categories.shape != counted.shape:
        raise ValueError(f"categories have shape {categories.shape}, expected {counted.shape}")
    names, group = np.unique(categories, return_inverse=True)
    queries, kept = (np.bincount(rows, minlength=len(names)) for rows in (group, group[counted]))
    columns = {
        name: _group_means(values[counted], group[counted], kept)
        for name, values in per_query.items()
    }
    columns |= {"num_queries": queries * 1.0, "num_left_out": (queries - kept) * 1.0}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    means = (dict(zip(columns, row, strict=True)) for row in rows)
    return dict(zip(names.tolist(), means, strict=True))


def ndcg(grades: ArrayLike, gallery_grades: ArrayLike, k: int, *, gain: str = "linear") -> Any:
    """Normalised discounted cumulative gain at K of each query, for relevance that has grades.

    DCG@K is the sum over the ranks i <= K of gain / log2(i + 1); nDCG@K divides it by that of the
    best order of the gallery (Jarvelin and Kekalainen 2002). Two gains are in use, so each has a
    name: ``"linear"``, the grade itself, as in trec_eval, BEIR and scikit-learn; ``"exp2"``,
    2^grade - 1 (Burges et al. 2005), as in much of the literature on learning to rank. Of grades 0
    and 1 both are the same.

    Ties are broken by the ranking's own order, which is (distance, gallery index) of `search`.
    scikit-learn's ``ndcg_score`` takes the mean over all orders of a tie instead, so the two agree
    where no two scores are equal; and it counts a query without a relevant item as 0, which is
    left out here.

    Args:
      grades: ``[q, k']`` numbers, not negative, grades of the items found, nearest first; 0 where a
        row has no item left. K is at most k'.
      gallery_grades: ``[q, n]``, grades of the whole gallery in any order, ignored items at 0; the
        K highest suffice.
      k: K.
      gain: ``"linear"`` or ``"exp2"``.

    Returns:
      ``[q]`` float64 (float32 of traced arrays), NaN for queries without a relevant item; the mean
      is ``np.nanmean``.

    Raises:
      ValueError: For wrong shapes, a K out of range, an unknown gain, a grade that is negative or
        not finite, or a row that found more than the gallery holds (of traced arrays not checked).

    Example:
      >>> ndcg([[1, 0, 2]], [[0, 2, 1, 0]], k=3).round(4).tolist()
      [0.7602]
      >>> ndcg([[1, 0, 2]], [[0, 2, 1, 0]], k=3, gain="exp2").round(4).tolist()
      [0.6885]
    """
    xp = traced(grades, gallery_grades) or np
    found, best = xp.asarray(grades), xp.asarray(gallery_grades)
    if found.ndim != 2 or best.ndim != 2 or len(found) != len(best):
        raise ValueError(
            f"grades have shape {found.shape} and gallery_grades {best.shape}, expected [q, k'] "
            "and [q, n]"
        )
    if gain not in _GAINS or not 1 <= k <= found.shape[1]:
        raise ValueError(
            f"ndcg: K is {k} of {found.shape[1]} ranks, gain {gain!r}; expected 1 to that, and one "
            f"of {', '.join(_GAINS)}"
        )
    values, ideal = (_discounted(xp, a, k, gain) for a in (found, -xp.sort(-best, axis=1)))
    if xp is np:
        _check_grades(found, best, values, ideal)
    return xp.where(ideal > 0, values / xp.where(ideal > 0, ideal, 1), np.nan)


def _discounted(xp: Any, grades: Any, k: int, gain: str) -> Any:
    """DCG@K of each row, [q]."""
    real = np.float64 if xp is np else np.float32
    gains = grades[:, :k].astype(real)
    if gain == "exp2":
        gains = xp.exp2(gains) - 1
    return gains @ (1 / np.log2(np.arange(2, gains.shape[1] + 2))).astype(real)


def _check_grades(found: np.ndarray, best: np.ndarray, values: Any, ideal: Any) -> None:
    """ValueError for grades that no gallery could have."""
    for name, grades in (("grades", found), ("gallery_grades", best)):
        if not np.all(np.isfinite(grades)) or np.any(grades < 0):
            raise ValueError(f"{name} hold numbers that are negative or not finite")
    wrong = np.flatnonzero(values > ideal * (1 + 1e-9))
    if len(wrong):
        raise ValueError(
            f"query {wrong[0]} found grades that are higher than those of its gallery: give the "
            "grades of the whole gallery"
        )


def _group_means(values: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Means of the values of each group, summed in one pass however many there are."""
    sums = np.bincount(group, weights=values, minlength=len(sizes))
    return np.where(sizes > 0, sums, np.nan) / np.maximum(sizes, 1)


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries; on the host alone.

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
      TypeError: For a traced array.

    Example:
      >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
      >>> round(low, 2), round(high, 2)
      (0.4, 0.6)
    """
    _on_host("bootstrap_interval", values)
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
      TypeError: For a traced array.

    Example:
      >>> low, high = t_interval([0.60, 0.62, 0.67])
      >>> round(low, 3), round(high, 3)
      (0.54, 0.72)
    """
    from scipy.special import stdtrit

    _on_host("t_interval", values)
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


def _block(
    xp: Any, matches: Any, num_relevant: Any, ks: Sequence[int], complete: bool
) -> dict[str, Any]:
    """The metrics of some queries, by the functions of ``xp``: NumPy, or jax.numpy."""
    real = np.float64 if xp is np else np.float32
    hits = xp.cumsum(matches, axis=1, dtype=np.int32)
    ranks = xp.arange(1, matches.shape[1] + 1, dtype=real)[None, :]
    # S_k, the sum over the hit ranks up to k of the precision there; the numerator of every mAP.
    sums = xp.cumsum(xp.where(matches, hits.astype(real) / ranks, 0.0), axis=1)
    relevant = xp.maximum(num_relevant, 1)
    all_relevant = relevant.astype(real)

    values = {}
    for k in ks:
        retrieved, total = hits[:, k - 1].astype(real), sums[:, k - 1]
        values[f"map@{k}"] = total / xp.maximum(retrieved, 1)
        values[f"map_min@{k}"] = total / xp.minimum(all_relevant, k)
        values[f"map_all@{k}"] = total / all_relevant
        values[f"precision@{k}"] = retrieved / k
        values[f"recall@{k}"] = (retrieved > 0).astype(real)
    if complete:
        last = xp.minimum(relevant, matches.shape[1])[:, None] - 1
        values["map@R"] = xp.take_along_axis(sums, last, axis=1)[:, 0] / all_relevant
        found = xp.take_along_axis(hits, last, axis=1)[:, 0]
        values["r_precision"] = found.astype(real) / all_relevant
    first = xp.where(matches.any(axis=1), xp.argmax(matches, axis=1) + 1, 0)
    values["mrr"] = _reciprocal(xp, first)
    return values


def _means(per_query: dict[str, np.ndarray], counted: np.ndarray) -> dict[str, float]:
    means = {
        name: float(values[counted].mean()) if counted.any() else float("nan")
        for name, values in per_query.items()
    }
    left_out = len(counted) - np.count_nonzero(counted)
    return {**means, "num_queries": float(len(counted)), "num_left_out": float(left_out)}


def _traced_means(per_query: dict[str, Any], counted: Any) -> dict[str, Any]:
    import jax.numpy as jnp

    count = jnp.sum(counted, dtype=np.float32)
    means = {
        name: jnp.sum(jnp.where(counted, values, 0.0)) / count for name, values in per_query.items()
    }
    queries = jnp.full((), len(counted), np.float32)
    return {**means, "num_queries": queries, "num_left_out": queries - count}


def _traced_metrics(
    matches: Any, num_relevant: Any, first_rank: Any = None, *, ks: Sequence[int]
) -> dict[str, Any]:
    """`per_query_metrics` of traced arrays: a result's names cannot depend on values."""
    import jax.numpy as jnp

    values = _block(jnp, matches, num_relevant, ks, True)
    if first_rank is not None:
        values["mrr"] = _reciprocal(jnp, first_rank)
    complete = jnp.max(num_relevant, initial=0) <= matches.shape[1]
    for name in ("map@R", "r_precision"):
        values[name] = jnp.where(complete, values[name], jnp.nan)
    return {name: jnp.where(num_relevant > 0, value, jnp.nan) for name, value in values.items()}


def _checked(matches: Any, num_relevant: Any, ks: Sequence[int]) -> tuple[Any, Any]:
    xp = traced(matches, num_relevant) or np
    matches, num_relevant = xp.asarray(matches), xp.asarray(num_relevant)
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
    if xp is not np:
        return matches, num_relevant
    wrong = np.flatnonzero(matches.sum(axis=1) > num_relevant)
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"query {i} has {matches[i].sum()} hits but num_relevant {num_relevant[i]}: "
            "count relevant items with the same items ignored as in the search"
        )
    return matches, num_relevant


def _on_host(name: str, *arrays: Any) -> None:
    if traced(*arrays):
        raise TypeError(
            f"{name} runs on the host: its arrays are traced; return them from the jitted function "
            "and call it there"
        )
