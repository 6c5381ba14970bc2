"""What a config means: its checks, and the data, model, loss and optimizer that it names.

Read from the top: ``check_config`` refuses what the fields alone show to be wrong; each other
function turns one section of the config into the thing it describes. Nothing here trains or writes.
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cbam_jax import InputError, data, evaluation, losses, named_parts, steps
from cbam_jax.config_files import Config
from cbam_jax.datasets import RetrievalDataset, is_path, open_dataset
from cbam_jax.foreign_files import read_json
from cbam_jax.models import MODELS, EmbeddingModel, create_model, parts_of, pixel_scaling
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import HUB, IMAGENET, fetch_imagenet, fetch_repository

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

LOSSES = ("triplet", "cross_entropy")
# Fields that may name a part of one's own, "package.module:factory".
_NAMED = ("model.name", "loss.name", "optimizer.name", "optimizer.schedule")
# Pixels from which on every backbone, of at most five halvings, has some of them left.
_SMALLEST_FOR_ALL = 32
# Fields of a config's data that say how an image becomes a model's square.
GEOMETRY = ("image_size", "crop_fraction", "resize", "interpolation", "pad_color")

# Of configs/default.py; where a config has these, they adapt to a dataset of few images or classes.
DEFAULT_KS = (5, 10, 20)
DEFAULT_CLASSES_PER_BATCH = 8


def with_whole_paths(config: Config) -> Config:
    """Return a copy whose paths hold in any folder: absolute, ``~`` expanded.

    >>> from ml_collections import ConfigDict
    >>> fields = {"name": "photos.csv", "data_dir": "~/prepared", "manual_dir": None}
    >>> config = ConfigDict({"data": fields, "model": {"pretrained": "imagenet"}})
    >>> whole = with_whole_paths(config)
    >>> Path(whole.data.name).is_absolute(), "~" in whole.data.data_dir, whole.model.pretrained
    (True, False, 'imagenet')
    """
    config = config.copy_and_resolve_references()
    data, model = config.data, config.model
    if is_path(data.name):
        data.name = _whole(data.name)
    for field in ("data_dir", "manual_dir"):
        if data[field] is not None:
            data[field] = _whole(data[field])
    if model.pretrained is not None and not _is_published(model.pretrained):
        model.pretrained = _whole(model.pretrained)
    return config


def _is_published(source: str) -> bool:
    """Whether weights are of the published ones or on the hub, rather than at a path."""
    return source in IMAGENET or source.startswith(HUB)


def _whole(path: str) -> str:
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise InputError(f"{path}: there is no such home folder; give the whole path")
    # A closing slash is what tells a folder of class folders from a dataset's name.
    return os.path.abspath(expanded) + "/" * path.endswith("/")


def trust_named_parts(config: Config) -> None:
    """Let the parts of one's own that a config names be imported: it is the user's own."""
    sections = (field.split(".") for field in _NAMED)
    named_parts.trust(*(config[section][field] for section, field in sections))


def check_config(config: Config) -> None:
    """Raise InputError for what the fields alone show to be wrong, before anything slow."""
    devices, batch = jax.device_count(), batch_size(config)
    if batch < 1 or batch % devices:
        raise InputError(
            f"data.classes_per_batch x data.images_per_class = {batch} cannot be divided among "
            f"{devices} devices: make it a multiple of {devices}"
        )
    check_large_batch(config, batch, devices)
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
    check_choices(config)
    preprocessing(config)


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


def check_choices(config: Config) -> None:
    """Raise InputError where a field is none of its choices."""
    for field, value, choices in (
        ("model.dtype", config.model.dtype, DTYPES),
        ("loss.name", config.loss.name, LOSSES),
        ("loss.mining", config.loss.mining, losses.MININGS),
        ("optimizer.name", config.optimizer.name, steps.OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, steps.SCHEDULES),
    ):
        if value not in choices and not (field in _NAMED and named_parts.is_named(value)):
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
        model = nnx.eval_shape(lambda: build_model(config))
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    check_blocks(config, model)
    check_image_size(config)


def check_blocks(config: Config, model: EmbeddingModel) -> None:
    """Raise InputError where the optimizer names blocks that the model does not have."""
    decay, frozen = config.optimizer.layer_decay, config.optimizer.frozen_blocks
    if not 0 < decay <= 1:
        raise InputError(f"optimizer.layer_decay={decay}: give a factor in (0, 1]; 1: none")
    blocks = len(getattr(model.backbone, "blocks", ()))
    if not 0 <= frozen <= blocks or (decay != 1 and not blocks):
        raise InputError(
            f"optimizer.frozen_blocks={frozen}, optimizer.layer_decay={decay}: {config.model.name} "
            f"has {blocks} blocks; set --config.optimizer.frozen_blocks=0 "
            "--config.optimizer.layer_decay=1.0"
        )


def check_image_size(config: Config) -> None:
    """Raise InputError where the model's poolings leave nothing of its images."""
    size = config.data.image_size
    if not 0 < size < _SMALLEST_FOR_ALL:  # Below 1 is the loading's to tell.
        return
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features = jax.eval_shape(lambda images: build_model(config).features(images), shape)
    if 0 in features.shape:
        raise InputError(
            f"data.image_size={size}: {config.model.name}'s poolings leave no pixel of it; set "
            f"--config.data.image_size={_SMALLEST_FOR_ALL} or more"
        )


