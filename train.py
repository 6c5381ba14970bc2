"""Train an embedding model: config -> data -> model -> loss -> step -> checkpoint.

python train.py --config=configs/quickstart.py --workdir=RUN [--config.data.image_size=160 ...]

The same command again resumes. RUN gets config.json, metrics.jsonl, tensorboard/, checkpoints/
and eval/; the last line on stdout is one JSON document. SIGTERM or Ctrl-C finishes the step under
way, saves it and stops. configs/default.py lists every field.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cbam_jax import InputError, command_line, data, evaluation, losses, steps
from cbam_jax.checkpoint import Checkpoints, StopSignal, unflatten
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.models import MODELS, EmbeddingModel
from cbam_jax.pretrained import IMAGENET, fetch_imagenet, load_pretrained
from cbam_jax.runlog import RunLog, StepMonitor, read_log
from evaluate import (
    DTYPES,
    build_model,
    check_classes,
    evaluate_split,
    open_split,
    read_config,
    split_protocol,
)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train and evaluate along the way; go on from what is in ``workdir``. Return the summary."""
    check_config(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", best_metric=evaluation.HEADLINE)
        )
        if checkpoints.steps():
            check_same_run(config, read_config(workdir))
        source = None if checkpoints.steps() else config.model.pretrained
        if source and source not in IMAGENET and not Path(source).exists():
            raise InputError(
                f"model.pretrained={source!r} is not there: give a file, the folder of a run, or "
                f"one of {', '.join(IMAGENET)}"
            )
        training = open_split(config, config.data.train_split)
        validation = open_split(config, config.data.eval_split)
        check_labels(config, training, validation)
        split_protocol(config, validation)
        train_batches(config, training, step=0).close()  # Their errors belong before what is slow.
        if source:  # Before the model, whose drawing takes a while.
            check_source(config, source)
        model = build_model(config)
        if source:
            print(load_pretrained(model, source).summary(), flush=True)
        mesh = steps.data_mesh()
        optimizer, learning_rate = build_optimizer(config)
        state = steps.create_train_state(
            model,
            optimizer,
            mesh,
            ema=config.train.ema_decay > 0,
            memory_shape=(config.loss.memory_size, model.embedding_dim),
        )
        classify, embed = EmbeddingModel.classify_deeply, EmbeddingModel.__call__
        train_step = steps.make_train_step(
            model,
            optimizer,
            build_loss(config),
            forward=classify if classifies(config) else embed,
            freeze_batch_norm=config.model.freeze_batch_norm,
            ema_decay=config.train.ema_decay,
            chunk_size=config.train.chunk_size,
            memory_start_step=config.loss.memory_start_step,
            mesh=mesh,
        )
        embed_step = steps.make_embed_step(model, mesh)
        state, step = restore(config, checkpoints, state, mesh)
        main = jax.process_index() == 0
        if main:
            command_line.write_json(workdir / "config.json", config.to_dict())
        log = stack.enter_context(RunLog(workdir, step=step, total=config.train.steps, active=main))
        log.line(describe(config, training, validation, state, step))
        monitor = StepMonitor(
            log,
            log_every=config.train.log_every,
            batch_size=config.data.classes_per_batch * config.data.images_per_class,
            learning_rate=learning_rate,
            warning=collapse_warning(config),
        )

        def evaluate(step: int) -> dict[str, float]:
            arrays = steps.evaluation_params(state), state.batch_stats
            result, _ = evaluate_split(config, validation, embed_step, arrays, mesh)
            return record_evaluation(config, log, step, result.report)

        if step == 0:
            with monitor.paused():
                evaluate(0)
        stop = stack.enter_context(StopSignal())
        batches = stack.enter_context(contextlib.closing(train_batches(config, training, step)))
        for batch in monitor.waiting(steps.to_devices(batches, mesh)):
            state, scalars = train_step(state, batch)
            step += 1
            monitor.step_done(step, scalars, batch["index"])
            stopped = stop_requested(stop, checkpoints, step)
            last = step == config.train.steps
            evaluates = not stopped and (last or step % config.train.eval_every == 0)
            if evaluates or stopped or step % config.train.checkpoint_every == 0:
                with monitor.paused():  # Steps under way are found finite before they are saved.
                    save(config, checkpoints, step, state, evaluate(step) if evaluates else None)
            if stopped:
                log.line(f"stopped by {stopped}; step {step} is saved: the same command resumes")
                break
        return summarize(config, workdir, checkpoints, step, monitor)


