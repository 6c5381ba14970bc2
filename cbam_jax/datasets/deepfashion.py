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
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds

from cbam_jax import InputError
from cbam_jax.datasets import deepfashion_files as files
from cbam_jax.datasets.deepfashion_files import Annotations, Layout, Photo
from cbam_jax.datasets.deepfashion_paper import draw_paper_splits, manifest_text, write_manifest
from cbam_jax.datasets.prepared import SKIPPED_LIST
from cbam_jax.datasets.progress import progress

Splits = dict[str, list[Photo]]


@dataclasses.dataclass(eq=False)
class DeepfashionConfig(tfds.core.BuilderConfig):
    """Which images.

    Attributes:
        highres: those of ``img_highres`` in place of ``img``, with the boxes converted.
        paper: the paper's splits (:mod:`cbam_jax.datasets.deepfashion_paper`), not the official.
        by_folder: whether ``paper`` keeps a folder within one split.
    """

    highres: bool = False
    paper: bool = False
    by_folder: bool = True


_RESOLUTIONS = (
    DeepfashionConfig(name="lowres", description="The images of img."),
    DeepfashionConfig(name="highres", description="The images of img_highres.", highres=True),
)


class DeepfashionInshop(tfds.core.GeneratorBasedBuilder):
    """In-shop Clothes Retrieval: 52,712 photos of 7,982 items in 23 categories.

    A tenth of the official train items are ``validation``, since the official partition has none;
    ``train+validation`` is the official train. In ``test`` queries and gallery are told apart. A
    category is the folder, such as ``WOMEN/Dresses``; ``series`` is the shoot of one colour.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = _RESOLUTIONS

    def __init__(
        self, *, manual_dir: str | None = None, on_bad_image: str = "fail", **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.manual_dir = manual_dir
        self.on_bad_image = on_bad_image

    def _info(self) -> tfds.core.DatasetInfo:
        return _make_info(self, {"source": tfds.features.ClassLabel(names=files.SOURCES)})

    def _split_generators(self, dl_manager):
        return _write_splits(self)

    def _generate_examples(self, *args) -> Iterator[tuple[str, dict]]:
        return _examples(*args)


class DeepfashionConsumer2shop(tfds.core.GeneratorBasedBuilder):
    """Consumer-to-shop Clothes Retrieval: 239,557 photos of 33,881 items.

    Pairs are taken apart: each image is there once in a split. As the official protocol has it, the
    gallery of ``validation`` and that of ``test`` are the shops' photos of both.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = _RESOLUTIONS

    def __init__(
        self, *, manual_dir: str | None = None, on_bad_image: str = "fail", **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.manual_dir = manual_dir
        self.on_bad_image = on_bad_image

    def _info(self) -> tfds.core.DatasetInfo:
        return _make_info(self, {"source": tfds.features.ClassLabel(names=files.SOURCES)})

    def _split_generators(self, dl_manager):
        return _write_splits(self)

    def _generate_examples(self, *args) -> Iterator[tuple[str, dict]]:
        return _examples(*args)


class DeepfashionCategory(tfds.core.GeneratorBasedBuilder):
    """Category and Attribute Prediction: 289,222 photos, 50 categories, 1,000 attributes.

    ``item_id`` is the number of the folder, which holds what one search of a shop found.
    ``attributes`` are those that an image has. Four categories were merged into Dress by the
    authors and have no images, so 46 can be used.

    ``full`` follows the official partition, which is by image: near-duplicates of a folder are in
    every split. ``paper`` draws from it the numbers of the paper and keeps each folder within one
    split; ``paper_by_image`` draws without that. What was drawn is in ``manifest.csv`` beside the
    records, its checksum in ``manifest.csv.sha256``.
    """

    VERSION = tfds.core.Version("1.0.0")
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

    def __init__(
        self, *, manual_dir: str | None = None, on_bad_image: str = "fail", **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.manual_dir = manual_dir
        self.on_bad_image = on_bad_image

    def _info(self) -> tfds.core.DatasetInfo:
        attributes = tfds.features.Sequence(tfds.features.ClassLabel())
        return _make_info(self, {"attributes": attributes})

    def _split_generators(self, dl_manager):
        return _write_splits(self)

    def _generate_examples(self, *args) -> Iterator[tuple[str, dict]]:
        return _examples(*args)


def _make_info(builder: tfds.core.DatasetBuilder, more: dict) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=type(builder).__doc__,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                # x, y in pixels and visibility: 0 visible, 1 occluded, 2 cut off.
                "landmarks": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
                "label": tfds.features.ClassLabel(),  # its names are read from the lists
                "item_id": np.int64,
                "series": np.int64,
                "is_query": np.bool_,
                "is_gallery": np.bool_,
                "id": tfds.features.Text(),
                **more,
            }
        ),
        homepage=files.BENCHMARKS[builder.name].page,
        license="non-commercial research only, by agreement with the authors",
    )


def config_of(builder: tfds.core.DatasetBuilder) -> DeepfashionConfig:
    """The builder's config."""
    return cast(DeepfashionConfig, builder.builder_config)


