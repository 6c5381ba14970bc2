"""From a dataset to batches: which images, how each is cut, and the pipeline that loads them.

Read ``sampling`` first (P x K batches as a pure function of seed and step), then ``images`` (how
one image is cut for a model: the same for datasets, files and uploads), ``augmentation`` (what
training changes of it), and ``pipeline``, which puts them together by Grain. Images stay uint8
here and are normalised on the device, inside the jitted step.
"""

from cbam_jax.data.augmentation import (
    augment,
    erase_rectangle,
    jitter_colors,
    random_crop,
    train_image,
)
from cbam_jax.data.images import (
    center_crop,
    cut_file,
    cut_pixels,
    decode_resized,
    eval_image,
    eval_mask,
    resize,
)
from cbam_jax.data.pipeline import Batches, eval_batches, train_batches
from cbam_jax.data.sampling import class_balanced_indices, deal, images_by_class

__all__ = [
    "Batches",
    "augment",
    "center_crop",
    "class_balanced_indices",
    "cut_file",
    "cut_pixels",
    "deal",
    "decode_resized",
    "erase_rectangle",
    "eval_batches",
    "eval_image",
    "eval_mask",
    "images_by_class",
    "jitter_colors",
    "random_crop",
    "resize",
    "train_batches",
    "train_image",
]
