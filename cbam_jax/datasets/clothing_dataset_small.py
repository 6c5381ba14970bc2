"""Clothing dataset (small): 3,781 photos of clothes in 10 classes, by Alexey Grigorev and others.

Published at https://github.com/alexeygrigorev/clothing-dataset-small under CC0-1.0, with official
splits: 3,068 train, 341 validation, 372 test. The photos were taken by many people at home, so a
query and its relevant images rarely share a background.
"""

import hashlib
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from cbam_jax import InputError
from cbam_jax.datasets.building import BuilderFromFiles, make_info
from cbam_jax.datasets.decoding import is_decodable
from cbam_jax.datasets.download import download
from cbam_jax.datasets.resizing import shrink
from cbam_jax.foreign_files import open_regular, read_file, shown
from cbam_jax.progress import few, progress

COMMIT = "11961516512414bf9f6c150a832cfd21b54a6b54"
URL = f"https://github.com/alexeygrigorev/clothing-dataset-small/archive/{COMMIT}.tar.gz"
NUM_IMAGES = {"train": 3068, "validation": 341, "test": 372}
CLASSES = (
    "dress",
    "hat",
    "longsleeve",
    "outwear",
    "pants",
    "shirt",
    "shoes",
    "shorts",
    "skirt",
    "t-shirt",
)
# Of the images, not of the archive: GitHub makes archives anew, and their bytes may change.
FINGERPRINT = "55ee2d8f2e6ad4bb657b13347839fe62bea5db0375d77ebe169e12026edee35c"

_LARGEST = 1 << 30  # Bytes; the published archive has 0.1 GB.

_SHORT_SIDE, _JPEG_QUALITY = 256, 90


