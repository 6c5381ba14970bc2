"""From a split's embeddings to its metrics: search, hits, means, intervals, the printed table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.metrics import (
    METRIC_DEFINITIONS,
    bootstrap_interval,
    count_relevant,
    label_matches,
    per_category_metrics,
    per_query_metrics,
    retrieval_metrics,
)
from cbam_jax.search import search

ACCURACY_DEFINITIONS = {
    "accuracy": "fraction of all images whose largest logit is the label's",
    "accuracy@5": "fraction of all images whose label's logit is among the largest 5",
}
# Chooses the best checkpoint, and gets the interval; without a K of 10 that of the largest K does.
HEADLINE = "map@10"
_RANKED = 4096


class Protocol(NamedTuple):
    """Who is searched among whom. Rows of the embeddings throughout.

    ``own`` [q] is each query's place in the gallery, -1 where it is not in it. ``query_group`` and
    ``gallery_group`` are None, or equal where a gallery image is ignored for a query.
    """

    query: np.ndarray
    gallery: np.ndarray
    own: np.ndarray
    query_group: np.ndarray | None
    gallery_group: np.ndarray | None
    name: str


class Evaluation(NamedTuple):
    """``report`` is JSON; per query [q]: its row, and of its nearest max(ks) the rest, [q, k]."""

    report: dict[str, Any]
    query: np.ndarray
    neighbour: np.ndarray
    distance: np.ndarray
    match: np.ndarray
    headline: np.ndarray


def make_protocol(
    is_query: np.ndarray,
    is_gallery: np.ndarray,
    *,
    item: np.ndarray | None = None,
    series: np.ndarray | None = None,
    ignore_same_series: bool = False,
    ks: Sequence[int] = (5, 10, 20),
) -> Protocol:
    """Search every image of ``is_query`` among those of ``is_gallery``, never finding itself.

    Where all images are both, that is leave-one-out within the split.

    Args:
        is_query: bool [n].
        is_gallery: bool [n].
        item: int [n], needed with ``ignore_same_series``, as is ``series``.
        series: int [n].
        ignore_same_series: leave out gallery images of the query's own item and series: photos of
            one shoot, which are found too easily.
        ks: the largest must not be above the number of images a query is searched among.

    Raises:
        InputError: when there is nothing to search, or too little for ``ks``, or no series.

    >>> both = np.ones(3, bool)
    >>> protocol = make_protocol(both, both, ks=(1, 2))
    >>> protocol.name, protocol.own.tolist()
    ('leave one out', [0, 1, 2])
    """
    query, gallery = np.flatnonzero(is_query), np.flatnonzero(is_gallery)
    place = np.full(len(is_gallery), -1)
    place[gallery] = np.arange(len(gallery))
    own = place[query]
    searched = len(gallery) - int(np.any(own >= 0))
    if not len(query) or searched < max(ks):
        raise InputError(
            f"{len(query)} queries among {searched} gallery images cannot give ks={tuple(ks)}: "
            "use a split with more images, or smaller eval.ks"
        )
    name = "leave one out" if np.all(is_query & is_gallery) else "queries in a gallery"
    if not ignore_same_series:
        return Protocol(query, gallery, own, None, None, name)
    if item is None or series is None:
        raise InputError(
            "eval.ignore_same_series=True needs a dataset with item_id and series; set it to False"
        )
    group = np.unique(np.stack([item, series], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    name += ", without the query's own item and series"
    return Protocol(query, gallery, own, group[query], group[gallery], name)


def evaluate_embeddings(
    embeddings: np.ndarray,
    label: np.ndarray,
    label_names: Sequence[str],
    protocol: Protocol,
    *,
    ks: Sequence[int] = (5, 10, 20),
) -> Evaluation:
    """Search, count hits and average: every metric, overall and per category.

    Args:
        embeddings: [n, d] float32.
        label: int [n]; equal labels are similar.
        label_names: the name of each label.
        protocol: from ``make_protocol``.
        ks: the K of the metrics.

    Raises:
        ValueError: when an embedding is not finite.
    """
    query_label, gallery_label = label[protocol.query], label[protocol.gallery]
    relevant = count_relevant(
        query_label, gallery_label, protocol.own >= 0, protocol.query_group, protocol.gallery_group
    )
    # map@R and R-precision look at the first R ranks of each query; beyond some thousands they
    # are left out rather than ranking everything.
    ranks = max(max(ks), int(relevant.max()) if relevant.max() <= _RANKED else 0)
    ranks = min(ranks, len(protocol.gallery))
    distance, index = search(
        embeddings[protocol.query],
        embeddings[protocol.gallery],
        ranks,
        exclude_self=protocol.own,
        query_group=protocol.query_group,
        gallery_group=protocol.gallery_group,
    )
    match = label_matches(index, query_label, gallery_label)
    chosen = HEADLINE if 10 in ks else f"map@{max(ks)}"
    headline = per_query_metrics(match, relevant, ks)[chosen]
    categories = per_category_metrics(match, relevant, query_label, ks)
    report = {
        "protocol": protocol.name,
        "num_gallery": len(protocol.gallery),
        "ks": list(ks),
        "metrics": retrieval_metrics(match, relevant, ks),
        "interval": {"metric": chosen, "confidence": 0.95, "of": bootstrap_interval(headline)},
        "per_category": {label_names[i]: metrics for i, metrics in categories.items()},
        "definitions": dict(METRIC_DEFINITIONS),
    }
    k = max(ks)
    neighbour = np.where(index[:, :k] >= 0, protocol.gallery[index[:, :k]], -1)
    return Evaluation(report, protocol.query, neighbour, distance[:, :k], match[:, :k], headline)


def classification_metrics(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 accuracy, as fractions; see ``ACCURACY_DEFINITIONS``.

    A logit equal to the label's counts as larger, so that constant logits get no credit.

    Args:
        logits: [n, number of classes] float.
        label: int [n].

    >>> classification_metrics(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    {'accuracy': 0.5, 'accuracy@5': 1.0}
    """
    own = np.take_along_axis(logits, label[:, None].astype(np.int64), axis=1)
    before = np.sum(logits >= own, axis=1) - 1
    return {"accuracy": float(np.mean(before < 1)), "accuracy@5": float(np.mean(before < 5))}


