"""DeepFashion's benchmarks as TFDS builders, from the files that its authors hand out.

* ``deepfashion_inshop``: by item or category, shop photos; test has queries and a gallery
* ``deepfashion_consumer2shop``: consumers' photos are queries among the shops'
* ``deepfashion_category``: 50 categories and 1,000 attributes; ``/paper`` is the paper's
  40,000 / 10,000 / 10,000 images of 30 categories

Nothing is downloaded: DeepFashion is for non-commercial research by those who sign its agreement,
https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html. ``manual_dir`` is where its folders are.
Images are kept byte for byte. ``python -m cbam_jax.datasets verify`` checks a copy.
"""

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds

from cbam_jax import InputError
from cbam_jax.datasets.building import BuilderFromFiles, make_info
from cbam_jax.datasets.deepfashion.images import look_at, low_size, pixel_box, to_pixels
from cbam_jax.datasets.deepfashion.layout import BENCHMARKS, Layout, find_layout
from cbam_jax.datasets.deepfashion.lists import (
    READERS,
    SOURCES,
    SPLITS,
    Annotations,
    Photo,
    read_attributes,
)
from cbam_jax.datasets.deepfashion.paper import draw_paper_splits, manifest_text, write_manifest
from cbam_jax.foreign_files import read_file
from cbam_jax.progress import few, progress

Splits = dict[str, list[Photo]]


@dataclasses.dataclass(eq=False)
class DeepfashionConfig(tfds.core.BuilderConfig):
    """Which images.

    Attributes:
        highres: those of ``img_highres`` in place of ``img``, with the boxes converted.
        paper: the paper's splits (:mod:`cbam_jax.datasets.deepfashion.paper`), not the official.
        by_folder: whether ``paper`` keeps a folder within one split.
    """

    highres: bool = False
    paper: bool = False
    by_folder: bool = True


_RESOLUTIONS = (
    DeepfashionConfig(name="lowres", description="The images of img."),
    DeepfashionConfig(name="highres", description="The images of img_highres.", highres=True),
)


class _Deepfashion(BuilderFromFiles, skip_registration=True):
    """What the three have in common; each has its columns besides."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            # x, y in pixels and visibility: 0 visible, 1 occluded, 2 cut off.
            "landmarks": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
            "label": tfds.features.ClassLabel(),  # its names are read from the lists
            "item_id": np.int64,
            "series": np.int64,
            "is_query": np.bool_,
            "is_gallery": np.bool_,
            "id": tfds.features.Text(),
        }
        return make_info(
            self,
            columns | self._own_columns(),
            description=type(self).__doc__,
            homepage=BENCHMARKS[self.name].page,
            license="non-commercial research only, by agreement with the authors",
        )

    def _own_columns(self) -> dict[str, Any]:
        return {"source": tfds.features.ClassLabel(names=SOURCES)}

    def _split_generators(self, dl_manager):
        return _write_splits(self)

    def _generate_examples(self, *args) -> Iterator[tuple[str, dict]]:
        return _examples(*args)


class DeepfashionInshop(_Deepfashion):
    """In-shop Clothes Retrieval: 52,712 photos of 7,982 items in 23 categories.

    A tenth of the official train items are ``validation``, since the official partition has none;
    ``train+validation`` is the official train. In ``test`` queries and gallery are told apart. A
    category is the folder, such as ``WOMEN/Dresses``; ``series`` is the shoot of one colour.
    """

    BUILDER_CONFIGS = _RESOLUTIONS


class DeepfashionConsumer2shop(_Deepfashion):
    """Consumer-to-shop Clothes Retrieval: 239,557 photos of 33,881 items.

    Pairs are taken apart: each image is there once in a split. As the official protocol has it, the
    gallery of ``validation`` and that of ``test`` are the shops' photos of both.
    """

    BUILDER_CONFIGS = _RESOLUTIONS


class DeepfashionCategory(_Deepfashion):
    """Category and Attribute Prediction: 289,222 photos, 50 categories, 1,000 attributes.

    ``item_id`` is the number of the folder, which holds what one search of a shop found.
    ``attributes`` are those that an image has. Four categories were merged into Dress by the
    authors and have no images, so 46 can be used.

    ``full`` follows the official partition, which is by image: near-duplicates of a folder are in
    every split. ``paper`` draws from it the numbers of the paper and keeps each folder within one
    split; ``paper_by_image`` draws without that. What was drawn is in ``manifest.csv`` beside the
    records, its checksum in ``manifest.csv.sha256``.
    """

    BUILDER_CONFIGS = (
        DeepfashionConfig(name="full", description="All images, the official partition."),
        DeepfashionConfig(name="full_highres", description="full in img_highres.", highres=True),
        DeepfashionConfig(
            name="paper", description="40,000 / 10,000 / 10,000 images, 30 categories.", paper=True
        ),
        DeepfashionConfig(
            name="paper_highres", description="paper in img_highres.", paper=True, highres=True
        ),
        DeepfashionConfig(
            name="paper_by_image", description="paper, folders in several splits.",
            paper=True, by_folder=False,
        ),
    )  # fmt: skip

    def _own_columns(self) -> dict[str, Any]:
        return {"attributes": tfds.features.Sequence(tfds.features.ClassLabel())}


def config_of(builder: tfds.core.DatasetBuilder) -> DeepfashionConfig:
    """The builder's config."""
    return cast(DeepfashionConfig, builder.builder_config)


