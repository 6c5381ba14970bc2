"""Trained models as folders that others can load: weights, how to build the model, a card.

A folder holds ``model.safetensors`` (our names, ``backbone.conv1.kernel``, float32),
``config.json`` (``create_model``'s arguments, the preprocessing, the metrics, hashes) and
``README.md``, the model card that the Hugging Face hub shows. Nothing in it is code, and a damaged
byte of the first two is noticed when it is loaded. Apart from ``pretrained``,
which works on any module, since this module builds models.

``python -m cbam_jax.hub export RUN FOLDER`` makes such a folder of a run.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import (
    InputError,
    __version__,
    command_line,
    evaluation,
    experiment,
    hub_config,
    model_state,
    runs,
    steps,
)
from cbam_jax.foreign_files import expanded, read_json, shown, shown_folder
from cbam_jax.metrics import METRIC_DEFINITIONS
from cbam_jax.models import EmbeddingModel, create_model
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import (
    IMAGENET,
    PUBLISHED,
    Description,
    describe,
    fetch_repository,
    load_pretrained,
    published_name,
)
from cbam_jax.runlog import read_log
from cbam_jax.whole_files import written_whole

_CARD = """---
library_name: cbam_jax
pipeline_tag: image-feature-extraction
tags: [image-retrieval, jax, flax]
---

# {name}

{description}

Maps an image to an embedding of {dimension} numbers; images whose embeddings have a small Euclidean
distance are similar.

```python
import cbam_jax

embedder = cbam_jax.load("PATH_OR_HUB_ID")
embeddings = embedder.embed_files(["photo.jpg"]).embeddings  # float32 [1, {dimension}]
model = embedder.model  # model(model.preprocess(images)): uint8 RGB [b, {size}, {size}, 3]
```

Preprocessing: {cutting}; pixels in [0, 1], less the mean, divided by the standard deviation.

{preprocessing}

Metrics:

{metrics}
{definitions}
Built by `create_model` of cbam_jax {version} with:

{model}
"""


_CUTTINGS = {
    "crop": "the short side resized to image_size / crop_fraction, then the central square of\n"
    "image_size",
    "squash": "both sides resized to image_size",
    "letterbox": "the long side resized to image_size, on a square of pad_color",
}


def save_pretrained(
    model: EmbeddingModel,
    folder: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    description: str = "",
) -> None:
    """Write a model into a folder, from which ``from_pretrained`` builds it again.

    Args:
        model: the model.
        folder: where to; made when needed, files in it are replaced.
        config: the arguments that ``create_model`` built it with, but ``rngs``: ``name`` and those
            that are not the default. NumPy and JAX scalars and dtypes are written as JSON has them.
        preprocessing: ``image_size`` in pixels, ``crop_fraction`` (the central share of the short
            side) and the other fields of ``Preprocessing`` that are not the default, and whatever
            else a user must know. The model's mean and deviation are added.
        metrics: names to numbers, for the card; those of ``cbam_jax.metrics`` get their definition.
        description: a paragraph for the card: trained on what, and how.

    Raises:
        InputError: ``config`` builds another model, ``preprocessing`` lacks ``image_size``, a value
            has no form in JSON, or the folder is a run's or cannot be written. Nothing has been
            written then.
    """
    import safetensors.numpy

    folder = expanded(folder)
    if runs.is_run(folder):
        raise InputError(
            f"{folder} is the workdir of a run, which would be lost: give another folder"
        )
    document = _document(model, config, preprocessing, metrics)
    arrays = _arrays(model)
    _check_config(config, arrays)
    values = {name: np.array(variable[...]) for name, variable in arrays.items()}
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            raise InputError(f"{name} is not finite: no model to be used; nothing was written")
    text = json.dumps(hub_config.with_hashes(document, values), indent=2) + "\n"
    card = _card(document, model.embedding_dim, description)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # All three are there before any takes its place.
            names = ("model.safetensors", "config.json", "README.md")
            paths = [stack.enter_context(written_whole(folder / name)) for name in names]
            safetensors.numpy.save_file(values, paths[0])
            paths[1].write_text(text, encoding="utf-8")
            paths[2].write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}): choose another folder") from error


def _document(
    model: EmbeddingModel,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What config.json will hold."""
    preprocessing = _as_json(preprocessing, "preprocessing")
    if "image_size" not in preprocessing:
        raise InputError("preprocessing must name the image_size, in pixels")
    known = Preprocessing.from_dict(preprocessing, mean=model.mean, std=model.std)
    return {
        "format_version": hub_config.FORMAT_VERSION,
        "cbam_jax_version": __version__,
        "model": _as_json(config, "config"),
        "preprocessing": {**preprocessing, **known.to_dict()},
        "metrics": _as_json(metrics or {}, "metrics"),
    }


