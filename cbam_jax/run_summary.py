"""What a training says of its data, and at its end: the JSON line, and the same in plain words."""

import shlex
import sys
from pathlib import Path
from typing import Any

from cbam_jax import evaluation, experiment, named_parts, runs
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset, is_path
from cbam_jax.runlog import StepMonitor


def images_of(training: RetrievalDataset, validation: RetrievalDataset) -> str:
    """Say how many images there are, and of how many classes: a split may lack some that exist."""
    known = len(training.label_names)
    counts = f"{len(training)} training", f"{len(validation)} validation images of"
    classes = [len(set(split.label.tolist())) for split in (training, validation)]
    if classes == [known, known]:
        return f"{' and '.join(counts)} {known} classes"
    return (
        f"{counts[0]} images of {classes[0]} classes and {counts[1]} {classes[1]} classes "
        f"(the dataset names {known})"
    )


def summarize(
    config: Config, workdir: Path, checkpoints: Checkpoints, step: int, monitor: StepMonitor
) -> dict[str, Any]:
    """Return the run's last line: where it stands, how fast it was, what training added."""
    split, best = config.data.eval_split, checkpoints.best_step()
    headline = experiment.headline(config)
    shown = [f"map@{min(config.eval.ks)}", headline, headline.replace("map", "precision")]
    shown = dict.fromkeys(shown + ["accuracy"] * experiment.classifies(config))
    evaluations = {
        number: {name: metrics.get(name) for name in shown}
        for number, metrics in runs.recorded_evaluations(config, workdir).items()
    }
    speed = round(monitor.images / monitor.seconds, 2) if monitor.seconds else None
    return {
        "workdir": str(workdir),
        "step": step,
        "finished": step == config.train.steps and step in evaluations,
        "images_seen": step * experiment.batch_size(config),
        "images_per_second": speed,
        "split": split,
        "untrained": evaluations.get(0),
        "best": None if best is None else evaluations.get(best),
        "best_step": best,
    }


def tell(summary: dict[str, Any]) -> str:
    """Say in plain words what the run did."""
    lines = [f"{summary['step']} steps, {summary['images_seen']} images seen"]
    before, after = summary["untrained"], summary["best"]
    if before and after:
        name = "trained" if _worse(before, after) else "best"
        lines[0] += f"; {summary['split']}, untrained -> {name} (step {summary['best_step']}):"
        lines += [f"  {name:14}{_number(before[name])} -> {_number(after[name])}" for name in after]
        if summary["finished"] and _worse(before, after):
            lines.append(
                f"training made it worse than the untrained network ({evaluation.headline(after)})"
                ": train longer, lower --config.optimizer.learning_rate, or look at the labels"
            )
    return "\n".join(lines)


def next_commands(workdir: str, data: str, *parts: str | None) -> str:
    """Return what to type next: to measure a run, and to find similar photos by it.

    Among the photos that it was trained on, or drawn ones; for other datasets none are named. Where
    some of the model's ``parts`` are one's own, the commands that build it trust them.

    >>> print(next_commands("runs/my run", "./photos/"))
    measure it: cbam-jax evaluate --workdir='runs/my run' --split=test --html
    find similar photos: cbam-jax catalogue add shop.db ./photos/ --model='runs/my run'
    """
    script = Path(sys.argv[0]).name == "train.py"
    evaluate, command = (
        ("python evaluate.py", "python -m cbam_jax")
        if script
        else ("cbam-jax evaluate", "cbam-jax")
    )
    workdir = shlex.quote(workdir)
    own = ",".join(part for part in parts if part and named_parts.is_named(part))
    trust = f"CBAM_JAX_TRUST={shlex.quote(own)} " if own else ""
    lines = [f"measure it: {trust}{evaluate} --workdir={workdir} --split=test --html"]
    add = f"{trust}{command} catalogue add shop.db"
    if is_path(data):
        lines.append(f"find similar photos: {add} {shlex.quote(data)} --model={workdir}")
    elif data.startswith("synthetic_garments"):
        lines.append(
            f"find similar photos: {command} datasets draw drawn && {add} drawn --model={workdir} "
            f"&& {trust}{command} catalogue find shop.db drawn/sweater/0000_0.jpg --html=found.html"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    # None: the mean over no query.
    return "-" if value is None else f"{value:.4f}"


def _worse(before: dict[str, Any], after: dict[str, Any]) -> bool:
    name = evaluation.headline(after)
    old, new = before.get(name), after.get(name)
    return old is not None and new is not None and new < old
