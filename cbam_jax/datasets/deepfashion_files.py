"""DeepFashion's files as they are published: the folders, the lists, whose boxes mean which pixels.

The lists are tables of words between runs of spaces. Their first line holds the number of rows and
the second names the columns, except in lists of items, which have no second line. Paths begin with
``img/``. Nothing of DeepFashion is fetched here: it is given to those who sign its agreement, see
https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.retrieval import decode_image

SITE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion"
SPLITS = ("train", "validation", "test")
SOURCES = ("shop", "consumer")
MISSING = "is missing"  # what a Look says of a file that is not there

# Where a release keeps its lists: the old folders, the new one, a flat copy. Anno_fine is not among
# them: its lists have the same names, and hold 20,000 images and 26 attributes.
_LIST_FOLDERS = ("Eval", "Anno", "Anno_coarse", "")
_PARTITION = "list_eval_partition.txt"
_SQUARE, _LONG_SIDE = (256, 256), 300  # pixels, of low-resolution images: of In-shop, of others


class Benchmark(NamedTuple):
    """One of DeepFashion's benchmarks: what a list is for -> the names that it goes by.

    The first required list tells the benchmark. ``published`` are the counts that its authors give.
    """

    title: str
    page: str
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]
    published: dict[str, int]


BENCHMARKS = {
    "deepfashion_inshop": Benchmark(
        "In-shop Clothes Retrieval Benchmark",
        f"{SITE}/InShopRetrieval.html",
        {"boxes": ("list_bbox_inshop.txt",), "partition": (_PARTITION,)},
        {"landmarks": ("list_landmarks_inshop.txt",), "items": ("list_item_inshop.txt",)},
        {
            "images": 52_712, "items": 7_982, "train images": 25_882, "query images": 14_218,
            "gallery images": 12_612, "train items": 3_997, "test items": 3_985,
        },
    ),
    "deepfashion_consumer2shop": Benchmark(
        "Consumer-to-shop Clothes Retrieval Benchmark",
        f"{SITE}/Consumer2ShopRetrieval.html",
        {"boxes": ("list_bbox_consumer2shop.txt",), "partition": (_PARTITION,)},
        {
            "landmarks": ("list_landmarks_consumer2shop.txt",),
            "items": ("list_item_consumer2shop.txt", "list_items_consumer2shop.txt"),
        },
        {"images": 239_557, "items": 33_881, "pairs": 195_540},
    ),
    "deepfashion_category": Benchmark(
        "Category and Attribute Prediction Benchmark",
        f"{SITE}/AttributePrediction.html",
        {
            "categories": ("list_category_img.txt",),
            "category names": ("list_category_cloth.txt",),
            "boxes": ("list_bbox.txt",),
            "partition": (_PARTITION,),
        },
        {
            # Its README calls the landmarks by the name that they have in the other benchmark.
            "landmarks": ("list_landmarks.txt", "list_landmarks_consumer2shop.txt"),
            "attributes": ("list_attr_img.txt",),
            "attribute names": ("list_attr_cloth.txt",),
        },
        {
            "images": 289_222, "categories": 50, "train images": 209_222, "val images": 40_000,
            "test images": 40_000, "attributes": 1_000,
        },
    ),
}  # fmt: skip


class Layout(NamedTuple):
    """Where a copy of a benchmark keeps what."""

    benchmark: str
    root: Path
    lists: dict[str, Path]
    images: Path  # the folder that holds img/ and img_highres/
    highres: bool

    def file(self, path: str) -> Path:
        """The image that the lists call ``path``, in the resolution that was asked for."""
        return self.images / (f"img_highres{path[3:]}" if self.highres else path)

    @property
    def padded(self) -> bool:
        """Whether low-resolution images have borders that high-resolution ones have not."""
        return self.benchmark == "deepfashion_inshop"


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


# Layout.


def find_layout(name: str, manual_dir: str | Path | None, *, highres: bool = False) -> Layout:
    """Finds a benchmark in ``manual_dir``, in a folder of it, or in a folder of that.

    The lists may be in ``Anno`` or ``Anno_coarse`` and ``Eval``, or beside the images; ``img`` may
    be in ``Img`` or not.

    Args:
        name: one of :data:`BENCHMARKS`.
        manual_dir: where the user put it.
        highres: look for ``img_highres`` in place of ``img``.

    Raises:
        InputError: names what was expected and what was found.
    """
    benchmark = BENCHMARKS[name]
    if manual_dir is None:
        raise InputError(
            f"{name} is not downloaded: sign the agreement on {benchmark.page}, unpack what you "
            f"get, and give the folder '{benchmark.title}' as manual_dir"
        )
    root = _find_root(name, Path(manual_dir))
    wanted = benchmark.required | benchmark.optional
    lists = {purpose: _find_list(root, names) for purpose, names in wanted.items()}
    missing = [benchmark.required[key][0] for key in benchmark.required if lists[key] is None]
    if missing:
        raise InputError(
            f"{root} lacks {', '.join(missing)}: expected in Eval/, Anno/, Anno_coarse/ or "
            f"{root.name}/ itself; {_found(root)}"
        )
    found = {purpose: path for purpose, path in lists.items() if path is not None}
    return Layout(name, root, found, _find_images(root, highres), highres)


def _find_root(name: str, manual_dir: Path) -> Path:
    level = [manual_dir]
    for _ in range(3):
        roots = [folder for folder in level if _holds(folder, name)]
        if len(roots) > 1:
            raise InputError(
                f"{manual_dir} holds {BENCHMARKS[name].title} more than once: give one of "
                f"{', '.join(map(str, roots))} as manual_dir"
            )
        if roots:
            return roots[0]
        level = [child for folder in level for child in _folders(folder)]
    raise _no_layout(name, manual_dir)


def _no_layout(name: str, manual_dir: Path) -> InputError:
    signature = next(iter(BENCHMARKS[name].required.values()))[0]
    folders = [manual_dir, *_folders(manual_dir)]
    others = [other for other in BENCHMARKS for folder in folders if _holds(folder, other)]
    hint = f" (it holds what {others[0]} wants)" if others else ""
    if any((folder / "Anno_fine" / signature).exists() for folder in folders):
        hint = " (it is in Anno_fine, which covers a part only: unpack Anno_coarse as well)"
    return InputError(
        f"manual_dir {manual_dir} is not the {BENCHMARKS[name].title}: expected {signature} in "
        f"Anno/, Anno_coarse/ or beside the images{hint}; {_found(manual_dir)}"
    )


def _holds(folder: Path, name: str) -> bool:
    return _find_list(folder, next(iter(BENCHMARKS[name].required.values()))) is not None


def _find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    paths = (root / folder / name for folder in _LIST_FOLDERS for name in names)
    return next((path for path in paths if path.is_file()), None)


def _find_images(root: Path, highres: bool) -> Path:
    name = "img_highres" if highres else "img"
    for folder in (root / "Img", root):
        if (folder / name).is_dir():
            return folder
    other = "; without highres the low resolution is used" if highres else ""
    raise InputError(
        f"{root} has no images: expected the folder Img/{name} or {name}, unpacked from "
        f"{name}.zip{other}; {_found(root)}"
    )


def _folders(folder: Path) -> list[Path]:
    try:
        children = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        return []
    skipped = ("img", "anno_fine")  # thousands of folders; lists of the same names
    return [path for path in children if not path.name.lower().startswith(skipped)]


def _found(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    packed = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.zip"))
    packed += [name for name in names if name.endswith(".zip")]
    text = f"found {', '.join(names[:10]) or 'nothing'}" + (", ..." if len(names) > 10 else "")
    return f"{text}; not unpacked: {', '.join(packed[:5])}" if packed else text


# Lists.


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
        lines = path.read_bytes().decode("utf-8-sig", "replace").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    rows, most, blank = [], most or columns, 0
    for number, line in enumerate(lines[header:], header + 1):
        words = line.split()
        if columns <= len(words) <= most:
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
    try:
        return [int(word, 10) for word in words]  # may be padded with zeros: 072
    except ValueError:
        problems.append(f"{path.name} has no whole numbers for {row[0]}: {' '.join(row[1:8])}")
        return None


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
    match = re.fullmatch(r"id_(\d+)", text)
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


# Benchmarks.


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
    counts = {"images": len(photos), "items": len({photo.item for photo in photos.values()})}
    for status in ("train", "query", "gallery"):
        counts[f"{status} images"] = sum(other == status for other in statuses.values())
    for split in ("train", "test"):
        items = {photo.item for photo in photos.values() if photo.split == split}
        counts[f"{split} items"] = len(items)
    return _annotations(layout, _carve_validation(list(photos.values())), 7, counts, problems)


def _shoot(path: str, item: int) -> int:
    """The number of a colour's shoot: ``.../02_1_front.jpg`` is of the second of its item."""
    match = re.match(r"(\d+)_", path.rpartition("/")[2])
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
    path, category_of = layout.lists["categories"], {}
    for row in read_list(path, problems, columns=2):
        number = _integers(path, row[1:], problems, row)
        if number and 1 <= number[0] <= len(categories):
            category_of[row[0]] = categories[number[0] - 1]
        elif number:
            problems.append(f"{path.name} has the unknown category {number[0]} for {row[0]}")
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
    with open(path, "rb") as file:
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


