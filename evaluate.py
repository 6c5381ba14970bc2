"""Measure a trained run: embed a split, search, and print every metric with its definition.

python evaluate.py --workdir=RUN [--split=test] [--checkpoint=best|last|STEP|untrained]
    [--figures] [--queries=ID,ID] [--html] [--focus]

Writes RUN/eval/SPLIT/metrics.json and embeddings.npz (and figures; report.html, a page of all of
it; focus.json: how much of the heat lies on the garment); the last line on stdout is one JSON
document. The untrained network's go to RUN/eval/SPLIT-untrained.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cbam_jax import InputError, checkpoint, command_line, data, evaluation, focus, gradcam, steps
from cbam_jax.datasets import RetrievalDataset, open_dataset
from cbam_jax.models import EmbeddingModel, create_model
from cbam_jax.pretrained import load_pretrained
from cbam_jax.runlog import read_log
from cbam_jax.whole_files import written_whole

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def open_split(config: ConfigDict, split: str) -> RetrievalDataset:
    """Open one split of the config's dataset; prepared first if need be."""
    options = {name: config.data[name] for name in ("data_dir", "manual_dir", "on_bad_image")}
    return open_dataset(config.data.name, split, label=config.data.label, **options)


def build_model(config: ConfigDict) -> EmbeddingModel:
    """Build the config's model, freshly initialised from its seed."""
    options = dict(config.model)
    for field in ("freeze_batch_norm", "pretrained"):  # train.py's business.
        options.pop(field, None)
    options["dtype"] = DTYPES[options["dtype"]]
    return create_model(**options, rngs=nnx.Rngs(config.seed))


def split_protocol(config: ConfigDict, dataset: RetrievalDataset) -> evaluation.Protocol:
    """Return who is searched among whom in a split, as the config asks."""
    return evaluation.make_protocol(
        dataset.is_query,
        dataset.is_gallery,
        item=dataset.item,
        series=dataset.series,
        ignore_same_series=config.eval.ignore_same_series,
        ks=config.eval.ks,
    )


def geometry(config: ConfigDict) -> dict[str, Any]:
    """Return how the config cuts an image for evaluation."""
    fields = ("image_size", "crop_fraction", "crop_to_box")
    return {name: config.data[name] for name in fields}


