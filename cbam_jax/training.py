"""The loop of a run, top to bottom: data -> step -> evaluation -> checkpoint.

``train_and_evaluate`` is the whole of it; what a config's fields mean is in ``experiment``, what a
step computes in ``steps``, what is minimised in ``losses``. A step is saved before it is evaluated,
and whatever ends a run, a signal, a photo that cannot be read, a full disk, leaves one that goes on
to what it would have been without.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cbam_jax import (
    InputError,
    command_line,
    config_checks,
    config_files,
    distributed,
    experiment,
    forecast,
    run_summary,
    runs,
    steps,
    stopping,
    workdirs,
)
from cbam_jax.checkpoint import Checkpoints, unflatten
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.foreign_files import expanded
from cbam_jax.models import EmbeddingModel
from cbam_jax.pretrained import load_pretrained
from cbam_jax.runlog import RunLog, StepMonitor
from cbam_jax.stopping import Stop, Stopped

DESCRIPTION = """Train an embedding model: config -> data -> model -> loss -> step -> checkpoint.

The same command again resumes. RUN gets config.json, metrics.jsonl, tensorboard/, checkpoints/
and eval/; the last line on stdout is one JSON document. SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C finishes
the step under way, saves it and stops. configs/default.py lists every field; --config.seed=1 sets
one.

Exit status: 0 finished; 75 stopped before its end, and the same command goes on; 2 a mistake, a
full disk or too little memory, told in one line.
"""
_JUDGED = 3  # Steps after which it is told how long the rest will take.


class Run(NamedTuple):
    """What does not change from step to step."""

    config: Config
    training: RetrievalDataset
    validation: RetrievalDataset
    mesh: Any
    embed_step: Callable
    checkpoints: Checkpoints
    log: RunLog
    monitor: StepMonitor
    stop: Stop


class Position(NamedTuple):
    """Where a run stands: the state after ``step``, and the scalars since the last record."""

    state: steps.TrainState
    step: int
    window: list[dict[str, float]]


def train_and_evaluate(
    config: Config, workdir: str | Path, *, stop: Stop | None = None
) -> dict[str, Any]:
    """Train and evaluate along the way; go on from what is in ``workdir``.

    Args:
        config: as ``configs/default.py`` has it. Paths in it are made whole, so that the run can
            be evaluated from any folder.
        workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and eval/.
        stop: asks to save the step under way and return; entered already. None: signals do, where
            they can be taken, which is in the main thread.

    Returns:
        The summary: the last line that ``train.py`` prints.

    Raises:
        InputError: for a mistake in the config, the data or the workdir, before anything slow; for
            what shows only later, once the last sound step is saved.
        FloatingPointError: for a loss or gradient that is not finite.
        Stopped: asked to stop before there was anything to save.
    """
    config = experiment.with_whole_paths(config)
    experiment.trust_named_parts(config)
    config = experiment.with_transformer(config)
    config_checks.check_config(config)
    workdir = expanded(workdir)
    workdirs.check_links(workdir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(take_signals())
        stack.enter_context(distributed.leaving_together())
        distributed.connect()
        stack.enter_context(workdirs.locked(workdir))
        stack.enter_context(workdirs.told_in_one_line(config, workdir))
        checkpoints = stack.enter_context(runs.open_checkpoints(config, workdir))
        # Again: on the way out, closing the checkpoints would wait for the others.
        stack.enter_context(distributed.leaving_together())
        config, training, validation, source = open_data(config, workdir, checkpoints)
        model, mesh = build_model(config, source, training), steps.data_mesh()
        optimizer, learning_rate = experiment.build_optimizer(config)
        train_step = make_train_step(config, model, optimizer, experiment.build_loss(config), mesh)
        embed_step = steps.make_embed_step(model, mesh)
        position = restore(
            config, checkpoints, first_state(config, model, optimizer, mesh), mesh
        )  # fmt: skip
        main = jax.process_index() == 0
        if main:
            command_line.write_json(workdir / "config.json", config.to_dict())
        log = stack.enter_context(
            RunLog(workdir, step=position.step, total=config.train.steps, active=main)
        )
        monitor = make_monitor(config, log, learning_rate, position)
        run = Run(
            config, training, validation, mesh, embed_step, checkpoints, log, monitor, stop
        )  # fmt: skip
        log.line(describe(run, position))
        make_up_evaluation(run, workdir, position)
        step = train(run, train_step, position)
        return run_summary.summarize(config, workdir, checkpoints, step, monitor)


def take_signals(**options: Any) -> contextlib.AbstractContextManager[Stop]:
    """Let signals ask to stop; of several processes JAX's own service takes SIGTERM, for all."""
    return Stop(**options) if jax.process_count() == 1 else contextlib.nullcontext(Stop())