class ClothingDatasetSmall(BuilderFromFiles):
    """TFDS builder; ``id`` is the path in the repository, such as ``train/dress/<uuid>.jpg``.

    Attributes:
        manual_dir: a folder that holds the archive (``clothing-dataset-small*.tar*``) or what it
            extracts to. None downloads the archive to ``<data_dir>/downloads``.
        on_bad_image: ``"fail"`` stops at images that are missing, changed or can't be decoded.
            ``"skip"`` leaves out those that can't be decoded, and lists them in
            ``skipped_images.txt`` in the prepared dataset.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="full", description="The published files, byte for byte."),
        tfds.core.BuilderConfig(
            name="256px", description="Short side 256 px (area average), JPEG quality 90."
        ),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {"label": tfds.features.ClassLabel(names=CLASSES), "id": tfds.features.Text()}
        return make_info(
            self,
            columns,
            description=__doc__,
            homepage="https://github.com/alexeygrigorev/clothing-dataset-small",
            license="CC0-1.0",
        )

    def _split_generators(self, dl_manager):
        images, origin = self._read(Path(dl_manager.download_dir))
        skipped = _check(images, origin, self.on_bad_image)
        self._write_skipped(skipped)
        return {split: self._generate_examples(images, split) for split in NUM_IMAGES}

    def _generate_examples(self, images: dict[str, bytes], split: str):
        names = [name for name in images if name.startswith(f"{split}/")]
        for name in progress(names, f"writing {split}", total=len(names)):
            encoded = images[name]
            if self.builder_config and self.builder_config.name == "256px":
                encoded = shrink(encoded, short_side=_SHORT_SIDE, quality=_JPEG_QUALITY)
            label = name.split("/")[1]
            yield name, {"image": io.BytesIO(encoded), "label": label, "id": name}

    def _read(self, download_dir: Path) -> tuple[dict[str, bytes], str]:
        if self.manual_dir is not None:
            return read_manual_dir(Path(self.manual_dir)), str(self.manual_dir)
        archive = download_dir / f"clothing-dataset-small-{COMMIT}.tar.gz"
        put = f"put a copy of it into a folder and name that as manual_dir ({archive.name})"
        download(URL, archive, remedy=put)
        try:
            images = read_archive(archive)
        except InputError:
            images = {}
        if fingerprint(images) != FINGERPRINT:
            archive.unlink()
            raise InputError(
                f"what {URL} sent is damaged ({len(images)} of {sum(NUM_IMAGES.values())} images "
                f"read, checksum differs) and was removed: run again, or {put}"
            )
        return images, str(archive)


def fingerprint(images: dict[str, bytes]) -> str:
    """SHA-256 over the lines ``<path> <SHA-256 of the file>``, in the order of the paths."""
    total = hashlib.sha256()
    for name in sorted(images):
        total.update(f"{name} {hashlib.sha256(images[name]).hexdigest()}\n".encode())
    return total.hexdigest()


def read_manual_dir(folder: Path) -> dict[str, bytes]:
    """Reads the images from an archive in ``folder``, or from the extracted tree.

    Raises:
        InputError: neither is there.
    """
    for root in (folder, *sorted(folder.glob("clothing-dataset-small*"))):
        files = {name: path for name, path in _image_files(root)}
        if files:
            return {name: read_file(files[name]) for name in sorted(files)}
    for archive in sorted(folder.glob("clothing-dataset-small*.tar*")):
        return read_archive(archive)
    raise InputError(
        f"manual_dir {folder} holds neither clothing-dataset-small*.tar* nor the folders "
        f"{', '.join(NUM_IMAGES)}: put there {URL}"
    )


def read_archive(archive: Path) -> dict[str, bytes]:
    """Reads the images of a tar, compressed or not, without extracting it.

    Raises:
        InputError: it is not a complete tar.
    """
    images, left = {}, _LARGEST
    try:
        with open_regular(archive, _LARGEST) as opened, tarfile.open(fileobj=opened) as tar:
            for member in tar:
                left -= max(member.size, 0)
                if left < 0:  # Before they are read, or only passed over.
                    raise tarfile.TarError("its files are larger than the photos published")
                name = _image_name(member.name)
                file = tar.extractfile(member) if name and member.isfile() else None
                if name and file:
                    images[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{shown(archive)} is damaged ({error}): put there {URL}") from error
    return dict(sorted(images.items()))


def _image_name(path: str) -> str | None:
    """``<anything>/train/hat/a.jpg`` -> ``train/hat/a.jpg``; None for what is no image."""
    parts = path.split("/")[-3:]
    is_image = len(parts) == 3 and parts[0] in NUM_IMAGES and parts[1] in CLASSES
    return "/".join(parts) if is_image and parts[2].endswith(".jpg") else None


def _image_files(root: Path) -> Iterator[tuple[str, Path]]:
    for split in NUM_IMAGES:
        for path in (root / split).glob("*/*.jpg"):
            name = _image_name(path.relative_to(root).as_posix())
            if name:
                yield name, path


def _check(images: dict[str, bytes], origin: str, on_bad_image: str) -> list[str]:
    """Removes undecodable images from ``images``; returns a line for each that is not there."""
    expected = sum(NUM_IMAGES.values())
    checked = progress(list(images), "checking images", total=len(images))
    bad = [name for name in checked if not is_decodable(images[name])]
    lines = [f"{name}: cannot be decoded" for name in bad]
    for split, count in NUM_IMAGES.items():
        found = sum(name.startswith(f"{split}/") for name in images)
        if found != count:
            lines.append(f"{split}: has {found} images instead of {count}")
    if not lines and fingerprint(images) != FINGERPRINT:
        lines = ["some images differ from the published ones (checksum)"]
    if not lines:
        return []
    usable = len(images) - len(bad)
    report = f"{usable} of {expected} images in {origin} can be used: {few(lines)}"
    if on_bad_image == "fail":
        raise InputError(f"{report}: get {URL} again, or go on with on_bad_image='skip'")
    for name in bad:
        del images[name]
    if any(not any(name.startswith(f"{split}/") for name in images) for split in NUM_IMAGES):
        raise InputError(f"{report}: a split would be empty; get {URL} again")
    print(f"skipped: {report}", file=sys.stderr)
    return lines
