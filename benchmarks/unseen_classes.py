"""Does fine-tuning by configs/photos.py help with classes that it has not seen?

python benchmarks/unseen_classes.py --data=PHOTOS.csv [--workdir=runs/unseen_classes] [--fold=0]
    [--config.FIELD=VALUE ...]

PHOTOS.csv is a manifest with the splits train, validation and test, such as `python -m
cbam_jax.datasets resize clothing_dataset_small photos` makes. Of the classes in alphabetical order
every second one is trained on, in fold 0 the first, the third and so on, in fold 1 the others; the
class of a photo is all that is used. Measured are the test photos of the classes that were seen,
and the validation and test photos of those that were not, each split searched within itself, before
the first step and at the checkpoint that is best on the seen classes' validation photos. The same
command goes on where it was stopped. WORKDIR/results.json has all folds that are finished.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax import InputError, command_line, config_files, runs, training
from cbam_jax.paper import paired, per_query
from cbam_jax.whole_files import written_whole

SPLITS = {"test": "test photos of classes seen", "unseen": "photos of classes not seen"}
CHECKPOINTS = {"untrained": "untrained", "best": "fine-tuned"}


def read_rows(data: Path) -> list[dict[str, str]]:
    """The rows of a manifest with splits; InputError where the file is none."""
    try:
        with data.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeError, csv.Error) as error:
        raise unreadable(data, error) from error
    lacking = [name for name in ("path", "label", "split") if name not in names]
    if lacking:
        raise InputError(
            f"--data={data} has no column {', '.join(lacking)}: give a manifest with splits, such "
            "as `python -m cbam_jax.datasets resize NAME FOLDER` makes"
        )
    return rows


def unreadable(data: Path, error: Exception) -> InputError:
    """What to raise for a manifest that cannot be read."""
    return InputError(f"--data={data} cannot be read ({error}): give a manifest.csv")


def write_fold(data: Path, fold: int, path: Path) -> list[str]:
    """Write the manifest of a fold; return the classes that it trains on."""
    rows = read_rows(data)
    seen = sorted({row["label"] for row in rows})[fold::2]
    # Whole: another command beside this one may be about to read it.
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for row in rows:
            split = row["split"] if row["label"] in seen else "unseen"
            if row["label"] in seen or row["split"] != "train":
                writer.writerow([data.parent.resolve() / row["path"], row["label"], split])
    return seen


def run_fold(workdir: Path, data: Path, fold: int, overrides: list[str]) -> dict[str, Any]:
    """Train and measure a fold as far as that is not done; its part of the results."""
    workdir.mkdir(parents=True, exist_ok=True)
    manifest, run = workdir / f"fold{fold}.csv", workdir / f"fold{fold}"
    seen = write_fold(data, fold, manifest)
    overrides = [f"--config.data.name={manifest}", *overrides]
    config = config_files.read_config_file("photos", overrides)
    summary = training.train_and_evaluate(config, run)
    if not summary["finished"]:
        raise InputError("stopped: the same command goes on from here")
    measured = {split: measure(run, split) for split in SPLITS}
    kept = json.loads((run / "config.json").read_text())
    kept["data"]["name"] = manifest.name
    return {"fold": fold, "trained_on": seen, "splits": measured, "config": kept}


def measure(run: Path, split: str) -> dict[str, Any]:
    """Measure a split before and after training, with the difference paired by query."""
    found, queries = {}, {}
    for which, name in CHECKPOINTS.items():
        folder = run / "eval" / (f"{split}-untrained" if which == "untrained" else split)
        if not (folder / "metrics.json").exists():
            runs.evaluate(run, split, which)
        report, queries[name] = json.loads((folder / "metrics.json").read_text()), per_query(folder)
        found[name] = {
            key: report[key]
            for key in ("step", "num_gallery", "metrics", "interval", "definitions")
        }
        found[name]["per_category"] = report["per_category"]
    before, after = queries.values()
    difference = {metric: paired(after[metric], before[metric]) for metric in before}
    return {"of": SPLITS[split], **found, "difference": difference}


def main() -> int:
    """Run the folds that the flags ask for; write what all finished ones measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=command_line.path, required=True)
    parser.add_argument("--workdir", type=command_line.path, default=Path("runs/unseen_classes"))
    parser.add_argument("--fold", type=int, choices=(0, 1), help="default: both")
    flags, overrides = parser.parse_known_args()
    for fold in (0, 1) if flags.fold is None else (flags.fold,):
        result = run_fold(flags.workdir, flags.data, fold, overrides)
        command_line.write_json(flags.workdir / f"result{fold}.json", result)
    paths = sorted(flags.workdir.glob("result?.json"))
    results = {"folds": [json.loads(path.read_text()) for path in paths]}
    command_line.write_json(flags.workdir / "results.json", results)
    print(command_line.to_json({"results": str(flags.workdir / "results.json")}))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