def _as_json(value: Any, name: str) -> Any:
    """A value as JSON has it: NumPy and JAX scalars as numbers, dtypes by their name.

    >>> _as_json({"d": jnp.bfloat16, "k": np.int64(3), "x": (np.float32(0.5), None)}, "config")
    {'d': 'bfloat16', 'k': 3, 'x': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry, name) for entry in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, np.dtype | type) or hasattr(value, "dtype"):
        with contextlib.suppress(TypeError):
            return jnp.dtype(value).name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"{name} is {type(value).__name__}, which JSON has no form for: give numbers, strings, "
        "None, lists or dicts"
    )


def _check_config(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Raise InputError where the arguments build another model than the one with these arrays."""
    expected = {name: array.shape for name, array in _arrays(_build(config)).items()}
    different = sorted(
        name for name in arrays.keys() | expected if _shape(arrays, name) != expected.get(name)
    )
    if different:
        raise InputError(
            f"the config {dict(config)} builds another model: {len(different)} tensors differ, "
            f"the first {different[0]}; give the arguments of create_model that built this one"
        )


def from_pretrained(
    source: str | os.PathLike, *, revision: str | None = None, training: bool = False
) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Build a model from a folder of ``save_pretrained``, here or on the Hugging Face hub.

    The model is in evaluation mode: BatchNorm normalises by its running statistics, so that an
    image's embedding does not depend on the batch it is in.

    Args:
        source: a folder, also one of a vision transformer as Hugging Face's transformers, timm or
            open_clip save it; a hub id such as ``"user/model"`` or ``"hf:user/model"`` (needs
            ``cbam_jax[hub]``); a transformer by name, such as ``"Marqo-FashionSigLIP"``; or the
            workdir of a run, whose best checkpoint is taken.
        revision: branch, tag or commit on the hub; None: its main branch.
        training: return it in training mode, in which BatchNorm uses and updates the statistics of
            each batch.

    Returns:
        The model, and ``config.json`` as a dict: ``model``, ``preprocessing``, ``metrics``.

    Raises:
        InputError: there is no such folder or id, it is of a newer format, or its weights do not
            fit its config.
    """
    folder = expanded(source)
    if runs.is_run(folder):
        model, document = from_run(runs.read_config(folder), folder)
    else:
        folder = folder if os.path.isdir(folder) else _fetched(str(source), revision)
        model, document = _from_folder(folder)
    model.train() if training else model.eval()
    return model, document


def from_published(backbone: str) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Build a backbone with its published ImageNet weights, with what a folder would say of it.

    Args:
        backbone: a name in ``pretrained.IMAGENET["imagenet"]``.

    Raises:
        InputError: the weights can't be had.
    """
    published = IMAGENET["imagenet"][backbone]
    model = _build({"name": backbone})
    load_pretrained(model, "imagenet")
    model.eval()
    preprocessing = Preprocessing(224, 224 / published.resize, model.mean, model.std)
    metrics = {"ImageNet top-1 accuracy, %": published.top1}
    return model, {
        "model": {"name": backbone},
        "preprocessing": preprocessing.to_dict(),
        "metrics": metrics,
    }


def _fetched(source: str, revision: str | None) -> Path:
    name = published_name(source)
    return fetch_repository(source if name is None else PUBLISHED[name].repository, revision)


def _from_folder(folder: Path) -> tuple[EmbeddingModel, dict[str, Any]]:
    description = describe(folder)
    if description is not None:
        return _from_description(folder, description)
    document = hub_config.read_config(folder / "config.json")
    if not os.path.lexists(path := folder / "model.safetensors"):
        raise InputError(f"no weights at {shown(path)}, but {shown_folder(folder)}: fetch them too")
    model = _build(document["model"])
    report = load_pretrained(model, folder / "model.safetensors")
    if report.fresh:
        raise InputError(
            f"{folder}: {len(report.fresh)} tensors of the model are not in model.safetensors, "
            f"the first {report.fresh[0]}; save it again"
        )
    arrays = {name: np.asarray(variable[...]) for name, variable in _arrays(model).items()}
    hub_config.check_weights(arrays, document, folder / "model.safetensors")
    return model, document


def _from_description(
    folder: Path, description: Description
) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Build a vision transformer of another library's folder."""
    model = _build(description.arguments())
    report = load_pretrained(model, folder)
    if report.fresh:
        raise InputError(f"{shown(folder)} lacks {len(report.fresh)} tensors: fetch it again")
    return model, {
        "model": description.arguments(),
        "preprocessing": description.preprocessing.to_dict(),
        "metrics": {},
    }


def from_run(
    config: Any, workdir: Path, checkpoint: str | int = "best"
) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Build a run's model, with what ``save_pretrained`` would write of it.

    Args:
        config: of the run.
        workdir: of the run.
        checkpoint: ``"best"``, ``"last"``, ``"untrained"`` or a step.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    mesh = steps.data_mesh(jax.local_devices())
    model, state, step = runs.restore_model(config, workdir, checkpoint, mesh)
    document = {
        "model": _as_json(experiment.model_arguments(config), "model"),
        "preprocessing": experiment.preprocessing(config).to_dict(),
        "metrics": measured_metrics(config, workdir, step),
    }
    return model_state.merger(model)(*state), document