# Images and their boxes.


class Look(NamedTuple):
    """An image file: its size (width, height), None where ``problem`` says why; its SHA-256."""

    size: tuple[int, int] | None
    digest: bytes
    problem: str


def look_at(files: Sequence[Path]) -> Iterator[Look]:
    """Reads and decodes image files on all cores, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 4096):  # map() would queue all of them at once
            yield from pool.map(_look, files[start : start + 4096])


def _look(file: Path) -> Look:
    try:
        encoded = file.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Look(None, b"", MISSING if missing else f"cannot be read ({error.strerror})")
    digest = hashlib.sha256(encoded).digest()
    try:
        height, width = decode_image(encoded).shape[:2]
    except InputError:
        return Look(None, digest, "cannot be decoded")
    return Look((width, height), digest, "")


def low_size(layout: Layout, path: str, size: tuple[float, float]) -> tuple[float, float]:
    """Width and height of the low-resolution image, in whose pixels the lists have their boxes.

    In high resolution it is looked at where it is there; else it is what its authors say: 256 x 256
    for In-shop, and a long side of 300 pixels for the others.
    """
    if not layout.highres:
        return size
    low = _look(layout.images / path).size
    if low is not None:
        return low
    shrink = _LONG_SIDE / max(size)
    return _SQUARE if layout.padded else (size[0] * shrink, size[1] * shrink)


def to_pixels(
    points: np.ndarray, low: tuple[float, float], size: tuple[float, float], *, padded: bool
) -> np.ndarray:
    """Takes points of the low-resolution image to the image of ``size``.

    In-shop's low-resolution images are the high ones shrunk into a square and centred, so that the
    borders of a portrait are no part of it (``padded``). The other benchmarks' are only shrunk.

    Args:
        points: [..., 2], x and y in pixels of the low-resolution image.
        low: its width and height.
        size: width and height of the image that is used.
        padded: whether the low-resolution image has borders.

    Returns:
        float32 [..., 2], pixels of the image that is used; not clipped to it.

    Example:
        >>> corners = np.array([[40.5, 0], [215.5, 256]])  # of a 750 x 1101 photo in 256 x 256
        >>> to_pixels(corners, (256, 256), (750, 1101), padded=True).round().tolist()
        [[-1.0, 0.0], [751.0, 1101.0]]
        >>> to_pixels(corners, (200, 256), (800, 1024), padded=False).tolist()
        [[162.0, 0.0], [862.0, 1024.0]]
    """
    low_array, full = np.array(low, np.float64), np.array(size, np.float64)
    if not padded:
        return (points * (full / low_array)).astype(np.float32)
    scale = np.min(low_array / full)
    return ((points - (low_array - full * scale) / 2) / scale).astype(np.float32)


def pixel_box(
    box: tuple[int, ...] | None,
    low: tuple[float, float],
    size: tuple[float, float],
    *,
    padded: bool,
) -> tuple[np.ndarray, str]:
    """A listed box in pixels of the image of ``size``, inside it, and what was wrong with it.

    Returns:
        float32 [4], x1, y1, x2, y2, which hold a pixel at least; and ``""``, ``"clamped"``, or
        ``"missing"`` or ``"empty"``, where the box is the whole image.

    Example:
        >>> pixel_box((5, 4, 30, 99), (40, 60), (40, 60), padded=False)
        (array([ 5.,  4., 30., 60.], dtype=float32), 'clamped')
        >>> pixel_box((9, 4, 9, 20), (40, 60), (40, 60), padded=False)[1]
        'empty'
    """
    whole = np.array([0, 0, *size], np.float32)
    if box is None:
        return whole, "missing"
    corners = to_pixels(np.array(box).reshape(2, 2), low, size, padded=padded).reshape(4)
    clamped = np.clip(corners, 0, np.tile(whole[2:], 2))
    if not (clamped[0] < clamped[2] and clamped[1] < clamped[3]):
        return whole, "empty"
    return clamped, "" if np.abs(corners - clamped).max() < 1 else "clamped"
