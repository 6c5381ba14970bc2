"""Manifests of Stanford Online Products, CUB-200-2011 and Cars-196, from a user's own copy.

The halves are those of the field (Oh Song et al. 2016): classes of the test are never trained on,
and each test image is searched among the others. SOP has the two lists of its authors; of CUB's 200
classes the first 100 are trained on, of Cars' 196 the first 98, whatever halves they came with.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cbam_jax import InputError
from cbam_jax.datasets.matlab_tables import read_structs
from cbam_jax.foreign_files import is_gone, read_text, shown
from cbam_jax.whole_files import written_whole

Row = tuple[str, int, bool]  # An image's path in the copy, its class, whether it is trained on.


def sop(folder: Path) -> Iterator[Row]:
    """Rows of Stanford_Online_Products: Ebay_train.txt and Ebay_test.txt, a header in each."""
    for name, train in (("Ebay_train.txt", True), ("Ebay_test.txt", False)):
        for fields in _fields(folder / name, 4)[1:]:
            yield fields[3], int(fields[1]), train


def cub(folder: Path) -> Iterator[Row]:
    """Rows of CUB_200_2011: images.txt and image_class_labels.txt, both by the image's number."""
    label = dict(_fields(folder / "image_class_labels.txt", 2))
    for number, path in _fields(folder / "images.txt", 2):
        yield f"images/{path}", int(label[number]), int(label[number]) <= 100


def cars(folder: Path) -> Iterator[Row]:
    """Rows of Cars-196: cars_annos.mat, all 16,185 images in one list, beside car_ims/."""
    for row in read_structs(_file(folder / "cars_annos.mat"), "annotations"):
        yield str(row["relative_im_path"]), int(row["class"]), int(row["class"]) <= 98


# Name -> its rows, and what of the copy is to be given.
BENCHMARKS: Mapping[str, tuple[Callable[[Path], Iterator[Row]], str]] = {
    "sop": (sop, "Stanford_Online_Products, with Ebay_train.txt"),
    "cub": (cub, "CUB_200_2011, with images.txt"),
    "cars": (cars, "the folder with cars_annos.mat and car_ims"),
}


def write_manifest(name: str, folder: str | Path, path: str | Path, *, validation: int = 0) -> int:
    """Write the manifest of a benchmark, columns path, label and split; return the images.

    Args:
        name: of `BENCHMARKS`.
        folder: of the copy.
        path: of the CSV, whose paths are absolute.
        validation: the last so many classes that would be trained on become the split validation,
            to choose by; the published numbers train on them as well.

    Raises:
        InputError: for a folder or a list that is none of it, or more classes than there are.
    """
    read, wanted = BENCHMARKS[name]
    folder = Path(folder).expanduser()
    try:
        rows = list(read(folder))
    except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{shown(folder)} is no copy of {name} ({shown(str(error))}): give {wanted}"
        ) from error
    known = sorted({label for _, label, train in rows if train})
    if not 0 <= validation < len(known):
        raise InputError(f"--validation={validation}: {name} trains on {len(known)} classes")
    kept = set(known[len(known) - validation :])
    _check_images(folder, rows)
    with (
        written_whole(path) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for image, label, train in rows:
            split = ("validation" if label in kept else "train") if train else "test"
            writer.writerow([(folder / image).absolute(), label, split])
    return len(rows)


def _check_images(folder: Path, rows: list[Row]) -> None:
    """InputError where images are not beside the lists: the first, the last, any by its path."""
    if not rows:
        raise InputError(f"{shown(folder)}: its list names no image")
    for image, _, _ in rows:
        if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
            raise InputError(f"{shown(folder)}: its list leads out of the folder: {shown(image)}")
    for image, _, _ in (rows[0], rows[-1]):
        if not (folder / image).is_file():
            raise InputError(
                f"{shown(folder / image)} is missing: unpack the images beside the lists"
            )


def _file(path: Path) -> Path:
    if is_gone(path):
        raise InputError(f"{shown(path)} is missing: give the folder that has it")
    return path


def _fields(path: Path, count: int) -> list[list[str]]:
    """The fields of each line of a list."""
    lines = read_text(_file(path)).splitlines()
    rows = [line.split() for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise InputError(f"{shown(path)}:{number} has {len(row)} fields, expected {count}")
    return rows