def check_classifier(config: Config) -> None:
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


def check_source_exists(source: str | None) -> None:
    """Raise InputError where the weights to start from are neither published nor there."""
    if source and not _is_published(source) and not os.path.exists(source):
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
    has_attention = MODELS.get(str(saved.get("name")), ("", ""))[1] != ""
    theirs = saved.get("attention_init", "paper")
    if has_attention and theirs != config.model.attention_init:
        raise InputError(
            f"model.attention_init={config.model.attention_init!r}, but the gates in {source} were "
            f"trained in the form {theirs!r}: set it to that"
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
    if classifies(config) and training.label_names != validation.label_names:
        raise InputError(
            f"{config.data.name} numbers {config.data.label!r} anew in each split, so there are no "
            "common classes: choose another data.label, or loss.name=triplet"
        )


def check_same_run(config: Config, saved: Config) -> None:
    """Raise InputError when the workdir holds a run of another model; tell of other changes."""
    before = with_whole_paths(saved)
    changed = [
        f"{section}.{field}"
        for section, fields in config.to_dict().items()
        if section != "seed"
        for field, value in fields.items()
        if before[section][field] != value and not _adapts(config, field)
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


def open_split(config: Config, split: str) -> RetrievalDataset:
    """Open one split of the config's dataset; prepared first if need be."""
    names = ("data_dir", "manual_dir", "on_bad_image", "crop_to_box")
    options = {name: config.data[name] for name in names}
    return open_dataset(config.data.name, split, label=config.data.label, **options)


def model_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of ``create_model`` that a config names, but ``rngs``."""
    options = dict(config.model)
    for field in ("freeze_batch_norm", "pretrained"):  # The training's business.
        options.pop(field, None)
    return options | {"dtype": DTYPES[options["dtype"]]}


def build_model(config: Config) -> EmbeddingModel:
    """Build the config's model, freshly initialised from its seed."""
    return create_model(**model_arguments(config), rngs=nnx.Rngs(config.seed))


def dataset_name(config: Config) -> str:
    """Return what a report calls the dataset: its name, of a path the last part."""
    return Path(config.data.name).name if is_path(config.data.name) else config.data.name


def headline(config: Config) -> str:
    """Return the metric that chooses the config's best checkpoint."""
    return evaluation.headline(f"map@{k}" for k in config.eval.ks)


def with_fitting_ks(
    config: Config, dataset: RetrievalDataset, *, chosen: bool | None = None
) -> Config:
    """Return a copy whose ``eval.ks`` a split can give; what the user chose stays as it is.

    Args:
        config: of the run.
        dataset: the split.
        chosen: whether the user chose the ks; None: unless they are the default's.
    """
    ks = tuple(config.eval.ks)
    searched = evaluation.searched_images(dataset.is_query, dataset.is_gallery)
    fitting = evaluation.fitting_ks(ks, searched)
    chosen = ks != DEFAULT_KS if chosen is None else chosen
    if chosen or fitting == ks or searched < 1:
        return config
    if jax.process_index() == 0:
        print(
            f"eval.ks={fitting} in place of {ks}: in split {dataset.split!r} a query is searched "
            f"among {searched} images",
            flush=True,
        )
    config = config.copy_and_resolve_references()
    config.eval.ks = fitting
    return config


def with_fitting_batch(config: Config, dataset: RetrievalDataset) -> Config:
    """Return a copy whose batches need no more classes than a dataset has; the user's stay.

    The batch is made of fewer classes and of more images of each, so that it is no larger than it
    was; images of a small class then stand in it more than once, each time cut differently.
    """
    size = batch_size(config)
    counts = np.unique(dataset.label, return_counts=True)[1]
    classes = int(np.sum(counts > 1)) if config.data.skip_singletons else len(counts)
    if not _adapts(config, "classes_per_batch") or not 2 <= classes < DEFAULT_CLASSES_PER_BATCH:
        return config
    devices = jax.device_count()
    images = max(size // classes // devices, 1) * devices
    if config.train.chunk_size is not None or images < 2:
        return config
    if jax.process_index() == 0:
        print(
            f"batches of {classes} classes x {images} images in place of "
            f"{config.data.classes_per_batch} x {config.data.images_per_class}: split "
            f"{dataset.split!r} has {classes} classes",
            flush=True,
        )
    config = config.copy_and_resolve_references()
    config.data.classes_per_batch, config.data.images_per_class = classes, images
    return config


def _adapts(config: Config, field: str) -> bool:
    """Whether a field of a config is one that adapts to the data, since it is the default's."""
    if field == "ks":
        return tuple(config.eval.ks) == DEFAULT_KS
    batch = field in ("classes_per_batch", "images_per_class")
    return batch and config.data.classes_per_batch == DEFAULT_CLASSES_PER_BATCH


def split_protocol(config: Config, dataset: RetrievalDataset) -> evaluation.Protocol:
    """Return who is searched among whom in a split, as the config asks.

    Raises:
        InputError: too few images for ``eval.ks``, or none that is relevant to any query.
    """
    if not len(dataset.label):
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no images: where splits are made, a "
            "class needs 4 photos to have two for validation, and 6 to have two for a test as "
            "well; add photos, or say which are whose by folders or a split column"
        )
    protocol = evaluation.make_protocol(
        dataset.is_query,
        dataset.is_gallery,
        item=dataset.item,
        series=dataset.series,
        ignore_same_series=config.eval.ignore_same_series,
        ks=config.eval.ks,
    )
    if not evaluation.relevant_images(dataset.label, protocol).any():
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} holds no two images of one label that "
            "could find each other: give every label two images or none there, by its folder or "
            "the split column"
        )
    return protocol