def read_splits(
    builder: tfds.core.DatasetBuilder,
) -> tuple[Layout, Annotations, Splits, str]:
    """Reads the lists of a copy: where it is, what they say, the splits, and the manifest.

    The manifest is empty but for the paper's configs. Takes some seconds; no image is opened.

    Raises:
        InputError: the layout is another one, a list cannot be read or does not suffice.
    """
    config = config_of(builder)
    manual_dir = cast(Any, builder).manual_dir
    layout = files.find_layout(builder.name, manual_dir, highres=config.highres)
    print(f"reading the lists in {layout.root}", file=sys.stderr)
    annotations = files.READERS[builder.name](layout)
    manifest = ""
    if config.paper:
        _check_lists(layout, annotations.problems)  # what is drawn from other lists is another draw
        annotations, manifest = _draw(annotations, config.by_folder)
    photos = annotations.photos
    splits = {split: [photo for photo in photos if photo.split == split] for split in files.SPLITS}
    if builder.name == "deepfashion_consumer2shop":
        shops = [photo for photo in photos if photo.split != "train" and photo.is_gallery]
        for split in ("validation", "test"):
            splits[split] = [photo for photo in splits[split] if photo.is_query] + shops
    return layout, annotations, splits, manifest


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


def _write_splits(builder: tfds.core.DatasetBuilder) -> dict[str, Iterator[tuple[str, dict]]]:
    layout, annotations, splits, manifest = read_splits(builder)
    features = cast(Any, builder.info.features)
    features["label"].names = annotations.categories
    attributes: dict[str, np.ndarray] = {}
    if "attributes" in features:
        names, attributes = files.read_attributes(layout, annotations.problems)
        features["attributes"].feature.names = names
    _check_lists(layout, annotations.problems)
    _tell_absent(layout)
    on_bad_image = cast(Any, builder).on_bad_image
    sizes, skipped = _measure(layout, annotations.photos, on_bad_image)
    # data_dir is TFDS's temporary folder here, which is renamed when all is written.
    folder = Path(builder.data_dir)
    (folder / SKIPPED_LIST).write_text("".join(f"{line}\n" for line in skipped))
    if manifest:
        print(f"manifest.csv has SHA-256 {write_manifest(folder, manifest)}", file=sys.stderr)
    examples = {}
    for split, listed in splits.items():
        photos = [photo for photo in listed if photo.path in sizes]
        if not photos:
            raise InputError(f"{layout.root} has no images for {split}: unpack it again")
        arguments = split, photos, layout, annotations, sizes, attributes
        examples[split] = cast(Any, builder)._generate_examples(*arguments)
    return examples


def _check_lists(layout: Layout, problems: list[str]) -> None:
    if problems:
        few = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise InputError(
            f"{len(problems)} mistakes in the lists of {layout.root}: {few}: unpack them again; "
            f"python -m cbam_jax.datasets verify {layout.benchmark} shows all"
        )


def _tell_absent(layout: Layout) -> None:
    for purpose, names in files.BENCHMARKS[layout.benchmark].optional.items():
        if purpose not in layout.lists and purpose != "items":
            print(f"{layout.root} has no {names[0]}: there are no {purpose}", file=sys.stderr)


def _measure(
    layout: Layout, photos: list[Photo], on_bad_image: str
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The size of every image that can be used, and a line for each that cannot."""
    looks = files.look_at([layout.file(photo.path) for photo in photos])
    sizes, bad = {}, []
    checked = progress(looks, "checking images", total=len(photos))
    for photo, look in zip(photos, checked, strict=True):
        if look.size is None:
            bad.append(f"{photo.path} {look.problem}")
        else:
            sizes[photo.path] = look.size
    if not bad:
        return sizes, bad
    few = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    report = f"{len(bad)} of {len(photos)} images in {layout.images} cannot be used: {few}"
    if on_bad_image == "fail" or not sizes:
        raise InputError(
            f"{report}: unpack them again, or go on with on_bad_image='skip'; "
            f"python -m cbam_jax.datasets verify {layout.benchmark} shows all"
        )
    print(f"skipped: {report}", file=sys.stderr)
    return sizes, bad


def _examples(
    split: str,
    photos: list[Photo],
    layout: Layout,
    annotations: Annotations,
    sizes: dict[str, tuple[int, int]],
    attributes: dict[str, np.ndarray],
) -> Iterator[tuple[str, dict]]:
    problems = Counter()
    for photo in progress(photos, f"writing {split}", total=len(photos)):
        size = sizes[photo.path]
        low = files.low_size(layout, photo.path, size)
        listed = annotations.boxes.get(photo.path)
        box, problem = files.pixel_box(listed, low, size, padded=layout.padded)
        problems[problem] += 1
        example = {
            "image": layout.file(photo.path).read_bytes(),
            "bbox": box,
            "landmarks": _landmarks(annotations.landmarks.get(photo.path), layout, low, size),
            "label": photo.category,
            "item_id": photo.item,
            "series": photo.series,
            "is_query": photo.is_query,
            "is_gallery": photo.is_gallery,
            "id": photo.path,
        }
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


def _landmarks(
    listed: np.ndarray | None,
    layout: Layout,
    low: tuple[float, float],
    size: tuple[float, float],
) -> np.ndarray:
    if listed is None:
        return np.zeros((0, 3), np.float32)
    points = files.to_pixels(listed[:, 1:], low, size, padded=layout.padded)
    return np.concatenate([points, listed[:, :1].astype(np.float32)], axis=1)