class Copy(NamedTuple):
    """A copy as its lists have it; ``manifest`` is empty but for the paper's configs."""

    layout: Layout
    annotations: Annotations
    splits: Splits
    manifest: str


def read_copy(builder: BuilderFromFiles) -> Copy:
    """Reads the lists of a copy. Takes some seconds; no image is opened.

    Raises:
        InputError: the layout is another one, a list cannot be read or does not suffice.
    """
    config = config_of(builder)
    layout = find_layout(builder.name, builder.manual_dir, highres=config.highres)
    print(f"reading the lists in {layout.root}", file=sys.stderr)
    annotations = READERS[builder.name](layout)
    manifest = ""
    if config.paper:
        _check_lists(layout, annotations.problems)  # what is drawn from other lists is another draw
        annotations, manifest = _draw(annotations, config.by_folder)
    return Copy(layout, annotations, _splits(builder.name, annotations.photos), manifest)


def _splits(name: str, photos: list[Photo]) -> Splits:
    splits = {split: [photo for photo in photos if photo.split == split] for split in SPLITS}
    if name == "deepfashion_consumer2shop":
        shops = [photo for photo in photos if photo.split != "train" and photo.is_gallery]
        for split in ("validation", "test"):
            splits[split] = [photo for photo in splits[split] if photo.is_query] + shops
    return splits


def _draw(annotations: Annotations, by_folder: bool) -> tuple[Annotations, str]:
    names = annotations.categories
    number = {name: index for index, name in enumerate(names)}
    photos = {photo.path: photo for photo in annotations.photos}
    rows = [(photo.path, number[photo.category], photo.split) for photo in photos.values()]
    drawn = draw_paper_splits(rows, by_folder=by_folder)
    kept = sorted({category for _, category, _ in drawn})
    annotations = dataclasses.replace(
        annotations,
        photos=[photos[path] for path, _, _ in drawn],
        categories=tuple(names[category] for category in kept),
    )
    return annotations, manifest_text(drawn, names)


def _write_splits(builder: BuilderFromFiles) -> dict[str, Iterator[tuple[str, dict]]]:
    layout, annotations, splits, manifest = copy = read_copy(builder)
    attributes = _name_labels(builder, layout, annotations)
    _check_lists(layout, annotations.problems)
    _tell_absent(layout)
    sizes, skipped = _measure(layout, annotations.photos, builder.on_bad_image)
    builder._write_skipped(skipped)
    if manifest:
        checksum = write_manifest(Path(builder.data_dir), manifest)
        print(f"manifest.csv has SHA-256 {checksum}", file=sys.stderr)
    examples = {}
    for split, listed in splits.items():
        photos = [photo for photo in listed if photo.path in sizes]
        if not photos:
            raise InputError(f"{layout.root} has no images for {split}: unpack it again")
        arguments = split, photos, copy, sizes, attributes
        examples[split] = cast(Any, builder)._generate_examples(*arguments)
    return examples


