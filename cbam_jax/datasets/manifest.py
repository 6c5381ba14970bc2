"""A CSV manifest: a user's own photos, read in place.

The first line names the columns, in any order::

    path,label[,split][,is_query,is_gallery][,item_id][,series][,x1,y1,x2,y2]

==================  ==============================================================================
path                an image file, relative to the folder of the CSV (or absolute); each only once
label               any text; equal text means "similar"
split               any text, e.g. train, validation, test
is_query            1/0, true/false or yes/no; without the column every image is a query
is_gallery          likewise
item_id             any text; equal for photos of one product
series              any text; equal for photos of one shoot
x1, y1, x2, y2      box of the garment in pixels; a row without one is its whole image
==================  ==============================================================================

Without a ``split`` column the rows are split here, 80 % train, 10 % validation, 10 % test, see
:func:`assign_splits`. Other columns are ignored, and named on stderr.
"""

import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.image_files import ImageFiles, good_boxes, good_images, tell_copies
from cbam_jax.datasets.retrieval import RetrievalDataset
from cbam_jax.datasets.tables import read_table
from cbam_jax.foreign_files import expanded, shown_names
from cbam_jax.progress import tell

LABELS = ("label", "item_id", "series")
ALL = "all"  # The split of every row, unless the column has that name.


def open_manifest(
    path: str | os.PathLike,
    split: str,
    *,
    label: str = "label",
    on_bad_image: str = "fail",
    crop_to_box: bool = False,
) -> RetrievalDataset:
    """Opens one split of a CSV manifest. Nothing is converted or copied.

    The whole table is checked, whatever the split, and labels are numbered over the whole table in
    sorted order, so that the splits agree. ``item`` and ``series`` are numbered the same way.

    Bad images: ``"fail"`` checks that every file exists, begins like an image and has its end, so
    that half-copied ones are found; one that is damaged within fails when it is decoded. ``"skip"``
    has to know what to skip, so it decodes every file of the table once (at an eighth of the
    resolution), leaves out what fails, and writes the list beside the CSV, as
    ``<name>.skipped.txt``, which later calls read until a file changes.

    Args:
        path: the CSV file, UTF-8 with or without BOM.
        split: a value of the ``split`` column, or one of :func:`assign_splits`; or ``all`` rows.
        label: the column that decides what is similar: ``label``, ``item_id`` or ``series``.
        on_bad_image: ``"fail"`` or ``"skip"``.
        crop_to_box: whether the boxes will be cut out, so that each must hold a pixel of its image;
            one that does not is treated as a bad image.

    Raises:
        InputError: names the file, the row (as a spreadsheet numbers it: the header is row 1) and
            the remedy.
    """
    name, path = str(path), expanded(path)
    split = unicodedata.normalize("NFC", split)
    table = read_table(path)
    if label not in LABELS or label not in table:
        found = [column for column in LABELS if column in table]
        raise InputError(f"label='{label}' is not a column of {path}: choose one of {found}")
    if split == ALL and ALL not in table.get("split", ()):
        table["split"] = [ALL] * len(table["path"])
    if "split" not in table:
        table["split"] = assign_splits(table)
        counts = {name: table["split"].count(name) for name in ("train", "validation", "test")}
        tell(f"{path} has no split column; split by hash into {counts}")
    here = np.array([each == split for each in table["split"]])
    if not here.any():
        names = sorted(set(table["split"]))
        raise InputError(
            f"split '{split}' has no rows in {path}: choose one of {shown_names([*names, ALL])}, "
            "or name it in the split column"
        )
    good = good_images(path, table["path"], on_bad_image=on_bad_image)
    rows = np.flatnonzero(good).tolist()
    columns = ("id", "path", "split")
    tell_copies(name, *([table[column][row] for row in rows] for column in columns))
    here &= good
    if crop_to_box and "bbox" in table:
        boxes = np.array(table["bbox"], np.float64)
        files = table["id"], table["path"]
        here &= good_boxes(path, *files, boxes, on_bad_image=on_bad_image)
    return _select(path, split, table, label, np.flatnonzero(here))


def assign_splits(table: dict[str, list]) -> list[str]:
    """Splits rows into train, validation and test (80/10/10), the same way every time.

    All photos of one ``item_id`` stay together (of one ``path``, without that column). Within each
    label the items are put in the order of the SHA-256 of their names; the first tenth (rounded) is
    test, the second validation, but of few items two each, since one alone would have nothing to
    find. So the splits are stratified, and don't depend on the order of the rows. A label of four
    or five items gives two to validation and none to test; one of fewer is in train only.

    Example:
        >>> table = {"label": ["hat"] * 10, "id": [f"{i}.jpg" for i in range(10)]}
        >>> splits = assign_splits(table)
        >>> {name: splits.count(name) for name in ("train", "validation", "test")}
        {'train': 6, 'validation': 2, 'test': 2}
    """
    items = table.get("item_id") or table["id"]
    label_of: dict[str, str] = {}
    for item, label in zip(items, table["label"], strict=True):
        label_of[item] = min(label, label_of[item]) if item in label_of else label
    members: dict[str, list[str]] = {}
    for item in sorted(label_of, key=_digest):
        members.setdefault(label_of[item], []).append(item)
    split_of: dict[str, str] = {}
    for ordered in members.values():
        tenth = max(2, round(len(ordered) / 10))
        test, validation = tenth * (len(ordered) >= 6), tenth * (len(ordered) >= 4)
        names = ["test"] * test + ["validation"] * validation
        names += ["train"] * (len(ordered) - len(names))
        split_of |= dict(zip(ordered, names, strict=True))
    return [split_of[item] for item in items]


def check_images(path: str | os.PathLike, *, on_bad_image: str = "fail") -> dict[str, int]:
    """Decodes every image of a manifest, and returns how many of each split can be used.

    Raises:
        InputError: as :func:`good_images`.
    """
    path = expanded(path)
    table = read_table(path)
    good = good_images(path, table["path"], on_bad_image=on_bad_image, decode=True)
    splits = np.array(table.get("split") or assign_splits(table))
    return {name: int(good[splits == name].sum()) for name in dict.fromkeys(splits.tolist())}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _numbered(texts: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    names = sorted(set(texts))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[text] for text in texts], np.int64), tuple(names)


def _select(
    path: Path, split: str, table: dict[str, list], label: str, rows: np.ndarray
) -> RetrievalDataset:
    labels, label_names = _numbered(table[label])

    def number(column: str) -> np.ndarray | None:
        return _numbered(table[column])[0][rows] if column in table else None

    def flag(column: str) -> np.ndarray:
        return np.array(table.get(column, [True] * len(labels)), bool)[rows]

    return RetrievalDataset(
        name=str(path),
        split=split,
        label=labels[rows].astype(np.int32),
        label_names=label_names,
        id=np.array(table["id"])[rows],
        is_query=flag("is_query"),
        is_gallery=flag("is_gallery"),
        item=number("item_id"),
        series=number("series"),
        bbox=np.array(table["bbox"], np.float32)[rows] if "bbox" in table else None,
        images=ImageFiles(tuple(table["path"][row] for row in rows)),
    )
