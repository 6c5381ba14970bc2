"""A dataset copied at the size that training needs: JPEGs and a CSV manifest.

Photos from a camera are many times larger than what a model sees, and decoding them is most of what
loading a batch costs. ``python -m cbam_jax.datasets resize NAME FOLDER`` does it once; train on
``FOLDER/manifest.csv``.
"""

import csv
import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import cv2

from cbam_jax import InputError
from cbam_jax.datasets import class_folders, is_folder, is_manifest, manifest, open_dataset, tables
from cbam_jax.datasets.decoding import decode_image, jpeg_size
from cbam_jax.datasets.image_files import ImageFiles, good_images
from cbam_jax.datasets.retrieval import RetrievalDataset
from cbam_jax.foreign_files import expanded, read_file, read_json
from cbam_jax.progress import progress
from cbam_jax.whole_files import written_whole

MANIFEST = "manifest.csv"
_JPEG_SIDE = 65_500  # pixels, of libjpeg
_SETTINGS = "settings.json"  # of an unfinished copy: what it is a copy of
Row = tuple[dict[str, str], Callable[[], bytes]]  # of the manifest, and its image's file


def resize_dataset(
    name: str,
    folder: str | os.PathLike,
    *,
    short_side: int = 256,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    on_bad_image: str = "fail",
) -> int:
    """Copies all splits of a dataset into ``folder``, images with a short side of ``short_side``.

    ``folder/manifest.csv`` has the columns of a CSV manifest that is copied, others included, or
    else those that the dataset has: label, split, queries and gallery, item, series and box. Boxes
    are scaled, and the splits are written down where a hash made them. Masks are not copied. Images
    are those of :func:`shrink` at quality 95; ``.jpg`` is added to names that do not end so.
    ``folder`` appears when it is complete. Until then the copy is in ``folder.partial``, where the
    same call goes on after an interruption.

    Args:
        name: a dataset, a CSV or a folder of class folders, as for
            :func:`cbam_jax.datasets.open_dataset`; the rest likewise.
        folder: where to; must not exist.
        short_side: pixels, at least 8. Images are never enlarged.
        data_dir: where prepared datasets live.
        manual_dir: the folder of what was fetched by hand.
        on_bad_image: ``"fail"`` or ``"skip"``.

    Returns:
        The number of images.

    Raises:
        InputError: unsuitable arguments, an image that cannot be read, no room on the disk.
    """
    folder = Path(os.path.expanduser(folder))
    if short_side < 8:
        raise InputError(f"short_side={short_side}: give at least 8 pixels")
    if folder.exists():
        raise InputError(f"{folder} exists already: give a new folder, or remove it")
    if is_manifest(name):
        rows = _rows_of_manifest(expanded(name), on_bad_image)
    else:
        options = {"manual_dir": manual_dir, "on_bad_image": on_bad_image}
        rows = _rows_of_splits(name, data_dir=data_dir, **options)
    _check_paths(rows)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _start(partial, {"name": str(name), "short_side": short_side})
        _copy_all(rows, partial, short_side)
        (partial / _SETTINGS).unlink()
        partial.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or partial} ({error.strerror}): make room or give "
            "another folder; the same command goes on"
        ) from error
    return len(rows)


def shrink(encoded: bytes, *, short_side: int, quality: int, name: str = "an image") -> bytes:
    """An image as JPEG with a shorter short side, by the mean over each pixel's area.

    One that is not larger keeps its size, and a JPEG its bytes.

    Raises:
        InputError: the image cannot be decoded, or would be larger than a JPEG can be.

    Example:
        >>> import numpy as np
        >>> png = cv2.imencode(".png", np.zeros((40, 30, 3), np.uint8))[1].tobytes()
        >>> jpeg_size(shrink(png, short_side=15, quality=95))
        (20, 15)
    """
    image = decode_image(encoded, name=name)
    height, width = image.shape[:2]
    scale = min(1, short_side / min(height, width))
    if scale == 1 and jpeg_size(encoded) is not None:
        return encoded
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    if max(size) > _JPEG_SIDE:
        raise InputError(
            f"{name} of {width} x {height} would become {size[0]} x {size[1]} pixels, and a JPEG "
            f"has at most {_JPEG_SIDE} a side: cut it, or give a smaller --short_side"
        )
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _rows_of_manifest(path: Path, on_bad_image: str) -> list[Row]:
    table = tables.read_table(path)
    usable = good_images(path, table["path"], on_bad_image=on_bad_image)
    rows = tables.read_rows(path)
    splits = [row["split"] for row in rows] if "split" in table else manifest.assign_splits(table)
    images = ImageFiles(tuple(table["path"]))
    return [
        (
            row | {"path": _inside(table["id"][index]), "split": splits[index]},
            functools.partial(images.__getitem__, index),
        )
        for index, row in enumerate(rows)
        if usable[index]
    ]


