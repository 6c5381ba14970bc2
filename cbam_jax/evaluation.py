"""From a split's embeddings to its metrics: search, hits, means, intervals, and their files."""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
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
from cbam_jax.search import first_ranks, search
from cbam_jax.whole_files import written_whole

ACCURACY_DEFINITIONS = {
    "accuracy": "fraction of all images whose largest logit is the label's",
    "accuracy@5": "fraction of all images whose label's logit is among the largest 5",
}
_MRR = "1 / rank of the first relevant item in the whole gallery"
_RANKED = 4096
_COLUMNS = (
    "query", "query_category", "rank", "neighbour", "neighbour_category", "distance",
    "same_category",
)  # fmt: skip


def headline(names: Iterable[str]) -> str:
    """The metric that chooses the best checkpoint: map@10, or without it that of the largest K.

    >>> headline(["map@5", "map@10", "map@20"]), headline(["map@3", "precision@20", "map@R"])
    ('map@10', 'map@3')
    """
    ks = [int(name[4:]) for name in names if re.fullmatch(r"map@[0-9]+", name)]
    return "map@10" if 10 in ks or not ks else f"map@{max(ks)}"


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
    searched = searched_images(is_query, is_gallery)
    if not len(query) or searched < max(ks):
        remedy = f"; or set '--config.eval.ks={_literal(fitting_ks(ks, searched))}'"
        raise InputError(
            f"{len(query)} queries among {searched} gallery images cannot give ks={tuple(ks)}: "
            "use a split with more images" + remedy * (len(query) > 0 and searched > 0)
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


def searched_images(is_query: np.ndarray, is_gallery: np.ndarray) -> int:
    """Return among how many images every query is searched at least; itself is left out."""
    return int(is_gallery.sum()) - int(np.any(is_query & is_gallery))


def fitting_ks(ks: Sequence[int], searched: int) -> tuple[int, ...]:
    """Return those K that can be measured among so many images, or where none can the largest K.

    >>> fitting_ks((5, 10, 20), 17), fitting_ks((5, 10, 20), 3)
    ((5, 10), (3,))
    """
    return tuple(k for k in ks if k <= searched) or (searched,)


def _literal(ks: Sequence[int]) -> str:
    return f"({','.join(map(str, ks))}{',' * (len(ks) == 1)})"


def relevant_images(label: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Return how many images there are to find for each query, int64 [q]."""
    return count_relevant(
        label[protocol.query],
        label[protocol.gallery],
        protocol.own >= 0,
        protocol.query_group,
        protocol.gallery_group,
    )


def relevant_matches(label: np.ndarray, protocol: Protocol) -> Iterator[np.ndarray]:
    """For each query in turn which gallery images are to be found, bool [gallery].

    >>> protocol = make_protocol(np.ones(3, bool), np.ones(3, bool), ks=(1,))
    >>> [row.tolist() for row in relevant_matches(np.array([5, 7, 5]), protocol)]
    [[False, False, True], [False, False, False], [True, False, False]]
    """
    for row, query in enumerate(protocol.query):
        match = label[protocol.gallery] == label[query]
        if protocol.own[row] >= 0:
            match[protocol.own[row]] = False
        if protocol.query_group is not None and protocol.gallery_group is not None:
            match &= protocol.gallery_group != protocol.query_group[row]
        yield match


def chance_precision(relevant: np.ndarray, searched: np.ndarray, k: int) -> float:
    """Return what precision@K is for images found at random, over the same queries.

    Each of the first K places holds a relevant image with probability relevant / searched. The mean
    is over the queries that have one; NaN where none has.

    Args:
        relevant: int [q], from ``relevant_images``.
        searched: int [q], how many images each query is searched among; where there are fewer than
            K, the last places stay empty.
        k: of the metric.

    >>> chance_precision(np.array([2, 1, 0]), np.array([8, 4, 4]), 2)
    0.25
    """
    counted = relevant > 0
    if not counted.any():
        return float("nan")
    relevant, searched = relevant[counted], searched[counted]
    return float(np.mean(relevant / searched * np.minimum(searched, k) / k))


def possible_precision(relevant: np.ndarray, k: int) -> float:
    """Return what precision@K is when all that there is to find is found first.

    It is below 1 where a category has fewer than K images to find: the mean of min(K, R) / K over
    the queries that have one; NaN where none has.

    Args:
        relevant: int [q], R, from ``relevant_images``.
        k: of the metric.

    >>> possible_precision(np.array([2, 9, 0]), 4)
    0.75
    """
    counted = relevant[relevant > 0]
    return float(np.mean(np.minimum(counted, k) / k)) if len(counted) else float("nan")


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
    relevant = relevant_images(label, protocol)
    # If all labels were equal, everything would be relevant.
    searched = relevant_images(np.zeros_like(label), protocol)
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
    first = _first_ranks(embeddings, label, protocol, match, relevant)
    chosen = headline(f"map@{k}" for k in ks)
    by_query = per_query_metrics(match, relevant, ks)[chosen]
    categories = per_category_metrics(match, relevant, query_label, ks, first_rank=first)
    report = {
        "protocol": protocol.name,
        "num_gallery": len(protocol.gallery),
        "ks": list(ks),
        "metrics": retrieval_metrics(match, relevant, ks, first_rank=first),
        "chance": {f"precision@{k}": chance_precision(relevant, searched, k) for k in ks},
        "possible": {f"precision@{k}": possible_precision(relevant, k) for k in ks},
        "interval": {"metric": chosen, "confidence": 0.95, "of": bootstrap_interval(by_query)},
        "per_category": {label_names[i]: metrics for i, metrics in categories.items()},
        "definitions": {**METRIC_DEFINITIONS, "mrr": _MRR},
    }
    k = max(ks)
    neighbour = np.where(index[:, :k] >= 0, protocol.gallery[index[:, :k]], -1)
    return Evaluation(report, protocol.query, neighbour, distance[:, :k], match[:, :k], by_query)


def _first_ranks(
    embeddings: np.ndarray,
    label: np.ndarray,
    protocol: Protocol,
    match: np.ndarray,
    relevant: np.ndarray,
) -> np.ndarray:
    """The rank of each query's first relevant image in the whole gallery, int64 [q], 0 for none.

    Most are among those found; for the other queries what is nearer is counted.
    """
    first = np.where(match.any(axis=1), np.argmax(match, axis=1) + 1, 0)
    beyond = np.flatnonzero((first == 0) & (relevant > 0))
    if not len(beyond):
        return first
    query, group = protocol.query[beyond], protocol.query_group
    first[beyond] = first_ranks(
        embeddings[query],
        embeddings[protocol.gallery],
        label[query],
        label[protocol.gallery],
        exclude_self=protocol.own[beyond],
        query_group=None if group is None else group[beyond],
        gallery_group=protocol.gallery_group,
    )
    return first


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


def save_neighbours(
    path: str | os.PathLike, result: Evaluation, ids: np.ndarray, categories: Sequence[str]
) -> None:
    """Write what was found for each query as a CSV, nearest first, whole or not at all.

    Columns: query and neighbour (ids), the category of each, rank (1 is the nearest), distance
    (Euclidean), same_category (true or false). UTF-8 with a byte order mark, without which
    spreadsheets show accents and other scripts as something else.

    Args:
        path: of the file.
        result: of ``evaluate_embeddings``.
        ids: str [n], of all images.
        categories: of all images, their category's name.
    """
    names = list(zip(ids.tolist(), categories, strict=True))
    with (
        written_whole(path) as partial,
        # File names that are no UTF-8 come out as the bytes that they are.
        open(partial, "w", encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row, query in enumerate(result.query):
            writer.writerows(_found(result, row, names[query], names))


def _found(
    result: Evaluation, row: int, query: tuple[str, str], names: Sequence[tuple[str, str]]
) -> Iterator[tuple[str | int, ...]]:
    """Rows of what was found for one query; names are ids and categories."""
    columns = (result.neighbour[row], result.distance[row], result.match[row])
    ranked = zip(*(column.tolist() for column in columns), strict=True)
    for rank, (index, distance, match) in enumerate(ranked, start=1):
        if index >= 0:
            yield *query, rank, *names[index], f"{distance:.7g}", "true" if match else "false"
