"""Trained models as folders that others can load: weights, how to build the model, a card.

A folder holds ``model.safetensors`` (our names, ``backbone.conv1.kernel``, float32),
``config.json`` (``create_model``'s arguments, the preprocessing, the metrics) and ``README.md``,
the model card that the Hugging Face hub shows. Nothing in it is code. Apart from ``pretrained``,
which works on any module, since this module builds models.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from cbam_jax import InputError, __version__
from cbam_jax.models import IMAGENET_MEAN, IMAGENET_STD, EmbeddingModel, create_model
from cbam_jax.pretrained import load_pretrained
from cbam_jax.whole_files import written_whole

# Raised when a folder needs something that earlier versions can't read.
FORMAT_VERSION = 1

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
from flax import nnx
from cbam_jax.hub import from_pretrained

model, config = from_pretrained("PATH_OR_HUB_ID")
model = nnx.view(model, use_running_average=True)
embeddings = model(model.preprocess(images))  # uint8 RGB [b, {size}, {size}, 3] -> [b, {dimension}]
```

Preprocessing: the short side resized to image_size / crop_fraction, then the central square of
image_size; pixels in [0, 1], less the mean, divided by the standard deviation.

{preprocessing}

Metrics:

{metrics}

Built by `create_model` of cbam_jax {version} with:

{model}
"""


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
            that are not the default.
        preprocessing: ``image_size`` in pixels, ``crop_fraction`` (the central share of the short
            side), and whatever else a user must know. ImageNet's mean and deviation are added.
        metrics: names to numbers, for the card.
        description: a paragraph for the card: trained on what, and how.

    Raises:
        InputError: ``config`` builds another model, or ``preprocessing`` lacks ``image_size``.
    """
    import safetensors.numpy

    if "image_size" not in preprocessing:
        raise InputError("preprocessing must name the image_size, in pixels")
    arrays = _arrays(model)
    expected = {name: array.shape for name, array in _arrays(_build(config)).items()}
    different = sorted(
        name for name in arrays.keys() | expected if _shape(arrays, name) != expected.get(name)
    )
    if different:
        raise InputError(
            f"the config {dict(config)} builds another model: {len(different)} tensors differ, "
            f"the first {different[0]}; give the arguments of create_model that built this one"
        )
    document = {
        "format_version": FORMAT_VERSION,
        "cbam_jax_version": __version__,
        "model": dict(config),
        "preprocessing": {**preprocessing, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "metrics": dict(metrics or {}),
    }
    card = _card(document, model.embedding_dim, description)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: np.array(variable[...]) for name, variable in arrays.items()}
    with written_whole(folder / "model.safetensors") as partial:
        safetensors.numpy.save_file(values, partial)
    with written_whole(folder / "config.json") as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n")
    with written_whole(folder / "README.md") as partial:
        partial.write_text(card)


def from_pretrained(
    source: str | os.PathLike, *, revision: str | None = None
) -> tuple[EmbeddingModel, dict[str, Any]]:
    """Build a model from a folder of ``save_pretrained``, here or on the Hugging Face hub.

    Args:
        source: a folder, or a hub id such as ``"user/model"`` (needs ``cbam_jax[hub]``).
        revision: branch, tag or commit on the hub; None: its main branch.

    Returns:
        The model, and ``config.json`` as a dict: ``model``, ``preprocessing``, ``metrics``.

    Raises:
        InputError: there is no such folder or id, it is of a newer format, or its weights do not
            fit its config.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source), revision)
    document = _read_config(folder / "config.json")
    model = _build(document["model"])
    report = load_pretrained(model, folder / "model.safetensors")
    if report.fresh:
        raise InputError(
            f"{folder}: {len(report.fresh)} tensors of the model are not in model.safetensors, "
            f"the first {report.fresh[0]}; save it again"
        )
    return model, document


def _build(config: Mapping[str, Any]) -> EmbeddingModel:
    """Build the model without its arrays: each is about to be set or only its shape is asked."""
    try:
        return nnx.eval_shape(lambda: create_model(**config, rngs=nnx.Rngs(0)))
    except (TypeError, ValueError) as error:
        raise InputError(f"no model can be built from {dict(config)}: {error}") from error


def _arrays(model: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _shape(arrays: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return arrays[name].shape if name in arrays else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        version = document["format_version"]
        if not isinstance(document["model"], dict):
            raise TypeError("model is not an object")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: not a folder of save_pretrained") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): fetch or save it again") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format {version}, written by cbam_jax {document.get('cbam_jax_version')}; "
            f"this is {__version__}, which reads up to {FORMAT_VERSION}: upgrade it"
        )
    return document


def _fetch(source: str, revision: str | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise InputError(f"no folder {source}, and no id of the hub either (user/model)")
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"no folder {source}; to fetch it from the hub: pip install 'cbam_jax[hub]'"
        ) from None
    files = ["model.safetensors", "config.json", "README.md"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except Exception as error:  # It raises its own, its HTTP library's, and the system's.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(
            f"cannot fetch {source} from the hub ({type(error).__name__}: {cause}): check the "
            "name, the network, or fetch the folder elsewhere and give its path"
        ) from error


def _card(document: Mapping[str, Any], dimension: int, description: str) -> str:
    return _CARD.format(
        name=document["model"]["name"],
        description=description or "An image embedding model for retrieval.",
        dimension=dimension,
        size=document["preprocessing"]["image_size"],
        preprocessing=_table(document["preprocessing"]),
        metrics=_table(document["metrics"]),
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
