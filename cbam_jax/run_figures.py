"""What an evaluation of a run shows: result rows, heat, gates, the training curve, the page."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cbam_jax import command_line, data, evaluation, experiment, figures, gradcam
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.datasets.looks import fitted_size
from cbam_jax.models import EmbeddingModel
from cbam_jax.report import Neighbour, Picture, Query, evaluation_page
from cbam_jax.report_text import first_k, gate_name
from cbam_jax.runlog import read_log
from cbam_jax.whole_files import save_arrays

# Longer side, in pixels, of an image in a figure's cell, and of one that the page can enlarge.
_CELL, _ENLARGED = 256, 400
_BLOCK = 8  # Images whose heat is measured at a time.
# Of the page's figures: a caption, and what is seen, in words.
_CAPTIONS = {
    "training.png": (
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


class Measured(NamedTuple):
    """A split of a run, measured: all that is drawn comes from here.

    ``model`` has its arrays; ``embeddings`` [n, d] are of all images of ``dataset``; everything is
    written to ``folder``.
    """

    config: Config
    workdir: Path
    folder: Path
    dataset: RetrievalDataset
    model: EmbeddingModel
    mesh: Any
    result: evaluation.Evaluation
    embeddings: np.ndarray
    report: dict[str, Any]


def draw(measured: Measured, chosen: Sequence[int], *, html: bool, frames: str = "green") -> None:
    """Draw the figures of an evaluation, of the chosen queries, and the page if it is asked for.

    ``frames`` is the colour of a hit's frame in the result rows, of ``figures.HIT_COLORS``.
    """
    rows = chosen_rows(measured.result, chosen)
    save_result_rows(measured, rows, frames)
    names = save_heat_figures(measured, rows)
    curve = save_training_curve(measured)
    if html:
        drawn = [curve, *(measured.folder / name for name in names)]
        save_page(measured, {"Chosen queries" if chosen else "Some queries": rows}, drawn)


def chosen_rows(result: evaluation.Evaluation, chosen: Sequence[int]) -> np.ndarray:
    """Rows of ``result`` of the chosen queries, or of eight spread evenly over the split."""
    if chosen:
        return np.array([int(np.flatnonzero(result.query == query)[0]) for query in chosen])
    counted = np.flatnonzero(~np.isnan(result.headline))
    return counted[np.linspace(0, len(counted) - 1, min(8, len(counted))).astype(int)]


def ranked_queries(result: evaluation.Evaluation) -> np.ndarray:
    """Rows of ``result``, the worst query first, those left out of the means left out.

    Of equal ones that with fewer hits is worse: map@K is 1 for a single hit, if it comes first.
    """
    counted = np.flatnonzero(~np.isnan(result.headline))
    hits = result.match[counted].sum(axis=1)
    return counted[np.lexsort((hits, result.headline[counted]))]


def save_result_rows(measured: Measured, drawn: np.ndarray, frames: str) -> None:
    """Draw the nearest five of some queries, and of those with the worst results."""
    dataset, result = measured.dataset, measured.result
    for name, rows in {"results": drawn, "worst": ranked_queries(result)[:8]}.items():
        figure = figures.result_rows(
            [shown_image(dataset, i, _CELL) for i in result.query[rows]],
            [
                [shown_image(dataset, i, _CELL) for i in line if i >= 0]
                for line in result.neighbour[rows, :5]
            ],
            result.match[rows, :5],
            distances=result.distance[rows, :5],
            titles=class_names(dataset, result.query[rows]),
            frames=frames,
        )
        _save(figure, measured.folder / f"{name}.png")


def shown_image(dataset: RetrievalDataset, index: int, longest: int) -> np.ndarray:
    """Read an image at the size at which it is shown, uint8 [h, w, 3].

    A photo's own pixels, of 12 megapixels or more, are neither all decoded nor kept.

    Args:
        dataset: of the image.
        index: of the image.
        longest: its longer side is at most so many pixels.

    Raises:
        InputError: the image cannot be read.
    """
    return data.decode_resized(
        dataset.encoded(index),
        part=lambda height, width: (0, 0, height, width),
        size=functools.partial(fitted_size, longest=longest),
        name=f"{dataset.id[index]} of {dataset.name}",
    )


def class_names(dataset: RetrievalDataset, rows: Iterable[int]) -> list[str]:
    """Names of the classes of some rows."""
    return [dataset.label_names[dataset.label[i]] for i in rows]


def _save(figure: Any, path: Path) -> None:
    figures.save(figure, path)
    print(f"wrote {path}", flush=True)


def save_heat_figures(measured: Measured, rows: np.ndarray) -> list[str]:
    """Draw the heat of some queries, the gates there, and each with its nearest hit.

    The heat is kept in ``heat.npz`` too, so that runs can be drawn side by side. Returns the names
    of the files.
    """
    dataset, model = measured.dataset, measured.model
    query = measured.result.query[rows]
    titles = class_names(dataset, query)
    queries = _images(measured, query)
    inputs = model.preprocess(queries)
    heat = by_blocks(lambda images: gradcam.grad_cam(model, images).heat, inputs)
    path = measured.folder / "heat.npz"
    save_arrays(path, id=dataset.id[query], image=queries, title=titles, heat=heat)
    drawn = {"heat": figures.heat_rows(queries, {measured.config.model.name: heat}, titles=titles)}
    gates = by_blocks(lambda images: spatial_gates(model, images), inputs)
    if gates:
        drawn["gates"] = figures.gate_rows(queries, gates, titles=titles)
    pairs = draw_pairs(measured, rows, queries, titles)
    if pairs is not None:
        drawn["pairs"] = pairs
    for name, figure in drawn.items():
        _save(figure, measured.folder / f"{name}.png")
    return [f"{name}.png" for name in drawn]


def spatial_gates(model: EmbeddingModel, inputs: Any) -> dict[str, np.ndarray]:
    """Return the spatial gates of each CBAM at some images, [b, h', w'], by its place."""
    return {
        gate_name(name): np.asarray(gate)
        for name, gate in gradcam.attention_gates(model, inputs).items()
        if name.endswith(".spatial")
    }


def draw_pairs(
    measured: Measured, rows: np.ndarray, queries: np.ndarray, titles: Sequence[str]
) -> Any:
    """Draw each query that has a hit beside its nearest one; None where none has."""
    model, result = measured.model, measured.result
    hit = np.flatnonzero(result.match[rows].any(axis=1))
    if not len(hit):
        return None
    rank = result.match[rows[hit]].argmax(axis=1)
    results = _images(measured, result.neighbour[rows[hit], rank])
    of_queries, of_results = by_blocks(
        lambda *pair: [maps.heat for maps in gradcam.pair_maps(model, *pair)],
        model.preprocess(queries[hit]),
        model.preprocess(results),
    )
    return figures.pair_rows(
        queries[hit],
        results,
        of_queries,
        of_results,
        titles=[titles[int(i)] for i in hit],
        distances=result.distance[rows[hit], rank],
    )


def _images(measured: Measured, index: np.ndarray) -> np.ndarray:
    geometry = experiment.geometry(measured.config)
    return np.stack([data.eval_image(measured.dataset, i, **geometry) for i in index])


def by_blocks(measure: Callable[..., Any], *images: Any) -> Any:
    """Measure images eight at a time: memory does not grow with their number.

    Args:
        measure: of as many arrays, [b, h, w, 3], a tree of arrays with an axis b in front.
        images: [n, h, w, 3] each.

    Returns:
        The tree for all n, of NumPy arrays.

    >>> pixels = np.arange(20).reshape(10, 2)
    >>> by_blocks(lambda rows: {"sum": rows.sum(axis=1)}, pixels)["sum"].tolist()
    [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]
    """
    n, parts = len(images[0]), []
    for start in range(0, n, _BLOCK):
        # The last block is filled up by repeating its rows, so that all have one shape.
        rows = np.resize(np.arange(start, min(start + _BLOCK, n)), min(_BLOCK, n))
        part = jax.device_get(measure(*(image[rows] for image in images)))
        parts.append(jax.tree.map(lambda array, left=n - start: array[:left], part))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def save_training_curve(measured: Measured) -> Path:
    """Draw the run's loss and its best-deciding metric over the steps, once for all splits."""
    shared = measured.workdir / "eval"
    folder = shared if measured.folder.parent == shared else measured.folder
    metric = f"{measured.config.data.eval_split}/{experiment.headline(measured.config)}"
    _save(
        figures.training_curve(read_log(measured.workdir), metric=metric), folder / "training.png"
    )
    return folder / "training.png"


