"""What an evaluation of a run writes: metrics, neighbours, ranked again too, where it looks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cbam_jax import (
    command_line,
    evaluation,
    experiment,
    focus,
    report_text,
    reranked,
    run_figures,
    trec,
)
from cbam_jax.rerank_steps import Step
from cbam_jax.run_figures import Measured
from cbam_jax.whole_files import save_arrays


def write_metrics(measured: Measured) -> None:
    """Write metrics.json, embeddings.npz and neighbours.csv, and print the table."""
    dataset = measured.dataset
    command_line.write_json(measured.folder / "metrics.json", measured.report)
    save_arrays(
        measured.folder / "embeddings.npz",
        embedding=measured.embeddings,
        label=dataset.label,
        id=dataset.id,
        is_query=dataset.is_query,
        is_gallery=dataset.is_gallery,
    )
    names = run_figures.class_names(dataset, range(len(dataset)))
    path = measured.folder / "neighbours.csv"
    evaluation.save_neighbours(path, measured.result, dataset.id, names)
    print(report_text.format_report(measured.report), flush=True)


def write_trec(measured: Measured) -> None:
    """Write run.txt and qrels.txt, which trec_eval reads."""
    dataset, result = measured.dataset, measured.result
    protocol = experiment.split_protocol(measured.config, dataset)
    place = np.full(len(dataset), -1)
    place[protocol.gallery] = np.arange(len(protocol.gallery))
    index = np.where(result.neighbour >= 0, place[result.neighbour], -1)
    names = dataset.id[protocol.query].tolist(), dataset.id[protocol.gallery].tolist()
    trec.write_run(measured.folder / "run.txt", *names, index)
    matches = evaluation.relevant_matches(dataset.label, protocol)
    trec.write_qrels(measured.folder / "qrels.txt", *names, matches)


def write_reranked(measured: Measured, steps: Sequence[Step], train: np.ndarray | None) -> None:
    """Rank again, into the report, metrics.json and reranked.csv; ``train`` [m, d] is to fit on."""
    dataset, report = measured.dataset, measured.report
    report["rerank"], found = reranked.measure(
        measured.embeddings,
        dataset.label,
        experiment.split_protocol(measured.config, dataset),
        measured.result,
        steps,
        ks=report["ks"],
        train=train,
    )
    names = run_figures.class_names(dataset, range(len(dataset)))
    evaluation.save_neighbours(measured.folder / "reranked.csv", found, dataset.id, names)
    command_line.write_json(measured.folder / "metrics.json", report)
    print(reranked.format_report(report["rerank"]), flush=True)


def write_focus(measured: Measured) -> None:
    """Measure where the model looks, into the report and focus.json."""
    measured.report["focus"] = measure_focus(measured)
    command_line.write_json(measured.folder / "focus.json", measured.report["focus"])
    print(focus.format_report(measured.report["focus"]), flush=True)


def measure_focus(measured: Measured) -> dict[str, Any]:
    """Measure where the model looks in each query: by itself, and for its nearest image."""
    config, result = measured.config, measured.result
    found = result.neighbour[:, 0] >= 0
    nearest = measured.embeddings[result.neighbour[found, 0]]
    values = focus.measure_focus(
        measured.model,
        measured.dataset,
        result.query[found],
        {"energy": None, "nearest": nearest},
        mesh=measured.mesh,
        batch_size=experiment.evaluation_batch_size(config),
        **experiment.geometry(config),
    )
    return focus.summarize(values, image_size=config.data.image_size)
