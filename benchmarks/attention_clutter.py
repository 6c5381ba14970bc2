"""Does attention look away from the background, and does retrieval gain by it?

python benchmarks/attention_clutter.py [--workdir=runs/attention_clutter] [--seeds=3] [--steps=160]
    [--only=clutter,model,seed] [--report]

Trains ResNet18 alone, with SE and with CBAM, from scratch, on the drawn garments before three
backgrounds (plain, medium, heavy clutter; same garments, same poses), several seeds of each, and
measures the test split of the same clutter: mAP@10, and the focus on the garments of the consumer
images, which are those that clutter changes. The last step counts: no checkpoint is chosen. The
same command goes on where it was stopped; --only measures one cell, and --report trains nothing and
writes benchmarks/results/attention_clutter_cpu.json and docs/attention_* from the cells there
are.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax import (
    InputError,
    command_line,
    data,
    experiment,
    figures,
    focus,
    gradcam,
    runs,
    steps,
    training,
)
from cbam_jax.configs import quickstart

CLUTTERS = {"clean": 0.0, "default": 0.5, "cluttered": 1.0}
MODELS = ("resnet18", "resnet18_se", "resnet18_cbam")
RESULTS = Path(__file__).parent / "results" / "attention_clutter_cpu.json"
DOCS = Path(__file__).parent.parent / "docs"
MEASURES = {
    "map@10": "mAP@10, test split",
    "nearest/heat_inside": "share of the heat on the garment",
    "nearest/pointing": "pointing game",
}
_SHOWN = 6  # images in the heat figure


def make_config(clutter: str, model: str, seed: int, num_steps: int) -> ConfigDict:
    """The quickstart's recipe at 72 px, whose last feature map is 3 x 3, and half its batch."""
    config = quickstart.get_config()
    config.seed = seed
    config.data.name = f"synthetic_garments/{clutter}"
    config.data.image_size = 72
    config.data.images_per_class = 4
    config.model.name = model
    config.train.steps = num_steps
    config.train.eval_every = config.train.checkpoint_every = num_steps
    config.lock()
    return config


