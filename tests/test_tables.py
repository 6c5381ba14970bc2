"""The paper's tables against loops and scipy over made-up runs."""

import csv
import io
import json
import re

import numpy as np
import pytest
from scipy import stats

from cbam_jax import InputError, command_line
from cbam_jax.metrics import METRIC_DEFINITIONS
from cbam_jax.paper import ROWS, TABLES, csv_text, make_table, markdown

METRICS = [f"{name}@{k}" for name in ("map", "map_min", "precision") for k in (5, 10)] + ["mrr"]
COST = {
    "device": "abacus", "cores": 2, "jax": "1.2", "numpy": "3.4", "python": "5.6"
}  # fmt: skip


def make_run(row, seed, metrics):
    config = {
        "seed": seed,
        "data": {"name": "a|b.csv", "eval_split": "validation", "image_size": 48, "workers": seed},
        "model": {"name": row, "dtype": "float32"},
        "eval": {"batch_size": 16},
    }
    report = {
        "split": "test",
        "step": 10 * seed + 5,
        "protocol": "leave one out",
        "num_gallery": 41,
        "ks": [5, 10],
        "metrics": {**metrics, "num_queries": 41.0, "num_left_out": 3.0},
        "definitions": dict(METRIC_DEFINITIONS),
    }
    return {"seed": seed, "config_file": "mine.py", "config": config, "report": report}


@pytest.fixture
def runs(rng):
    """Table 1 of three seeds: a seed's runs are alike, the third row is better, the second not."""
    of_seed = rng.normal(0.5, 0.1, (3, len(METRICS)))
    better = {"resnet50": 0.0, "resnet50_se": 0.001, "resnet50_cbam": 0.08}
    return {
        row: [
            make_run(row, seed, dict(zip(METRICS, values, strict=True)))
            for seed, values in enumerate(of_seed + gain + rng.normal(0, 0.004, of_seed.shape))
        ]
        for row, gain in better.items()
    }


@pytest.fixture
def costs():
    return {
        row: {**COST, "parameters": 1_234_567 + i, "flops": 2.5e9, "images_per_second": 10.25 + i}
        for i, row in enumerate(TABLES[1])
    }


def test_means_intervals_and_paired_differences_agree_with_scipy(runs, costs):
    table = make_table(1, runs, costs, command="do it")
    assert [row["row"] for row in table["rows"]] == list(TABLES[1])
    first = runs["resnet50"]
    for row in table["rows"]:
        assert row["metrics"].keys() == set(METRICS)
        for name, metric in row["metrics"].items():
            values = [run["report"]["metrics"][name] for run in runs[row["row"]]]
            assert metric["values"] == values
            assert metric["mean"] == pytest.approx(sum(values) / 3)
            interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert metric["interval"] == pytest.approx(interval)
            if row["row"] == "resnet50":
                assert metric["difference"] is None
                continue
            found = metric["difference"]
            test = stats.ttest_rel(values, [run["report"]["metrics"][name] for run in first])
            assert found["interval"] == pytest.approx(tuple(test.confidence_interval(0.95)))
            assert found["mean"] == pytest.approx(sum(found["interval"]) / 2)
            assert found["shown"] == (test.pvalue < 0.05)
    shown = {row["row"]: row["metrics"]["map@5"]["difference"] for row in table["rows"][1:]}
    # Paired: the spread between seeds is ten times the gain that is shown.
    assert (shown["resnet50_se"]["shown"], shown["resnet50_cbam"]["shown"]) == (False, True)
    low, high = table["rows"][2]["metrics"]["map@5"]["interval"]
    assert low < table["rows"][0]["metrics"]["map@5"]["mean"] < high


def test_a_loss_is_shown_as_a_gain_is(runs, costs):
    runs["resnet50"], runs["resnet50_cbam"] = runs["resnet50_cbam"], runs["resnet50"]
    for row in ("resnet50", "resnet50_cbam"):
        for run in runs[row]:
            run["config"]["model"]["name"] = row
    table = make_table(1, runs, costs, command="do it")
    found = table["rows"][2]["metrics"]["map@5"]["difference"]
    assert found["mean"] < found["interval"][1] < 0
    assert found["shown"]


def test_the_papers_figures_are_those_of_its_tables(runs, costs):
    table = make_table(1, runs, costs, command="do it")
    assert table["rows"][2]["metrics"]["map@5"]["paper"] == 0.925
    assert table["rows"][0]["metrics"]["map@10"]["paper"] == 0.824
    assert table["rows"][1]["metrics"]["precision@10"]["paper"] is None
    assert ROWS["vgg16_cbam"].paper == (0.815, 0.791, 0.592)
    assert ROWS["googlenet_cbam"].paper == (0.836, 0.812, 0.624)
    # One row of two tables, trained once.
    assert TABLES[1][2] == TABLES[2][2] == "resnet50_cbam"