def check_config(config: ConfigDict) -> None:
    """Raise InputError for what the fields alone show to be wrong, before anything slow."""
    devices = jax.device_count()
    batch = config.data.classes_per_batch * config.data.images_per_class
    for field, size in {
        "data.classes_per_batch x data.images_per_class": batch,
        "eval.batch_size": config.eval.batch_size,
    }.items():
        if size < 1 or size % devices:
            raise InputError(
                f"{field} = {size} cannot be divided among {devices} devices: "
                f"make it a multiple of {devices}"
            )
    check_large_batch(config, batch, devices)
    for field in ("steps", "log_every", "eval_every", "checkpoint_every"):
        if config.train[field] < 1:
            raise InputError(f"train.{field}={config.train[field]}: give at least 1 step")
    if not 0 <= config.optimizer.warmup_steps < config.train.steps:
        raise InputError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"train.steps={config.train.steps}: lower it"
        )
    if not 0 <= config.train.ema_decay < 1:
        raise InputError(f"train.ema_decay={config.train.ema_decay}: give a share in [0, 1)")
    if 10 not in config.eval.ks or min(config.eval.ks) < 1:
        raise InputError(
            f"eval.ks={tuple(config.eval.ks)}: give positive ks with 10 among them, since "
            f"{evaluation.HEADLINE} chooses the best checkpoint"
        )
    check_choices(config)


def check_large_batch(config: ConfigDict, batch: int, devices: int) -> None:
    """Raise InputError where the chunks or the memory do not fit the batch and the loss."""
    chunk, size, start = (
        config.train.chunk_size, config.loss.memory_size, config.loss.memory_start_step
    )  # fmt: skip
    if chunk is not None and (chunk < 1 or batch % chunk or chunk % devices):
        raise InputError(
            f"train.chunk_size={chunk}: give a divisor of the batch of {batch} images that is a "
            f"multiple of {devices} devices"
        )
    if size and (size < batch or classifies(config)):
        raise InputError(
            f"loss.memory_size={size}: give 0, or with loss.name=triplet at least the {batch} "
            "images of a batch"
        )
    if start < 0 or (size and start >= config.train.steps):
        raise InputError(
            f"loss.memory_start_step={start}: give a step from 0 to below "
            f"train.steps={config.train.steps}"
        )


def check_choices(config: ConfigDict) -> None:
    """Raise InputError where a field is none of its choices."""
    for field, value, choices in (
        ("model.dtype", config.model.dtype, DTYPES),
        ("loss.name", config.loss.name, LOSSES),
        ("loss.mining", config.loss.mining, losses.MININGS),
        ("optimizer.name", config.optimizer.name, steps.OPTIMIZERS),
    ):
        if value not in choices:
            raise InputError(f"{field}={value!r}: choose one of {', '.join(choices)}")
    if config.loss.margin < 0:
        raise InputError(f"loss.margin={config.loss.margin}: give a distance of at least 0")
    if not 0 <= config.loss.label_smoothing < 1:
        raise InputError(
            f"loss.label_smoothing={config.loss.label_smoothing}: give a share in [0, 1)"
        )
    if config.loss.auxiliary_weight < 0:
        raise InputError(
            f"loss.auxiliary_weight={config.loss.auxiliary_weight}: give a weight of at least 0"
        )
    check_classifier(config)
    try:
        jax.eval_shape(lambda: build_model(config) and None)
    except ValueError as error:
        raise InputError(f"model: {error}") from error


