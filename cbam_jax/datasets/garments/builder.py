"""Synthetic garments: drawn clothes of 16 categories, in a shop's photos and in customers' photos.

No download, no licence, and the truth is known: every pixel of every garment. Colour and textile
are drawn independently of the category, so that only the cut tells categories apart, while items of
one category differ in cut, colours, textile and details. The splits have different items. Good for
trying things out, for tests, and for questions about attention that need masks; a number reached
here says nothing about photos.

``python -m cbam_jax.datasets.garments --sheet sheet.png`` draws a labelled overview.
"""

import dataclasses
from collections.abc import Iterator
from typing import cast

import cv2
import numpy as np
import tensorflow_datasets as tfds

from cbam_jax import InputError
from cbam_jax.datasets.building import make_info
from cbam_jax.datasets.garments.drawing import CATEGORIES, DOMAINS, draw_garment
from cbam_jax.datasets.garments.textiles import TEXTILES
from cbam_jax.progress import progress

# A split's items are numbered from here, so that more items in one split change no other split.
FIRST_ITEM = {"train": 0, "validation": 100_000, "test": 200_000}
_ITEMS_PER_CATEGORY = 1_000_000  # item_id = this * category + item

_LEAST = {"image_size": 32, "views_per_item": 1, "eval_views_per_item": 1, "seed": 0}

_JPEG = (
    cv2.IMWRITE_JPEG_QUALITY, 92,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class SyntheticGarmentsConfig(tfds.core.BuilderConfig):
    """What is drawn.

    >>> config = SyntheticGarmentsConfig(name="mine", image_size=96, clutter=0.8)
    >>> builder = SyntheticGarments(config=config)

    Attributes:
        image_size: side of the square images, pixels.
        train_items: items of each category in the train split.
        validation_items: the same of validation.
        test_items: the same of test.
        views_per_item: images of each item in the train split.
        eval_views_per_item: images of each item in validation and test. With two, one of each
            domain, an item has no second photo of its kind: similar colours find no category.
        clutter: of the consumer images, from 0 (plain background) to 1 (heavy, often occluded).
        consumer_fraction: part of the views of each item that are consumer images, 0 to 1.
        seed: another one gives other items.

    Raises:
        InputError: a number out of its range.
    """

    image_size: int = 128
    train_items: int = 40
    validation_items: int = 30
    test_items: int = 30
    views_per_item: int = 6
    eval_views_per_item: int = 2
    clutter: float = 0.5
    consumer_fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clutter", "consumer_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: give a number from 0 to 1")
        for name in ("train_items", "validation_items", "test_items"):
            if not 1 <= getattr(self, name) <= 100_000:
                raise InputError(f"{name}={getattr(self, name)}: give a number from 1 to 100000")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: give at least {least}")

    def items(self, split: str) -> range:
        """The numbers of a split's items, the same in each category."""
        return range(FIRST_ITEM[split], FIRST_ITEM[split] + getattr(self, f"{split}_items"))

    def views(self, split: str) -> range:
        """The numbers of the views of each of a split's items."""
        return range(self.views_per_item if split == "train" else self.eval_views_per_item)


class SyntheticGarments(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; ``id`` is ``category/item/view``, such as ``t_shirt/0003/02``.

    ``bbox`` (``x1, y1, x2, y2``, ends exclusive) and ``mask`` (255 where the garment is seen) are
    in pixels and leave out what an occluder hides. ``series`` is equal for the images of one item
    in one domain. Every image is query and gallery: evaluation leaves the query itself out.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        SyntheticGarmentsConfig(name="default", description="128 px, medium clutter."),
        SyntheticGarmentsConfig(name="clean", description="Plain backgrounds only.", clutter=0.0),
        SyntheticGarmentsConfig(name="cluttered", description="Heavy clutter.", clutter=1.0),
        SyntheticGarmentsConfig(
            name="quickstart", description="80 px, few items, little clutter: made in seconds.",
            image_size=80, clutter=0.25,
            train_items=24, views_per_item=3, validation_items=15, test_items=15,
        ),
    )  # fmt: skip

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "label": tfds.features.ClassLabel(names=CATEGORIES),
            "domain": tfds.features.ClassLabel(names=DOMAINS),
            "textile": tfds.features.ClassLabel(names=TEXTILES),
            "item_id": np.int64,
            "series": np.int64,
            "is_query": np.bool_,
            "is_gallery": np.bool_,
            "id": tfds.features.Text(),
        }
        return make_info(self, columns, description=__doc__)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in FIRST_ITEM}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        config = cast(SyntheticGarmentsConfig, self.builder_config)
        keys = [
            (category, item, view)
            for category in CATEGORIES
            for item in config.items(split)
            for view in config.views(split)
        ]
        for category, item, view in progress(keys, f"drawing {split}", total=len(keys)):
            example = make_example(config, category, item, view)
            yield example["id"], example


def make_example(config: SyntheticGarmentsConfig, category: str, item: int, view: int) -> dict:
    """One record of the dataset, its images encoded, from the numbers in its ``id``."""
    drawn = draw_garment(
        seed=config.seed, category=category, item=item, view=view, image_size=config.image_size,
        clutter=config.clutter, domain=DOMAINS[is_consumer(view, config.consumer_fraction)],
    )  # fmt: skip
    item_id = CATEGORIES.index(category) * _ITEMS_PER_CATEGORY + item
    bgr = cv2.cvtColor(drawn["image"], cv2.COLOR_RGB2BGR)
    # Encoded here: TFDS would encode arrays with TensorFlow.
    return {
        "image": cv2.imencode(".jpg", bgr, _JPEG)[1].tobytes(),
        "mask": cv2.imencode(".png", drawn["mask"] * np.uint8(255))[1].tobytes(),
        "bbox": drawn["bbox"],
        "label": category,
        "domain": drawn["domain"],
        "textile": drawn["textile"],
        "item_id": item_id,
        "series": 2 * item_id + DOMAINS.index(drawn["domain"]),
        "is_query": True,
        "is_gallery": True,
        "id": f"{category}/{item:04d}/{view:02d}",
    }


def is_consumer(view: int, fraction: float) -> bool:
    """Spreads the consumer's views evenly among an item's views, the first a shop's.

    >>> [is_consumer(view, 1 / 3) for view in range(6)]
    [False, False, True, False, False, True]
    """
    return int((view + 1) * fraction + 1e-9) > int(view * fraction + 1e-9)