def format_report(report: dict[str, Any]) -> str:
    """Lay a report out as text: metrics by K with their definitions, then the categories."""
    metrics, ks = report["metrics"], report["ks"]
    lines = [
        f"{metrics['num_queries']:.0f} queries, {report['num_gallery']} gallery images "
        f"({report['protocol']}); {metrics['num_left_out']:.0f} queries left out of all means "
        "for having no relevant item",
        "",
        f"{'metric':14}" + "".join(f"{'@' + str(k):>8}" for k in ks) + "  definition",
    ]
    for family in ("map", "map_min", "map_all", "precision", "recall"):
        values = "".join(f"{metrics[f'{family}@{k}']:8.4f}" for k in ks)
        lines.append(f"{family:14}{values}  {report['definitions'][family + '@K']}")
    for name in ("map@R", "r_precision", "mrr", *ACCURACY_DEFINITIONS):
        if name in metrics:
            value = f"{metrics[name]:8.4f}".ljust(8 * len(ks))
            lines.append(f"{name:14}{value}  {report['definitions'][name]}")
    (low, high), name = report["interval"]["of"], report["interval"]["metric"]
    lines += ["", f"95% bootstrap interval of {name} over queries: {low:.4f} to {high:.4f}", ""]
    return "\n".join(lines + _format_categories(report["per_category"], ks))


def _format_categories(categories: dict[str, dict[str, float]], ks: Sequence[int]) -> list[str]:
    k = 10 if 10 in ks else max(ks)
    names = [f"{family}@{k}" for family in ("map", "precision", "recall")]
    width = max(map(len, categories), default=0) + 2
    lines = [f"{'category':{width}}{'queries':>8}" + "".join(f"{name:>14}" for name in names)]
    for category, metrics in categories.items():
        values = "".join(f"{metrics[name]:14.4f}" for name in names)
        lines.append(f"{category:{width}}{metrics['num_queries']:8.0f}{values}")
    return lines