def check_classifier(config: ConfigDict) -> None:
    """Raise InputError where the model and the loss disagree on whether there are classes."""
    classes = config.model.num_classes
    if not classifies(config) and classes is not None:
        raise InputError(
            f"model.num_classes={classes}, which {config.loss.name} does not train: "
            "leave it out, or set loss.name=cross_entropy"
        )
    if classifies(config) and (classes is None or classes < 2):
        raise InputError(
            f"model.num_classes={classes}: cross_entropy needs the number of classes, at least 2"
        )
    if classifies(config) and config.model.normalize:
        raise InputError(
            "model.normalize=True: logits of unit vectors are too alike for cross_entropy; "
            "set it to False"
        )


def check_source(config: ConfigDict, source: str) -> None:
    """Raise InputError where published weights can't be had, or a run's gates have another form."""
    if source in IMAGENET:
        fetch_imagenet(MODELS[config.model.name][0], source)
    path = Path(source) / "config.json"  # Of a run, or of hub.save_pretrained.
    saved = json.loads(path.read_text())["model"] if path.exists() else {}
    has_attention = MODELS.get(saved.get("name"), ("", ""))[1] != ""
    theirs = saved.get("attention_init", "paper")
    if has_attention and theirs != config.model.attention_init:
        raise InputError(
            f"model.attention_init={config.model.attention_init!r}, but the gates in {source} were "
            f"trained in the form {theirs!r}: set it to that"
        )


def check_labels(
    config: ConfigDict, training: RetrievalDataset, validation: RetrievalDataset
) -> None:
    """Raise InputError where a classifier's classes are not those of both splits."""
    check_classes(config, training)
    check_classes(config, validation)
    if classifies(config) and training.label_names != validation.label_names:
        raise InputError(
            f"{config.data.name} numbers {config.data.label!r} anew in each split, so there are no "
            "common classes: choose another data.label, or loss.name=triplet"
        )


