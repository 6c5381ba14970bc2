"""A table's document laid out as Markdown and as CSV; either says what its numbers are."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cbam_jax.paper.queries import METRICS

_SHOWN = ("map", "map_min", "precision")


def markdown(table: Mapping[str, Any]) -> str:
    """Lay a document of ``tables.make_table`` out as Markdown."""
    first, *others = table["rows"]
    shown = [f"{family}@{k}" for family in _SHOWN for k in table["ks"]]
    seeds = len(table["seeds"])
    spread = f"mean of {seeds} seeds ± half of its 95 % interval"
    spread = spread if seeds > 1 else "one seed, so no interval and no difference shown"
    lines = [f"## {table['title']}", "", f"In %: {spread}.", ""]
    lines += _metric_rows(table, shown)
    lines += ["", f"Difference from {first['title']}, in percentage points, with its interval:", ""]
    lines += _difference_rows(others, shown)
    lines += _query_lines(table)
    lines += _category_lines(table)
    lines += ["", f"Embedding one image of {table['config']['data']['image_size']} px:", ""]
    lines += _cost_rows(table["rows"])
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(table)), ""])


def _metric_rows(table: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    papers = [name for name in shown if any(row["metrics"][name]["paper"] for row in table["rows"])]
    header = ["model", *shown, *(f"paper's mAP{name[3:]}" for name in papers)]
    rows = []
    for row in table["rows"]:
        ours = [_with_half(row["metrics"][name]) for name in shown]
        theirs = [_percent(row["metrics"][name]["paper"]) for name in papers]
        rows.append([row["title"], *ours, *theirs])
    return _pipe_table(header, rows)


def _difference_rows(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    cells = [
        [row["title"], *(_difference(row["metrics"][name]["difference"]) for name in shown)]
        for row in rows
    ]
    return _pipe_table(["model", *shown], cells)


def _query_lines(table: Mapping[str, Any]) -> list[str]:
    """The intervals over the queries, where the runs kept what they found for each."""
    first, *others = table["rows"]
    if not first.get("over_queries"):
        return []
    cells = [
        [row["title"], *(_difference(row["over_queries"][name]["difference"]) for name in METRICS)]
        for row in others
    ]
    title = f"The same differences, with their intervals over the {table['num_queries']} queries:"
    return ["", title, "", *_pipe_table(["model", *METRICS], cells)]


def _category_lines(table: Mapping[str, Any]) -> list[str]:
    """Precision by category, the largest category first."""
    of_first = table["rows"][0].get("per_category")
    if not of_first:
        return []
    metric = METRICS[1]
    names = sorted(of_first, key=lambda name: -of_first[name]["num_queries"])
    header = ["model", *(f"{name} ({of_first[name]['num_queries']:.0f})" for name in names)]
    cells = [
        [row["title"], *(_percent(row["per_category"][name][metric]) for name in names)]
        for row in table["rows"]
    ]
    return ["", f"`{metric}` by category (its queries), in %:", "", *_pipe_table(header, cells)]


def _cost_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        [
            row["title"],
            f"{row['parameters'] / 1e6:.2f}",
            "unknown" if row["flops"] is None else f"{row['flops'] / 1e9:.3f}",
            f"{row['images_per_second']:.1f}",
        ]
        for row in rows
    ]
    return _pipe_table(["model", "parameters (M)", "GFLOPs", "images/s"], cells)


def _notes(table: Mapping[str, Any]) -> list[str]:
    machine, config = table["machine"], table["config"]
    definitions = table["definitions"]
    paper = (
        "The paper's figures are of DeepFashion, 30 categories: compare them with these only where "
        "the data are the same."
    )
    return [
        *(f"`{family}@K`: {definitions[family + '@K']}." for family in _SHOWN),
        *[paper] * has_paper(table),
        f"Interval: {table['interval']}.",
        f"Difference: {table['difference']}.",
        *[f"Interval over the queries: {table.get('over_queries')}."]
        * bool(table["rows"][0].get("over_queries")),
        f"Data: `{table['data']}`, split `{table['split']}`; {table['num_queries']} queries, "
        f"{table['num_gallery']} gallery images ({table['protocol']}); {table['num_left_out']} "
        "queries left out of all means for having no relevant item.",
        f"Seeds {', '.join(map(str, table['seeds']))}; {table['checkpoint']}; configs "
        + ", ".join(f"`{row['config']}`" for row in table["rows"])
        + ", with all fields in the JSON file beside this one.",
        "Parameters are those that are trained. GFLOPs: 10^9 operations an image that XLA counts "
        "in the compiled program, a multiply-add being two. Images/s: the compiled "
        f"embedding of {config['eval']['batch_size']} images that are on the device already, "
        f"median of repeated calls, on {machine['device']} ({machine['cores']} cores), jax "
        f"{machine['jax']}.",
        f"Command: `{table['command']}`",
    ]


def has_paper(table: Mapping[str, Any]) -> bool:
    """Whether a table has rows of the paper's."""
    return any(
        metric["paper"] is not None for row in table["rows"] for metric in row["metrics"].values()
    )


def _pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _with_half(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval"]
    half = f" ± {50 * (high - low):.1f}" if len(metric["values"]) > 1 else ""
    return _percent(metric["mean"]) + half


def _difference(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    points = f"{100 * difference['mean']:+.1f}"
    if not np.isnan(low):  # As it is of one seed.
        points += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return points + ("" if difference["shown"] else " not shown")


def csv_text(table: Mapping[str, Any]) -> str:
    """Lay a table's document out as CSV: one line for each row and metric, fractions."""
    header = ["table", "model", "metric", "mean", "low", "high", "paper", "difference"]
    header += ["difference_low", "difference_high", "difference_shown"]
    header += [f"seed_{seed}" for seed in table["seeds"]]
    header += ["definition", "data", "split", "queries", "left_out", "config", "command"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    of_table = [table["data"], table["split"], table["num_queries"], table["num_left_out"]]
    for row in table["rows"]:
        of_row = [*of_table, row["config"], table["command"]]
        for name, metric in row["metrics"].items():
            values = [table["table"], row["title"], name, metric["mean"], *metric["interval"]]
            values += [metric["paper"], *_difference_cells(metric["difference"])]
            family, at, _ = name.partition("@")
            definition = table["definitions"].get(name) or table["definitions"][family + at + "K"]
            writer.writerow(_cells([*values, *metric["values"], definition, *of_row]))
        for name, definition in _COSTS.items():
            empty = [None] * (7 + len(table["seeds"]))
            line = [table["table"], row["title"], name, row[name], *empty, definition, *of_row]
            writer.writerow(_cells(line))
    return file.getvalue()


_COSTS = {
    "parameters": "number of trained parameters",
    "flops": "operations that XLA counts in embedding one image",
    "images_per_second": "of the compiled embedding of a batch on the device",
}


def _difference_cells(difference: Mapping[str, Any] | None) -> list[Any]:
    if difference is None:
        return [None] * 4
    return [difference["mean"], *difference["interval"], difference["shown"]]


def _cells(values: Sequence[Any]) -> list[Any]:
    """NaN, an interval of one value, is an empty cell as None is."""
    return [None if isinstance(v, float) and np.isnan(v) else v for v in values]
