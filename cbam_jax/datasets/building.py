"""What our TFDS builders have in common: the image column, and the files that they are given."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

SKIPPED_LIST = "skipped_images.txt"  # in a prepared dataset: one line for each image left out


def make_info(
    builder: tfds.core.DatasetBuilder, columns: dict[str, Any], **more
) -> tfds.core.DatasetInfo:
    """The info of a dataset of JPEGs of any size, ``image``, and other columns."""
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    features = tfds.features.FeaturesDict({"image": image, **columns})
    return tfds.core.DatasetInfo(builder=builder, features=features, **more)


class BuilderFromFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of image files that were fetched, by the user or by it.

    Attributes:
        manual_dir: the folder of what the user fetched, or None.
        on_bad_image: ``"fail"`` stops at images that cannot be used; ``"skip"`` leaves out those
            and lists them in ``skipped_images.txt`` in the prepared dataset.
    """

    def __init__(
        self, *, manual_dir: str | None = None, on_bad_image: str = "fail", **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.manual_dir = manual_dir
        self.on_bad_image = on_bad_image

    def _write_skipped(self, lines: Iterable[str]) -> None:
        # data_dir is TFDS's temporary folder while a dataset is prepared, which is renamed when all
        # is written.
        (Path(self.data_dir) / SKIPPED_LIST).write_text("".join(f"{line}\n" for line in lines))