def run_cell(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train and measure one model; the checkpoints go once everything is measured."""
    start = time.process_time()
    training.train_and_evaluate(config, workdir)
    trained = time.process_time()
    mesh = steps.data_mesh()
    model, state, _ = runs.restore_model(config, workdir, "last", mesh)
    dataset = experiment.open_split(config, "test")
    embed_step = steps.make_embed_step(model, mesh)
    result, embeddings = runs.evaluate_split(config, dataset, embed_step, state, mesh)
    model = nnx.merge(nnx.graphdef(model), *state)
    # series is twice the item, and one more for a consumer's image.
    consumer = np.flatnonzero(dataset.series % 2 == 1)
    measured = focus.measure_focus(
        model,
        dataset,
        consumer,
        {"energy": None, "nearest": embeddings[result.neighbour[consumer, 0]]},
        mesh=mesh,
        batch_size=config.eval.batch_size,
        **experiment.geometry(config),
    )
    save_heat(config, workdir, model, dataset, consumer, embeddings, result)
    cell = {
        "clutter": config.data.name.split("/")[1],
        "model": config.model.name,
        "seed": config.seed,
        "steps": config.train.steps,
        "metrics": result.report["metrics"],
        "focus": focus.summarize(measured, image_size=config.data.image_size),
        # Of the cores together, since other programs may run beside.
        "cpu_seconds": {
            "train": round(trained - start, 1),
            "measure": round(time.process_time() - trained, 1),
        },
    }
    command_line.write_json(workdir / "cell.json", cell)
    shutil.rmtree(workdir / "checkpoints")
    return cell


def save_heat(config, workdir, model, dataset, consumer, embeddings, result) -> None:
    """Keep the heat of a few images for the figure: the same images for every model."""
    rows = consumer[np.linspace(0, len(consumer) - 1, _SHOWN).astype(int)]
    cut = experiment.geometry(config)
    images = np.stack([data.eval_image(dataset, i, **cut) for i in rows])
    nearest = embeddings[result.neighbour[rows, 0]]
    maps = gradcam.grad_cam(model, model.preprocess(images), nearest)
    gates = gradcam.attention_gates(model, model.preprocess(images))
    np.savez(
        workdir / "heat.npz",
        image=images,
        title=np.array([dataset.label_names[dataset.label[i]] for i in rows]),
        heat=np.asarray(maps.heat),
        **{name: np.asarray(gate) for name, gate in gates.items() if name.endswith("spatial")},
    )


def value(cell: dict[str, Any], measure: str) -> float:
    """Look one measure up in a cell."""
    target, _, key = measure.rpartition("/")
    return cell["focus"]["targets"][target][key] if target else cell["metrics"][measure]


def compare(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By clutter, model and measure: each seed's value, and its gain over plain ResNet18."""
    by_key = {(cell["clutter"], cell["model"], cell["seed"]): cell for cell in cells}
    rows = []
    for clutter in CLUTTERS:
        for model in MODELS:
            for measure in MEASURES:
                values, gains = {}, {}
                for (of_clutter, of_model, seed), cell in sorted(by_key.items()):
                    if (of_clutter, of_model) == (clutter, model):
                        values[seed] = value(cell, measure)
                        plain = by_key.get((clutter, MODELS[0], seed))
                        if plain is not None:
                            gains[seed] = values[seed] - value(plain, measure)
                row = {"clutter": clutter, "model": model, "measure": measure}
                if values:
                    summary = {"values": values, "mean": float(np.mean([*values.values()]))}
                    rows.append(row | summary | {"gain_over_resnet18": gains})
    return rows


def draw_curves(rows: list[dict[str, Any]], even: dict[str, float]):
    """Each measure over the clutter: a point a seed, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, 3), MEASURES.items(), strict=True):
        for i, model in enumerate(MODELS):
            found = [row for row in rows if (row["model"], row["measure"]) == (model, measure)]
            color = f"C{i}"
            x = [CLUTTERS[row["clutter"]] for row in found]
            axes.plot(x, [row["mean"] for row in found], color=color, label=model)
            for place, row in zip(x, found, strict=True):
                points = list(row["values"].values())
                # Beside one another, so that equal seeds can be told.
                axes.plot([place + 0.02 * (i - 1)] * len(points), points, ".", color=color)
        if measure == "nearest/heat_inside":
            x = [CLUTTERS[clutter] for clutter in even]
            axes.plot(x, list(even.values()), "--", color="0.5", label="an even map")
        axes.set(xlabel="clutter of the consumer images", ylabel=label)
        axes.set_xticks(list(CLUTTERS.values()))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw_heat(workdir: Path):
    """The same cluttered images under each model, seed 0, and CBAM's gates beside them."""
    kept = {
        model: np.load(workdir / f"cluttered-{model}-0" / "heat.npz")
        for model in MODELS
        if (workdir / f"cluttered-{model}-0" / "heat.npz").exists()
    }
    if not kept:
        return {}
    first = next(iter(kept.values()))
    images, titles = list(first["image"]), [str(title) for title in first["title"]]
    heats = {model: arrays["heat"] for model, arrays in kept.items()}
    drawn = {"attention_heat.jpg": figures.heat_rows(images, heats, titles=titles)}
    gates = {
        name.removeprefix("backbone.").removesuffix(".spatial"): arrays[name]
        for arrays in kept.values()
        for name in arrays.files
        if name.endswith(".spatial")
    }
    if gates:
        drawn["attention_gates.jpg"] = figures.gate_rows(images, gates, titles=titles)
    return drawn


def report(workdir: Path) -> dict[str, Any]:
    """Write the results and the figures from the cells there are."""
    cells = [json.loads(path.read_text()) for path in sorted(workdir.glob("*/cell.json"))]
    if not cells:
        raise InputError(f"no finished cell in {workdir}: leave --report out, or check --workdir")
    rows = compare(cells)
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": "2-core x86-64 CPU",
        "command": "python benchmarks/attention_clutter.py "
        f"--seeds={len({cell['seed'] for cell in cells})} --steps={cells[0]['steps']}",
        "data": "synthetic_garments/{clean,default,cluttered}, test split, leave one out; focus on "
        "the consumer images only",
        "comparison": rows,
        "cells": cells,
    }
    command_line.write_json(RESULTS, document)
    print(f"wrote {RESULTS}")
    even = {cell["clutter"]: cell["focus"]["area"] for cell in cells}
    even = {clutter: even[clutter] for clutter in CLUTTERS if clutter in even}
    drawn = {"attention_clutter.png": draw_curves(rows, even)} | draw_heat(workdir)
    for name, figure in drawn.items():
        figures.save(figure, DOCS / name)
        print(f"wrote {DOCS / name}")
    return {"cells": len(cells), "comparison": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/attention_clutter"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160, help="of training, 32 images each")
    parser.add_argument("--only", help="one cell: clutter,model,seed; writes no report")
    parser.add_argument("--report", action="store_true", help="train nothing")
    flags = parser.parse_args()
    # Seed by seed, so that what is there after an interruption can be compared.
    cells = [(c, m, str(s)) for s in range(flags.seeds) for c in CLUTTERS for m in MODELS]
    cells = [tuple(flags.only.split(","))] if flags.only else cells
    flags.workdir.mkdir(parents=True, exist_ok=True)
    # Cells of one model differ in nothing that is compiled.
    command_line.keep_compiled_programs()
    for clutter, model, seed in [] if flags.report else cells:
        workdir = flags.workdir / f"{clutter}-{model}-{seed}"
        if not (workdir / "cell.json").exists():
            cell = run_cell(make_config(clutter, model, int(seed), flags.steps), workdir)
            print(
                json.dumps({key: cell[key] for key in ("clutter", "model", "seed", "cpu_seconds")})
            )
    if not flags.only:
        print(command_line.to_json(report(flags.workdir)))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
