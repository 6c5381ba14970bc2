"""Which loss to fine-tune by: a network from ImageNet's weights, under one budget a loss.

python benchmarks/compare_losses.py --data=PHOTOS.csv [--workdir=runs/compare_losses] [--fold=0]
    [--losses=triplet,...] [--rates=1e-4,3e-4,1e-3] [--seeds=3] [--config.FIELD=VALUE ...]

PHOTOS.csv is a manifest as of ``unseen_classes.py``, whose folds these are: every second class is
trained on. Each loss trains configs/photos.py, all of the network, at every learning rate with seed
0, and MAP@R of the seen classes' validation photos chooses the rate. By that rate the other seeds
are trained too, and every seed is measured after its last step: on the photos of the classes not
seen, and on the test photos of those that were. Options of a loss are its defaults. The same
command goes on where it was stopped, and more losses or seeds can be named later; seeds come one
after the other, so that all losses have one before any has two. Other photos, or another budget,
ask for another WORKDIR. WORKDIR/results0.json and results0.md, of fold 0, have what is finished.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.unseen_classes import unreadable, write_fold
from cbam_jax import InputError, command_line, config_files, experiment, runs, training
from cbam_jax.metrics import t_interval

SPLITS = {"unseen": "classes not seen", "test": "classes seen"}
MEASURED = ("map@R", "precision@1", "map@10")
# A minute of a core: small photos, few steps. The average of photos.py would hold back what 30
# steps change; proxies begin at random and have to move far in few.
BUDGET = (
    "--config.data.image_size=96",
    "--config.data.classes_per_batch=5",
    "--config.data.images_per_class=6",
    "--config.train.steps=30",
    "--config.train.eval_every=30",
    "--config.train.checkpoint_every=30",
    "--config.train.ema_decay=0.0",
    "--config.optimizer.proxy_multiple=100",
    "--config.eval.ks=(1,10)",
)


class Trial(NamedTuple):
    """One training."""

    loss: str
    rate: str
    seed: int

    def folder(self, workdir: Path, fold: int) -> Path:
        """Of its run."""
        return workdir / f"fold{fold}" / f"{self.loss}-{self.rate}-{self.seed}"


def config_of(trial: Trial, manifest: Path, overrides: Sequence[str]) -> Any:
    """The config of a training; what the user gave counts most."""
    fields = {"data.name": manifest, "loss.name": trial.loss, "seed": trial.seed}
    fields |= {"optimizer.learning_rate": trial.rate}
    if trial.loss == "cross_entropy":  # It trains a classifier, of the classes that are seen.
        classes = json.loads(manifest.with_suffix(".json").read_text())
        fields |= {"model.normalize": False, "model.num_classes": len(classes)}
    own = [f"--config.{name}={value}" for name, value in fields.items()]
    return config_files.read_config_file("photos", [*BUDGET, *own, *overrides])


def check_settings(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """InputError where a fold's trainings were of other photos, or of another budget."""
    try:
        digest = hashlib.sha256(flags.data.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise unreadable(flags.data, error) from error
    settings = {
        "data": str(flags.data.resolve()),  # Its rows do not tell in which size photos lie there.
        "rows": digest,
        "budget": [*BUDGET, *overrides],
    }
    path = flags.workdir / f"settings{flags.fold}.json"
    finished = any(flags.workdir.glob(f"fold{flags.fold}/*/validation.json"))
    if not finished or not path.exists():  # After a first try with a wrong flag, say.
        command_line.write_json(path, settings)
    elif (kept := json.loads(path.read_text())) != settings:
        other = [name for name in settings if kept.get(name) != settings[name]]
        raise InputError(f"{path} has another {', '.join(other)}: give another --workdir")


def validation(trial: Trial, run: Path, config: Any) -> float:
    """MAP@R of the validation photos after the last step; trained as far as it is not yet."""
    kept = run / "validation.json"
    if not kept.exists():
        summary = training.train_and_evaluate(config, run)
        if not summary["finished"]:
            raise InputError("stopped: the same command goes on from here")
        found = runs.recorded_evaluations(experiment.with_whole_paths(config), run)
        command_line.write_json(kept, found[config.train.steps])
        jax.clear_caches()
    value = json.loads(kept.read_text())["map@R"]
    print(f"{trial}: validation map@R {value:.4f}", flush=True)
    return value


def measured(run: Path, split: str, which: str = "last") -> dict[str, float]:
    """Metrics of a split, embedded by a run's last step, or before its first."""
    folder = run / "eval" / (f"{split}-untrained" if which == "untrained" else split)
    if not (folder / "metrics.json").exists():
        runs.evaluate(run, split, which)
        jax.clear_caches()
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    return {name: metrics[name] for name in MEASURED}


def rows(flags: argparse.Namespace, overrides: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """What is known after each loss and seed: a row a loss, of those that are finished."""
    manifest = flags.workdir / f"fold{flags.fold}.csv"
    found: dict[str, dict[str, Any]] = {}
    for seed in range(flags.seeds):
        for loss in flags.losses:
            tried = {}
            for rate in flags.rates:
                trial = Trial(loss, rate, 0)
                config = config_of(trial, manifest, overrides)
                tried[rate] = validation(trial, trial.folder(flags.workdir, flags.fold), config)
            trial = Trial(loss, max(tried, key=tried.__getitem__), seed)
            run = trial.folder(flags.workdir, flags.fold)
            validation(trial, run, config_of(trial, manifest, overrides))
            if not found:
                before = {split: measured(run, split, "untrained") for split in SPLITS}
                found["before training"] = {"loss": "before training", "seeds": [before]}
            row = found.setdefault(loss, {"loss": loss, "validation": tried, "seeds": []})
            row["seeds"].append({split: measured(run, split) for split in SPLITS})
            yield list(found.values())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table, best first on classes that were not seen."""
    head = [
        "loss",
        *(f"MAP@R, {name}" for name in SPLITS.values()),
        "precision@1, classes not seen",
    ]
    lines = [" | ".join([*head, "seeds", "learning rate"]), "|".join(["---"] * 6)]
    for row in sorted(rows, key=lambda row: -np.mean(of(row, "unseen", "map@R"))):
        tried = row.get("validation", {})
        cells = [row["loss"], *(spread(of(row, split, "map@R")) for split in SPLITS)]
        cells += [spread(of(row, "unseen", "precision@1")), str(len(row["seeds"]))]
        lines.append(" | ".join([*cells, max(tried, key=tried.__getitem__, default="")]))
    return "".join(f"| {line} |\n" for line in lines)


def of(row: dict[str, Any], split: str, metric: str) -> list[float]:
    """A metric of each seed."""
    return [seed[split][metric] for seed in row["seeds"]]


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, Student's interval of it.

    >>> spread([0.5, 0.6]), spread([0.5])
    ('0.5500 (-0.0853 to 1.1853)', '0.5000')
    """
    told = f"{np.mean(values):.4f}"
    if len(values) < 2:
        return told
    low, high = t_interval(values)
    return f"{told} ({low:.4f} to {high:.4f})"


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The flags, checked before anything is trained, and the overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*experiment.LOSSES, "cross_entropy")
    parser.add_argument("--data", type=command_line.path, required=True)
    parser.add_argument("--workdir", type=command_line.path, default=Path("runs/compare_losses"))
    parser.add_argument("--fold", type=int, choices=(0, 1), default=0)
    parser.add_argument("--losses", default=",".join(known))
    parser.add_argument("--rates", default="1e-4,3e-4,1e-3")
    parser.add_argument("--seeds", type=int, default=3)
    flags, overrides = parser.parse_known_args()
    # Each once: a seed that counts twice would narrow the interval.
    flags.losses, flags.rates = (
        list(dict.fromkeys(name.strip() for name in text.split(",")))
        for text in (flags.losses, flags.rates)
    )
    for loss in flags.losses:
        if loss not in known:
            raise InputError(f"--losses has {loss!r}: give some of {','.join(known)}")
    for rate in flags.rates:
        if not re.fullmatch(r"[\d.]+(e-?\d+)?", rate):
            raise InputError(f"--rates has {rate!r}: give learning rates, such as 1e-4,3e-4")
    if flags.seeds < 1:
        raise InputError(f"--seeds={flags.seeds}: give at least 1")
    return flags, overrides


def main() -> int:
    """Train and measure what is not there yet; write the table after each step."""
    command_line.keep_compiled_programs()
    flags, overrides = parse()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    check_settings(flags, overrides)
    manifest = flags.workdir / f"fold{flags.fold}.csv"
    seen = write_fold(flags.data, flags.fold, manifest)
    command_line.write_json(manifest.with_suffix(".json"), seen)
    for known in rows(flags, overrides):
        document = {"trained_on": seen, "budget": [*BUDGET, *overrides], "rows": known}
        command_line.write_json(flags.workdir / f"results{flags.fold}.json", document)
        command_line.write_text(flags.workdir / f"results{flags.fold}.md", markdown(known))
    print((flags.workdir / f"results{flags.fold}.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
