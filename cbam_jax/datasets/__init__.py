"""Datasets for image retrieval, all opened as a :class:`RetrievalDataset`.

* ``clothing_dataset_small``: 3,781 photos of clothes in 10 classes, CC0; downloaded when first used
* ``synthetic_garments``: drawn on this machine, no download
* ``deepfashion_inshop``, ``deepfashion_consumer2shop`` and ``deepfashion_category``, from one's own
  copy of DeepFashion, see :mod:`cbam_jax.datasets.deepfashion`
* any installed dataset of TensorFlow Datasets with an image and an integer label
* ``photos.csv``: one's own photos, see :mod:`cbam_jax.datasets.manifest`
* ``./photos/``: a folder of class folders, see :mod:`cbam_jax.datasets.class_folders`
* manifests of Stanford Online Products, CUB-200-2011 and Cars-196, see
  :mod:`cbam_jax.datasets.benchmarks`; LookBench is read by :mod:`cbam_jax.datasets.lookbench`

``python -m cbam_jax.datasets prepare NAME`` prepares one and checks its images; ``verify NAME``
compares a copy of DeepFashion with what was published.
"""

import os

from cbam_jax import InputError
from cbam_jax.datasets.decoding import decode_image, jpeg_size
from cbam_jax.datasets.retrieval import RetrievalDataset

__all__ = [
    "RetrievalDataset",
    "check_options",
    "decode_image",
    "is_folder",
    "is_manifest",
    "is_ours",
    "is_path",
    "is_prepared",
    "jpeg_size",
    "open_dataset",
]


def open_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    label: str = "label",
    on_bad_image: str = "fail",
    crop_to_box: bool = False,
) -> RetrievalDataset:
    """Opens one split of a dataset, preparing the dataset first if necessary.

    Args:
        name: ``clothing_dataset_small[/full|/256px]``, ``synthetic_garments[/config]``,
            ``deepfashion_inshop[/highres]``, ``deepfashion_consumer2shop[/highres]``,
            ``deepfashion_category[/full|/paper|...]``, the name of an installed TFDS dataset
            (``package.module.name`` imports the module first), the path of a CSV manifest, which
            ends in ``.csv``, or that of a folder of class folders, which begins with ``/``, ``.``
            or ``~`` or ends in ``/``, so that no name is mistaken for one.
        split: ``train``, ``validation``, ``test``, what else the dataset has, or ``all`` of it.
        data_dir: where prepared datasets live; None is TFDS's default, ``$TFDS_DATA_DIR`` or
            ``~/tensorflow_datasets``. Not used for a manifest or a folder.
        manual_dir: the folder of what was fetched by hand.
        label: the integer column that decides what is similar; ``"item_id"`` is retrieval by item.
        on_bad_image: ``"fail"`` raises at missing or undecodable images; ``"skip"`` leaves them
            out, counts them on stderr and lists them in a file beside the dataset.
        crop_to_box: whether boxes will be cut out: those of a manifest must then hold a pixel.

    Raises:
        InputError: one line that names the value and the remedy.
    """
    if manual_dir is not None:
        manual_dir = os.path.expanduser(manual_dir)
    check_options(manual_dir=manual_dir, on_bad_image=on_bad_image)
    # Imported late: worker processes unpickle a RetrievalDataset without TFDS's import time.
    if is_manifest(name):
        from cbam_jax.datasets.manifest import open_manifest

        return open_manifest(
            name, split, label=label, on_bad_image=on_bad_image, crop_to_box=crop_to_box
        )
    if is_folder(name):
        from cbam_jax.datasets.class_folders import open_class_folders

        return open_class_folders(name, split, label=label, on_bad_image=on_bad_image)
    from cbam_jax.datasets.prepared import open_prepared

    return open_prepared(
        name,
        split,
        data_dir=data_dir,
        manual_dir=manual_dir,
        label=label,
        on_bad_image=on_bad_image,
    )


def is_path(name: str) -> bool:
    """Whether a dataset's name is a path: that of a manifest, or of a folder of class folders.

    >>> is_path("photos.csv"), is_path("./photos"), is_path("synthetic_garments")
    (True, True, False)
    """
    return is_manifest(name) or is_folder(name)


def is_manifest(name: str) -> bool:
    """Whether a dataset's name is the path of a CSV manifest."""
    return str(name).lower().endswith(".csv")


def is_folder(name: str) -> bool:
    """Whether a dataset's name means a folder of class folders.

    >>> is_folder("./photos"), is_folder("photos/"), is_folder("synthetic_garments/clean")
    (True, True, False)
    """
    return str(name).startswith(("/", ".", "~")) or str(name).endswith("/")


def is_ours(name: str) -> bool:
    """Whether a dataset is one whose builder is part of this package."""
    from cbam_jax.datasets.prepared import OURS

    return name.partition("/")[0] in OURS


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether a dataset of TFDS lies prepared in a folder, so that opening it writes nothing big.

    Raises:
        InputError: there is no such dataset.
    """
    from cbam_jax.datasets import prepared

    return prepared.is_prepared(prepared.make_builder(name, data_dir, None, "skip"))


def check_options(*, manual_dir: str | os.PathLike | None, on_bad_image: str) -> None:
    """Raises InputError unless the options of :func:`open_dataset` make sense."""
    if on_bad_image not in ("fail", "skip"):
        raise InputError(f"on_bad_image='{on_bad_image}': choose 'fail' or 'skip'")
    if manual_dir is not None and not os.path.isdir(manual_dir):
        raise InputError(f"manual_dir {manual_dir} is not a folder: give an existing one or None")