def test_the_document_says_what_its_numbers_are(runs, costs):
    table = make_table(1, runs, costs, command="do it")
    assert (table["num_queries"], table["num_left_out"], table["num_gallery"]) == (41, 3, 41)
    assert (table["seeds"], table["split"], table["data"]) == ([0, 1, 2], "test", "a|b.csv")
    assert table["definitions"]["map@K"] == METRIC_DEFINITIONS["map@K"]
    assert table["rows"][1]["config"] == "mine.py with model.name=resnet50_se"
    assert table["rows"][1]["checkpoint_steps"] == [5, 15, 25]
    assert table["machine"]["device"] == "abacus"
    assert "name" not in table["config"]["model"]
    assert runs["resnet50"][0]["config"]["model"]["name"] == "resnet50"
    assert json.loads(command_line.to_json(table))["command"] == "do it"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_shows_percent_and_marks_what_is_not_shown(runs, costs):
    table = make_table(1, runs, costs, command="do it")
    text = markdown(table)
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ResNet50 + CBAM")]
    means, differences, cost = lines
    metric = table["rows"][2]["metrics"]["map@5"]
    low, high = metric["interval"]
    assert means[1] == f"{100 * metric['mean']:.1f} ± {50 * (high - low):.1f}"
    assert means[-2:] == ["92.5", "89.8"]
    assert re.fullmatch(r"\+[78]\.\d \(\+\d+\.\d to \+\d+\.\d\)", differences[1])
    assert cost == ["ResNet50 + CBAM", "1.23", "2.500", "12.2"]
    [unclear] = [
        line
        for line in text.splitlines()
        if line.startswith("| ResNet50 + SE | ") and "not shown" in line
    ]
    assert "not shown" in cells(unclear)[1]
    for part in (
        METRIC_DEFINITIONS["map_min@K"], "41 queries", "3 queries left out", "`a|b.csv`",
        "split `test`", "Seeds 0, 1, 2", "`mine.py with model.name=resnet50`", "`do it`",
        "Student's t over the seeds", "best of each run by map@10 on split validation",
    ):  # fmt: skip
        assert part in text


def test_csv_has_a_line_for_each_row_and_metric(runs, costs):
    table = make_table(1, runs, costs, command="do it, now")
    lines = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert len(lines) == 3 * (len(METRICS) + 3)
    found = {(line["model"], line["metric"]): line for line in lines}
    line = found["ResNet50 + CBAM", "map_min@10"]
    metric = table["rows"][2]["metrics"]["map_min@10"]
    assert float(line["mean"]) == metric["mean"]
    assert (float(line["low"]), float(line["high"])) == metric["interval"]
    assert [float(line[f"seed_{seed}"]) for seed in range(3)] == metric["values"]
    assert float(line["difference"]) == metric["difference"]["mean"]
    assert line["difference_shown"] == str(metric["difference"]["shown"])
    assert line["definition"] == METRIC_DEFINITIONS["map_min@K"]
    assert (line["queries"], line["left_out"], line["command"]) == ("41", "3", "do it, now")
    assert line["paper"] == ""
    assert found["ResNet50", "map@5"]["difference"] == ""
    assert found["ResNet50", "mrr"]["definition"] == METRIC_DEFINITIONS["mrr"]
    assert float(found["ResNet50 + SE", "parameters"]["mean"]) == 1_234_568


def test_one_seed_has_no_interval_and_shows_nothing(runs, costs):
    table = make_table(1, {row: of_row[:1] for row, of_row in runs.items()}, costs, command="do it")
    assert not any(metric["difference"]["shown"] for metric in table["rows"][2]["metrics"].values())
    text = markdown(table)
    assert "one seed, so no interval" in text
    assert "±" not in text
    assert "nan" not in text
    assert json.loads(command_line.to_json(table))["rows"][0]["metrics"]["mrr"]["interval"] == [
        None,
        None,
    ]
    [line, *_] = csv.DictReader(io.StringIO(csv_text(table)))
    assert (line["low"], line["high"]) == ("", "")


def test_a_mean_over_no_query_and_operations_that_are_not_known(runs, costs):
    runs["resnet50"][1]["report"]["metrics"]["map@5"] = None
    costs["resnet50"]["flops"] = None
    table = make_table(1, runs, costs, command="do it")
    assert np.isnan(table["rows"][0]["metrics"]["map@5"]["mean"])
    assert not table["rows"][2]["metrics"]["map@5"]["difference"]["shown"]
    assert "unknown" in markdown(table)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "dtype", "bfloat16"), ("data", "image_size", 64)],
)
def test_runs_of_different_configs_make_no_table(runs, costs, section, field, value):
    runs["resnet50_se"][1]["config"][section][field] = value
    message = f"{section}.{field} is .* in resnet50, seed 0 and {value!r} in resnet50_se, seed 1"
    with pytest.raises(InputError, match=message):
        make_table(1, runs, costs, command="do it")


def test_runs_of_different_queries_make_no_table(runs, costs):
    runs["resnet50_cbam"][2]["report"]["metrics"]["num_queries"] = 40.0
    with pytest.raises(InputError, match="num_queries is 41.0 in .* and 40.0 in resnet50_cbam"):
        make_table(1, runs, costs, command="do it")


def test_seeds_of_different_models_make_no_row(runs, costs):
    runs["resnet50_se"][2]["config"]["model"]["name"] = "resnet50_bn_se"
    message = "model.name is 'resnet50_se' in resnet50_se, seed 0 and .* in resnet50_bn_se, seed 2"
    with pytest.raises(InputError, match=message):
        make_table(1, runs, costs, command="do it")