def train(run: Run, train_step: Callable, position: Position) -> int:
    """Train to the end, or as far as it goes; return the last step, which is saved."""
    config, monitor = run.config, run.monitor
    state, step, saved, stopped = position.state, position.step, position.step, None
    batches = experiment.train_batches(config, run.training, step)
    try:
        with contextlib.closing(batches):
            for batch in monitor.waiting(steps.to_devices(batches, run.mesh)):
                state, scalars = train_step(state, batch)
                step += 1
                monitor.step_done(step, scalars, batch["index"])
                run.stop.waits_for = "the step under way, to save it"
                if step == position.step + _JUDGED:
                    tell_forecast(run, step)
                stopped = stop_requested(run, step)
                if stopped or evaluates(config, step) or step % config.train.checkpoint_every == 0:
                    # Pausing waits for the steps under way: what is saved was found finite.
                    with monitor.paused():
                        saved = step
                        save(config, run.checkpoints, Position(state, step, monitor.window))
                        if evaluates(config, step):
                            stopped = stopped or evaluate(run, state, step)
                if stopped:
                    break
    except FloatingPointError:
        raise  # The state is of no use.
    except Exception:
        # A signal that reached the loading workers too is a stop like any other.
        stopped = run.stop.received
        kept = step == saved or keep(run, state, step)
        if not (stopped and kept and step):
            raise
    if stopped:
        run.log.line(f"stopped by {stopped}; step {step} is saved: the same command resumes")
    return step


def keep(run: Run, state: steps.TrainState, step: int) -> bool:
    """Save the last step before an error leaves; whether it was sound, and could be."""
    if jax.process_count() > 1:
        return False  # Saving takes all processes, and the others have no error.
    try:
        run.monitor.flush()
        if run.monitor.window and step % run.config.train.log_every == 0:
            return False  # The record of this step could not be written.
        save(run.config, run.checkpoints, Position(state, step, run.monitor.window))
        run.checkpoints.wait()
    except Exception:  # The first error is the one to tell.
        return False
    run.log.line(f"step {step} is saved: the same command goes on from there")
    return True


def open_data(
    config: Config, workdir: Path, checkpoints: Checkpoints
) -> tuple[Config, RetrievalDataset, RetrievalDataset, str | None]:
    """Open both splits; with them the config as it fits them, and the weights to start from.

    Those are None where the run goes on. All that can be wrong is found here, before a model is
    drawn, which takes a while.
    """
    resumes = bool(checkpoints.steps())
    if resumes:
        config_checks.check_same_run(config, runs.read_config(workdir))
    source = None if resumes else config.model.pretrained
    config_checks.check_source_exists(source)
    training = experiment.open_split(config, config.data.train_split)
    validation = experiment.open_split(config, config.data.eval_split)
    config_checks.check_labels(config, training, validation)
    config = experiment.with_fitting_batch(config, training)
    config = experiment.with_fitting_ks(config, validation)
    experiment.split_protocol(config, validation)
    experiment.train_batches(config, training, step=0).close()
    if source:
        config_checks.check_source(config, source)
    return config, training, validation, source


