"""DeepFashion's lists, read: which images there are, of what, in which split.

The lists are tables of words between runs of spaces. Their first line holds the number of rows and
the second names the columns, except in lists of items, which have no second line. Paths begin with
``img/``.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.deepfashion.layout import Layout
from cbam_jax.foreign_files import MOST_TABLE, open_regular, read_file, shown

SPLITS = ("train", "validation", "test")
_WHOLE = re.compile(r"[-+]?[0-9]{1,9}")  # of pixels, or of a category
SOURCES = ("shop", "consumer")


class Photo(NamedTuple):
    """A row: ``split`` is where the image belongs, of train, validation and test."""

    path: str
    split: str
    category: str
    item: int
    series: int
    source: str
    is_query: bool
    is_gallery: bool


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What the lists of a benchmark say.

    Attributes:
        photos: each image once, in the order of the partition.
        categories: the names of the categories, in the order of their numbers.
        boxes: path -> x1, y1, x2, y2 in pixels of the low resolution, as listed.
        landmarks: path -> int32 [n, 3], visibility (0 visible, 1 occluded, 2 cut off), x and y in
            the same pixels; n is 4 for lower-body clothes, 6 for upper-body, 8 for full-body ones.
        counts: what can be compared with :attr:`Benchmark.published`.
        problems: a line for each row that contradicts the format or another row.
    """

    photos: list[Photo]
    categories: tuple[str, ...]
    boxes: dict[str, tuple[int, ...]]
    landmarks: dict[str, np.ndarray]
    counts: dict[str, int]
    problems: list[str]


def draw_key(text: str) -> bytes:
    """Puts names into an order that looks random and is the same everywhere: their SHA-256."""
    return hashlib.sha256(text.encode()).digest()