def save_page(measured: Measured, some: Mapping[str, np.ndarray], drawn: Sequence[Path]) -> None:
    """Write the evaluation as one HTML page, with some, best and worst queries and the figures."""
    worst = ranked_queries(measured.result)
    headings = {**some, "Best queries": worst[::-1][:8], "Worst queries": worst[:8]}
    names = short_names(measured.dataset.id.tolist())
    page = evaluation_page(
        measured.report,
        model=measured.config.model.name,
        config=measured.config.to_dict(),
        queries={
            heading: [describe_query(measured, row, names) for row in rows]
            for heading, rows in headings.items()
        },
        pictures=[Picture(path.read_bytes(), *_CAPTIONS[path.name]) for path in drawn],
    )
    path = measured.folder / "report.html"
    command_line.write_text(path, page)
    print(f"wrote {path}", flush=True)


def short_names(ids: Sequence[str]) -> list[str]:
    """Names of images for others to read: of paths from the root what differs between them.

    >>> short_names(["/home/me/hat/1.jpg", "/home/me/2.jpg", "coat/3.jpg"])
    ['hat/1.jpg', '2.jpg', 'coat/3.jpg']
    """
    rooted = [os.path.dirname(name) for name in ids if os.path.isabs(name)]
    common = os.path.commonpath(rooted) if rooted else ""
    return [os.path.relpath(name, common) if os.path.isabs(name) else str(name) for name in ids]


def describe_query(measured: Measured, row: int, names: Sequence[str]) -> Query:
    """Return a query as the page shows it, with the nearest five images."""
    dataset, result = measured.dataset, measured.result

    def describe(index: int) -> tuple[np.ndarray, str, str]:
        category = dataset.label_names[dataset.label[index]]
        return shown_image(dataset, index, _ENLARGED), category, names[index]

    found = zip(result.neighbour[row], result.distance[row], result.match[row], strict=True)
    neighbours = [
        Neighbour(*describe(i), float(distance), bool(match))
        for i, distance, match in list(found)[:5]
        if i >= 0
    ]
    hits = int(result.match[row, : first_k(measured.report["ks"])].sum())
    return Query(*describe(result.query[row]), float(result.headline[row]), hits, neighbours)