def preprocessing(config: Config) -> Preprocessing:
    """Return how the config cuts and scales an image for evaluation."""
    mean, std = pixel_scaling(parts_of(config.model.name)[0])
    fields = {name: config.data[name] for name in GEOMETRY}
    return Preprocessing(**fields, mean=mean, std=std)


def geometry(config: Config) -> dict[str, Any]:
    """Return how the config cuts a dataset's image for evaluation: options of eval_batches."""
    return {name: config.data[name] for name in (*GEOMETRY, "crop_to_box")}


def batch_size(config: Config) -> int:
    """Return the images of a training batch, P x K, over all devices."""
    return config.data.classes_per_batch * config.data.images_per_class


def evaluation_batch_size(config: Config) -> int:
    """Return ``eval.batch_size``, rounded up to what the devices can share evenly."""
    devices = jax.device_count()
    return math.ceil(config.eval.batch_size / devices) * devices


def train_batches(config: Config, dataset: RetrievalDataset, step: int) -> data.Batches:
    """Return the batches after ``step``: a pure function of the seed and the step."""
    fields = dict(config.data)
    names = (
        "classes_per_batch", "images_per_class", "image_size", "crop_scale", "crop_ratio", "flip",
        "color_jitter", "random_erasing", "crop_to_box", "skip_singletons", "workers",
        "resize", "interpolation", "pad_color",
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


def classifies(config: Config) -> bool:
    """Whether the objective is to name the class, rather than distances."""
    return config.loss.name == "cross_entropy"


def build_loss(config: Config) -> Callable:
    """Return loss(embeddings, or logits where it classifies, labels) -> loss, scalars."""
    loss = config.loss
    if named_parts.is_named(loss.name):
        return named_parts.load(loss.name, "loss.name")
    if classifies(config):
        options = {name: loss[name] for name in ("label_smoothing", "auxiliary_weight")}
        return functools.partial(losses.deep_cross_entropy_loss, **options)
    options = {"margin": loss.margin, "mining": loss.mining, "soft": loss.soft}
    return functools.partial(losses.triplet_loss, **options)


def collapse_warning(config: Config) -> Callable:
    """Return what turns mean scalars into a warning when the embeddings have collapsed."""
    if config.loss.name != "triplet":
        return lambda stats: None  # Its gradient does not vanish there.
    options = {"margin": config.loss.margin, "soft": config.loss.soft}
    return functools.partial(losses.collapse_warning, **options)


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, Callable]:
    """Return the optimizer, and the learning rate as a function of the step."""
    options = dict(config.optimizer)
    accumulate = options["accumulate_steps"]
    kind = options.pop("schedule")
    own = named_parts.is_named(kind)
    make = named_parts.load(kind, "optimizer.schedule") if own else steps.learning_rate_schedule
    schedule = make(
        options.pop("learning_rate"),
        **({} if own else {"kind": kind}),
        warmup_steps=options.pop("warmup_steps") // accumulate,
        total_steps=max(config.train.steps // accumulate, 1),
    )
    name = options.pop("name")
    if named_parts.is_named(name):
        name = named_parts.load(name, "optimizer.name")
    optimizer = steps.create_optimizer(name, schedule, **options)
    return optimizer, lambda step: schedule(step // accumulate)
