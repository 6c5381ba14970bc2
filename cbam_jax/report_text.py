"""An evaluation in words and tables of at most 80 columns: first what anyone understands."""

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cbam_jax.foreign_files import escaped

_COLUMNS = 80
_FAMILIES = ("map", "map_min", "map_all", "precision", "recall")
# Of more categories than this the best and the worst are shown.
_CATEGORIES = 20
# Queries that a category's mean is mixed with, each of the mean of all, before it is ranked: 1.0000
# from two queries says less than 0.9 from two hundred.
_PRIOR = 10
Categories = Mapping[str, Mapping[str, float]]


def first_k(ks: Sequence[int]) -> int:
    """Return the K that is spoken of where there is room for one: 10, or the largest."""
    return 10 if 10 in ks else max(ks)


def plain_words(report: Mapping[str, Any]) -> str:
    """Say what a report means to someone who knows no metric.

    >>> metrics = {"precision@10": 0.16, "recall@10": 0.8, "num_queries": 17.0, "num_left_out": 2.0}
    >>> plain_words({"ks": [10], "metrics": metrics, "chance": {"precision@10": 0.11},
    ...     "possible": {"precision@10": 0.18}})
    'Of the first 10 images found, 1.6 are of the same category as the query; by chance \
1.1 would be; at most 1.8 are possible. 12 of 15 queries find at least one.'
    """
    k = first_k(report["ks"])
    metrics = report["metrics"]
    hits = metrics[f"precision@{k}"]
    if not is_number(hits):
        return "No query has an image of its category to find: there is nothing to measure."
    chance, possible = (
        report.get(name, {}).get(f"precision@{k}") for name in ("chance", "possible")
    )
    told = f"Of the first {k} images found, {_few(k * hits)} are of the same category as the query"
    if is_number(chance):
        told += f"; by chance {_few(k * chance)} would be"
    if is_number(possible) and _few(k * possible) != _few(k):  # Categories of few images.
        told += f"; at most {_few(k * possible)} are possible"
    return f"{told}. {_finding(metrics, k)}"


def _finding(metrics: Mapping[str, float], k: int) -> str:
    """How many queries find one; of a hundred and more, a percentage is easier to read."""
    counted = round(metrics["num_queries"] - metrics["num_left_out"])
    share = metrics[f"recall@{k}"]
    percent = f" ({_percent(share)} %)" if counted >= 100 else ""
    return f"{round(share * counted)} of {counted} queries find at least one{percent}."


def _few(number: float) -> str:
    """A mean number of images: 7.2, but no 0.0 where there are some."""
    return f"{number:.1f}" if number >= 0.05 or number == 0 else f"{number:.1g}"


def _percent(share: float) -> str:
    """A share of 100, rounded, but 100 and 0 only where it is all and none."""
    rounded = min(max(round(100 * share), 1), 99) if 0 < share < 1 else round(100 * share)
    return f"{rounded}"


def is_number(value: float | None) -> bool:
    """Whether a mean is over something: it is None or NaN where it is over nothing."""
    return value is not None and not np.isnan(value)


def gate_name(path: str) -> str:
    """Name a spatial gate by its place in the backbone.

    >>> gate_name("backbone.last_attention.spatial")
    'last_attention'
    """
    return path.removeprefix("backbone.").removesuffix(".spatial")


def counts(report: Mapping[str, Any]) -> str:
    """Say how much was searched among how much, and what no mean has."""
    metrics = report["metrics"]
    return (
        f"{metrics['num_queries']:.0f} queries, {report['num_gallery']} gallery images "
        f"({report['protocol']}); {metrics['num_left_out']:.0f} queries left out of all means "
        "for having no relevant item"
    )


def shown_categories(
    categories: Categories, metric: str, limit: int = _CATEGORIES
) -> tuple[list[str], list[str]]:
    """Choose the categories of a table: all, or the best and the worst where there are many.

    Args:
        categories: the metrics of each.
        metric: decides what is best.
        limit: most categories to show.

    Returns:
        All, those with most queries first, and nothing; or the ``limit // 2`` best, best first, and
        as many of the worst, the worst last. Means over few queries are drawn to the mean of all.

    >>> shown_categories({"hat": {"num_queries": 2.0}, "coat": {"num_queries": 7.0}}, "map@10")
    (['coat', 'hat'], [])
    """
    if len(categories) <= limit:
        return sorted(categories, key=lambda name: -categories[name]["num_queries"]), []
    ranked = _ranked(categories, metric)
    half = min(limit, len(ranked)) // 2
    return ranked[:half], ranked[len(ranked) - half :]


