"""What every dataset is opened as: columns in memory, encoded images by random access."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.decoding import decode_image


@dataclasses.dataclass(frozen=True)
class RetrievalDataset:
    """One split of an image retrieval dataset: its columns, and its images by random access.

    Two images are *similar* when their ``label`` is equal. Evaluation searches each image of
    ``is_query`` among the images of ``is_gallery``. The object can be pickled, so worker processes
    read images themselves.

    Attributes:
        name: the dataset, as it was asked for.
        split: the split, as it was asked for.
        label: int32 [n], ``0 <= label < len(label_names)``. A split need not hold every label.
        label_names: the name of each label.
        id: str [n], unique; for files, the path.
        is_query: bool [n].
        is_gallery: bool [n].
        item: int64 [n], equal for images of one product; None when the dataset has none.
        series: int64 [n], equal for images of one shoot of a product; None likewise.
        bbox: float32 [n, 4], ``x1, y1, x2, y2`` of the garment in pixels of the decoded image;
            None likewise.
        images: ``images[index]`` is the encoded file of an image.
        masks: ``masks[index]`` is the encoded file of an image's mask, grey, of the decoded image's
            size, and at least 128 where the garment is seen; None when the dataset has none.
    """

    name: str
    split: str
    label: np.ndarray
    label_names: tuple[str, ...]
    id: np.ndarray
    is_query: np.ndarray
    is_gallery: np.ndarray
    item: np.ndarray | None
    series: np.ndarray | None
    bbox: np.ndarray | None
    images: Sequence[bytes] = dataclasses.field(repr=False)
    masks: Sequence[bytes] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.label)

    def encoded(self, index: int) -> bytes:
        """The encoded file (JPEG, PNG, WebP) of one image.

        Raises:
            InputError: a file that was there when the dataset was opened cannot be read.
        """
        return self.images[int(index)]

    def image(self, index: int) -> np.ndarray:
        """One decoded image, uint8 [h, w, 3], RGB; see :func:`cbam_jax.datasets.decode_image`.

        Raises:
            InputError: names the image and the remedy.
        """
        return decode_image(self.encoded(index), name=f"{self.id[index]} of {self.name}")

    def mask(self, index: int) -> np.ndarray:
        """Where the garment is, bool [h, w]: the dataset's mask, or else the pixels of its box.

        A pixel on the edge of the box belongs to it; none does where the box is missing (NaN).

        Raises:
            InputError: the dataset has neither, or the file cannot be read.
        """
        if self.masks is not None:
            encoded, name = self.masks[int(index)], f"the mask of {self.id[index]} of {self.name}"
            return decode_image(encoded, name=name)[..., 0] >= 128
        if self.bbox is None:
            raise InputError(
                f"{self.name} has neither masks nor boxes to tell where the garment is: use a "
                "dataset that has, such as synthetic_garments or a CSV with x1,y1,x2,y2"
            )
        mask = np.zeros(self.image(index).shape[:2], bool)
        box = self.bbox[index]
        if not np.isnan(box).any():
            left, top = np.floor(np.maximum(box[:2], 0)).astype(int)
            right, bottom = np.ceil(np.maximum(box[2:], 0)).astype(int)
            mask[top:bottom, left:right] = True
        return mask
