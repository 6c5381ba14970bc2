"""What is refused of a config, in one line each, before anything slow begins.

Read from the top: ``check_config`` refuses what the fields alone show to be wrong; then the
weights to start from, the data's classes, and the run that a workdir already holds.
"""

import functools
import inspect
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import InputError, experiment, losses, named_parts, remat, steps
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.foreign_files import read_json, shown
from cbam_jax.models import FORM, MODELS, EmbeddingModel, parts_of
from cbam_jax.pretrained import HUB, IMAGENET, fetch_imagenet, fetch_repository

# These compare directions, and retrieval compares Euclidean distances: of unit vectors they agree.
OF_DIRECTIONS = (
    "distance_weighted", "multi_similarity", "circle", "sup_con", "nt_xent",
    "recall_at_k_surrogate", "smooth_ap",
    "proxy_anchor", "proxy_nca", "arcface", "cosface", "soft_triple",
)  # fmt: skip
# Pixels from which on every backbone, of at most five halvings, has some of them left.
_SMALLEST_FOR_ALL = 32


def check_config(config: Config) -> None:
    """Raise InputError for what the fields alone show to be wrong, before anything slow."""
    devices, batch = jax.device_count(), experiment.batch_size(config)
    if batch < 1 or batch % devices:
        raise InputError(
            f"data.classes_per_batch x data.images_per_class = {batch} cannot be divided among "
            f"{devices} devices: make it a multiple of {devices}"
        )
    check_evaluation(config)
    for field in ("steps", "log_every", "eval_every", "checkpoint_every"):
        if config.train[field] < 1:
            raise InputError(f"train.{field}={config.train[field]}: give at least 1 step")
    if not 0 <= config.optimizer.warmup_steps < config.train.steps:
        raise InputError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"train.steps={config.train.steps}: set "
            f"--config.optimizer.warmup_steps={config.train.steps // 10}"
        )
    if not 0 < config.optimizer.learning_rate < math.inf:
        raise InputError(
            f"optimizer.learning_rate={config.optimizer.learning_rate}: give a number above 0, "
            "such as --config.optimizer.learning_rate=1e-3"
        )
    if config.optimizer.accumulate_steps < 1:
        raise InputError(
            f"optimizer.accumulate_steps={config.optimizer.accumulate_steps}: give at least 1 batch"
        )
    clip = config.optimizer.clip_norm
    if clip is not None and not clip > 0:
        raise InputError(
            f"optimizer.clip_norm={clip}: give a norm above 0, or leave it out for no limit"
        )
    if not 0 <= config.train.ema_decay < 1:
        raise InputError(f"train.ema_decay={config.train.ema_decay}: give a share in [0, 1)")
    if config.train.ema_batch_stats and not config.train.ema_decay:
        raise InputError(
            "train.ema_batch_stats=True, of no average: set --config.train.ema_decay=0.999 too"
        )
    check_choices(config)
    check_large_batch(config, batch, devices)
    experiment.preprocessing(config)


def check_evaluation(config: Config) -> None:
    """Raise InputError for what no evaluation could be done by."""
    if config.eval.batch_size < 1:
        raise InputError(f"eval.batch_size={config.eval.batch_size}: give at least 1 image")
    if not 0 < config.data.crop_fraction <= 1:
        raise InputError(
            f"data.crop_fraction={config.data.crop_fraction}: give a fraction in (0, 1]"
        )
    if not config.eval.ks or min(config.eval.ks) < 1:
        raise InputError(f"eval.ks={tuple(config.eval.ks)}: give positive ks, such as (5,10,20)")


def check_large_batch(config: Config, batch: int, devices: int) -> None:
    """Raise InputError where the chunks or the memory do not fit the batch and the loss."""
    chunk, size, start = (
        config.train.chunk_size, config.loss.memory_size, config.loss.memory_start_step
    )  # fmt: skip
    if chunk is not None and (chunk < 1 or batch % chunk or chunk % devices):
        raise InputError(
            f"train.chunk_size={chunk}: give a divisor of the batch of {batch} images that is a "
            f"multiple of {devices} devices"
        )
    if size and not experiment.has_memory(config):
        raise InputError(
            f"loss.memory_size={size}: {config.loss.name} takes no memory; leave it out, or give 0"
        )
    if size and size < batch:
        raise InputError(
            f"loss.memory_size={size}: give 0, or at least the {batch} images of a batch"
        )
    if start < 0 or (size and start >= config.train.steps):
        raise InputError(
            f"loss.memory_start_step={start}: give a step from 0 to below "
            f"train.steps={config.train.steps}"
        )


def check_choices(config: Config) -> None:
    """Raise InputError where a field is none of its choices."""
    for field, value, choices in (
        ("model.dtype", config.model.dtype, experiment.DTYPES),
        ("loss.name", config.loss.name, ("cross_entropy", *experiment.LOSSES)),
        ("loss.mining", config.loss.mining, losses.MININGS),
        ("optimizer.name", config.optimizer.name, steps.OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, steps.SCHEDULES),
    ):
        if value not in choices and not (field in experiment.NAMED and named_parts.is_named(value)):
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
    check_loss(config)
    try:
        model = nnx.eval_shape(lambda: experiment.build_model(config))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    check_own_model(config, model)
    check_own_loss(config, model)
    check_blocks(config, model)
    check_remat(config, model)
    check_image_size(config)