def _name_labels(
    builder: BuilderFromFiles, layout: Layout, annotations: Annotations
) -> dict[str, np.ndarray]:
    """Gives the features their classes; returns the attributes of each image, where there are."""
    features = cast(Any, builder.info.features)
    features["label"].names = annotations.categories
    if "attributes" not in features:
        return {}
    names, attributes = read_attributes(layout, annotations.problems)
    features["attributes"].feature.names = names
    return attributes


def _check_lists(layout: Layout, problems: list[str]) -> None:
    if problems:
        raise InputError(
            f"{len(problems)} mistakes in the lists of {layout.root}: {few(problems)}: unpack them "
            f"again; {_verify_command(layout)} shows all"
        )


def _verify_command(layout: Layout) -> str:
    folder = shlex.quote(str(layout.root))
    return f"python -m cbam_jax.datasets verify {layout.benchmark} --manual_dir={folder}"


def _tell_absent(layout: Layout) -> None:
    for purpose, names in BENCHMARKS[layout.benchmark].optional.items():
        if purpose not in layout.lists and purpose != "items":
            print(f"{layout.root} has no {names[0]}: there are no {purpose}", file=sys.stderr)


def _measure(
    layout: Layout, photos: list[Photo], on_bad_image: str
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The size of every image that can be used, and a line for each that cannot."""
    looks = look_at([layout.file(photo.path) for photo in photos])
    sizes, bad = {}, []
    checked = progress(looks, "checking images", total=len(photos))
    for photo, look in zip(photos, checked, strict=True):
        if look.size is None:
            bad.append(f"{photo.path} {look.problem}")
        else:
            sizes[photo.path] = look.size
    if not bad:
        return sizes, bad
    report = f"{len(bad)} of {len(photos)} images in {layout.images} cannot be used: {few(bad)}"
    if on_bad_image == "fail" or not sizes:
        raise InputError(
            f"{report}: unpack them again, or go on with on_bad_image='skip'; "
            f"{_verify_command(layout)} shows all"
        )
    print(f"skipped: {report}", file=sys.stderr)
    return sizes, bad


def _examples(
    split: str,
    photos: list[Photo],
    copy: Copy,
    sizes: dict[str, tuple[int, int]],
    attributes: dict[str, np.ndarray],
) -> Iterator[tuple[str, dict]]:
    problems = Counter()
    for photo in progress(photos, f"writing {split}", total=len(photos)):
        example, problem = _example(photo, copy, sizes[photo.path])
        problems[problem] += 1
        if photo.source:
            example["source"] = photo.source
        else:
            example["attributes"] = attributes.get(photo.path, ())
        yield photo.path, example
    unboxed = problems["empty"] + problems["missing"]
    if unboxed:
        print(
            f"{split}: {unboxed} of {len(photos)} images have no box with pixels in it; "
            "the whole image stands for it",
            file=sys.stderr,
        )


def _example(photo: Photo, copy: Copy, size: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """The columns that every benchmark has, and what is wrong with the box (``pixel_box``)."""
    layout, annotations = copy.layout, copy.annotations
    low = low_size(layout, photo.path, size)
    listed = annotations.boxes.get(photo.path)
    box, problem = pixel_box(listed, low, size, padded=layout.padded)
    return {
        "image": read_file(layout.file(photo.path)),
        "bbox": box,
        "landmarks": _landmarks(annotations.landmarks.get(photo.path), layout, low, size),
        "label": photo.category,
        "item_id": photo.item,
        "series": photo.series,
        "is_query": photo.is_query,
        "is_gallery": photo.is_gallery,
        "id": photo.path,
    }, problem


def _landmarks(
    listed: np.ndarray | None,
    layout: Layout,
    low: tuple[float, float],
    size: tuple[float, float],
) -> np.ndarray:
    if listed is None:
        return np.zeros((0, 3), np.float32)
    points = to_pixels(listed[:, 1:], low, size, padded=layout.padded)
    return np.concatenate([points, listed[:, :1].astype(np.float32)], axis=1)
