"""One row with one seed: trained, measured, its cost taken, unless all that is done."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbam_jax import command_line
from cbam_jax.paper.processes import call, script
from cbam_jax.paper.queries import per_query
from cbam_jax.paper.settings import read_kept, row_config, row_to_train
from cbam_jax.paper.tables import ROWS, row_fields


def run_folder(workdir: Path, row: str, seed: int) -> Path:
    """Where a row's run of one seed lies; a run of train.py like any other."""
    return workdir / "runs" / f"{trained_row(row)}-seed{seed}"


def trained_row(row: str) -> str:
    """Return the row whose run is measured: of an untrained row that which starts as it is."""
    if not ROWS[row].untrained:
        return row
    started = ROWS[row]._replace(untrained=False, title="")
    return next(name for name, other in ROWS.items() if other._replace(title="") == started)


def evaluated_folder(workdir: Path, row: str, seed: int, split: str) -> Path:
    """Where evaluate.py writes what it measures of a row."""
    return run_folder(workdir, row, seed) / "eval" / evaluated_name(row, split)


def evaluated_name(row: str, split: str) -> str:
    """Return what evaluate.py calls a row's evaluation.

    >>> evaluated_name("efficientnet_lite0-untrained", "test"), evaluated_name("resnet50", "test")
    ('test-untrained', 'test')
    """
    return f"{split}-untrained" if ROWS[row].untrained else split


def result_path(workdir: Path, row: str, seed: int, split: str) -> Path:
    """Where a row's result is kept, beside its run's files."""
    return run_folder(workdir, row, seed) / f"result-{evaluated_name(row, split)}.json"


def read_result(workdir: Path, row: str, seed: int, split: str) -> dict[str, Any] | None:
    """Return what a finished run measured, or None while it is unfinished."""
    path = result_path(workdir, row, seed, split)
    return read_kept(path) if path.exists() else None


def run_row(workdir: Path, row: str, seed: int, *, split: str, settings: Mapping[str, str]) -> bool:
    """Train and measure one row with one seed, unless that is done: whether it was not."""
    if read_result(workdir, row, seed, split):
        return False
    start, folder = time.monotonic(), run_folder(workdir, row, seed)
    train(workdir, row, seed, settings)
    call(workdir, folder.name, evaluation(workdir, row, seed, split))
    config = read_kept(folder / "config.json")
    if not cost_path(workdir, row).exists():
        measure_cost(workdir, row, config)
    evaluated = evaluated_folder(workdir, row, seed, split)
    result = {
        "row": row,
        "seed": seed,
        "config_file": settings.get("config", f"configs/{ROWS[row].config or row}.py"),
        "seconds": round(time.monotonic() - start, 1),
        "config": config,
        "report": read_kept(evaluated / "metrics.json"),
        "per_query": per_query(evaluated),
    }
    # Last, so that whoever finds it finds all of the row.
    command_line.write_json(result_path(workdir, row, seed, split), result)
    return True


def train(workdir: Path, row: str, seed: int, settings: Mapping[str, str]) -> None:
    """Train a row with one seed, or go on with it; one that is finished stays as it is."""
    folder = run_folder(workdir, row, seed)
    told = row_fields(row, row_to_train(row, settings))
    fields = {**settings, **told, "seed": str(seed)}
    fields.pop("config", None)
    arguments = [f"--config={row_config(row, settings)}", f"--workdir={folder}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    call(workdir, folder.name, [*script("train"), *arguments])


def evaluation(workdir: Path, row: str, seed: int, split: str) -> list[str]:
    """Return what Python is given to measure a row's run."""
    arguments = [f"--workdir={run_folder(workdir, row, seed)}", f"--split={split}"]
    arguments += ["--checkpoint=untrained"] * ROWS[row].untrained
    return [*script("evaluate"), *arguments]


def cost_path(workdir: Path, row: str) -> Path:
    """Where the parameters, operations and speed of a row's model are kept."""
    return workdir / "runs" / f"{ROWS[row].model or row}-cost.json"


def measure_cost(workdir: Path, row: str, config: Mapping[str, Any]) -> None:
    """Measure a row's embedding in a process of its own, as the runs' config has it."""
    fields = {name: config["model"][name] for name in ("embedding_dim", "pooling", "dtype")}
    fields |= {"model": config["model"]["name"], "image_size": config["data"]["image_size"]}
    fields |= {"batch_size": config["eval"]["batch_size"]}
    arguments = [f"--{name}={value}" for name, value in fields.items() if value is not None]
    command = ["-m", "cbam_jax.benchmark", "embed", "--no_plain", *arguments]
    cost = call(workdir, f"{row}-cost", command)
    command_line.write_json(cost_path(workdir, row), cost)


def progress(workdir: Path, jobs: Sequence[tuple[str, int]], position: int, split: str) -> str:
    """Say which row is next, how many there are, and about how long they will take."""
    row, seed = jobs[position]
    line = f"[{position + 1}/{len(jobs)}] {ROWS[row].title}, seed {seed}"
    results = {job: read_result(workdir, *job, split) for job in jobs}
    if results[row, seed]:
        return f"{line}: finished before"
    seconds = {job: result["seconds"] for job, result in results.items() if result}
    if not seconds:
        return line
    overall = sum(seconds.values()) / len(seconds)
    left = 0.0
    for name, _ in (job for job in jobs if job not in seconds):
        same = [value for (other, _), value in seconds.items() if other == name]
        left += sum(same) / len(same) if same else overall
    return f"{line}; about {max(left / 60, 0.1):.1f} min left"
