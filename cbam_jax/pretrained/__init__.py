"""Weights from elsewhere into our models: strictly, and without running what a file asks for.

In the order in which to read it:

* :mod:`~cbam_jax.pretrained.published`: which weights there are to fetch, with hashes and figures
* :mod:`~cbam_jax.pretrained.sources`: files, folders and mappings as arrays by name; ``convert``
* :mod:`~cbam_jax.pretrained.torch_files`: torch's containers, and in
  :mod:`~cbam_jax.pretrained.torch_pickles` the pickles in them, read by a machine of our own
* :mod:`~cbam_jax.pretrained.names`: each family's names in terms of torchvision's
* :mod:`~cbam_jax.pretrained.vit_names`: those of vision transformers, and
  :mod:`~cbam_jax.pretrained.vit_folders`: what the files beside their weights say of them
* :mod:`~cbam_jax.pretrained.repositories`: files from the Hugging Face hub
* :mod:`~cbam_jax.pretrained.loading`: ``load_pretrained``, every tensor set or accounted for
* :mod:`~cbam_jax.pretrained.classifier`: torchvision's classification head, to check the logits

``python -m cbam_jax.pretrained convert SRC.pth DST.safetensors`` writes a torch file anew;
``... check resnet50 --images FOLDER`` measures published weights beside the published figures.
"""

from typing import TYPE_CHECKING, Any

from cbam_jax.backbones.vit_published import PUBLISHED, published_name
from cbam_jax.pretrained.loading import LoadReport, load_pretrained
from cbam_jax.pretrained.published import IMAGENET, Published, fetch_imagenet
from cbam_jax.pretrained.repositories import HUB, fetch_repository
from cbam_jax.pretrained.sources import Source, convert
from cbam_jax.pretrained.torch_files import read_torch
from cbam_jax.pretrained.vit_folders import Description, describe

if TYPE_CHECKING:
    from cbam_jax.pretrained.classifier import (
        Classifier,
        check,
        create_classifier,
        image_accuracy,
        read_central_square,
    )

__all__ = [
    "HUB",
    "IMAGENET",
    "PUBLISHED",
    "Classifier",
    "Description",
    "LoadReport",
    "Published",
    "Source",
    "check",
    "convert",
    "create_classifier",
    "describe",
    "fetch_imagenet",
    "fetch_repository",
    "image_accuracy",
    "load_pretrained",
    "published_name",
    "read_central_square",
    "read_torch",
]


def __getattr__(name: str) -> Any:
    # Only now: loading weights into a model that is there needs none of our models.
    if name in __all__:
        import cbam_jax.pretrained.classifier as classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
