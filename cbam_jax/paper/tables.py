"""The paper's Tables 1 and 2 from finished runs: means over seeds, intervals, paired differences.

``make_table`` turns what each row's runs measured into one JSON document; ``markdown`` and
``csv_text`` lay that document out. Every layout says what its numbers are: definitions, queries,
data, split, seeds, configs and command.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.metrics import t_interval


class Row(NamedTuple):
    """A row of the paper's tables: its model, and its mAP@5, mAP@10 and mAP@20 there."""

    title: str
    paper: tuple[float, float, float]


# By the name of the config; rows of equal name are one row, trained once.
ROWS = {
    "resnet50": Row("ResNet50", (0.887, 0.824, 0.682)),
    "resnet50_se": Row("ResNet50 + SE", (0.901, 0.851, 0.694)),
    "resnet50_cbam": Row("ResNet50 + CBAM", (0.925, 0.898, 0.713)),
    "vgg16_cbam": Row("VGG16 + CBAM", (0.815, 0.791, 0.592)),
    "googlenet_cbam": Row("GoogLeNet + CBAM", (0.836, 0.812, 0.624)),
}
TABLES = {
    1: ("resnet50", "resnet50_se", "resnet50_cbam"),
    2: ("vgg16_cbam", "googlenet_cbam", "resnet50_cbam"),
}
TITLES = {1: "Table 1: attention in ResNet50", 2: "Table 2: backbones with CBAM"}
INTERVAL = (
    "Student's t over the seeds, 95 %: it covers what varies from training to training (starting "
    "weights, batches, augmentation) on this split, not the choice of its images"
)
DIFFERENCE = (
    "a row's value minus the first row's of the same seed, whose batches are the same too; its "
    "interval is Student's t over these differences, 95 % each by itself, without correction for "
    'their number; where it holds 0 the difference is "not shown"'
)
# Fields that say where and how data are read, whatever they are.
READING = ("data.data_dir", "data.manual_dir", "data.workers")
_PAPER_KS = (5, 10, 20)
_SHOWN = ("map", "map_min", "precision")
_COUNTS = ("num_queries", "num_left_out")


def make_table(
    number: int,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, Any]],
    *,
    command: str,
) -> dict[str, Any]:
    """Sum up the runs of one of the paper's tables.

    Args:
        number: 1 or 2.
        results: of each row of the table, its runs, one a seed in the same order in every row;
            each has ``seed``, ``config_file``, ``config`` (the run's ``config.json``) and
            ``report`` (its ``metrics.json``).
        costs: of each row ``parameters``, ``flops``, ``images_per_second`` and the machine, from
            ``python -m cbam_jax.benchmark embed``.
        command: that repeats it.

    Returns:
        The document, strict JSON; metrics are fractions.

    Raises:
        InputError: where two runs differ by more than model and seed, so that no table can hold
            both.
    """
    names = TABLES[number]
    runs = [run for name in names for run in results[name]]
    check_comparable(runs)
    first, report = results[names[0]], runs[0]["report"]
    return {
        "table": number,
        "title": TITLES[number],
        "data": runs[0]["config"]["data"]["name"],
        **{key: report[key] for key in ("split", "protocol", "num_gallery", "ks")},
        **{key: int(report["metrics"][key]) for key in _COUNTS},
        "seeds": [run["seed"] for run in first],
        "checkpoint": "the best of each run by map@10 on split "
        f"{runs[0]['config']['data']['eval_split']}",
        "command": command,
        "interval": INTERVAL,
        "difference": DIFFERENCE,
        "definitions": report["definitions"],
        "rows": [
            _row(name, results[name], None if name == names[0] else first, costs[name])
            for name in names
        ],
        "config": _common_config(runs[0]),
        "machine": {
            key: costs[names[0]][key] for key in ("device", "cores", "jax", "numpy", "python")
        },
    }


