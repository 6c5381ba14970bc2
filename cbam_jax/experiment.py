"""What a config means: the data, model, loss and optimizer that it names.

Each function turns one section of the config into the thing it describes; ``config_checks`` holds
what is refused before. Nothing here trains or writes.
"""

import functools
import inspect
import json
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
from cbam_jax.foreign_files import expanded, shown
from cbam_jax.models import (
    ANY_TRANSFORMER,
    EmbeddingModel,
    create_model,
    parts_of,
    pixel_scaling,
)
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import HUB, IMAGENET, describe, fetch_repository

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Fields that may name a part of one's own, "package.module:factory".
NAMED = ("model.name", "model.attention", "loss.name", "optimizer.name", "optimizer.schedule")
# What loss.name may be, but cross_entropy. A loss's fields in the config are its arguments', after
# its name: loss.circle_margin; the triplet loss alone has its own without.
LOSSES = {
    "triplet": losses.triplet_loss,
    "distance_weighted": losses.distance_weighted_loss,
    "multi_similarity": losses.multi_similarity_loss,
    "sup_con": losses.sup_con_loss,
    "nt_xent": losses.nt_xent_loss,
    "circle": losses.circle_loss,
    "contrastive": losses.contrastive_loss,
    "n_pair": losses.n_pair_loss,
    "recall_at_k_surrogate": losses.recall_at_k_surrogate_loss,
    "smooth_ap": losses.smooth_ap_loss,
    "proxy_anchor": losses.proxy_anchor_loss,
    "proxy_nca": losses.proxy_nca_loss,
    "arcface": losses.arcface_loss,
    "cosface": losses.cosface_loss,
    "soft_triple": losses.soft_triple_loss,
}
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
    if model.pretrained is not None and not is_published(model.pretrained):
        model.pretrained = _whole(model.pretrained)
    return config


def is_published(source: str) -> bool:
    """Whether weights are of the published ones or on the hub, rather than at a path."""
    return source in IMAGENET or source.startswith(HUB)


def _whole(path: str) -> str:
    # A closing slash is what tells a folder of class folders from a dataset's name.
    return os.path.abspath(expanded(path)) + "/" * path.endswith("/")


def trust_named_parts(config: Config) -> None:
    """Let the parts of one's own that a config names be imported: it is the user's own."""
    sections = (field.split(".") for field in NAMED)
    named_parts.trust(*filter(None, (config[section][field] for section, field in sections)))


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
    options["transformer"] = _transformer_fields(options.get("transformer"))
    return options | {"dtype": DTYPES[options["dtype"]]}


def _transformer_fields(text: str | None) -> dict[str, Any] | None:
    """What ``model.transformer`` says, as a dict."""
    try:
        fields = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        fields = text
    if fields is not None and (not isinstance(fields, dict) or {"mean", "std"} - fields.keys()):
        raise InputError(
            f"model.transformer={shown(str(text), 80)}: leave it to train.py, which writes it by "
            "the folder in model.pretrained"
        )
    return fields


def with_transformer(config: Config) -> Config:
    """Return a copy in which the model ``vit`` has the fields that its weights' folder says.

    Raises:
        InputError: there are no such weights, or what lies beside them says nothing of that kind.
    """
    if config.model.name != ANY_TRANSFORMER or config.model.transformer is not None:
        return config
    source = config.model.pretrained
    if source is None or source in IMAGENET:
        raise InputError(
            "model.name=vit is what a folder says: give it, --config.model.pretrained=FOLDER, or "
            "the name of a transformer: python -m cbam_jax.models lists them"
        )
    description = describe(fetch_repository(source) if source.startswith(HUB) else source)
    if description is None:
        raise InputError(
            f"{shown(source)} is no folder of a vision transformer: give one with config.json and "
            "preprocessor_config.json, or with open_clip_config.json"
        )
    config = config.copy_and_resolve_references()
    config.model.transformer = json.dumps(description.arguments()["transformer"])
    return config


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
    if not adapts(config, "classes_per_batch") or not 2 <= classes < DEFAULT_CLASSES_PER_BATCH:
        return config
    devices = jax.device_count()
    images = max(size // classes // devices, 1) * devices
    if config.train.chunk_size is not None or images < 2:
        return config
    if jax.process_index() == 0:
        print(
            f"batches of {classes} classes x {images} images in place of "
            f"{config.data.classes_per_batch} x {config.data.images_per_class}: split "
            f"{dataset.split!r} has {classes} classes"
            + " of two images or more"
            * config.data.skip_singletons,
            flush=True,
        )
    config = config.copy_and_resolve_references()
    config.data.classes_per_batch, config.data.images_per_class = classes, images
    return config


def adapts(config: Config, field: str) -> bool:
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
    transformer = model_arguments(config)["transformer"]
    mean, std = pixel_scaling(parts_of(config.model.name)[0], transformer)
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
    """Return loss(embeddings, or logits where it classifies, labels) -> loss, scalars.

    One with proxies also asks for the model that is trained, whose ``proxies`` are its own.
    """
    name = config.loss.name
    if named_parts.is_named(name):
        return named_parts.load(name, "loss.name")
    if classifies(config):
        return functools.partial(losses.deep_cross_entropy_loss, **loss_options(config))
    loss = functools.partial(LOSSES[name], **loss_options(config))
    if not has_proxies(config):
        return loss
    return lambda embeddings, labels, model: loss(embeddings, labels, model.proxies.vectors[...])


def loss_options(config: Config) -> dict[str, Any]:
    """Return what the config's fields say of the loss that it names, as its function's arguments.

    >>> from ml_collections import ConfigDict
    >>> loss_options(ConfigDict({"loss": {"name": "circle", "circle_scale": 64.0, "margin": 0.2}}))
    {'scale': 64.0}
    """
    loss = config.loss
    if loss.name == "triplet":
        return {field: loss[field] for field in ("margin", "mining", "soft")}
    if classifies(config):
        return {field: loss[field] for field in ("label_smoothing", "auxiliary_weight")}
    own = f"{loss.name}_"
    fields = {f.removeprefix(own): value for f, value in loss.items() if f.startswith(own)}
    taken = inspect.signature(LOSSES[loss.name]).parameters
    return {name: value for name, value in fields.items() if name in taken}


def has_memory(config: Config) -> bool:
    """Whether the config's loss may be given a memory of earlier batches' embeddings."""
    return "memory" in inspect.signature(build_loss(config)).parameters


def has_proxies(config: Config) -> bool:
    """Whether the config's loss has vectors of the classes, which are trained."""
    loss = LOSSES.get(config.loss.name)
    return loss is not None and "proxies" in inspect.signature(loss).parameters


def build_proxies(config: Config, num_classes: int, dim: int) -> losses.Proxies:
    """Return the vectors of the config's loss, drawn by its seed."""
    per_class = config.loss.soft_triple_centers if config.loss.name == "soft_triple" else None
    rngs = nnx.Rngs(config.seed)
    return losses.Proxies(num_classes, dim, per_class=per_class, rngs=rngs)


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
    make = functools.partial(steps.learning_rate_schedule, kind=kind)
    if named_parts.is_named(kind):
        make = functools.partial(named_parts.call, kind, "optimizer.schedule")
    schedule = make(
        options.pop("learning_rate"),
        warmup_steps=options.pop("warmup_steps") // accumulate,
        total_steps=max(config.train.steps // accumulate, 1),
    )
    name = options.pop("name")
    if named_parts.is_named(name):
        name = functools.partial(named_parts.call, name, "optimizer.name")
    optimizer = steps.create_optimizer(name, schedule, **options)
    return optimizer, lambda step: schedule(step // accumulate)