def read_list(
    path: Path, problems: list[str], *, columns: int, most: int = 0, header: int = 2
) -> list[list[str]]:
    """Reads a list whole: its rows, each as its words.

    Args:
        path: the file.
        problems: gets a line for each row that does not fit, which is left out, and one where the
            first line announces another number of rows.
        columns: words in a row.
        most: the greatest number of words, where rows are ragged.
        header: lines before the rows.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = read_file(path, MOST_TABLE).decode("utf-8-sig", "replace").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    rows, most, blank = [], most or columns, 0
    for number, line in enumerate(lines[header:], header + 1):
        words = line.split()
        if columns <= len(words) <= most and _leads_out(words[0]):
            problems.append(f"{path.name} line {number} leads out of its folder: {shown(words[0])}")
        elif columns <= len(words) <= most:
            rows.append(words)
        elif words:
            problems.append(f"{path.name} line {number} has {len(words)} words, not {columns}")
        else:
            blank += 1
    announced, found = lines[0].strip(), len(lines[header:]) - blank
    if announced != str(found):
        problems.append(f"{path.name} announces {announced[:40] or 'nothing'} rows and has {found}")
    return rows


def _integers(
    path: Path, words: Sequence[str], problems: list[str], row: list[str]
) -> list[int] | None:
    if all(_WHOLE.fullmatch(word) for word in words):
        return [int(word, 10) for word in words]  # may be padded with zeros: 072
    found = shown(" ".join(row[1:8]), 80)
    problems.append(f"{path.name} has no whole numbers for {shown(row[0])}: {found}")
    return None


def _leads_out(path: str) -> bool:
    """Whether what a list calls a file may lie outside the folder of images, or is no path."""
    return path.startswith("/") or ".." in path.split("/") or "\0" in path


def _read_boxes(layout: Layout, columns: int, problems: list[str]) -> dict[str, tuple[int, ...]]:
    path, boxes = layout.lists["boxes"], {}
    for row in read_list(path, problems, columns=columns):
        numbers = _integers(path, row[-4:], problems, row)
        if numbers:
            boxes[row[0]] = tuple(numbers)
    return boxes


def _read_landmarks(layout: Layout, problems: list[str]) -> dict[str, np.ndarray]:
    if "landmarks" not in layout.lists:
        return {}
    path, landmarks = layout.lists["landmarks"], {}
    for row in read_list(path, problems, columns=3, most=27):
        numbers = _integers(path, row[3:], problems, row)
        if numbers is not None and len(numbers) % 3 == 0:
            landmarks[row[0]] = np.array(numbers, np.int32).reshape(-1, 3)
        elif numbers is not None:
            problems.append(f"{path.name} breaks off in the landmarks of {row[0]}")
    return landmarks


def _add(photos: dict[str, Photo], photo: Photo, problems: list[str]) -> None:
    # The same row twice is one photo.
    if photos.setdefault(photo.path, photo) != photo:
        problems.append(f"{photo.path} is listed twice, with different items or splits")


def _item_number(text: str) -> int | None:
    match = re.fullmatch(r"id_([0-9]{1,9})", text)
    return int(match[1]) if match else None


def _category(path: str) -> str:
    """``img/WOMEN/Dresses/id_00000002/02_1_front.jpg`` -> ``WOMEN/Dresses``."""
    return "/".join(path.split("/")[1:-2])


def _check_items(layout: Layout, photos: Iterable[Photo], problems: list[str]) -> None:
    path = layout.lists.get("items")
    if path is None:
        return
    known = {row[0] for row in read_list(path, problems, columns=1, header=1)}
    used = {f"id_{photo.item:08d}" for photo in photos}
    for item in sorted(used - known):
        problems.append(f"{path.name} lacks {item}, which the partition uses")


def read_inshop(layout: Layout) -> Annotations:
    """Reads the In-shop lists; a tenth of the official train items become validation.

    The official partition has no validation split, so without one users would tune on the test
    items. The tenth is drawn by item, by :func:`draw_key`. All images of train and validation are
    query and gallery; in test, query and gallery images are told apart, and share their items.
    """
    problems: list[str] = []
    path, photos, statuses = layout.lists["partition"], {}, {}
    for name, item_name, status in read_list(path, problems, columns=3):
        item = _item_number(item_name)
        if item is None or status not in ("train", "query", "gallery") or not _category(name):
            problems.append(f"{path.name} has an unknown row: {name} {item_name} {status}")
            continue
        training = status == "train"
        photo = Photo(
            name, "train" if training else "test", _category(name), item, _shoot(name, item),
            "shop", status != "gallery", status != "query",
        )  # fmt: skip
        _add(photos, photo, problems)
        statuses[name] = status
    _check_items(layout, photos.values(), problems)
    counts = _inshop_counts(list(photos.values()), list(statuses.values()))
    return _annotations(layout, _carve_validation(list(photos.values())), 7, counts, problems)


def _inshop_counts(photos: list[Photo], statuses: list[str]) -> dict[str, int]:
    counts = {"images": len(photos), "items": len({photo.item for photo in photos})}
    for status in ("train", "query", "gallery"):
        counts[f"{status} images"] = statuses.count(status)
    for split in ("train", "test"):
        counts[f"{split} items"] = len({photo.item for photo in photos if photo.split == split})
    return counts


def _shoot(path: str, item: int) -> int:
    """The number of a colour's shoot: ``.../02_1_front.jpg`` is of the second of its item."""
    match = re.match(r"([0-9]{1,6})_", path.rpartition("/")[2])
    return 100 * item + (int(match[1]) if match else 0)


def _carve_validation(photos: list[Photo]) -> list[Photo]:
    items = sorted({photo.item for photo in photos if photo.split == "train"})
    items.sort(key=lambda item: draw_key(f"id_{item:08d}"))
    tenth = set(items[: max(1, round(len(items) / 10))])
    return [
        photo._replace(split="validation")
        if photo.split == "train" and photo.item in tenth
        else photo
        for photo in photos
    ]


def read_consumer2shop(layout: Layout) -> Annotations:
    """Reads the Consumer-to-shop lists: rows are pairs, in which both images repeat.

    Consumers' images are queries, shops' images the gallery, equal item is relevant. Their files
    are called ``comsumer_NN.jpg``; that is how they are spelled.
    """
    problems: list[str] = []
    path, photos = layout.lists["partition"], {}
    splits = {"train": "train", "val": "validation", "test": "test"}
    rows = read_list(path, problems, columns=4)
    for consumer, shop, item_name, status in rows:
        item = _item_number(item_name)
        if item is None or status not in splits or not (_category(consumer) and _category(shop)):
            problems.append(f"{path.name} has an unknown row: {consumer} {shop} {item_name}")
            continue
        for name, source in ((shop, "shop"), (consumer, "consumer")):
            shown = source == "consumer"
            photo = Photo(
                name, splits[status], _category(name), item, 2 * item + shown, source,
                shown, not shown,
            )  # fmt: skip
            _add(photos, photo, problems)
    _check_items(layout, photos.values(), problems)
    items = {photo.item for photo in photos.values()}
    counts = {"items": len(items), "pairs": len(rows)}
    annotations = _annotations(layout, list(photos.values()), 7, counts, problems)
    annotations.counts["images"] = len(annotations.boxes.keys() | photos.keys())
    return annotations