def build_model(config: Config, source: str | None, dataset: RetrievalDataset) -> EmbeddingModel:
    """Build the config's model, with the weights of ``source`` where there is one.

    With it what its loss trains of the dataset's classes, which no checkpoint is evaluated by.
    """
    model = experiment.build_model(config)
    if source:
        print(load_pretrained(model, source).summary(), flush=True)
    if experiment.has_proxies(config):
        classes = len(dataset.label_names)
        model.proxies = experiment.build_proxies(config, classes, model.embedding_dim)
    return model


def first_state(config: Config, model: EmbeddingModel, optimizer: Any, mesh: Any) -> Any:
    """Return the training state before any step."""
    return steps.create_train_state(
        model,
        optimizer,
        mesh,
        ema=config.train.ema_decay > 0,
        ema_batch_stats=config.train.ema_batch_stats,
        memory_shape=(config.loss.memory_size, model.embedding_dim),
        shard_state=config.train.shard_state,
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
        seed=config.seed,
        mesh=mesh,
        shard_state=config.train.shard_state,
        remat=config.train.remat,
    )


def make_monitor(
    config: Config, log: RunLog, learning_rate: Callable, position: Position
) -> StepMonitor:
    """Return what follows the steps from ``position`` on."""
    return StepMonitor(
        log,
        log_every=config.train.log_every,
        batch_size=experiment.batch_size(config),
        learning_rate=learning_rate,
        warning=experiment.collapse_warning(config),
        eval_every=config.train.eval_every,
        window=position.window,
    )


def evaluates(config: Config, step: int) -> bool:
    """Whether an evaluation is due after ``step``."""
    return step == config.train.steps or step % config.train.eval_every == 0


def evaluate(run: Run, state: steps.TrainState, step: int) -> str | None:
    """Measure the validation split and keep its metrics; why that was left, or None."""
    arrays = steps.evaluation_arrays(state)
    try:
        with run.monitor.evaluating():
            result, _ = runs.evaluate_split(
                run.config, run.validation, run.embed_step, arrays, run.mesh, stop=run.stop
            )
    except Stopped:
        return run.stop.received
    metrics = record_evaluation(run.config, run.log, step, result.report)
    if step > 0:
        run.checkpoints.add_metrics(step, metrics)
    return None


def make_up_evaluation(run: Run, workdir: Path, position: Position) -> None:
    """Evaluate the state that the run starts from where that is due and was not done."""
    run.checkpoints.keep_known_metrics()
    if not evaluates(run.config, position.step):
        return
    if position.step in runs.recorded_evaluations(run.config, workdir):
        return
    with run.monitor.paused():
        if evaluate(run, position.state, position.step):
            raise Stopped


