"""A run on disk: its config, its trained model, a split of its dataset measured.

``restore_model`` reads a checkpoint, ``evaluate_split`` embeds and measures a split, ``evaluate``
does both and writes what was found; ``run_figures`` draws it.
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from cbam_jax import (
    InputError,
    checkpoint,
    command_line,
    config_checks,
    config_files,
    data,
    evaluation,
    experiment,
    model_state,
    rerank_steps,
    reranked,
    run_figures,
    run_results,
    saved_config,
    steps,
    workdirs,
)
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset, is_ours, is_path
from cbam_jax.figures import HIT_COLORS
from cbam_jax.foreign_files import expanded
from cbam_jax.models import EmbeddingModel
from cbam_jax.pretrained import load_pretrained
from cbam_jax.run_figures import Measured
from cbam_jax.runlog import read_log
from cbam_jax.sharding import on_host
from cbam_jax.stopping import Stop

_DRAWN = 50  # Most queries of one figure, each a row of it.
State = tuple[Any, Any]  # A model's parameters and its BatchNorm statistics.


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's workdir."""
    return os.path.isdir(folder / "checkpoints")


def read_config(workdir: Path) -> Config:
    """Read the config that a run was trained with; where it is damaged, a checkpoint's copy of it.

    Fields that the run's version did not have are those of ``configs/default.py``.

    Raises:
        InputError: there is no run, or no copy that is whole.
    """
    path = Path(workdir) / "config.json"
    if os.path.lexists(path.parent / "model.safetensors") and not is_run(Path(workdir)):
        raise InputError(
            f"{workdir} is an exported model, not a run, which alone can be measured: give the "
            "workdir of a training; cbam_jax.load reads both"
        )
    if not os.path.lexists(path) and not is_run(Path(workdir)):
        raise InputError(f"no run in {workdir}: {path} is missing; train first, or check --workdir")
    try:
        return saved_config.read(path)
    except (OSError, ValueError) as error:
        with _checkpoints(workdir) as checkpoints:
            kept = checkpoints.read_config()
        if kept is None and not os.path.lexists(path):
            raise InputError(
                f"the run in {workdir} ended before it began: train first, or check --workdir"
            ) from error
        if kept is None:
            raise InputError(
                f"{path} cannot be read ({error}), and no checkpoint has a copy: restore it"
            ) from error
        print(f"{path} cannot be read ({error}): taken from a checkpoint", file=sys.stderr)
    try:
        return saved_config.from_document(kept)
    except ValueError as error:
        raise InputError(f"{path} is damaged, and a checkpoint's copy too ({error})") from error


def _checkpoints(workdir: Path) -> Checkpoints:
    """A run's checkpoints, to be read only, whatever its config."""
    folder = Path(workdir) / "checkpoints"
    return Checkpoints(folder, best_metric=evaluation.headline, read_only=True)


