"""The loop of a run, top to bottom: data -> step -> evaluation -> checkpoint.

``train_and_evaluate`` is the whole of it; what a config's fields mean is in ``experiment``, what a
step computes in ``steps``, what is minimised in ``losses``.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cbam_jax import InputError, command_line, config_files, evaluation, experiment, runs, steps
from cbam_jax.checkpoint import Checkpoints, StopSignal, unflatten
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.models import EmbeddingModel
from cbam_jax.pretrained import load_pretrained
from cbam_jax.runlog import RunLog, StepMonitor, read_log

DESCRIPTION = """Train an embedding model: config -> data -> model -> loss -> step -> checkpoint.

The same command again resumes. RUN gets config.json, metrics.jsonl, tensorboard/, checkpoints/
and eval/; the last line on stdout is one JSON document. SIGTERM or Ctrl-C finishes the step under
way, saves it and stops. configs/default.py lists every field; --config.seed=1 sets one.
"""


class Run(NamedTuple):
    """What an evaluation along the way needs, and what does not change from step to step."""

    config: Config
    training: RetrievalDataset
    validation: RetrievalDataset
    mesh: Any
    embed_step: Callable


def train_and_evaluate(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train and evaluate along the way; go on from what is in ``workdir``.

    Args:
        config: as ``configs/default.py`` has it. Paths in it are made whole, so that the run can
            be evaluated from any folder.
        workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and eval/.

    Returns:
        The summary: the last line that ``train.py`` prints.

    Raises:
        InputError: for a mistake in the config, the data or the workdir, before anything slow.
        FloatingPointError: for a loss or gradient that is not finite.
    """
    config = experiment.with_whole_paths(config)
    experiment.check_config(config)
    workdir = Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.locked(workdir))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", best_metric=evaluation.headline)
        )
        training, validation, source = open_data(config, workdir, checkpoints)
        config = experiment.with_fitting_ks(config, validation)
        experiment.split_protocol(config, validation)
        model, mesh = build_model(config, source), steps.data_mesh()
        optimizer, learning_rate = experiment.build_optimizer(config)
        loss = experiment.build_loss(config)
        train_step = make_train_step(config, model, optimizer, loss, mesh)
        embed_step = steps.make_embed_step(model, mesh)
        run = Run(config, training, validation, mesh, embed_step)
        state = first_state(config, model, optimizer, mesh)
        state, step = restore(config, checkpoints, state, mesh)
        main = jax.process_index() == 0
        if main:
            command_line.write_json(workdir / "config.json", config.to_dict())
        log = stack.enter_context(RunLog(workdir, step=step, total=config.train.steps, active=main))
        log.line(describe(run, state, step))
        monitor = StepMonitor(
            log,
            log_every=config.train.log_every,
            batch_size=config.data.classes_per_batch * config.data.images_per_class,
            learning_rate=learning_rate,
            warning=experiment.collapse_warning(config),
        )
        if step == 0:
            with monitor.paused():
                evaluate(run, state, log, step=0)
        stop = stack.enter_context(StopSignal())
        batches = experiment.train_batches(config, training, step)
        stack.enter_context(contextlib.closing(batches))
        for batch in monitor.waiting(steps.to_devices(batches, mesh)):
            state, scalars = train_step(state, batch)
            step += 1
            monitor.step_done(step, scalars, batch["index"])
            stopped = stop_requested(stop, checkpoints, step)
            last = step == config.train.steps
            evaluates = not stopped and (last or step % config.train.eval_every == 0)
            if evaluates or stopped or step % config.train.checkpoint_every == 0:
                with monitor.paused():  # Steps under way are found finite before they are saved.
                    metrics = evaluate(run, state, log, step) if evaluates else None
                    save(config, checkpoints, step, state, metrics)
            if stopped:
                log.line(f"stopped by {stopped}; step {step} is saved: the same command resumes")
                break
        return summarize(config, workdir, checkpoints, step, monitor)