def embed_split(
    config: ConfigDict, dataset: RetrievalDataset, embed_step: Any, state: Any, mesh: Any
) -> np.ndarray:
    """Embed every image of a split once: [n, d] float32. ``state`` is (params, batch_stats)."""
    batches = data.eval_batches(
        dataset,
        **geometry(config),
        batch_size=config.eval.batch_size,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return steps.embed_batches(embed_step, *state, batches, mesh, len(dataset))


def evaluate_split(
    config: ConfigDict, dataset: RetrievalDataset, embed_step: Any, state: Any, mesh: Any
) -> tuple[evaluation.Evaluation, np.ndarray]:
    """Embed and measure a split; the evaluation and the embeddings."""
    protocol = split_protocol(config, dataset)
    embeddings = embed_split(config, dataset, embed_step, state, mesh)
    result = evaluation.evaluate_embeddings(
        embeddings, dataset.label, dataset.label_names, protocol, ks=config.eval.ks
    )
    if config.loss.name == "cross_entropy":
        report = result.report
        report["metrics"] |= evaluation.classification_metrics(
            class_logits(state[0], embeddings), dataset.label
        )
        report["definitions"] |= evaluation.ACCURACY_DEFINITIONS
    return result, embeddings


def class_logits(params: Any, embeddings: np.ndarray) -> np.ndarray:
    """Apply a model's class_head to embeddings [n, d]: [n, classes] float32."""
    head = jax.device_get(nnx.to_pure_dict(params)["class_head"])
    return embeddings @ head["kernel"] + head["bias"]


def check_classes(config: ConfigDict, dataset: RetrievalDataset) -> None:
    """Raise InputError where a classifier's classes are not a dataset's."""
    found = len(dataset.label_names)
    if config.loss.name == "cross_entropy" and found != config.model.num_classes:
        raise InputError(
            f"model.num_classes={config.model.num_classes}, but split {dataset.split!r} of "
            f"{dataset.name} has {found} classes: set it to the number of classes"
        )


def read_config(workdir: Path) -> ConfigDict:
    """Read the config that a run was trained with."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(f"no run in {workdir}: {path} is missing; train first, or check --workdir")
    return ConfigDict(json.loads(path.read_text()))


def restore_model(
    config: ConfigDict, workdir: Path, which: str | int, mesh: Any
) -> tuple[EmbeddingModel, tuple[Any, Any], int]:
    """Read a checkpoint: the model's structure, its (params, batch_stats), and the step.

    ``"untrained"`` is the model that the run started from, so that what training added can be seen.
    """
    if which == "untrained":
        model = build_model(config)
        if config.model.get("pretrained"):
            load_pretrained(model, config.model.pretrained)
        _, *state = nnx.split(model, nnx.Param, nnx.BatchStat)
        return model, steps.replicate(tuple(state), mesh), 0
    with checkpoint.Checkpoints(
        workdir / "checkpoints", best_metric=evaluation.HEADLINE
    ) as checkpoints:
        read = checkpoints.restore(which, optimizer=False)
    model = nnx.eval_shape(lambda: build_model(config))
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    tree = {"params": params, "batch_stats": batch_stats}
    if config.train.ema_decay:
        tree["ema"] = params
    tree = checkpoint.unflatten(tree, read.model)
    state = tree.get("ema", tree["params"]), tree["batch_stats"]
    return model, steps.replicate(state, mesh), read.step


def evaluate(
    workdir: Path,
    split: str,
    which: str | int,
    *,
    figures: bool = False,
    queries: Sequence[str] = (),
    html: bool = False,
    measure: bool = False,
) -> dict[str, Any]:
    """Measure one split of a run and write what was found.

    Args:
        workdir: of the run.
        split: of its dataset.
        which: checkpoint; see ``restore_model``.
        figures: draw them.
        queries: ids of those to draw; without any, eight of all.
        html: write the page, with the figures.
        measure: measure the focus too.
    """
    config = read_config(workdir)
    mesh = steps.data_mesh()
    model, state, step = restore_model(config, workdir, which, mesh)
    dataset = open_split(config, split)
    check_classes(config, dataset)
    split_protocol(config, dataset)  # Its errors belong before the slow part.
    chosen = find_queries(dataset, queries)
    if measure:
        dataset.mask(0)  # And those of a dataset that can't tell where the garment is.
    print(f"embedding {len(dataset)} images of {dataset.name}/{split} with step {step}", flush=True)
    embed_step = steps.make_embed_step(model, mesh)
    result, embeddings = evaluate_split(config, dataset, embed_step, state, mesh)
    report = {"dataset": config.data.name, "split": split, "step": step, **result.report}
    folder = workdir / "eval" / (split if which != "untrained" else f"{split}-untrained")
    folder.mkdir(parents=True, exist_ok=True)
    command_line.write_json(folder / "metrics.json", report)
    save_embeddings(folder / "embeddings.npz", embeddings, dataset)
    print(evaluation.format_report(report), flush=True)
    model = nnx.merge(nnx.graphdef(model), *state)
    if measure:
        report["focus"] = measure_focus(config, model, dataset, result, embeddings, mesh)
        command_line.write_json(folder / "focus.json", report["focus"])
        print(focus.format_report(report["focus"]), flush=True)
    if figures or html:
        drawn = chosen_rows(result, chosen)
        save_figures(folder, dataset, result, drawn)
        names = save_heat_figures(folder, config, model, dataset, result, drawn)
        save_training_curve(workdir, config)
    if html:
        save_page(folder, config, dataset, result, report, ["../training.png", *names])
    return report


def find_queries(dataset: RetrievalDataset, ids: Sequence[str]) -> list[int]:
    """Return the rows of queries by their ids; InputError where one is none."""
    rows = {name: row for row, name in enumerate(dataset.id) if dataset.is_query[row]}
    for name in ids:
        if name not in rows:
            raise InputError(
                f"--queries: {name!r} is no query of {dataset.name}/{dataset.split}: ids look like "
                f"{', '.join(map(repr, list(rows)[:3]))}, and embeddings.npz has them all"
            )
    return [rows[name] for name in ids]


def measure_focus(
    config: ConfigDict,
    model: EmbeddingModel,
    dataset: RetrievalDataset,
    result: evaluation.Evaluation,
    embeddings: np.ndarray,
    mesh: Any,
) -> dict[str, Any]:
    """Measure where the model looks in each query: by itself, and for its nearest image."""
    found = result.neighbour[:, 0] >= 0
    measured = focus.measure_focus(
        model,
        dataset,
        result.query[found],
        {"energy": None, "nearest": embeddings[result.neighbour[found, 0]]},
        mesh=mesh,
        batch_size=config.eval.batch_size,
        **geometry(config),
    )
    return focus.summarize(measured, image_size=config.data.image_size)


def save_embeddings(path: Path, embeddings: np.ndarray, dataset: RetrievalDataset) -> None:
    """Write the embeddings and what each row is."""
    save_arrays(
        path,
        embedding=embeddings,
        label=dataset.label,
        id=dataset.id,
        is_query=dataset.is_query,
        is_gallery=dataset.is_gallery,
    )


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an npz file whole or not at all."""
    with written_whole(path) as partial:
        np.savez(partial, **arrays)


def chosen_rows(result: evaluation.Evaluation, chosen: Sequence[int]) -> np.ndarray:
    """Rows of ``result`` of the chosen queries, or of eight spread evenly over the split."""
    if chosen:
        return np.array([int(np.flatnonzero(result.query == query)[0]) for query in chosen])
    counted = np.flatnonzero(~np.isnan(result.headline))
    return counted[np.linspace(0, len(counted) - 1, min(8, len(counted))).astype(int)]


def save_figures(
    folder: Path, dataset: RetrievalDataset, result: evaluation.Evaluation, drawn: np.ndarray
) -> None:
    """Draw the nearest five of some queries, and of those with the worst results."""
    from cbam_jax import figures

    for name, rows in {"results": drawn, "worst": ranked_queries(result)[:8]}.items():
        figure = figures.result_rows(
            [dataset.image(i) for i in result.query[rows]],
            [[dataset.image(i) for i in line if i >= 0] for line in result.neighbour[rows, :5]],
            result.match[rows, :5],
            distances=result.distance[rows, :5],
            titles=[dataset.label_names[dataset.label[i]] for i in result.query[rows]],
        )
        figures.save(figure, folder / f"{name}.png")
        print(f"wrote {folder / f'{name}.png'}", flush=True)


def ranked_queries(result: evaluation.Evaluation) -> np.ndarray:
    """Rows of ``result``, the worst query first, those left out of the means left out.

    Of equal ones that with fewer hits is worse: map@K is 1 for a single hit, if it comes first.
    """
    counted = np.flatnonzero(~np.isnan(result.headline))
    hits = result.match[counted].sum(axis=1)
    return counted[np.lexsort((hits, result.headline[counted]))]


# Of the page's figures: a caption, and what is seen, in words.
_CAPTIONS = {
    "../training.png": (
        "Training loss, and the metric that chooses the checkpoint, by step.",
        "Two curves over the steps of training: the loss, and below it the validation metric",
    ),
    "heat.png": (
        "Where the embedding of an image comes from: Grad-CAM of the last convolution's output.",
        "Rows of two pictures: a query, and the same with its heat laid over it",
    ),
    "pairs.png": (
        "A query and its nearest hit, and where either is like the other.",
        "Rows of four pictures: a query, its heat, the heat of its nearest hit, that image",
    ),
    "gates.png": (
        "What the attention itself multiplies its feature maps by, at each place.",
        "Rows of pictures: a query, and the same with the spatial gates laid over it",
    ),
}


def save_page(
    folder: Path,
    config: ConfigDict,
    dataset: RetrievalDataset,
    result: evaluation.Evaluation,
    report: dict[str, Any],
    figures: Sequence[str],
) -> None:
    """Write the evaluation as one HTML page, with the best and worst queries and the figures."""
    from cbam_jax.report import Neighbour, Picture, Query, evaluation_page

    def describe(row: int) -> tuple[np.ndarray, str, str]:
        return dataset.image(row), dataset.label_names[dataset.label[row]], str(dataset.id[row])

    def query(row: int) -> Query:
        found = zip(result.neighbour[row], result.distance[row], result.match[row], strict=True)
        neighbours = [
            Neighbour(*describe(i), float(distance), bool(match))
            for i, distance, match in list(found)[:5]
            if i >= 0
        ]
        return Query(*describe(result.query[row]), float(result.headline[row]), neighbours)

    worst = ranked_queries(result)
    headings = {"Best queries": worst[::-1][:8], "Worst queries": worst[:8]}
    pictures = [Picture((folder / name).read_bytes(), *_CAPTIONS[name]) for name in figures]
    page = evaluation_page(
        report,
        model=config.model.name,
        config=config.to_dict(),
        queries={name: [query(row) for row in rows] for name, rows in headings.items()},
        pictures=pictures,
    )
    command_line.write_text(folder / "report.html", page)
    print(f"wrote {folder / 'report.html'}", flush=True)


def save_heat_figures(
    folder: Path,
    config: ConfigDict,
    model: EmbeddingModel,
    dataset: RetrievalDataset,
    result: evaluation.Evaluation,
    rows: np.ndarray,
) -> list[str]:
    """Draw the heat of some queries, the gates there, and each with its nearest hit.

    The heat is kept in ``heat.npz`` too, so that runs can be drawn side by side. Returns the names
    of the files.
    """
    from cbam_jax import figures

    def images(index: np.ndarray) -> np.ndarray:
        return np.stack([data.eval_image(dataset, i, **geometry(config)) for i in index])

    query = result.query[rows]
    titles = [dataset.label_names[dataset.label[i]] for i in query]
    queries = images(query)
    inputs = model.preprocess(queries)
    heat = _heat(gradcam.grad_cam(model, inputs))
    save_arrays(folder / "heat.npz", id=dataset.id[query], image=queries, title=titles, heat=heat)
    drawn = {"heat": figures.heat_rows(queries, {config.model.name: heat}, titles=titles)}
    gates = {
        name.removeprefix("backbone."): np.asarray(gate)
        for name, gate in gradcam.attention_gates(model, inputs).items()
        if name.endswith(".spatial")
    }
    if gates:
        drawn["gates"] = figures.gate_rows(queries, gates, titles=titles)
    hit = np.flatnonzero(result.match[rows].any(axis=1))
    if len(hit):
        rank = result.match[rows[hit]].argmax(axis=1)
        results = images(result.neighbour[rows[hit], rank])
        drawn["pairs"] = figures.pair_rows(
            queries[hit],
            results,
            *map(_heat, gradcam.pair_maps(model, inputs[hit], model.preprocess(results))),
            titles=[titles[i] for i in hit],
            distances=result.distance[rows[hit], rank],
        )
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png")
        print(f"wrote {folder / f'{name}.png'}", flush=True)
    return [f"{name}.png" for name in drawn]


def _heat(maps: gradcam.HeatMaps) -> np.ndarray:
    return np.asarray(maps.heat)


def save_training_curve(workdir: Path, config: ConfigDict) -> None:
    """Draw the run's loss and its best-deciding metric over the steps."""
    from cbam_jax import figures

    metric = f"{config.data.eval_split}/{evaluation.HEADLINE}"
    path = workdir / "eval" / "training.png"
    figures.save(figures.training_curve(read_log(workdir), metric=metric), path)
    print(f"wrote {path}", flush=True)


def main() -> None:
    """Read the flags, evaluate, print the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run, as given to train.py")
    parser.add_argument("--split", default="test", help="split of the run's dataset")
    parser.add_argument("--checkpoint", default="best", help="best, last, untrained or a step")
    parser.add_argument("--figures", action="store_true", help="draw result rows and heat maps")
    parser.add_argument("--queries", help="ids of those to draw, ID,ID; default: eight of all")
    parser.add_argument("--html", action="store_true", help="write a page of it, with the figures")
    parser.add_argument("--focus", action="store_true", help="measure the heat on the garments")
    flags = parser.parse_args()
    which = int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint
    if which not in ("best", "last", "untrained") and not isinstance(which, int):
        raise InputError(f"--checkpoint={which}: give best, last, untrained or a step")
    command_line.keep_compiled_programs()
    report = evaluate(
        flags.workdir,
        flags.split,
        which,
        figures=flags.figures,
        queries=flags.queries.split(",") if flags.queries else (),
        html=flags.html,
        measure=flags.focus,
    )
    keys = ("dataset", "split", "step", "metrics", "interval", "focus")
    line = {key: report[key] for key in keys if key in report}
    print(command_line.to_json({"workdir": str(flags.workdir), **line}))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