def measured_metrics(config: Any, workdir: Path, step: int) -> dict[str, Any]:
    """Return what was measured of a run's checkpoint: on the test split, else in training."""
    path = workdir / "eval" / "test" / "metrics.json"
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # Damaged, or another's.
        report = read_json(path)
        if report["step"] == step:
            return {"dataset": report["dataset"], "split": "test", "step": step} | report["metrics"]
    split = config.data.eval_split
    found = [
        {name.removeprefix(f"{split}/"): value for name, value in record.items() if "/" in name}
        for record in read_log(workdir)
        if record["step"] == step and f"{split}/{experiment.headline(config)}" in record
    ]
    if not found:
        return {}
    return {"dataset": experiment.dataset_name(config), "split": split, "step": step} | found[-1]


def export(run: str | os.PathLike, folder: str | os.PathLike, checkpoint: str | int = "best"):
    """Write a run's model as ``save_pretrained`` does, with its preprocessing and its metrics.

    Args:
        run: the workdir of a run.
        folder: where to; made when needed, files in it are replaced.
        checkpoint: as for ``from_run``.

    Raises:
        InputError: as ``from_run`` and ``save_pretrained``.
    """
    run = expanded(run)
    config = runs.read_config(run)
    model, document = from_run(config, run, checkpoint)
    data, loss = experiment.dataset_name(config), config.loss.name
    save_pretrained(
        model,
        folder,
        config=document["model"],
        preprocessing=document["preprocessing"],
        metrics=document["metrics"],
        description=f"Trained on {data}, split {config.data.train_split!r}, by the {loss} loss.",
    )


def in_dtype(
    model: EmbeddingModel, config: Mapping[str, Any], dtype: str
) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Return a model with the same arrays whose backbone computes in a dtype, and its arguments.

    Args:
        model: the model.
        config: the arguments that ``create_model`` built it with, but ``rngs``.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """
    config = {**config, "dtype": dtype}
    other = _build(config)
    nnx.update(other, nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return other, config


def _build(config: Mapping[str, Any]) -> EmbeddingModel:
    """Build the model without its arrays: each is about to be set or only its shape is asked."""
    arguments = dict(config)
    try:
        if "dtype" in arguments:
            arguments["dtype"] = experiment.DTYPES[jnp.dtype(arguments["dtype"]).name]
        return nnx.eval_shape(lambda: create_model(**arguments, rngs=nnx.Rngs(0)))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"no model can be built from {shown(str(arguments))}: {shown(str(error))}"
        ) from error


def _arrays(model: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _shape(arrays: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return arrays[name].shape if name in arrays else None


def _card(document: Mapping[str, Any], dimension: int, description: str) -> str:
    return _CARD.format(
        name=document["model"]["name"],
        description=description or "An image embedding model for retrieval.",
        dimension=dimension,
        size=document["preprocessing"]["image_size"],
        cutting=_CUTTINGS[document["preprocessing"].get("resize", "crop")],
        preprocessing=_table(document["preprocessing"]),
        metrics=_table(document["metrics"]),
        definitions=_definitions(document["metrics"]),
        version=document["cbam_jax_version"],
        model=_table(document["model"]),
    )


def _table(values: Mapping[str, Any]) -> str:
    """A Markdown table of two columns.

    >>> print(_table({"map@5": 0.9251234}))
    | name | value |
    | --- | --- |
    | map@5 | 0.9251 |
    """
    if not values:
        return "none given."
    rows = [("name", "value"), ("---", "---")]
    rows += [(k, f"{v:.4g}" if isinstance(v, float) else f"{v}") for k, v in values.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _definitions(metrics: Mapping[str, Any]) -> str:
    """The definitions of those metrics that have one, as a Markdown list."""
    families = dict.fromkeys(re.sub(r"@\d+$", "@K", name) for name in metrics)
    known = {**METRIC_DEFINITIONS, **evaluation.ACCURACY_DEFINITIONS}
    return "".join(f"\n- `{name}`: {known[name]}" for name in families if name in known) + "\n"


def main() -> None:
    """Export a run."""
    parser = argparse.ArgumentParser(
        description="Write a trained run as a folder that cbam_jax.load reads and the Hugging Face "
        "hub shows: weights, preprocessing, a card with the metrics that were measured."
    )
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", type=command_line.path, help="workdir of the run")
    parser.add_argument("folder", type=command_line.path, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="best, last, untrained or a step")
    flags = parser.parse_args()
    export(flags.run, flags.folder, runs.parse_checkpoint(flags.checkpoint))
    print(command_line.to_json({"folder": str(flags.folder), "run": str(flags.run)}))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