def open_data(
    config: Config, workdir: Path, checkpoints: Checkpoints
) -> tuple[RetrievalDataset, RetrievalDataset, str | None]:
    """Open both splits; with them the weights to start from, None where the run goes on.

    All that can be wrong is found here, before a model is drawn, which takes a while.
    """
    resumes = bool(checkpoints.steps())
    if resumes:
        experiment.check_same_run(config, runs.read_config(workdir))
    source = None if resumes else config.model.pretrained
    experiment.check_source_exists(source)
    training = experiment.open_split(config, config.data.train_split)
    validation = experiment.open_split(config, config.data.eval_split)
    experiment.check_labels(config, training, validation)
    experiment.train_batches(config, training, step=0).close()
    if source:
        experiment.check_source(config, source)
    return training, validation, source


def build_model(config: Config, source: str | None) -> EmbeddingModel:
    """Build the config's model, with the weights of ``source`` where there is one."""
    model = experiment.build_model(config)
    if source:
        print(load_pretrained(model, source).summary(), flush=True)
    return model


def first_state(config: Config, model: EmbeddingModel, optimizer: Any, mesh: Any) -> Any:
    """Return the training state before any step."""
    return steps.create_train_state(
        model,
        optimizer,
        mesh,
        ema=config.train.ema_decay > 0,
        memory_shape=(config.loss.memory_size, model.embedding_dim),
    )


def make_train_step(
    config: Config, model: EmbeddingModel, optimizer: Any, loss: Callable, mesh: Any
) -> Callable:
    """Return the config's jitted training step."""
    classify, embed = EmbeddingModel.classify_deeply, EmbeddingModel.__call__
    return steps.make_train_step(
        model,
        optimizer,
        loss,
        forward=classify if experiment.classifies(config) else embed,
        freeze_batch_norm=config.model.freeze_batch_norm,
        ema_decay=config.train.ema_decay,
        chunk_size=config.train.chunk_size,
        memory_start_step=config.loss.memory_start_step,
        mesh=mesh,
    )


def evaluate(run: Run, state: steps.TrainState, log: RunLog, step: int) -> dict[str, float]:
    """Measure the validation split, log its metrics and return them."""
    arrays = steps.evaluation_params(state), state.batch_stats
    result, _ = runs.evaluate_split(run.config, run.validation, run.embed_step, arrays, run.mesh)
    return record_evaluation(run.config, log, step, result.report)