def read_category(layout: Layout) -> Annotations:
    """Reads the lists of Category and Attribute Prediction, but for the attributes.

    An item is a folder, which holds what one search of a shop found. The official partition is by
    image, so that a folder has images in every split.
    """
    problems: list[str] = []
    names = read_list(layout.lists["category names"], problems, columns=2, most=99)
    categories = tuple(" ".join(row[:-1]) for row in names)  # numbered from 1 by their place
    category_of = _read_categories(layout, categories, problems)
    path, photos = layout.lists["partition"], {}
    splits = {"train": "train", "val": "validation", "test": "test"}
    rows = read_list(path, problems, columns=2)
    folders = sorted({name.rpartition("/")[0] for name, _ in rows})
    item_of = {folder: number for number, folder in enumerate(folders)}
    for name, status in rows:
        if status not in splits or name not in category_of:
            problems.append(f"{path.name} has an unknown row or no category: {name} {status}")
            continue
        item = item_of[name.rpartition("/")[0]]
        photo = Photo(name, splits[status], category_of[name], item, item, "", True, True)
        _add(photos, photo, problems)
    counts = {"images": len(photos), "categories": len(categories)}
    for status, split in splits.items():
        counts[f"{status} images"] = sum(photo.split == split for photo in photos.values())
    return _annotations(layout, list(photos.values()), 5, counts, problems, categories)


def _read_categories(
    layout: Layout, categories: tuple[str, ...], problems: list[str]
) -> dict[str, str]:
    """Path -> the name of its category."""
    path, category_of = layout.lists["categories"], {}
    for row in read_list(path, problems, columns=2):
        number = _integers(path, row[1:], problems, row)
        if number and 1 <= number[0] <= len(categories):
            category_of[row[0]] = categories[number[0] - 1]
        elif number:
            problems.append(f"{path.name} has the unknown category {number[0]} for {row[0]}")
    return category_of


def _annotations(
    layout: Layout,
    photos: list[Photo],
    box_columns: int,
    counts: dict[str, int],
    problems: list[str],
    categories: tuple[str, ...] | None = None,
) -> Annotations:
    if categories is None:
        categories = tuple(sorted({photo.category for photo in photos}))
    boxes = _read_boxes(layout, box_columns, problems)
    landmarks = _read_landmarks(layout, problems)
    return Annotations(photos, categories, boxes, landmarks, counts, problems)


def read_attributes(
    layout: Layout, problems: list[str]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Reads the attributes' names, and path -> int16 [n], the numbers of those that an image has.

    The list is 870 MB of -1 and 1, so it is streamed and its rows are compared as bytes.
    """
    if "attributes" not in layout.lists or "attribute names" not in layout.lists:
        return (), {}
    rows = read_list(layout.lists["attribute names"], problems, columns=2, most=99)
    names = [" ".join(row[:-1]) for row in rows]
    names = [f"{n} ({i})" if n in names[:i] else n for i, n in enumerate(names)]
    path, attributes, count = layout.lists["attributes"], {}, 0
    with open_regular(path, MOST_TABLE) as file:
        announced = file.readline().strip()
        file.readline()
        for line in file:
            name, _, values = line.partition(b" ")
            if not name.strip():
                continue
            count += 1
            digits = np.frombuffer(b" " + values, np.uint8)
            first = digits[1:][(digits[1:] > 32) & (digits[:-1] <= 32)]  # of each word
            if len(first) == len(names):
                attributes[name.decode(errors="replace")] = np.flatnonzero(
                    first == ord("1")
                ).astype(np.int16)
            else:
                problems.append(f"{path.name} has {len(first)} attributes for {name!r}")
    if announced != str(count).encode():
        problems.append(f"{path.name} announces {announced!r:.40} rows and has {count}")
    return tuple(names), attributes


READERS: dict[str, Callable[[Layout], Annotations]] = {
    "deepfashion_inshop": read_inshop,
    "deepfashion_consumer2shop": read_consumer2shop,
    "deepfashion_category": read_category,
}
