"""All rows of the paper's tables, run as far as they are not, and what is written of them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax import InputError, command_line
from cbam_jax.foreign_files import read_arrays
from cbam_jax.paper.drawing import draw_heat, draw_table
from cbam_jax.paper.layouts import csv_text, markdown
from cbam_jax.paper.processes import call, locked
from cbam_jax.paper.rows import (
    cost_path,
    evaluated_folder,
    evaluation,
    progress,
    read_result,
    run_row,
)
from cbam_jax.paper.settings import check_settings, check_split, read_kept, row_config
from cbam_jax.paper.tables import ROWS, TABLES, make_table, trained_as


def make_tables(
    workdir: Path,
    numbers: Sequence[int],
    *,
    seeds: int,
    split: str,
    settings: Mapping[str, str],
    command: str,
) -> list[dict[str, Any]]:
    """Train and measure what is missing in ``workdir``, write the tables, return their documents.

    Seed by seed, all rows in each, so that a mistake that meets only one of the rows shows early,
    and tables can be written after each seed.

    Args:
        workdir: of an earlier call with the same settings, or a new one.
        numbers: of the tables.
        seeds: how many; 0 to ``seeds - 1``.
        split: that is measured.
        settings: ``config``, a file that stands in for each row's own, and fields of the config.
        command: that repeats it, for the tables.

    Raises:
        InputError: a mistake, or a row that failed.
    """
    rows = list(dict.fromkeys(name for number in numbers for name in TABLES[number]))
    jobs = [(row, seed) for seed in range(seeds) for row in rows]
    documents = []
    with locked(workdir):
        check_settings(workdir, settings)
        if not all(read_result(workdir, row, seed, split) for row, seed in jobs):
            check_split(row_config(rows[0], settings), split, settings)
        for i, (row, seed) in enumerate(jobs):
            print(progress(workdir, jobs, i, split), flush=True)
            new = run_row(workdir, row, seed, split=split, settings=settings)
            if (new and row == rows[-1]) or i == len(jobs) - 1:
                documents = write_tables(workdir, numbers, seed + 1, split, command)
    return documents


def write_tables(
    workdir: Path, numbers: Sequence[int], seeds: int, split: str, command: str
) -> list[dict[str, Any]]:
    """Write each table of the runs with seeds below ``seeds``; return their documents."""
    documents = []
    for number in numbers:
        results = {row: _results(workdir, row, seeds, split) for row in TABLES[number]}
        costs = {row: read_kept(cost_path(workdir, row)) for row in TABLES[number]}
        table = make_table(number, results, costs, command=command)
        path = workdir / f"table{number}.json"
        command_line.write_json(path, table)
        command_line.write_text(path.with_suffix(".md"), markdown(table))
        command_line.write_text(path.with_suffix(".csv"), csv_text(table))
        draw_table(path.with_suffix(".png"), table)
        print(f"\n{markdown(table)}\nwrote {path.with_suffix('.*')}", flush=True)
        documents.append(table)
    return documents


def _results(workdir: Path, row: str, seeds: int, split: str) -> list[dict[str, Any]]:
    found = (read_result(workdir, row, seed, split) for seed in range(seeds))
    return [result for result in found if result]


def make_figures(workdir: Path, *, seed: int, split: str, queries: Sequence[str]) -> dict[str, Any]:
    """Draw Figure 4 of each row and Figure 5 of all, from the finished runs of one seed.

    Args:
        workdir: of ``make_tables``.
        seed: of the runs.
        split: whose queries are drawn.
        queries: their ids; without any, six that are spread evenly over the split.

    Raises:
        InputError: there is no such run, or a query is none of the split's.
    """
    with locked(workdir):
        found = {row: read_result(workdir, row, seed, split) for row in ROWS}
        results = {row: result for row, result in found.items() if result}
        if not results:
            raise InputError(
                f"no finished row of seed {seed}, split {split}, in {workdir}: make the tables "
                "first, or check --workdir, --seed and --split"
            )
        folder = workdir / "figures"
        folder.mkdir(exist_ok=True)
        queries = queries or sample_queries(
            evaluated_folder(workdir, next(iter(results)), seed, split)
        )
        written, heats = [], {}
        for i, (row, result) in enumerate(results.items()):
            title = trained_as(row, result["config"]).title
            print(f"[{i + 1}/{len(results)}] {title}, seed {seed}", flush=True)
            drawn = _evaluate_queries(workdir, row, seed, split, queries)
            for source, name in {"results": f"figure4-{row}", "worst": f"worst-{row}"}.items():
                written.append(folder / f"{name}.png")
                shutil.copyfile(drawn / f"{source}.png", written[-1])
            heats[title] = read_arrays(drawn / "heat.npz")
        written.append(folder / "figure5.png")
        draw_heat(written[-1], heats)
    return {"queries": list(queries), "figures": [str(path) for path in written]}


def _evaluate_queries(
    workdir: Path, row: str, seed: int, split: str, queries: Sequence[str]
) -> Path:
    """Have a finished run evaluated once more, with figures of some queries; where they are."""
    drawn = ["--figures", "--frames=red", *(f"--query={name}" for name in queries)]
    call(workdir, f"{row}-figures", [*evaluation(workdir, row, seed, split), *drawn])
    return evaluated_folder(workdir, row, seed, split)


def sample_queries(evaluated: Path, number: int = 6) -> list[str]:
    """Return ids of queries spread evenly over an evaluation's ``embeddings.npz``."""
    saved = read_arrays(evaluated / "embeddings.npz")
    label, is_query, ids = saved["label"], saved["is_query"], saved["id"]
    # Alone in its category, a query has nothing to find.
    alone = np.bincount(label)[label] < 2
    usable = ids[is_query & ~alone].tolist()
    places = np.linspace(0, len(usable) - 1, min(number, len(usable))).astype(int)
    return [usable[place] for place in places]