def _inside(path: str) -> str:
    """A path without the parts that lead out of a folder: ``/a/b.jpg`` and ``../a/b.jpg``."""
    return "/".join(part for part in PurePosixPath(path).parts if part not in ("/", ".."))


def _rows_of_splits(name: str, **options) -> list[Row]:
    if is_folder(name):
        splits = class_folders.split_names(name)
    else:
        from cbam_jax.datasets.prepared import prepare

        splits = list(prepare(name, **options).info.splits)
    rows = []
    for split in splits:
        dataset = open_dataset(name, split, **options)
        written = "validation" if split in tables.VALIDATION else split
        rows += [
            (_row(dataset, index, written), functools.partial(dataset.encoded, index))
            for index in range(len(dataset))
        ]
    return rows


def _row(dataset: RetrievalDataset, index: int, split: str) -> dict[str, str]:
    # One image may be in several splits, but a path is in a manifest once.
    path = PurePosixPath(_inside(dataset.id[index]))
    row = {
        "path": str(path if path.parts[0] == split else split / path),
        "label": dataset.label_names[dataset.label[index]],
        "split": split,
        "is_query": str(int(dataset.is_query[index])),
        "is_gallery": str(int(dataset.is_gallery[index])),
    }
    if dataset.item is not None:
        row["item_id"] = str(dataset.item[index])
    if dataset.series is not None:
        row["series"] = str(dataset.series[index])
    if dataset.bbox is not None:
        box = dataset.bbox[index].tolist()
        missing = all(map(math.isnan, box))  # which a manifest writes as four empty cells
        if not missing and not (box[0] < box[2] and box[1] < box[3]):
            raise InputError(
                f"{dataset.id[index]} of {dataset.name}: the box {box} is empty, which a manifest "
                "cannot hold: correct it"
            )
        cells = [""] * 4 if missing else map(str, box)
        row |= dict(zip(tables.BOX, cells, strict=True))
    return row


def _check_paths(rows: list[Row]) -> None:
    seen: set[str] = set()
    for row, _ in rows:
        if _target(row) in seen:
            raise InputError(f"two images would be written to {_target(row)}: rename one of them")
        seen.add(_target(row))


def _target(row: dict[str, str]) -> str:
    named = row["path"].lower().endswith((".jpg", ".jpeg"))
    return row["path"] if named else f"{row['path']}.jpg"


def _start(partial: Path, settings: dict) -> None:
    """Makes the folder of an unfinished copy, or sees that the one there is of the same."""
    path = partial / _SETTINGS
    if not partial.exists():
        partial.mkdir(parents=True)
        with written_whole(path) as file:
            file.write_text(json.dumps(settings))
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = None
    if found != settings:
        raise InputError(
            f"{partial} holds an unfinished copy of something else ({found}): remove it, or give "
            "another folder"
        )


def _copy_all(rows: list[Row], folder: Path, short_side: int) -> None:
    copy = functools.partial(_copy, folder=folder, short_side=short_side)
    with ThreadPoolExecutor() as pool:
        done = progress(pool.map(copy, rows), "resizing images", total=len(rows))
        _write_manifest(folder / MANIFEST, list(done))


def _copy(row: Row, *, folder: Path, short_side: int) -> dict[str, str]:
    """Writes one image, unless it is there, and returns its row of the new manifest."""
    columns, read = row
    columns = columns | {"path": _target(columns)}
    path = folder / columns["path"]
    encoded = read()
    if path.exists():
        small = read_file(path)
    else:
        small = shrink(encoded, short_side=short_side, quality=95, name=columns["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_bytes(small)
    if columns.get(tables.BOX[0]):
        (height, width), (new_height, new_width) = _size(encoded), _size(small)
        scales = (new_width / width, new_height / height) * 2
        for side, scale in zip(tables.BOX, scales, strict=True):
            columns[side] = f"{float(columns[side]) * scale:.2f}"
    return columns


def _size(encoded: bytes) -> tuple[int, ...]:
    return jpeg_size(encoded) or decode_image(encoded).shape[:2]


def _write_manifest(path: Path, rows: list[dict[str, str]]) -> None:
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
