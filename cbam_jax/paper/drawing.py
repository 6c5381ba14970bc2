"""What is drawn: a table's mAP@K as bars, and Figure 5, where the rows look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbam_jax import figures
from cbam_jax.paper.layouts import has_paper


def draw_table(path: Path, table: Mapping[str, Any]) -> None:
    """Draw a table's mAP@K as bars."""
    names = [f"map@{k}" for k in table["ks"]]
    rows = {row["title"]: [row["metrics"][name] for name in names] for row in table["rows"]}
    figure = figures.metric_bars(
        names,
        {title: [[100 * x for x in metric["values"]] for metric in rows[title]] for title in rows},
        {title: [_percent_interval(metric) for metric in rows[title]] for title in rows},
        marks={title: [_percent_in_paper(metric) for metric in rows[title]] for title in rows},
        ylabel="mAP@K (%)",
        caption=_caption(table),
    )
    figures.save(figure, path)


def _percent_interval(metric: Mapping[str, Any]) -> tuple[float, float]:
    low, high = metric["interval"]
    return 100 * low, 100 * high


def _percent_in_paper(metric: Mapping[str, Any]) -> float | None:
    return None if metric["paper"] is None else 100 * metric["paper"]


def _caption(table: Mapping[str, Any]) -> str:
    several = len(table["seeds"]) > 1
    bars = "means of seeds" if several else "seed"
    line = "; lines: 95 % interval (Student's t over the seeds)" if several else ""
    return (
        f"{table['title']}, {table['data']}, split {table['split']}, {table['num_queries']} "
        f"queries ({table['num_left_out']} left out). map@K as the paper defines it. Bars: {bars} "
        f"{', '.join(map(str, table['seeds']))}; dots: each seed{line}."
        + " Red diamonds: the paper's figures, of DeepFashion."
        * has_paper(table)
    )


def draw_heat(path: Path, heats: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw where each row looks in the same images: by title, its evaluation's ``heat.npz``."""
    drawn = next(iter(heats.values()))
    figure = figures.heat_rows(
        list(drawn["image"]),
        {title: heat["heat"] for title, heat in heats.items()},
        titles=drawn["title"].tolist(),
    )
    figures.save(figure, path)