def _ranked(categories: Categories, metric: str) -> list[str]:
    """Categories that have the metric, the best first."""
    counted = {name: values for name, values in categories.items() if is_number(values[metric])}
    sizes = {name: v["num_queries"] - v.get("num_left_out", 0.0) for name, v in counted.items()}
    total = sum(sizes.values())
    mean = sum(sizes[name] * v[metric] for name, v in counted.items()) / max(total, 1)
    drawn = {
        name: (sizes[name] * v[metric] + _PRIOR * mean) / (sizes[name] + _PRIOR)
        for name, v in counted.items()
    }
    return sorted(drawn, key=lambda name: -drawn[name])


def told_categories(categories: Categories, shown: tuple[list[str], list[str]]) -> str:
    """Say which categories a table shows; nothing where it shows all."""
    best, worst = shown
    if not worst:
        return ""
    return (
        f"The {len(best)} best and the {len(worst)} worst of {len(categories)} categories; a mean "
        "over few queries counts less. All are in metrics.json."
    )


def format_report(report: Mapping[str, Any]) -> str:
    """Lay a report out as text of at most 80 columns.

    Plain words, metrics by K, their definitions, the categories: at most 40 lines where there are
    more than 20 of them.
    """
    (low, high), name = report["interval"]["of"], report["interval"]["metric"]
    interval = f"95% bootstrap interval of {name} over queries: {low:.4f} to {high:.4f}"
    return "\n".join(
        [
            *wrapped(plain_words(report)),
            *wrapped(counts(report)),
            "",
            *_metrics(report),
            *([interval] if is_number(low) else []),
            *_definitions(report),
            "",
            *_categories(report["per_category"], first_k(report["ks"])),
        ]
    )


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """One line a family, one column a K, as many as fit, and below it the metrics without a K."""
    metrics, lines = report["metrics"], []
    fitting = (_COLUMNS - 14) // 8
    for start in range(0, len(report["ks"]), fitting):
        ks = report["ks"][start : start + fitting]
        lines.append(f"{'metric':14}" + "".join(f"{'@' + str(k):>8}" for k in ks))
        for family in _FAMILIES:
            values = "".join(f"{metrics[f'{family}@{k}']:8.4f}" for k in ks)
            lines.append(f"{family:14}{values}")
    return lines + [f"{name:14}{metrics[name]:8.4f}" for name in _single(report)]


def _single(report: Mapping[str, Any]) -> list[str]:
    """Metrics without a K that were measured."""
    counted = ("num_queries", "num_left_out")
    return [name for name in report["definitions"] if name in report["metrics"].keys() - counted]


def _definitions(report: Mapping[str, Any]) -> list[str]:
    names = [f"{family}@K" for family in _FAMILIES] + _single(report)
    return [
        line for name in names for line in wrapped(f"{name:14}{report['definitions'][name]}", 14)
    ]


def _categories(categories: Categories, k: int) -> list[str]:
    names = [f"{family}@{k}" for family in ("map", "precision", "recall")]
    shown = shown_categories(categories, names[0], _CATEGORIES)
    if shown[1]:
        shown = shown_categories(categories, names[0], _CATEGORIES // 2)
    rows = shown[0] + shown[1]
    room = _COLUMNS - 8 - 14 * len(names)
    width = min(max(map(display_width, ["category", *map(escaped, rows)])) + 2, room)
    lines = wrapped(told_categories(categories, shown))
    heads = "".join(f"{name:>14}" for name in names)
    lines.append(f"{_padded('category', width)}{'queries':>8}{heads}")
    for category in rows:
        metrics = categories[category]
        values = "".join(f"{metrics[name]:14.4f}" for name in names)
        lines.append(f"{_padded(category, width)}{metrics['num_queries']:8.0f}{values}")
    return lines


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Break a text into lines of at most 80 columns, all but the first one indented."""
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=" " * indent)


def display_width(text: str) -> int:
    """Count the columns of a text on a terminal: two for Chinese, none for a combining accent.

    >>> display_width("连衣裙"), display_width("e\u0301te\u0301")
    (6, 3)
    """
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _padded(text: str, width: int) -> str:
    """A text in a column, cut where it is too long for it."""
    text = escaped(" ".join(text.split()))
    if display_width(text) > width - 1:
        while display_width(text) > width - 2:
            text = text[:-1]
        text += "…"
    return text + " " * (width - display_width(text))
