"""What runs measured query by query and category by category, and how sure that makes a mean."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.foreign_files import read_arrays
from cbam_jax.metrics import bootstrap_interval, per_query_metrics

METRICS = ("map@10", "precision@10")
_K = 10


def per_query(evaluated: str | os.PathLike) -> dict[str, list[float | None]]:
    """Measure each query of an evaluation once more, by its ``neighbours.csv``.

    Args:
        evaluated: folder that ``evaluate.py`` wrote.

    Returns:
        ``map@10`` and ``precision@10`` of each query, in the file's order; None for a query that
        has nothing to find. Without the file, {}.
    """
    path = Path(evaluated) / "neighbours.csv"
    if not path.exists():
        return {}
    matches: dict[str, list[bool]] = {}
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for line in csv.DictReader(file):
            matches.setdefault(line["query"], []).append(line["same_category"] == "true")
    hits = np.zeros((len(matches), _K), bool)
    for row, found in enumerate(matches.values()):
        hits[row, : len(found[:_K])] = found[:_K]
    relevant = _relevant(path.with_name("embeddings.npz"))
    measured = per_query_metrics(hits, [relevant[query] for query in matches], (_K,))
    return {
        name: [None if np.isnan(value) else float(value) for value in measured[name]]
        for name in METRICS
    }


def _relevant(path: Path) -> dict[str, int]:
    """How many images of its category each image of an evaluation can find."""
    saved = read_arrays(path)
    label, is_gallery = saved["label"], saved["is_gallery"]
    found = np.bincount(label[is_gallery], minlength=label.max() + 1)[label] - is_gallery
    return dict(zip(saved["id"].tolist(), found.tolist(), strict=True))


def over_queries(
    runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Return each metric's bootstrap interval over the queries, and that of the difference.

    Args:
        runs: of one row, each with ``per_query``; {} is returned where one has none.
        baseline: of the row it is compared with, paired seed by seed and query by query; or None.
    """
    every = [*runs, *(baseline or ())]
    if not all(run.get("per_query") for run in every):
        return {}
    return {
        metric: {
            "interval": bootstrap_interval(_mean_of_seeds(runs, metric)),
            "difference": baseline
            and paired(_mean_of_seeds(runs, metric), _mean_of_seeds(baseline, metric)),
        }
        for metric in METRICS
    }


def _mean_of_seeds(runs: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    return np.mean([np.array(run["per_query"][metric], np.float64) for run in runs], axis=0)


def paired(values: ArrayLike, baseline: ArrayLike) -> dict[str, Any]:
    """Sum up ``values - baseline``, query by query; shown when the interval leaves out 0.

    >>> paired([0.5, 1.0, float("nan")], [0.25, 0.75, float("nan")])
    {'mean': 0.25, 'interval': (0.25, 0.25), 'shown': True}
    """
    difference = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    low, high = bootstrap_interval(difference)
    kept = difference[~np.isnan(difference)]
    mean = float(kept.mean()) if len(kept) else float("nan")
    return {"mean": mean, "interval": (low, high), "shown": bool(low > 0 or high < 0)}


def mean_of_categories(
    reports: Sequence[Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """Average the categories of several runs' ``per_category``, metric by metric.

    >>> mean_of_categories([{"hat": {"map@10": 0.5}}, {"hat": {"map@10": 0.75}}])
    {'hat': {'map@10': 0.625}}
    """
    return {
        category: {
            metric: float(np.mean([report[category][metric] for report in reports]))
            for metric in (*METRICS, "num_queries")
            if metric in first
        }
        for category, first in reports[0].items()
    }