def checkpoint_items(state: steps.TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort a state into what evaluation needs (the model) and what only training needs."""
    model = {"params": state.params, "batch_stats": state.batch_stats}
    if state.ema is not None:
        model["ema"] = state.ema
    if state.ema_batch_stats is not None:
        model["ema_batch_stats"] = state.ema_batch_stats
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    if state.memory is not None:
        optimizer["memory"] = state.memory
    if state.rngs is not None:
        optimizer["rngs"] = state.rngs
    return model, optimizer


def save(config: Config, checkpoints: Checkpoints, position: Position) -> None:
    """Save where a run stands, in the background."""
    model, optimizer = checkpoint_items(position.state)
    data = {"seed": config.seed, "next_step": position.step, "window": position.window}
    checkpoints.save(
        position.step, model=model, optimizer=optimizer, data=data, config=config.to_dict()
    )


def restore(
    config: Config, checkpoints: Checkpoints, state: steps.TrainState, mesh: Any
) -> Position:
    """Return where the newest checkpoint stands, or ``state`` at step 0 when there is none."""
    if not checkpoints.steps():
        return Position(state, 0, [])
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
        rngs=optimizer.get("rngs"),
        ema_batch_stats=model.get("ema_batch_stats"),
    )
    window = read.data.get("window", [])  # Older runs kept none.
    placed = steps.state_shardings(restored, mesh, shard_state=config.train.shard_state)
    return Position(steps.place(restored, placed), read.data["next_step"], window)


def stop_requested(run: Run, step: int) -> str | None:
    """Return why to stop after this step, or None; the same answer in all processes."""
    if jax.process_count() == 1:
        return run.stop.received
    return "preemption" if run.checkpoints.reached_preemption(step) else None


def tell_forecast(run: Run, step: int) -> None:
    """Say how long the rest will take, what memory the run holds, and what would make it less."""
    config, monitor = run.config, run.monitor
    with monitor.paused():
        seconds, each = monitor.seconds_left(step), monitor.seconds_per_step
    if seconds is None or each is None or step == config.train.steps:
        return
    run.log.line(
        f"about {forecast.duration(seconds)} for {remaining(config.train.steps - step)} "
        f"({each:.2g} s each) and their evaluations; memory: {memory_held()}"
    )
    if jax.devices()[0].platform == "cpu":
        hint = forecast.advice(
            seconds,
            image_size=config.data.image_size,
            model=config.model.name,
            steps=config.train.steps,
        )
        if hint:
            run.log.line(hint)


def remaining(steps: int) -> str:
    """Name so many steps that are left, at least one.

    >>> remaining(1), remaining(3)
    ('the step that is left', 'the 3 steps that are left')
    """
    return "the step that is left" if steps == 1 else f"the {steps} steps that are left"


def memory_held() -> str:
    """Say how much memory the run holds, on the host and on an accelerator."""
    told = f"{forecast.resident_bytes() / 1e9:.1f} GB"
    statistics = jax.local_devices()[0].memory_stats() or {}  # None on a CPU.
    if "peak_bytes_in_use" in statistics:
        told += f", {statistics['peak_bytes_in_use'] / 1e9:.1f} GB of each device"
    return told


def describe(run: Run, position: Position) -> str:
    """Say in one line what is about to be trained on what."""
    config, training, validation = run.config, run.training, run.validation
    size = sum(leaf.size for leaf in jax.tree.leaves(position.state.params))
    return (
        f"{config.model.name} ({size / 1e6:.1f} M parameters) on {config.data.name}: "
        f"{run_summary.images_of(training, validation)}, {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s), {steps_left(position.step, config.train.steps)}"
    )


def steps_left(step: int, total: int) -> str:
    """Say which steps are left.

    >>> steps_left(300, 300)
    'all 300 steps are done'
    """
    if step == total:
        return f"all {total} steps are done"
    return f"steps {step} to {total}; compiling the first takes up to minutes"


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


def parse_flags() -> tuple[Config, Path, float | None]:
    """Read --config and overrides, --workdir, and the seconds to stop after.

    Raises:
        InputError: for an unknown field or a wrong type.
    """
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
        "--stop_after", metavar="TIME", help="45m, 2h, 1h30m: then save and stop, with status 75"
    )
    distributed.add_flags(parser)
    known, overrides = parser.parse_known_args()
    after = None if known.stop_after is None else stopping.seconds(known.stop_after)
    if known.distributed and after is not None:
        raise InputError(
            f"--stop_after={known.stop_after}: several processes would not stop at the same step; "
            "leave it out, and let the scheduler send SIGTERM"
        )
    config = config_files.read_config_file(known.config, overrides)
    distributed.start(known, expanded(known.workdir))
    return config, known.workdir, after


@config_files.told_as_flags()
def main() -> int:
    """Train, and print the JSON line; the exit status tells a stopped run from a finished one."""
    command_line.keep_compiled_programs()
    config, workdir, after = parse_flags()
    with take_signals(after=after, exits=True) as stop:
        try:
            summary = train_and_evaluate(config, workdir, stop=stop)
        except Stopped:
            print(f"stopped by {stop.received}, before there was anything to save", file=sys.stderr)
            return stopping.STATUS
    if jax.process_index() == 0:
        print(run_summary.tell(summary))
        parts = config.model.name, config.model.attention
        print(run_summary.next_commands(summary["workdir"], config.data.name, *parts))
        print(command_line.to_json(summary))
    return 0 if summary["finished"] else stopping.STATUS