def open_checkpoints(config: Config, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """Open a run's checkpoints; what one was measured to be worth is in the run's log too."""
    return Checkpoints(
        Path(workdir) / "checkpoints",
        best_metric=evaluation.headline,
        read_only=read_only,
        known=recorded_evaluations(config, workdir),
    )


def recorded_evaluations(config: Config, workdir: Path) -> dict[int, dict[str, Any]]:
    """Return what the log has of evaluations along the way: metrics by step."""
    prefix = f"{config.data.eval_split}/"
    return {
        record["step"]: {
            name.removeprefix(prefix): value
            for name, value in record.items()
            if name.startswith(prefix)
        }
        for record in read_log(workdir)
        if any(name.startswith(prefix + "map@") for name in record)
    }


def restore_model(
    config: Config, workdir: Path, which: str | int, mesh: Any
) -> tuple[EmbeddingModel, State, int]:
    """Read a checkpoint: the model's structure, its (params, batch_stats), and the step.

    Args:
        config: of the run.
        workdir: of the run, which need not be writable.
        which: ``"best"`` (the last, and told, where none was validated yet), ``"last"``, a step, or
            ``"untrained"``: the model that the run started from, so that what training added can be
            seen.
        mesh: whose devices get the arrays.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or of another model.
    """
    if which == "untrained":
        model = experiment.build_model(config)
        if config.model.get("pretrained"):
            load_pretrained(model, config.model.pretrained)
        _, *state, _ = model_state.split(model)
        return model, steps.replicate(tuple(state), mesh), 0
    with open_checkpoints(config, workdir, read_only=True) as checkpoints:
        if which == "best" and checkpoints.steps() and checkpoints.best_step() is None:
            which = "last"
            print(f"{workdir}: no step was validated yet, so the last is taken", file=sys.stderr)
        read = checkpoints.restore(which, optimizer=False)
    model = nnx.eval_shape(lambda: experiment.build_model(config))
    _, params, batch_stats, _ = model_state.split(model)
    tree = {"params": params, "batch_stats": batch_stats}
    if config.train.ema_decay:
        tree["ema"] = params
    if config.train.ema_batch_stats:
        tree["ema_batch_stats"] = batch_stats
    # What a loss trained of its own makes no embedding.
    arrays = {name: array for name, array in read.model.items() if ".proxies." not in name}
    tree = checkpoint.unflatten(tree, arrays)
    state = tree.get("ema", tree["params"]), tree.get("ema_batch_stats", tree["batch_stats"])
    return model, steps.replicate(state, mesh), read.step


def embed_split(
    config: Config,
    dataset: RetrievalDataset,
    embed_step: Any,
    state: State,
    mesh: Any,
    *,
    stop: Stop | None = None,
) -> np.ndarray:
    """Embed every image of a split once: [n, d] float32. ``state`` is (params, batch_stats).

    Raises:
        Stopped: asked to by ``stop``.
    """
    batches = data.eval_batches(
        dataset,
        **experiment.geometry(config),
        batch_size=experiment.evaluation_batch_size(config),
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        checked = batches if stop is None else stop.checked(batches)
        return steps.embed_batches(embed_step, *state, checked, mesh, len(dataset))


def evaluate_split(
    config: Config,
    dataset: RetrievalDataset,
    embed_step: Any,
    state: State,
    mesh: Any,
    *,
    stop: Stop | None = None,
) -> tuple[evaluation.Evaluation, np.ndarray]:
    """Embed and measure a split; the evaluation and the embeddings. Raises as ``embed_split``."""
    protocol = experiment.split_protocol(config, dataset)
    embeddings = embed_split(config, dataset, embed_step, state, mesh, stop=stop)
    result = evaluation.evaluate_embeddings(
        embeddings, dataset.label, dataset.label_names, protocol, ks=config.eval.ks
    )
    if experiment.classifies(config):
        report = result.report
        report["metrics"] |= evaluation.classification_metrics(
            class_logits(state[0], embeddings), dataset.label
        )
        report["definitions"] |= evaluation.ACCURACY_DEFINITIONS
    return result, embeddings


def class_logits(params: Any, embeddings: np.ndarray) -> np.ndarray:
    """Apply a model's class_head to embeddings [n, d]: [n, classes] float32."""
    head = jax.tree.map(on_host, nnx.to_pure_dict(params)["class_head"])
    return embeddings @ head["kernel"] + head["bias"]


def evaluate(
    workdir: str | Path,
    split: str = "test",
    which: str | int = "best",
    *,
    figures: bool = False,
    queries: Sequence[str] = (),
    html: bool = False,
    frames: str = "green",
    measure: bool = False,
    rerank: Sequence[rerank_steps.Step] = (),
    trec: bool = False,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure one split of a run and write what was found.

    Args:
        workdir: of the run, which is only read where ``out`` is given.
        split: of its dataset, or ``"all"``.
        which: checkpoint; see ``restore_model``.
        figures: draw them.
        queries: ids of those to draw; without any, eight of all.
        html: write the page, with the figures.
        frames: colour of a hit's frame in the figures, ``"green"`` or the paper's ``"red"``.
        measure: measure the focus too.
        rerank: steps of ``rerank_steps.parse_steps``, to rank by once more and compare.
        trec: write run.txt and qrels.txt for trec_eval.
        overrides: ``--config.FIELD=VALUE`` of the sections ``data`` and ``eval``.
        out: folder of what is written; None: ``RUN/eval/SPLIT``, or for another dataset than the
            run's ``RUN/eval/DATASET-SPLIT``.

    Raises:
        InputError: for a mistake, before anything is embedded; for too little memory or room.
    """
    workdir = expanded(workdir)
    config = evaluation_config(workdir, overrides)
    others = any(argument.startswith("--config.data.name=") for argument in overrides)
    name = experiment.dataset_name(config)
    part = f"{Path(name).stem}-{split}" if others else split
    part += "-untrained" if which == "untrained" else ""
    folder = workdir / "eval" / part if out is None else expanded(out)
    if out is None:
        workdirs.check_inside(folder, workdir)
    workdirs.make_writable(folder)
    with workdirs.told_in_one_line(config, folder):
        mesh = steps.data_mesh()
        model, state, step = restore_model(config, workdir, which, mesh)
        told = (
            "" if others else f" (data.name comes from {workdir}/config.json; or give --data=PATH)"
        )
        dataset = open_for_evaluation(config, split, told)
        chosen_ks = any(argument.startswith("--config.eval.ks=") for argument in overrides)
        config = experiment.with_fitting_ks(config, dataset, chosen=chosen_ks)
        experiment.split_protocol(config, dataset)
        reranked.check_fits(
            rerank, evaluation.searched_images(dataset.is_query, dataset.is_gallery)
        )
        fitted = [step for step in rerank if step.name == "whiten"]
        train = open_for_evaluation(config, "train", told) if fitted else None
        chosen = find_queries(dataset, queries)
        if measure:
            dataset.mask(0)  # A dataset that can't tell where the garment is says so here.
        print(
            f"embedding {len(dataset)} images of {dataset.name}/{split} with step {step}",
            flush=True,
        )
        embed_step = steps.make_embed_step(model, mesh)
        result, embeddings = evaluate_split(config, dataset, embed_step, state, mesh)
        report = {"dataset": name, "split": split, "step": step, **result.report}
        model = model_state.merger(model)(*state)
        measured = Measured(
            config, workdir, folder, dataset, model, mesh, result, embeddings, report
        )
        run_results.write_metrics(measured)
        if trec:
            run_results.write_trec(measured)
        if rerank:
            known = None if train is None else embed_split(config, train, embed_step, state, mesh)
            run_results.write_reranked(measured, rerank, known)
        if measure:
            run_results.write_focus(measured)
        if figures or html:
            run_figures.draw(measured, chosen, html=html, frames=frames)
        return report


def evaluation_config(workdir: Path, overrides: Sequence[str]) -> Config:
    """Return a run's config with the fields that an evaluation may set.

    Raises:
        InputError: for any other field, or a value that no evaluation could be done by.
    """
    for argument in overrides:
        if not argument.startswith(("--config.data.", "--config.eval.")):
            raise InputError(
                f"unknown argument {argument!r}: an evaluation can set --config.data.FIELD and "
                "--config.eval.FIELD; see --help"
            )
    config = config_files.override(read_config(workdir), overrides)
    config_checks.check_evaluation(config)
    config = experiment.with_whole_paths(config)
    saved_config.check_trusted(config, overrides, workdir)
    return config


def open_for_evaluation(config: Config, split: str, told: str) -> RetrievalDataset:
    """Open a split and check that its classes are the run's.

    Raises:
        InputError: followed by ``told`` where the dataset cannot be opened.
    """
    try:
        dataset = experiment.open_split(config, split)
    except InputError as error:
        raise InputError(f"{error}{told}") from error
    config_checks.check_classes(config, dataset)
    return dataset


def find_queries(dataset: RetrievalDataset, ids: Sequence[str]) -> list[int]:
    """Return the rows of queries by their ids; InputError where one is none, or for too many."""
    if len(ids) > _DRAWN:
        raise InputError(f"--query names {len(ids)} images: a figure holds {_DRAWN}; give fewer")
    rows = {str(name): row for row, name in enumerate(dataset.id)}
    for name in ids:
        if name not in rows or not dataset.is_query[rows[name]]:
            raise InputError(_no_query(dataset, name, known=name in rows))
    return [rows[name] for name in dict.fromkeys(ids)]


def _no_query(dataset: RetrievalDataset, name: str, *, known: bool) -> str:
    first = " ".join(f"--query={shlex.quote(str(one))}" for one in dataset.id[dataset.is_query][:3])
    why = "is only searched among, and no query" if known else "is no query"
    return (
        f"--query={shlex.quote(name)} {why} of {dataset.name}, split {dataset.split}: give such as "
        f"{first}; neighbours.csv has them all (in --queries, a comma parts two ids)"
    )


DESCRIPTION = """Measure a trained run: embed a split, search, print metrics with their definitions.

Writes metrics.json, embeddings.npz and neighbours.csv (what was found for each query, by name) to
RUN/eval/SPLIT (and figures; report.html, a page of all of it; focus.json: how much of the heat lies
on the garment); the last line on stdout is one JSON document. The untrained network's go to
RUN/eval/SPLIT-untrained. Fields of the run's config for the data and the evaluation can be set:
--config.eval.ks='(1,10)' --config.eval.batch_size=16.
"""


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """Read the flags of an evaluation, and the fields that it sets."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = command_line.path
    parser.add_argument("--workdir", required=True, type=path, help="the run, as given to train.py")
    parser.add_argument("--split", default="test", help="split of the run's dataset, or all")
    parser.add_argument("--checkpoint", default="best", help="best, last, untrained or a step")
    parser.add_argument("--data", help="another dataset than the run's, or where it lies now")
    parser.add_argument("--out", type=path, help="folder of the results; the run is only read then")
    parser.add_argument("--figures", action="store_true", help="draw result rows and heat maps")
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="ID",
        help="one to draw, of neighbours.csv; repeatable; default: eight of all",
    )
    parser.add_argument(
        "--queries", default="", metavar="ID,ID", help="likewise, of ids without commas"
    )
    parser.add_argument(
        "--frames", choices=HIT_COLORS, default="green", help="around a hit; the paper's are red"
    )
    parser.add_argument("--html", action="store_true", help="write a page of it, with the figures")
    parser.add_argument("--focus", action="store_true", help="measure the heat on the garments")
    parser.add_argument("--trec", action="store_true", help="write run.txt, qrels.txt (trec_eval)")
    parser.add_argument(
        "--rerank",
        metavar="STEP,STEP",
        help=f"rank again and compare: {', '.join(rerank_steps.STEPS)}, with options as in aqe:k=5",
    )
    known, overrides = parser.parse_known_args()
    if known.data is not None:
        overrides.append(f"--config.data.name={_dataset(known.data)}")
    return known, overrides


def _dataset(text: str) -> str:
    """The dataset that ``--data`` means: ``moved/photos`` is a folder where there is one.

    A closing slash tells it from the name of a dataset. Ours, such as ``synthetic_garments/clean``,
    are never mistaken for one.
    """
    folder = "/" in text and os.path.isdir(text) and not is_ours(text)
    return text.rstrip("/") + "/" if folder and not is_path(text) else text


def parse_checkpoint(text: str) -> str | int:
    """Read which checkpoint a flag means; InputError for none.

    >>> parse_checkpoint("best"), parse_checkpoint("450")
    ('best', 450)
    """
    which = int(text) if text.isdigit() else text
    if which not in ("best", "last", "untrained") and not isinstance(which, int):
        raise InputError(f"--checkpoint={which}: give best, last, untrained or a step")
    return which


@config_files.told_as_flags()
def main() -> None:
    """Evaluate, and print the JSON line."""
    flags, overrides = parse_flags()
    which = parse_checkpoint(flags.checkpoint)
    rerank = [] if flags.rerank is None else rerank_steps.parse_steps(flags.rerank)
    command_line.keep_compiled_programs()
    report = evaluate(
        flags.workdir,
        flags.split,
        which,
        figures=flags.figures,
        queries=command_line.listed(flags.query, flags.queries),
        html=flags.html,
        frames=flags.frames,
        measure=flags.focus,
        rerank=rerank,
        trec=flags.trec,
        overrides=overrides,
        out=flags.out,
    )
    keys = ("dataset", "split", "step", "metrics", "interval", "rerank", "focus")
    line = {key: report[key] for key in keys if key in report}
    print(command_line.to_json({"workdir": str(flags.workdir), **line}))
