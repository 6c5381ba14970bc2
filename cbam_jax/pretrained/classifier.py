"""A backbone under torchvision's classification head, to check ported weights by their logits.

Submodules carry torchvision's names (``fc``, or VGG's ``classifier.0``, ``.3`` and ``.6``).
"""

import functools
import io
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import InputError
from cbam_jax.backbones.layers import adaptive_average_pool
from cbam_jax.backbones.vgg import VGG
from cbam_jax.foreign_files import read_file
from cbam_jax.models import BACKBONES, normalize_images, pixel_scaling
from cbam_jax.pretrained.loading import load_pretrained
from cbam_jax.pretrained.published import IMAGENET
from cbam_jax.pretrained.sources import Source


class Classifier(nnx.Module):
    """Backbone and head: [b, h, w, 3] to logits [b, num_classes], float32.

    ResNets and GoogLeNet average the last feature map and apply one linear layer; VGG has three
    on the map averaged to 7 x 7. Without torchvision's dropout, which only training sees.

    Args:
        backbone: maps [b, h, w, 3] to [b, h', w', backbone.num_features].
        num_classes: length of the logits; torchvision's weights have ImageNet's 1000.
        scaling: mean and deviation of the pixels that the backbone expects; None: ImageNet's.
        rngs: for the parameters.

    >>> images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    >>> build = lambda: create_classifier("resnet18", num_classes=5, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda images: build()(images), images).shape
    (2, 5)
    """

    def __init__(
        self,
        backbone,
        num_classes: int = 1000,
        *,
        scaling: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.scaling = nnx.static(scaling or pixel_scaling(""))
        self.num_classes = num_classes
        if isinstance(backbone, VGG):
            self.classifier = nnx.Dict(
                {
                    "0": nnx.Linear(7 * 7 * backbone.num_features, 4096, rngs=rngs),
                    "3": nnx.Linear(4096, 4096, rngs=rngs),
                    "6": nnx.Linear(4096, num_classes, rngs=rngs),
                }
            )
        else:
            self.fc = nnx.Linear(backbone.num_features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of images normalised as the backbone expects."""
        return self.classify(self.backbone(images))

    def classify(self, features: jax.Array) -> jax.Array:
        """Turn a last feature map [b, h', w', c] into logits."""
        x = features.astype(jnp.float32)
        if isinstance(self.backbone, VGG):
            # torch's order of the entries, channels first: the weights of layer 0 follow it.
            x = adaptive_average_pool(x, 7).transpose(0, 3, 1, 2).reshape(len(x), -1)
            x = nnx.relu(self.classifier["0"](x))
            x = nnx.relu(self.classifier["3"](x))
            return self.classifier["6"](x)
        return self.fc(jnp.mean(x, axis=(1, 2)))


def create_classifier(name: str, num_classes: int = 1000, *, rngs: nnx.Rngs) -> Classifier:
    """Build a classifier on one of ``models.BACKBONES``, without attention.

    Raises:
        ValueError: on an unknown name; the message lists the choices.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    scaling = pixel_scaling(name)
    return Classifier(BACKBONES[name](rngs=rngs), num_classes, scaling=scaling, rngs=rngs)


def check(
    name: str, images: str | os.PathLike, *, version: str = "imagenet", source: Source | None = None
) -> dict[str, Any]:
    """Measure a backbone with published weights on ImageNet images, beside the published figures.

    Args:
        name: a backbone, one of ``IMAGENET[version]``.
        images: folder with one folder a class, named so that sorting gives the classes' numbers,
            as ImageNet's synset names do.
        version: which published figures, and which weights unless ``source`` is given.
        source: weights, as for ``load_pretrained``, with their classifier.

    Returns:
        Top-1 and top-5 accuracy in %, measured and published, and the number of images.
    """
    if name not in IMAGENET[version]:
        raise InputError(
            f"no {version} weights for {name!r}: choose one of {', '.join(IMAGENET[version])}"
        )
    class_folders(Path(images))  # Its error belongs before the download.
    published = IMAGENET[version][name]
    model = nnx.eval_shape(lambda: create_classifier(name, rngs=nnx.Rngs(0)))
    report = load_pretrained(model, version if source is None else source)
    print(report.summary(), file=sys.stderr)
    measured = image_accuracy(model, images, resize=published.resize)
    figures = {"published_top1": published.top1, "published_top5": published.top5}
    return {"model": name, "weights": report.source, **measured, **figures}


def image_accuracy(
    model: Classifier, folder: str | os.PathLike, *, resize: int, batch_size: int = 32
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, in %, on a folder with one folder of images a class.

    Args:
        model: the classifier; the class of an image is the place of its folder's name when sorted.
        folder: the images.
        resize: pixels of the short side before the central crop of 224.
        batch_size: images a step.

    Raises:
        InputError: no images, or not as many folders as the model has classes.
    """
    folder = Path(folder)
    classes, files = class_folders(folder)
    if len(classes) != model.num_classes:
        raise InputError(
            f"{folder} has {len(classes)} folders, the model {model.num_classes} classes: "
            "give one folder a class, empty ones too"
        )
    graph, state = nnx.split(nnx.view(model, use_running_average=True))
    scaled = functools.partial(normalize_images, mean=model.scaling[0], std=model.scaling[1])
    predict = jax.jit(lambda state, images: nnx.merge(graph, state)(scaled(images)))
    hits = np.zeros((0, 5), bool)
    # Imported late: a classifier itself needs no datasets.
    from cbam_jax.progress import progress

    steps = range(0, len(files), batch_size)
    for start in progress(steps, "classifying", total=len(steps), unit=" batches"):
        batch = files[start : start + batch_size]
        images = np.zeros((batch_size, 224, 224, 3), np.uint8)  # The last batch is padded.
        images[: len(batch)] = [read_central_square(path, resize) for path, _ in batch]
        logits = np.asarray(predict(state, images))[: len(batch)]
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = np.concatenate([hits, best == np.array([[label] for _, label in batch])])
    top1, top5 = 100 * hits[:, 0].mean(), 100 * hits.any(1).mean()
    return {"images": len(files), "top1": float(top1), "top5": float(top5)}


def class_folders(folder: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """Find the classes' folders, sorted, and each image with its class.

    Raises:
        InputError: there are no images.
    """
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    files = [(file, i) for i, path in enumerate(classes) for file in sorted(path.glob("*.*"))]
    if not files:
        raise InputError(f"no images in {folder}: give a folder with one folder a class")
    return classes, files


def read_central_square(path: Path, resize: int) -> np.ndarray:
    """Read an image, its short side resized, its central 224 x 224 cut out; uint8 RGB."""
    # PIL's antialiased bilinear resize is what the published figures were measured with.
    from PIL import Image

    with Image.open(io.BytesIO(read_file(path))) as file:
        image = file.convert("RGB")
    # torchvision's rounding: the long side down, the crop's corner to the nearest.
    width, height = (side * resize // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))
