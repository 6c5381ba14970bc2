"""One row with one seed: trained, measured, its cost taken, unless all that is done."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbam_jax import command_line
from cbam_jax.paper.processes import call, script
from cbam_jax.paper.settings import row_config
from cbam_jax.paper.tables import ROWS


def run_folder(workdir: Path, row: str, seed: int) -> Path:
    """Where a row's run of one seed lies; a run of train.py like any other."""
    return workdir / "runs" / f"{row}-seed{seed}"


def read_result(workdir: Path, row: str, seed: int, split: str) -> dict[str, Any] | None:
    """Return what a finished run measured, or None while it is unfinished."""
    path = run_folder(workdir, row, seed) / f"result-{split}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_row(workdir: Path, row: str, seed: int, *, split: str, settings: Mapping[str, str]) -> bool:
    """Train and measure one row with one seed, unless that is done: whether it was not."""
    if read_result(workdir, row, seed, split):
        return False
    start, name, folder = time.monotonic(), f"{row}-seed{seed}", run_folder(workdir, row, seed)
    fields = {**settings, "model.name": row, "seed": str(seed)}
    fields.pop("config", None)
    arguments = [f"--config={row_config(row, settings)}", f"--workdir={folder}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    call(workdir, name, [*script("train"), *arguments])
    call(workdir, name, [*script("evaluate"), f"--workdir={folder}", f"--split={split}"])
    config = json.loads((folder / "config.json").read_text())
    if not cost_path(workdir, row).exists():
        measure_cost(workdir, row, config)
    result = {
        "row": row,
        "seed": seed,
        "config_file": settings.get("config", f"configs/{row}.py"),
        "seconds": round(time.monotonic() - start, 1),
        "config": config,
        "report": json.loads((folder / "eval" / split / "metrics.json").read_text()),
    }
    # Last, so that whoever finds it finds all of the row.
    command_line.write_json(folder / f"result-{split}.json", result)
    return True


def cost_path(workdir: Path, row: str) -> Path:
    """Where a row's parameters, operations and speed are kept."""
    return workdir / "runs" / f"{row}-cost.json"


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