def train_batches(config: ConfigDict, dataset: RetrievalDataset, step: int) -> data.Batches:
    """Return the batches after ``step``: a pure function of the seed and the step."""
    fields = dict(config.data)
    names = (
        "classes_per_batch", "images_per_class", "image_size", "crop_scale", "crop_ratio", "flip",
        "color_jitter", "random_erasing", "crop_to_box", "skip_singletons", "workers",
    )  # fmt: skip
    return data.train_batches(
        dataset,
        **{name: fields[name] for name in names},
        seed=config.seed,
        start_step=step,
        num_steps=config.train.steps - step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


LOSSES = ("triplet", "cross_entropy")


def classifies(config: ConfigDict) -> bool:
    """Whether the objective is to name the class, rather than distances."""
    return config.loss.name == "cross_entropy"


def build_loss(config: ConfigDict) -> Callable:
    """Return loss(embeddings, or logits where it classifies, labels) -> loss, scalars."""
    loss = config.loss
    if classifies(config):
        options = {name: loss[name] for name in ("label_smoothing", "auxiliary_weight")}
        return functools.partial(losses.deep_cross_entropy_loss, **options)
    options = {"margin": loss.margin, "mining": loss.mining, "soft": loss.soft}
    return functools.partial(losses.triplet_loss, **options)


def collapse_warning(config: ConfigDict) -> Callable:
    """Return what turns mean scalars into a warning when the embeddings have collapsed."""
    if classifies(config):
        return lambda stats: None  # Its gradient does not vanish there.
    options = {"margin": config.loss.margin, "soft": config.loss.soft}
    return functools.partial(losses.collapse_warning, **options)


def build_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, Callable]:
    """Return the optimizer, and the learning rate as a function of the step."""
    options = dict(config.optimizer)
    accumulate = options["accumulate_steps"]
    schedule = steps.learning_rate_schedule(
        options.pop("learning_rate"),
        warmup_steps=options.pop("warmup_steps") // accumulate,
        total_steps=max(config.train.steps // accumulate, 1),
    )
    name = options.pop("name")
    optimizer = steps.create_optimizer(name, schedule, **options)
    return optimizer, lambda step: schedule(step // accumulate)


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
    config: ConfigDict,
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
    config: ConfigDict, checkpoints: Checkpoints, state: steps.TrainState, mesh: Any
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


def check_same_run(config: ConfigDict, saved: ConfigDict) -> None:
    """Raise InputError when the workdir holds a run of another model; tell of other changes."""
    now = json.loads(json.dumps(config.to_dict()))
    changed = [
        f"{section}.{field}"
        for section, fields in now.items()
        if isinstance(fields, dict)
        for field, value in fields.items()
        if saved.get(section, {}).get(field) != value
    ]
    changed += ["seed"] if now["seed"] != saved.seed else []
    for field in changed:
        section, _, name = field.partition(".")
        if section == "model" and name not in ("freeze_batch_norm", "pretrained"):
            raise InputError(
                f"the workdir holds a run with {field}={saved.model.get(name)!r}, not "
                f"{config.model[name]!r}: use its config, or a new --workdir"
            )
    if changed and jax.process_index() == 0:
        print(f"resuming with changed fields: {', '.join(sorted(changed))}", flush=True)


def stop_requested(stop: StopSignal, checkpoints: Checkpoints, step: int) -> str | None:
    """Return why to stop after this step, or None; the same answer in all processes."""
    if jax.process_count() == 1:
        return stop.received
    return "preemption" if checkpoints.reached_preemption(step) else None


def describe(
    config: ConfigDict,
    training: RetrievalDataset,
    validation: RetrievalDataset,
    state: steps.TrainState,
    step: int,
) -> str:
    """Say in one line what is about to be trained on what."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model.name} ({size / 1e6:.1f} M parameters) on {config.data.name}: "
        f"{len(training)} training and {len(validation)} validation images of "
        f"{len(training.label_names)} classes, {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s), steps {step} to {config.train.steps}"
    )


def record_evaluation(
    config: ConfigDict, log: RunLog, step: int, report: dict[str, Any]
) -> dict[str, float]:
    """Log an evaluation; return its metrics."""
    metrics = report["metrics"]
    split = config.data.eval_split
    log.scalars(step, {f"{split}/{name}": value for name, value in metrics.items()})
    names = [name for name in ("map@10", "precision@10", "mrr", "accuracy") if name in metrics]
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
    log.line(f"step {step:6d}  {split}  {shown}" + ("  (untrained)" if step == 0 else ""))
    return metrics


def summarize(
    config: ConfigDict, workdir: Path, checkpoints: Checkpoints, step: int, monitor: StepMonitor
) -> dict[str, Any]:
    """Return the run's last line: where it stands, how fast it was, what training added."""
    split, best = config.data.eval_split, checkpoints.best_step()
    shown = ("map@5", "map@10", "precision@10") + ("accuracy",) * classifies(config)
    evaluations = {
        record["step"]: {name: record.get(f"{split}/{name}") for name in shown}
        for record in read_log(workdir)
        if f"{split}/{evaluation.HEADLINE}" in record
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
    workdir = summary["workdir"]
    lines.append(f"measure it: python evaluate.py --workdir={workdir} --split=test --figures")
    return "\n".join(lines)


def parse_flags() -> tuple[ConfigDict, Path]:
    """Read --config, --workdir and overrides; InputError for an unknown field or a wrong type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes; jax.distributed finds them from the cluster's environment",
    )
    known, overrides = parser.parse_known_args()
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    try:
        rest = values(["train.py", f"--config={known.config}", *overrides])
    except OSError as error:
        raise InputError(f"--config={known.config}: no such file") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections wraps a message in its repr, with escaped quotes and line breaks.
        message = " ".join(str(error).replace("\\n", " ").replace("\\", "").split())
        if message[0] == message[-1] == "'":
            message = message[1:-1]
        raise InputError(f"config: {message}; configs/default.py lists every field") from error
    if rest[1:]:
        raise InputError(f"unknown argument {rest[1]!r}: see python train.py --help")
    if known.distributed:
        jax.distributed.initialize()
    return config.value, known.workdir


def main() -> None:
    """Train, and print the JSON line."""
    command_line.keep_compiled_programs()
    summary = train_and_evaluate(*parse_flags())
    if jax.process_index() == 0:
        print(tell(summary))
        print(command_line.to_json(summary))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
