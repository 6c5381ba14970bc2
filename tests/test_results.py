"""Tables of the docs have the numbers of the results that they name, rounded as they are there."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def rows(page):
    """All rows of a page's tables, as lists of their cells."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def test_losses_on_features_that_do_not_change():
    kept = results("compare_losses_cpu")
    told = rows("losses.md")
    for row in kept["rows"]:
        value = row["test"]
        name = "random axes, before training" if row["chosen"] is None else row["loss"]
        chosen = row["chosen"] and f"{row['chosen']['validation']['map@R']:.3f}"
        assert [
            name, f"{value['map@R']['mean']:.3f}", span(value["map@R"]["interval"]),
            f"{value['precision@1']['mean']:.3f}", chosen or "",
        ] in told  # fmt: skip
    first = {row["loss"]: row for row in kept["rows"]}
    for row in kept["lower_rates"]["rows"]:
        both = [f"{r['test']['map@R']['mean']:.3f}, {rate(r)}" for r in (first[row["loss"]], row)]
        assert [row["loss"], *both, span(row["test"]["map@R"]["interval"])] in told


def test_losses_trained_into_a_network():
    told = rows("losses.md")
    for row in results("compare_losses_network_cpu")["rows"]:
        assert [
            row["loss"],
            *(
                ", ".join(f"{seed[split][metric]:.3f}" for seed in row["seeds"])
                for split, metric in (
                    ("unseen", "map@R"), ("test", "map@R"), ("unseen", "precision@1"),
                )
            ),
        ] in told  # fmt: skip


def span(interval):
    return "{:.3f} to {:.3f}".format(*interval)


def rate(row):
    return f"{row['chosen']['learning_rate']:.2g}"


def test_vgg16_from_random_weights():
    """Mean of three seeds and half of its 95 % interval: t of 2 degrees of freedom is 4.303."""
    kept = results("clothing_vgg16_bn_cpu")
    seeds = [kept["test"]["metrics"], *kept["test_of_other_seeds"].values()]
    percent = np.array([[100 * seed[f"map@{k}"] for k in (5, 10, 20)] for seed in seeds])
    half = 4.3027 * percent.std(axis=0, ddof=1) / 3**0.5
    values = [f"{m:.1f} ± {h:.1f}" for m, h in zip(percent.mean(axis=0), half, strict=True)]
    assert ["VGG16 with BatchNorm + CBAM", *values, ""] in rows("guides/deepfashion.md")


def test_what_a_step_needs_of_each_device():
    for row in results("state_memory_h100")["rows"]:
        chunks = f" by {row['chunk_size']}" if row["chunk_size"] else ""
        assert [
            f"`{row['model']}`", str(row["devices"]), "shared" if row["shard_state"] else "whole",
            "yes" if row["remat"] else "", f"{row['batch_size']:,}{chunks}",
            f"{row['state'] / 1e9:.3f}", f"{row['memory']['temporaries'] / 1e9:.2f}",
            f"{row['memory']['total'] / 1e9:.2f}", f"{row['flops_per_device'] / 1e12:.2f}",
        ] in rows("guides/scaling.md")  # fmt: skip


def test_a_steps_work_shared_by_devices():
    for row in results("step_devices_cpu")["rows"]:
        memory = row["memory"]
        assert [
            str(row["devices"]), f"{row['flops_per_device'] / 1e9:,.0f}",
            f"{row['bytes_per_device'] / 1e9:.1f}", f"{memory['arguments'] / 1e6:.0f}",
            f"{memory['temporaries'] / 1e6:,.0f}",
        ] in rows("guides/scaling.md")  # fmt: skip


def test_the_same_run_by_several_processes():
    for row in results("processes_cpu")["rows"]:
        losses = ", ".join(f"{loss:.6f}" for loss in row["loss_at_1_5_10_20"])
        assert [
            str(row["processes"]), str(row["devices"]), losses,
            f"{row['validation_map@10']:.3f}", f"{row['greatest_difference']:.1e}",
        ] in rows("guides/scaling.md")  # fmt: skip


def test_where_heat_lies_at_224_px():
    kept = results("pretrained_focus_224px_cpu")["rows"]
    told = {row[0].strip("`").replace("the same,", "configs/photos.py,").replace("`", ""): row
            for row in rows("attention.md") if len(row) == 5}  # fmt: skip
    for name, row in kept.items():
        targets = [row["targets"][target] for target in ("energy", "nearest")]
        values = [f"{t[key]:.3f}" for t in targets for key in ("heat_inside", "pointing")]
        assert told[name][1:] == values