def check_loss(config: Config) -> None:
    """Raise InputError where the loss is of another model, or refuses its fields."""
    name = config.loss.name
    if name in OF_DIRECTIONS and not config.model.normalize:
        raise InputError(
            f"loss.name={name} compares directions, and retrieval distances: set "
            "--config.model.normalize=True, so that both order alike"
        )
    if not named_parts.is_named(name) and name not in ("triplet", "cross_entropy"):
        check_numbers(config)


def check_numbers(config: Config) -> None:
    """Raise InputError where the loss's function refuses a number of its fields."""
    name, centers = config.loss.name, config.loss.soft_triple_centers
    if centers < 1:
        raise InputError(f"loss.soft_triple_centers={centers}: give at least 1")

    def find(embeddings: Any, labels: Any) -> Any:
        proxies = experiment.build_proxies(config, 2, 2).vectors[...]
        given = {"key": jax.random.key(0), "proxies": proxies}
        loss = functools.partial(experiment.LOSSES[name], **experiment.loss_options(config))
        taken = inspect.signature(loss).parameters
        return loss(embeddings, labels, **{k: v for k, v in given.items() if k in taken})

    batch = jax.ShapeDtypeStruct((2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        jax.eval_shape(find, *batch)
    except ValueError as error:
        told = re.sub(r"^(\w+) is (.+), expected ", r"\1=\2: give ", str(error))
        raise InputError(f"loss.{name}_{told}") from error


def check_own_model(config: Config, model: EmbeddingModel) -> None:
    """Raise InputError where a model of one's own can't be called, or returns no feature map."""
    name, side, width = config.model.name, config.data.image_size, model.backbone.num_features
    if not named_parts.is_named(name):
        return
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    try:
        found = nnx.eval_shape(lambda model, images: model.backbone(images), model, images)
    except Exception as error:  # Whatever the user's encoder raises.
        raise InputError(
            f"model.name={name}: called with images [2, {side}, {side}, 3], it raised "
            f"{type(error).__name__}: {named_parts.first_line(error)}"
        ) from error
    pooled = getattr(model.backbone, "pools_itself", False)
    shape = list(getattr(found, "shape", ()))
    if len(shape) != (2 if pooled else 4) or [shape[0], shape[-1]] != [2, width]:
        expected = f"[2, {width}]" if pooled else f"[2, h, w, {width}]"
        raise InputError(
            f"model.name={name}: of images [2, {side}, {side}, 3] it makes "
            f"{shown(str(shape or found), 80)}, expected {expected}, the last its num_features"
        )


def check_own_loss(config: Config, model: EmbeddingModel) -> None:
    """Raise InputError where a loss of one's own can't be called, or returns something else.

    One that asks for the batch or the model, which there are none of yet, is tried by the first
    step.
    """
    name = config.loss.name
    if not named_parts.is_named(name):
        return
    loss, batch = experiment.build_loss(config), experiment.batch_size(config)
    asked = steps.loss_arguments(loss)
    if {"batch", "model"} & set(asked):
        return
    given = {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(0)}
    given = {argument: given[argument] for argument in asked}
    dim = model.embedding_dim
    rows = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
    try:
        found = jax.eval_shape(loss, rows, jax.ShapeDtypeStruct((batch,), jnp.int32), **given)
    except Exception as error:  # Whatever the user's function raises.
        raise InputError(
            f"loss.name={name}: called with embeddings [{batch}, {dim}] and labels [{batch}], it "
            f"raised {type(error).__name__}: {named_parts.first_line(error)}"
        ) from error
    check_returned(name, found)


def check_returned(name: str, found: Any) -> None:
    """Raise InputError unless a loss of one's own returned a scalar and a dict of scalars."""
    is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    if not is_pair or any(np.shape(leaf) for leaf in jax.tree.leaves(found)):
        shapes = jax.tree.map(np.shape, found)
        raise InputError(
            f"loss.name={name}: it returns {shown(str(shapes))}, expected a scalar and a dict of "
            "scalars; end it with: return loss, {}"
        )


def check_blocks(config: Config, model: EmbeddingModel) -> None:
    """Raise InputError where the optimizer names blocks that the model does not have."""
    decay, frozen = config.optimizer.layer_decay, config.optimizer.frozen_blocks
    if not 0 < decay <= 1:
        raise InputError(f"optimizer.layer_decay={decay}: give a factor in (0, 1]; 1: none")
    if decay == 1 and not frozen:
        return
    blocks = len(getattr(model.backbone, "blocks", ()))
    if not 0 <= frozen <= blocks or not blocks:
        raise InputError(
            f"optimizer.frozen_blocks={frozen}, optimizer.layer_decay={decay}: {config.model.name} "
            f"has {blocks} blocks; set --config.optimizer.frozen_blocks=0 "
            "--config.optimizer.layer_decay=1.0"
        )


def check_remat(config: Config, model: EmbeddingModel) -> None:
    """Raise InputError where no block of the model can be computed again."""
    try:
        remat.recomputed(model) if config.train.remat else None
    except ValueError as error:
        raise InputError(
            f"train.remat=True: {config.model.name} has no blocks that can be computed again; set "
            "--config.train.remat=False, and for less memory --config.train.chunk_size"
        ) from error


def check_image_size(config: Config) -> None:
    """Raise InputError where the model's poolings leave nothing of its images."""
    size = config.data.image_size
    if not 0 < size < _SMALLEST_FOR_ALL:  # Below 1 is the loading's to tell.
        return
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features = jax.eval_shape(lambda images: experiment.build_model(config).features(images), shape)
    if 0 in features.shape:
        raise InputError(
            f"data.image_size={size}: {config.model.name}'s poolings leave no pixel of it; set "
            f"--config.data.image_size={_SMALLEST_FOR_ALL} or more"
        )


def check_classifier(config: Config) -> None:
    """Raise InputError where the model and the loss disagree on whether there are classes."""
    classes = config.model.num_classes
    if not experiment.classifies(config) and classes is not None:
        raise InputError(
            f"model.num_classes={classes}, which {config.loss.name} does not train: "
            "leave it out, or set loss.name=cross_entropy"
        )
    if experiment.classifies(config) and (classes is None or classes < 2):
        raise InputError(
            f"model.num_classes={classes}: cross_entropy needs the number of classes, at least 2"
        )
    if experiment.classifies(config) and config.model.normalize:
        raise InputError(
            "model.normalize=True: logits of unit vectors are too alike for cross_entropy; "
            "set it to False"
        )


def check_source_exists(source: str | None) -> None:
    """Raise InputError where the weights to start from are neither published nor there."""
    if source and not experiment.is_published(source) and not os.path.exists(source):
        raise InputError(
            f"model.pretrained={source!r} is not there: give a file, the folder of a run, "
            f"hf:USER/MODEL of the hub, or one of {', '.join(IMAGENET)}"
        )


def check_source(config: Config, source: str) -> None:
    """Raise InputError where published weights can't be had, or a run's gates have another form."""
    if source in IMAGENET:
        fetch_imagenet(parts_of(config.model.name)[0], source)
    if source.startswith(HUB):
        fetch_repository(source)
    saved = saved_model(Path(source) / "config.json")
    if MODELS.get(str(saved.get("name")), ("", ""))[1] == "":
        return
    for field, before in {"attention_init": "paper", **FORM}.items():
        theirs = saved.get(field, before)
        if theirs != config.model[field]:
            raise InputError(
                f"model.{field}={config.model[field]!r}, but the gates in {source} were trained in "
                f"the form {theirs!r}: set it to that"
            )


def saved_model(path: Path) -> dict[str, Any]:
    """Return the model's fields in the config of a run or of save_pretrained; of others' none."""
    try:
        model = read_json(path)["model"]
    except (OSError, ValueError, TypeError, LookupError):  # Of another library, or damaged.
        return {}
    return model if isinstance(model, dict) else {}


def check_labels(config: Config, training: RetrievalDataset, validation: RetrievalDataset) -> None:
    """Raise InputError where a classifier's classes are not those of both splits."""
    check_classes(config, training)
    check_classes(config, validation)
    if experiment.classifies(config) and training.label_names != validation.label_names:
        raise InputError(
            f"{config.data.name} numbers {config.data.label!r} anew in each split, so there are no "
            "common classes: choose another data.label, or loss.name=triplet"
        )


def check_same_run(config: Config, saved: Config) -> None:
    """Raise InputError when the workdir holds a run of another model; tell of other changes."""
    before = experiment.with_whole_paths(saved)
    changed = [
        f"{section}.{field}"
        for section, fields in config.to_dict().items()
        if section != "seed"
        for field, value in fields.items()
        if before[section][field] != value and not experiment.adapts(config, field)
    ]
    changed += ["seed"] if config.seed != saved.seed else []
    for field in changed:
        section, _, name = field.partition(".")
        if section == "model" and name not in ("freeze_batch_norm", "pretrained"):
            raise InputError(
                f"the workdir holds a run with {field}={saved.model[name]!r}, not "
                f"{config.model[name]!r}: use its config, or a new --workdir"
            )
    if changed and jax.process_index() == 0:
        print(f"resuming with changed fields: {', '.join(sorted(changed))}", flush=True)


def check_classes(config: Config, dataset: RetrievalDataset) -> None:
    """Raise InputError where a classifier's classes are not a dataset's."""
    found = len(dataset.label_names)
    if config.loss.name == "cross_entropy" and found != config.model.num_classes:
        raise InputError(
            f"model.num_classes={config.model.num_classes}, but split {dataset.split!r} of "
            f"{dataset.name} has {found} classes: set it to the number of classes"
        )
