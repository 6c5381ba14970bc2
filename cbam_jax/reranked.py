"""An evaluation again after re-ranking, and what that gained, query by query.

``measure`` ranks by the steps that `cbam_jax.rerank_steps` reads of ``evaluate.py --rerank``, and
compares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cbam_jax import InputError
from cbam_jax.evaluation import Evaluation, Protocol, relevant_images
from cbam_jax.metrics import bootstrap_interval, label_matches, per_query_metrics
from cbam_jax.rerank import (
    apply_whitening,
    augment_gallery,
    expand_queries,
    fit_whitening,
    k_reciprocal,
)
from cbam_jax.rerank_steps import STEPS, Step
from cbam_jax.search import search

_SINGLE = ("mrr", "map@R", "r_precision")  # They need more than the first K ranks.


def check_fits(steps: Sequence[Step], searched: int) -> None:
    """InputError where a step takes more neighbours than a query is searched among."""
    for step in steps:
        if step.options.get("k", 1) > searched:
            raise InputError(
                f"--rerank={step}: there are {searched} images to search among; give k up to that"
            )


def transductive(steps: Sequence[Step], protocol: Protocol) -> bool:
    """Whether the answer to a query depended on other queries.

    k_reciprocal ranks all together; the others use gallery images, of which some may be queries.
    """
    names = {step.name for step in steps}
    return "k_reciprocal" in names or bool(names & {"aqe", "dba"} and (protocol.own >= 0).any())


def measure(
    embeddings: np.ndarray,
    label: np.ndarray,
    protocol: Protocol,
    result: Evaluation,
    steps: Sequence[Step],
    *,
    ks: Sequence[int],
    train: np.ndarray | None = None,
) -> tuple[dict[str, Any], Evaluation]:
    """Rank again by some steps, and compare with the plain ranking on the same queries.

    Args:
        embeddings: [n, d] float32.
        label: int [n].
        protocol: from ``make_protocol``.
        result: of ``evaluate_embeddings``, of the same.
        steps: of ``parse_steps``.
        ks: as of the result.
        train: [m, d], embeddings of the training split, which ``whiten`` is fitted on.

    Returns:
        A part of the report, ``rerank``: metrics at K, each one's gain with the 95 % bootstrap
        interval of its mean over queries (paired: of the differences), ``transductive``; and what
        was found.

    Raises:
        InputError: the training split varies along fewer axes than whitening is to keep.
    """
    relevant = relevant_images(label, protocol)
    distance, index = rank(embeddings, protocol, steps, max(ks), train)
    match = label_matches(index, label[protocol.query], label[protocol.gallery])
    before, after = (
        {name: v for name, v in per_query_metrics(m, relevant, ks).items() if name not in _SINGLE}
        for m in (result.match, match)
    )
    report = {
        "steps": [str(step) for step in steps],
        "definitions": {step.name: STEPS[step.name][1] for step in steps},
        "transductive": transductive(steps, protocol),
        "metrics": {name: _mean(values) for name, values in after.items()},
        "plain": {name: _mean(values) for name, values in before.items()},
        "gain": {name: bootstrap_interval(after[name] - before[name]) for name in after},
        "confidence": 0.95,
    }
    neighbour = np.where(index >= 0, protocol.gallery[index], -1)
    return report, result._replace(neighbour=neighbour, distance=distance, match=match)


def rank(
    embeddings: np.ndarray,
    protocol: Protocol,
    steps: Sequence[Step],
    k: int,
    train: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query after some steps: distances and gallery indices, [q, k]."""
    ignored: dict[str, Any] = {
        "exclude_self": protocol.own,
        "query_group": protocol.query_group,
        "gallery_group": protocol.gallery_group,
    }
    query, gallery = embeddings[protocol.query], embeddings[protocol.gallery]
    for name, options in steps:
        if name == "whiten":
            assert train is not None
            query, gallery = _whitened(train, options, query, gallery)
        elif name == "dba":
            gallery = augment_gallery(gallery, int(options["k"]), options["alpha"])
        elif name == "aqe":
            query = expand_queries(query, gallery, int(options["k"]), options["alpha"], **ignored)
        else:
            k1, k2 = int(options["k1"]), int(options["k2"])
            ignored |= {"k1": k1, "k2": k2, "lambda_": options["lambda_"]}
            return k_reciprocal(query, gallery, k, **ignored)
    return search(query, gallery, k, **ignored)


def _whitened(
    train: np.ndarray, options: Mapping[str, float], *parts: np.ndarray
) -> list[np.ndarray]:
    try:
        fitted = fit_whitening(train, int(options["dim"]) or None, power=options["power"])
    except ValueError as error:
        raise InputError(f"--rerank=whiten: of the training split: {error}") from error
    return [apply_whitening(part, fitted) for part in parts]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def format_report(report: Mapping[str, Any]) -> str:
    """Lay the comparison out as text: plain, re-ranked, and the gain with its interval."""
    told = "; transductive: other queries were used" if report["transductive"] else ""
    lines = [f"re-ranked by {', '.join(report['steps'])}{told}"]
    lines.append(f"{'metric':14}{'plain':>8}{'re-ranked':>11}{'gain':>9}  95% interval of the gain")
    for name, after in report["metrics"].items():
        before, (low, high) = report["plain"][name], report["gain"][name]
        lines.append(
            f"{name:14}{before:8.4f}{after:11.4f}{after - before:+9.4f}  {low:+.4f} to {high:+.4f}"
        )
    return "\n".join(lines)
