"""Figures from arrays: the paper's Figures 4 (result rows) and 5 (heat), the curves of a run.

Each function returns a ``matplotlib.figure.Figure``, which notebooks show and ``save`` writes.
matplotlib is imported where it is used and pyplot never, so that nothing here needs a display or
keeps figures alive.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbam_jax import fonts
from cbam_jax.report_text import display_width
from cbam_jax.whole_files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Images = np.ndarray | Sequence[np.ndarray]

# Of a frame around a hit: ours, and the paper's.
HIT_COLORS = {"green": "#1a8a3c", "red": "red"}
_OTHER = "0.75"
# Inches of one image's cell, with its text.
_WIDTH, _HEIGHT = 1.5, 1.85


def result_rows(
    queries: Sequence[np.ndarray],
    neighbours: Sequence[Sequence[np.ndarray]],
    matches: np.ndarray,
    *,
    distances: np.ndarray,
    titles: Sequence[str],
    frames: str = "green",
) -> "Figure":
    """Draw one row a query: the query, then its nearest images, the relevant ones framed, ticked.

    That is the paper's Figure 4, whose frames are red; ours says what frame and number mean.

    Args:
        queries: of each query, its image, uint8 [h, w, 3]; sizes may differ.
        neighbours: of each query, its nearest images, nearest first; at most k, or fewer.
        matches: bool [q, k], True for a relevant neighbour.
        distances: [q, k], written below each neighbour.
        titles: of each query, its category.
        frames: colour of the frames, of ``HIT_COLORS``.

    Raises:
        ValueError: when there is no query, or the arguments are not of one length.

    >>> image = np.zeros((8, 6, 3), np.uint8)
    >>> figure = result_rows(
    ...     [image], [[image, image]], np.array([[True, False]]),
    ...     distances=np.array([[0.31, 0.55]]), titles=["dress"])
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['dress', '0.310', '0.550']
    >>> [axes.get_title() for axes in figure.axes]
    ['query', '1 ✓', '2']
    """
    _check_lengths(
        {
            "queries": queries, "neighbours": neighbours, "matches": matches,
            "distances": distances, "titles": titles,
        }
    )  # fmt: skip
    caption = (
        f"Each query and its nearest gallery images, nearest first. {frames.title()} frame and "
        "tick: same category as the query. Number: Euclidean distance of the embeddings."
    )
    figure, grid = _grid(len(queries), 1 + max(map(len, neighbours)), caption)
    for row, (query, nearest) in enumerate(zip(queries, neighbours, strict=True)):
        _show(grid[row, 0], query, "query", titles[row], "black")
        for rank, image in enumerate(nearest):
            hit, below = bool(matches[row, rank]), f"{distances[row, rank]:.3f}"
            color = HIT_COLORS[frames] if hit else _OTHER
            _show(grid[row, rank + 1], image, f"{rank + 1}{' ✓' * hit}", below, color, bold=hit)
        for empty in grid[row, len(nearest) + 1 :]:
            empty.remove()
    return _fitted(figure)


def heat_rows(
    images: Images, heats: Mapping[str, np.ndarray], *, titles: Sequence[str]
) -> "Figure":
    """Draw one row an image: the image, then the heat of each model laid over it.

    That is the paper's Figure 5. An empty map, all zero, is said to be empty.

    Args:
        images: n images, uint8 [h, w, 3].
        heats: of each column, its name and its maps [n, h, w] in [0, 1], from ``gradcam``.
        titles: of each image, its category.

    Raises:
        ValueError: when there is no image, or the arguments are not of one length.

    >>> figure = heat_rows([np.zeros((8, 6, 3), np.uint8)], {
    ...     "plain": np.zeros((1, 8, 6)), "cbam": np.ones((1, 8, 6))}, titles=["dress"])
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['dress', 'empty map', '']
    """
    _check_lengths({"images": images, "titles": titles, **heats})
    caption = (
        "Each image and where the model looks (Grad-CAM). Red: the most of this image; blue: none."
    )
    figure, grid = _grid(len(images), 1 + len(heats), caption)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        _show(grid[row, 0], image, "image", title, "black")
        for axes, (name, heat) in zip(grid[row, 1:], heats.items(), strict=True):
            _show_heat(axes, image, heat[row], name)
    return _fitted(figure)


def pair_rows(
    queries: Images,
    results: Images,
    query_heats: np.ndarray,
    result_heats: np.ndarray,
    *,
    titles: Sequence[str],
    distances: np.ndarray,
) -> "Figure":
    """Draw one row a pair: the query, where it is like its result, the converse, the result.

    Args:
        queries: n images, uint8 [h, w, 3].
        results: n images, the i-th for the i-th query.
        query_heats: [n, h, w] in [0, 1], from ``gradcam.pair_maps``.
        result_heats: [n, h, w] likewise.
        titles: of each query, its category.
        distances: [n], written below each result.

    Raises:
        ValueError: when there is no pair, or the arguments are not of one length.
    """
    _check_lengths(
        {
            "queries": queries, "results": results, "query_heats": query_heats,
            "result_heats": result_heats, "titles": titles, "distances": distances,
        }
    )  # fmt: skip
    caption = (
        "Each query and a result, and where either is more like the other than on the whole "
        "(Grad-CAM of the cosine). Red: the most; blue: none. Number: Euclidean distance."
    )
    figure, grid = _grid(len(queries), 4, caption)
    for row, (query, result) in enumerate(zip(queries, results, strict=True)):
        _show(grid[row, 0], query, "query", titles[row], "black")
        _show_heat(grid[row, 1], query, query_heats[row], "query, like the result")
        _show_heat(grid[row, 2], result, result_heats[row], "result, like the query")
        _show(grid[row, 3], result, "result", f"{distances[row]:.3f}", _OTHER)
    return _fitted(figure)


def gate_rows(
    images: Images, gates: Mapping[str, np.ndarray], *, titles: Sequence[str]
) -> "Figure":
    """Draw one row an image: the image, then what each spatial gate multiplies its places by.

    Args:
        images: n images, uint8 [h, w, 3].
        gates: of each column, its name and its gates [n, h', w'], from
            ``gradcam.attention_gates``. Each map is drawn from its least to its greatest value,
            which are written below it.
        titles: of each image, its category.

    Raises:
        ValueError: when there is no image, or the arguments are not of one length.
    """
    _check_lengths({"images": images, "titles": titles, **gates})
    caption = (
        "Each image and its spatial gates: what the feature map is multiplied by at each place. "
        "White: the greatest; black: the least; numbers: both."
    )
    figure, grid = _grid(len(images), 1 + len(gates), caption)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        _show(grid[row, 0], image, "image", title, "black")
        for axes, (name, gate) in zip(grid[row, 1:], gates.items(), strict=True):
            span = f"{gate[row].min():.3f} to {gate[row].max():.3f}"
            _show(axes, gate[row], name, span, _OTHER)
    return _fitted(figure)


def _check_lengths(parts: Mapping[str, Any]) -> None:
    lengths = [len(part) for part in parts.values()]
    if len(set(lengths)) > 1 or not lengths[0]:
        names = ", ".join(parts)
        raise ValueError(f"{names} have lengths {lengths}, expected the same, at least 1")


def _grid(rows: int, columns: int, caption: str) -> "tuple[Figure, np.ndarray]":
    from matplotlib.figure import Figure

    text = textwrap.fill(caption, 16 * columns)
    height = _HEIGHT * rows + 0.3 + 0.15 * (1 + text.count("\n"))
    figure = Figure(figsize=(_WIDTH * columns, height), layout="constrained")
    figure.suptitle(text, fontsize=9)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show_heat(axes: "Axes", image: np.ndarray, heat: np.ndarray, above: str) -> None:
    from matplotlib import colormaps

    if heat.any():
        color = np.rint(255 * colormaps["turbo"](heat)[..., :3])
        _show(axes, ((color + image + 1) // 2).astype(np.uint8), above, "", _OTHER)
        return
    _show(axes, image // 2 + 128, above, "empty map", _OTHER)
    axes.plot([0, 1], [0, 1], color=_OTHER, transform=axes.transAxes, linewidth=1)


def _show(
    axes: "Axes", image: np.ndarray, above: str, below: str, color: str, *, bold: bool = False
) -> None:
    axes.imshow(image, cmap="gray")  # The map is for gates: photos have their own colours.
    axes.set(xticks=[], yticks=[])
    # Names of categories are text, whatever dollar signs they hold.
    axes.set_title(above, fontsize=8, pad=4, color=color if bold else "black")
    axes.set_xlabel(_lines(below), fontsize=8, parse_math=False)
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=3 if bold else 1)


def _lines(text: str) -> str:
    """At most three lines, each as wide as a cell: of 20 characters, or 10 that are twice as wide.

    >>> _lines("连衣裙" * 8).split()
    ['连衣裙连衣裙连衣裙连', '衣裙连衣裙连衣裙连衣', '裙连衣裙']
    """
    width = 20 * len(text) // max(display_width(text), 1)
    lines = textwrap.wrap(text, max(width, 1), max_lines=3, placeholder="…")
    return "\n".join(lines)


def _fitted(figure: "Figure") -> "Figure":
    fonts.fit_fonts(figure)
    return figure


def training_curve(records: Sequence[Mapping[str, Any]], *, metric: str) -> "Figure":
    """Draw the loss and one metric over the steps of a run.

    Args:
        records: of ``metrics.jsonl``, from ``cbam_jax.runlog.read_log``; each has a ``step``, and
            those of training steps a ``loss``.
        metric: the other key, e.g. ``"validation/map@10"``. Its value at step 0, of the untrained
            model, is drawn as a line to compare with.

    >>> records = [{"step": 0, "test/mrr": 0.1}, {"step": 5, "loss": 0.4}, {"step": 5,
    ...     "test/mrr": 0.3}]
    >>> [axes.get_ylabel() for axes in training_curve(records, metric="test/mrr").axes]
    ['training loss', 'test/mrr']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, key, label in ((above, "loss", "training loss"), (below, metric, metric)):
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, marker=".", label=label)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    _mark_metric(below, records, metric)
    below.set_xlabel("step (batches)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _fitted(figure)


def _mark_metric(axes: "Axes", records: Sequence[Mapping[str, Any]], metric: str) -> None:
    values = {record["step"]: record[metric] for record in records if metric in record}
    if 0 in values:
        label = f"untrained: {values[0]:.4f}"
        axes.axhline(values[0], color="0.5", linestyle="--", linewidth=1, label=label)
    trained = {step: value for step, value in values.items() if step and np.isfinite(value)}
    if trained:
        best = max(trained, key=trained.__getitem__)
        label = f"best after training: {trained[best]:.4f} at step {best}"
        axes.plot([best], [trained[best]], "*", color="red", markersize=11, label=label)
    axes.legend(loc="best", fontsize=8)


def metric_bars(
    groups: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float]]],
    intervals: Mapping[str, Sequence[tuple[float, float]]],
    *,
    marks: Mapping[str, Sequence[float | None]],
    ylabel: str,
    caption: str,
) -> "Figure":
    """Draw bars of means, a group for each metric and in it one bar a model, with what they vary.

    Args:
        groups: names of the groups.
        values: of each model, in each group, the single values, such as one a seed: a dot each,
            their mean the bar.
        intervals: of each model, in each group, (low, high), drawn as a line; NaN for none.
        marks: of each model, in each group, a value to compare with, drawn as a diamond, or None.
        ylabel: says what the values are, and their unit.
        caption: what dots, line and diamond are.

    >>> figure = metric_bars(
    ...     ["map@5", "map@10"], {"plain": [[0.5, 0.75], [0.25]]},
    ...     {"plain": [(0.25, 1.0), (float("nan"), float("nan"))]}, marks={"plain": [0.8, None]},
    ...     ylabel="share", caption="Bars: means.")
    >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
    [0.625, 0.25]
    """
    from matplotlib.figure import Figure

    width = 0.8 / len(values)
    figure = Figure(figsize=(2.0 + 0.7 * len(values) * len(groups), 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (model, of_groups) in enumerate(values.items()):
        place = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        means = [float(np.mean(one)) for one in of_groups]
        axes.bar(place, means, 0.92 * width, label=model, color=f"C{i}", alpha=0.75)
        low, high = np.array(intervals[model], float).T
        axes.vlines(place, low, high, color="black", linewidth=1.5)
        for x, one, mark in zip(place, of_groups, marks[model], strict=True):
            spread = x + width * np.linspace(-0.15, 0.15, len(one) + 2)[1:-1]
            axes.plot(spread, one, "o", color="white", markeredgecolor="black", markersize=4)
            if mark is not None:
                axes.plot([x], [mark], "D", color="none", markeredgecolor="red", markersize=7)
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(values), fontsize=9)
    columns = int(12 * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(caption, columns), fontsize=8, parse_math=False)
    return _fitted(figure)


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure as what the path's ending says, such as ``.png``, whole or not at all."""
    ending = os.path.splitext(path)[1]
    with written_whole(path) as partial:
        figure.savefig(partial, format=ending.removeprefix("."), dpi=150, bbox_inches="tight")