def _row(
    name: str,
    runs: Sequence[Mapping[str, Any]],
    first: Sequence[Mapping[str, Any]] | None,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    values = _values(runs)
    baseline = {} if first is None else _values(first)
    paper = {f"map@{k}": value for k, value in zip(_PAPER_KS, ROWS[name].paper, strict=True)}
    return {
        "row": name,
        "title": ROWS[name].title,
        "config": f"{runs[0]['config_file']} with model.name={name}",
        "checkpoint_steps": [run["report"]["step"] for run in runs],
        "parameters": cost["parameters"],
        "flops": cost["flops"],
        "images_per_second": cost["images_per_second"],
        "metrics": {
            metric: {
                **summary(values[metric]),
                "paper": paper.get(metric),
                "difference": paired_difference(values[metric], baseline[metric])
                if metric in baseline
                else None,
            }
            for metric in values
        },
    }


def _values(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = [name for name in runs[0]["report"]["metrics"] if name not in _COUNTS]
    # A mean over no query is NaN, and null in JSON.
    return {
        name: [
            float(
                "nan" if run["report"]["metrics"][name] is None else run["report"]["metrics"][name]
            )
            for run in runs
        ]
        for name in names
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values, their mean and its 95 % t interval, NaN for a single value.

    >>> summary([0.25, 0.25])
    {'values': [0.25, 0.25], 'mean': 0.25, 'interval': (0.25, 0.25)}
    """
    return {
        "values": list(values),
        "mean": float(np.mean(values)),
        "interval": t_interval(values),
    }


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Sum up ``values - baseline``, pair by pair; shown when the t interval leaves out 0.

    >>> difference = paired_difference([0.5, 0.75, 0.625], [0.25, 0.5, 0.5])
    >>> [round(bound, 3) for bound in difference["interval"]], difference["shown"]
    ([0.029, 0.388], True)
    >>> paired_difference([0.5], [0.25])["shown"]  # One pair shows nothing.
    False
    """
    found = summary([float(a - b) for a, b in zip(values, baseline, strict=True)])
    low, high = found["interval"]
    return {**found, "shown": bool(low > 0 or high < 0)}


def check_comparable(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where two runs differ by more than model and seed."""
    first = _comparable(runs[0])
    for run in runs[1:]:
        other = _comparable(run)
        for field, value in first.items():
            if other.get(field) != value:
                raise InputError(
                    f"no table can hold both: {field} is {value!r} in {_run_name(runs[0])} and "
                    f"{other.get(field)!r} in {_run_name(run)}: use a new --workdir"
                )


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['config']['model']['name']}, seed {run['seed']}"


def _comparable(run: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal in all runs of a table: fields of the config, and what was searched."""
    report = run["report"]
    fields = {
        f"{section}.{name}": value
        for section, values in _common_config(run).items()
        for name, value in values.items()
    }
    searched = {key: report[key] for key in ("split", "protocol", "num_gallery")}
    return fields | searched | {key: report["metrics"][key] for key in _COUNTS}


def _common_config(run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's config that decide its result, model and seed aside."""
    aside = ("model.name", *READING)
    return {
        section: {name: value for name, value in fields.items() if f"{section}.{name}" not in aside}
        for section, fields in run["config"].items()
        if section != "seed"
    }


def markdown(table: Mapping[str, Any]) -> str:
    """Lay a document of ``make_table`` out as Markdown."""
    first, *others = table["rows"]
    shown = [f"{family}@{k}" for family in _SHOWN for k in table["ks"]]
    seeds = len(table["seeds"])
    spread = f"mean of {seeds} seeds ± half of its 95 % interval"
    spread = spread if seeds > 1 else "one seed, so no interval and no difference shown"
    lines = [f"## {table['title']}", "", f"In %: {spread}.", ""]
    lines += _metric_rows(table, shown)
    lines += ["", f"Difference from {first['title']}, in percentage points, with its interval:", ""]
    lines += _difference_rows(others, shown)
    lines += ["", f"Embedding one image of {table['config']['data']['image_size']} px:", ""]
    lines += _cost_rows(table["rows"])
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(table)), ""])


def _metric_rows(table: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    papers = [f"map@{k}" for k in table["ks"] if k in _PAPER_KS]
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
    return [
        *(f"`{family}@K`: {definitions[family + '@K']}." for family in _SHOWN),
        "The paper's figures are of DeepFashion, 30 categories: compare them with these only where "
        "the data are the same.",
        f"Interval: {table['interval']}.",
        f"Difference: {table['difference']}.",
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
    if len(difference["values"]) > 1:
        points += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return points + ("" if difference["shown"] else " not shown")


def csv_text(table: Mapping[str, Any]) -> str:
    """Lay a document of ``make_table`` out as CSV: one line for each row and metric, fractions."""
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
