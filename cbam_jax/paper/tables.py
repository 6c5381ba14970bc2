"""The paper's Tables 1 and 2, and one of pretrained weights, from finished runs.

Means over seeds, intervals, and differences paired by seed and by query.

``make_table`` turns what each row's runs measured into one JSON document, which says what its
numbers are: definitions, queries, data, split, seeds, configs and command.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.metrics import t_interval
from cbam_jax.paper.queries import mean_of_categories, over_queries


class Row(NamedTuple):
    """A row of the tables: its model, and its mAP@5, mAP@10 and mAP@20 in the paper.

    None stands for the row's own name in ``config`` and ``model``, and in ``attention_init`` for
    what the config says. ``untrained`` rows are another row's run before its first step.
    """

    title: str
    paper: tuple[float, float, float] | None = None
    config: str | None = None
    model: str | None = None
    attention_init: str | None = None
    untrained: bool = False


# Rows of equal name are one row, trained once.
ROWS = {
    "resnet50": Row("ResNet50", (0.887, 0.824, 0.682)),
    "resnet50_se": Row("ResNet50 + SE", (0.901, 0.851, 0.694)),
    "resnet50_cbam": Row("ResNet50 + CBAM", (0.925, 0.898, 0.713)),
    "vgg16_cbam": Row("VGG16 + CBAM", (0.815, 0.791, 0.592)),
    "googlenet_cbam": Row("GoogLeNet + CBAM", (0.836, 0.812, 0.624)),
} | {
    name: Row(f"EfficientNet-Lite0{title}", None, "photos", f"efficientnet_lite0{attention}", init)
    for name, title, attention, init in (
        ("efficientnet_lite0", "", "", "identity"),
        ("efficientnet_lite0_se", " + SE", "_se", "paper"),
        ("efficientnet_lite0_se-identity", " + SE from the identity", "_se", "identity"),
        ("efficientnet_lite0_cbam", " + CBAM", "_cbam", "paper"),
        ("efficientnet_lite0_cbam-identity", " + CBAM from the identity", "_cbam", "identity"),
    )
}
ROWS["efficientnet_lite0-untrained"] = ROWS["efficientnet_lite0"]._replace(
    title="EfficientNet-Lite0, untrained", untrained=True
)
# What a row is trained as where it starts from random weights. Without BatchNorm, VGG16's thirteen
# random convolutions turn all images into nearly one direction, which triplets make a point.
FROM_SCRATCH = {
    "vgg16_cbam": ROWS["vgg16_cbam"]._replace(
        title="VGG16 with BatchNorm + CBAM", model="vgg16_bn_cbam"
    )
}
# The first row of each is the one that the others are compared with.
TABLES = {
    1: ("resnet50", "resnet50_se", "resnet50_cbam"),
    2: ("vgg16_cbam", "googlenet_cbam", "resnet50_cbam"),
    3: tuple(name for name in ROWS if name.startswith("efficientnet_lite0")),
}
TITLES = {
    1: "Table 1: attention in ResNet50",
    2: "Table 2: backbones with CBAM",
    3: "Table 3: attention on pretrained weights",
}
INTERVAL = (
    "Student's t over the seeds, 95 %: it covers what varies from training to training (starting "
    "weights, batches, augmentation) on this split, not the choice of its images"
)
DIFFERENCE = (
    "a row's value minus the first row's of the same seed, whose batches are the same too; its "
    "interval is Student's t over these differences, 95 % each by itself, without correction for "
    'their number; where it holds 0 the difference is "not shown"'
)
QUERIES = (
    "95 % percentile bootstrap over the queries, of each query's mean over the seeds: it covers "
    "the choice of the split's images, not what varies from training to training"
)
# Fields that say where and how data are read, whatever they are.
READING = ("data.data_dir", "data.manual_dir", "data.workers")
_PAPER_KS = (5, 10, 20)
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
        number: of ``TABLES``.
        results: of each row of the table, its runs, one a seed in the same order in every row;
            each has ``seed``, ``config_file``, ``config`` (the run's ``config.json``),
            ``report`` (its ``metrics.json``) and, if it was kept, ``per_query`` (of
            ``queries.per_query``).
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
    aside = ("model.name", *(["model.attention_init"] if number == 3 else []), *READING)
    check_comparable(runs, aside)
    for name in names:
        check_comparable(results[name], READING)  # Seeds of a row are of one model.
    first, report = results[names[0]], runs[0]["report"]
    return {
        "table": number,
        "title": TITLES[number],
        "data": report.get("dataset", runs[0]["config"]["data"]["name"]),
        **{key: report[key] for key in ("split", "protocol", "num_gallery", "ks")},
        **{key: int(report["metrics"][key]) for key in _COUNTS},
        "seeds": [run["seed"] for run in first],
        "checkpoint": "the best of each run by map@10 on split "
        f"{runs[0]['config']['data']['eval_split']}",
        "command": command,
        "interval": INTERVAL,
        "difference": DIFFERENCE,
        "over_queries": QUERIES,
        "definitions": report["definitions"],
        "rows": [
            _row(name, results[name], None if name == names[0] else first, costs[name])
            for name in names
        ],
        "config": _common_config(runs[0], aside),
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
    told = zip(_PAPER_KS, ROWS[name].paper or (), strict=False)
    paper = {f"map@{k}": value for k, value in told}
    return {
        "row": name,
        "title": trained_as(name, runs[0]["config"]).title,
        "config": _config(name, runs[0]),
        "checkpoint_steps": [run["report"]["step"] for run in runs],
        "parameters": cost["parameters"],
        "flops": cost["flops"],
        "images_per_second": cost["images_per_second"],
        "over_queries": over_queries(runs, first),
        "per_category": mean_of_categories([run["report"].get("per_category", {}) for run in runs]),
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


def _config(name: str, run: Mapping[str, Any]) -> str:
    fields = row_fields(name, trained_as(name, run["config"])).items()
    told = f"{run['config_file']} with " + " ".join(f"{field}={value}" for field, value in fields)
    return told + ", before its first step" * ROWS[name].untrained


def trained_as(name: str, config: Mapping[str, Any]) -> Row:
    """Return what a row was trained as, by its run's config: of ``FROM_SCRATCH`` or itself.

    >>> trained_as("vgg16_cbam", {"model": {"name": "vgg16_bn_cbam"}}).title
    'VGG16 with BatchNorm + CBAM'
    """
    other = FROM_SCRATCH.get(name, ROWS[name])
    return other if other.model == config["model"]["name"] else ROWS[name]


def row_fields(name: str, row: Row) -> dict[str, str]:
    """Return the fields of the config that make a row what it is trained as.

    >>> name = "efficientnet_lite0_se-identity"
    >>> row_fields(name, ROWS[name])
    {'model.name': 'efficientnet_lite0_se', 'model.attention_init': 'identity'}
    """
    fields = {"model.name": row.model or name, "model.attention_init": row.attention_init}
    return {field: value for field, value in fields.items() if value}


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


def check_comparable(runs: Sequence[Mapping[str, Any]], aside: Sequence[str]) -> None:
    """Raise InputError where two runs differ by more than seed and the fields ``aside``."""
    first = _comparable(runs[0], aside)
    for run in runs[1:]:
        other = _comparable(run, aside)
        for field, value in first.items():
            if other.get(field) != value:
                raise InputError(
                    f"no table can hold both: {field} is {value!r} in {_run_name(runs[0])} and "
                    f"{other.get(field)!r} in {_run_name(run)}: use a new --workdir"
                )


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['config']['model']['name']}, seed {run['seed']}"


def _comparable(run: Mapping[str, Any], aside: Sequence[str]) -> dict[str, Any]:
    """What must be equal in all runs of a table: fields of the config, and what was searched."""
    report = run["report"]
    fields = {
        f"{section}.{name}": value
        for section, values in _common_config(run, aside).items()
        for name, value in values.items()
    }
    searched = {key: report[key] for key in ("split", "protocol", "num_gallery")}
    return fields | searched | {key: report["metrics"][key] for key in _COUNTS}


def _common_config(run: Mapping[str, Any], aside: Sequence[str]) -> dict[str, Any]:
    """The fields of a run's config that decide its result, seed and ``aside`` left out."""
    return {
        section: {name: value for name, value in fields.items() if f"{section}.{name}" not in aside}
        for section, fields in run["config"].items()
        if section != "seed"
    }