def checkpoint_items(state: steps.TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort a state into what evaluation needs (the model) and what only training needs."""
    model = {"params": state.params, "batch_stats": state.batch_stats}
    if state.ema is not None:
        model["ema"] = state.ema
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    if state.memory is not None:
        optimizer["memory"] = state.memory
    return model, optimizer


def save(
    config: Config,
    checkpoints: Checkpoints,
    step: int,
    state: steps.TrainState,
    metrics: dict[str, float] | None,
) -> None:
    """Save the state after ``step``, in the background."""
    model, optimizer = checkpoint_items(state)
    position = {"seed": config.seed, "next_step": step}
    checkpoints.save(
        step,
        model=model,
        optimizer=optimizer,
        data=position,
        config=config.to_dict(),
        metrics=metrics,
    )


def restore(
    config: Config, checkpoints: Checkpoints, state: steps.TrainState, mesh: Any
) -> tuple[steps.TrainState, int]:
    """Return the newest saved state and its step, or what was given and 0 when there is none."""
    if not checkpoints.steps():
        return state, 0
    read = checkpoints.restore("last")
    if read.step > config.train.steps:
        raise InputError(
            f"the workdir holds step {read.step}, beyond train.steps={config.train.steps}: "
            "raise train.steps, or use a new --workdir"
        )
    model, optimizer = checkpoint_items(state)
    model, optimizer = unflatten(model, read.model), unflatten(optimizer, read.optimizer)
    checkpoints.delete_after(read.step)
    restored = steps.TrainState(
        step=optimizer["step"],
        params=model["params"],
        batch_stats=model["batch_stats"],
        opt_state=optimizer["opt_state"],
        ema=model.get("ema"),
        memory=optimizer.get("memory"),
    )
    return steps.replicate(restored, mesh), read.data["next_step"]


def stop_requested(stop: StopSignal, checkpoints: Checkpoints, step: int) -> str | None:
    """Return why to stop after this step, or None; the same answer in all processes."""
    if jax.process_count() == 1:
        return stop.received
    return "preemption" if checkpoints.reached_preemption(step) else None


def describe(run: Run, state: steps.TrainState, step: int) -> str:
    """Say in one line what is about to be trained on what."""
    config, training, validation = run.config, run.training, run.validation
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model.name} ({size / 1e6:.1f} M parameters) on {config.data.name}: "
        f"{len(training)} training and {len(validation)} validation images of "
        f"{len(training.label_names)} classes, {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s), steps {step} to {config.train.steps}"
    )


def record_evaluation(
    config: Config, log: RunLog, step: int, report: dict[str, Any]
) -> dict[str, float]:
    """Log an evaluation; return its metrics."""
    metrics = report["metrics"]
    split = config.data.eval_split
    log.scalars(step, {f"{split}/{name}": value for name, value in metrics.items()})
    best = experiment.headline(config)
    names = [best, best.replace("map", "precision"), "mrr", "accuracy"]
    names = [name for name in names if name in metrics]
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
    log.line(f"step {step:6d}  {split}  {shown}" + ("  (untrained)" if step == 0 else ""))
    return metrics


def summarize(
    config: Config, workdir: Path, checkpoints: Checkpoints, step: int, monitor: StepMonitor
) -> dict[str, Any]:
    """Return the run's last line: where it stands, how fast it was, what training added."""
    split, best = config.data.eval_split, checkpoints.best_step()
    headline = experiment.headline(config)
    shown = [f"map@{min(config.eval.ks)}", headline, headline.replace("map", "precision")]
    shown = dict.fromkeys(shown + ["accuracy"] * experiment.classifies(config))
    evaluations = {
        record["step"]: {name: record.get(f"{split}/{name}") for name in shown}
        for record in read_log(workdir)
        if f"{split}/{headline}" in record
    }
    batch = config.data.classes_per_batch * config.data.images_per_class
    speed = round(monitor.images / monitor.seconds, 2) if monitor.seconds else None
    return {
        "workdir": str(workdir),
        "step": step,
        "finished": step == config.train.steps,
        "images_seen": step * batch,
        "images_per_second": speed,
        "split": split,
        "untrained": evaluations.get(0),
        "best": evaluations.get(best),
        "best_step": best,
    }


def tell(summary: dict[str, Any]) -> str:
    """Say in plain words what the run did and what to do next."""
    lines = [f"{summary['step']} steps, {summary['images_seen']} images seen"]
    before, after = summary["untrained"], summary["best"]
    if before and after:
        lines[0] += f"; {summary['split']}, untrained -> best (step {summary['best_step']}):"
        lines += [f"  {name:14}{before[name]:.4f} -> {after[name]:.4f}" for name in after]
    script = Path(sys.argv[0]).name == "train.py"
    program = "python evaluate.py" if script else "cbam-jax evaluate"
    workdir = shlex.quote(summary["workdir"])
    lines.append(f"measure it: {program} --workdir={workdir} --split=test --figures")
    return "\n".join(lines)


def parse_flags() -> tuple[Config, Path]:
    """Read --config, --workdir and overrides; InputError for an unknown field or a wrong type."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help=f"a config by name ({config_files.names()}) or path"
    )
    parser.add_argument(
        "--workdir", required=True, type=command_line.path, help="folder of the run"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes; jax.distributed finds them from the cluster's environment",
    )
    known, overrides = parser.parse_known_args()
    config = config_files.read_config_file(known.config, overrides)
    if known.distributed:
        jax.distributed.initialize()
    return config, known.workdir


def main() -> None:
    """Train, and print the JSON line."""
    command_line.keep_compiled_programs()
    summary = train_and_evaluate(*parse_flags())
    if jax.process_index() == 0:
        print(tell(summary))
        print(command_line.to_json(summary))
