"""Checks any dataset's images: those that cannot be used, and those that are there more than once.

What training has seen and evaluation is asked to find again, equal to the byte or nearly, makes a
model look better than it is.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets import class_folders, decoding, is_folder, is_manifest, manifest
from cbam_jax.datasets.image_files import name_problem
from cbam_jax.datasets.looks import differing_bits, look_of, small_image
from cbam_jax.datasets.tables import read_table
from cbam_jax.foreign_files import expanded, read_file, shown
from cbam_jax.progress import progress

_SHOWN = 10  # findings of a kind
_TWO_LABELS = "the same photo under two classes"
# Of two photos that are nearly the same: how many of the 64 bits of their looks differ at most, and
# by how many grey levels their thumbnails differ in the mean.
_BITS, _LEVELS = 8, 6


class Photo(NamedTuple):
    """One image of a dataset, wherever it lies."""

    split: str
    name: str
    label: str
    read: Callable[[], bytes]


class Seen(NamedTuple):
    """What is kept of an image: what is wrong with it, its hash, and how it looks."""

    problem: str
    digest: bytes = b""
    look: int = 0
    thumbnail: np.ndarray = np.zeros((16, 16, 3), np.int16)


def verify(name: str, *, data_dir: str | None, manual_dir: str | None, show_all: bool) -> int:
    """Checks every image of every split, and prints what is found. Nothing is written.

    Args:
        name: a dataset, a manifest or a folder, as for :func:`cbam_jax.datasets.open_dataset`.
        data_dir: where prepared datasets live.
        manual_dir: the folder of what was fetched by hand.
        show_all: print every finding, not the first ten of a kind.

    Returns:
        0, or 1 where something is found.

    Raises:
        InputError: there is nothing to check.
    """
    photos = list(_photos(name, data_dir, manual_dir))
    with ThreadPoolExecutor() as pool:
        looked = progress(pool.map(_look, photos), "checking images", total=len(photos))
        seen = list(looked)
    splits = sorted({photo.split for photo in photos})
    print(f"{name}: {len(photos)} images in the splits {', '.join(splits)}")
    equal = _equal_images(photos, seen)
    found = {
        _TWO_LABELS: equal.pop(_TWO_LABELS),  # A mistake in the labels, which training would learn.
        "images that cannot be used": [
            f"{_called(photo)}: {look.problem}"
            for photo, look in zip(photos, seen, strict=True)
            if look.problem
        ],
        **equal,
        "near copies in two splits": list(_near_copies(photos, seen)),
    }
    for kind, lines in found.items():
        print(f"{kind}: {len(lines) or 'none'}")
        for line in lines if show_all else lines[:_SHOWN]:
            print(f"  {line}")
        if len(lines) > _SHOWN and not show_all:
            print(f"  and {len(lines) - _SHOWN} more: --all shows them")
    return int(any(found.values()))


def _photos(name: str, data_dir: str | None, manual_dir: str | None) -> Iterator[Photo]:
    if is_manifest(name):
        table = read_table(expanded(name))
        splits = table.get("split") or manifest.assign_splits(table)
        for row in zip(splits, table["id"], table["label"], table["path"], strict=True):
            yield Photo(*row[:3], _reader(row[3]))
    elif is_folder(name):
        for split, inside, label, file in class_folders.photos(name):
            yield Photo(split, inside, label, _reader(file))
    else:
        yield from _prepared_photos(name, data_dir, manual_dir)


def _prepared_photos(name: str, data_dir: str | None, manual_dir: str | None) -> Iterator[Photo]:
    from cbam_jax.datasets.prepared import open_prepared, prepare

    options: dict = {"data_dir": data_dir, "manual_dir": manual_dir, "on_bad_image": "skip"}
    for split in prepare(name, **options).info.splits:
        dataset = open_prepared(name, split, **options)
        for index in range(len(dataset)):
            label = dataset.label_names[dataset.label[index]]
            read = lambda dataset=dataset, index=index: dataset.encoded(index)  # noqa: E731
            yield Photo(split, dataset.id[index], label, read)


def _reader(file: str) -> Callable[[], bytes]:
    def read() -> bytes:
        if problem := name_problem(file):
            raise InputError(problem)
        return read_file(file)

    return read


def _look(photo: Photo) -> Seen:
    try:
        encoded = photo.read()
    except (OSError, InputError) as error:
        return Seen(getattr(error, "strerror", None) or shown(str(error)))
    look = look_of(encoded) if decoding.is_decodable(encoded) else None
    if look is None:
        heic = decoding.not_installed(decoding.image_format(encoded))
        return Seen(decoding.HEIC_REMEDY if heic else "cannot be decoded")
    image = cv2.resize(small_image(encoded, 64), (16, 16), interpolation=cv2.INTER_AREA)
    return Seen("", hashlib.sha256(encoded).digest(), look, image.astype(np.int16))


def _equal_images(photos: Sequence[Photo], seen: Sequence[Seen]) -> dict[str, list[str]]:
    """Images of the same bytes: under two classes, in two splits, in one under one class."""
    groups: dict[bytes, list[Photo]] = {}
    for photo, look in zip(photos, seen, strict=True):
        if not look.problem:
            groups.setdefault(look.digest, []).append(photo)
    repeated = [group for group in groups.values() if len(group) > 1]
    return {
        "equal images in two splits": _lines(g for g in repeated if _several(g, "split")),
        "equal images in one split": _lines(
            g for g in repeated if not (_several(g, "split") or _several(g, "label"))
        ),
        _TWO_LABELS: [
            f"{line}: {shown(' and '.join(sorted({photo.label for photo in group})))}"
            for group in repeated
            if _several(group, "label")
            for line in _lines([group])
        ],
    }


def _several(group: Iterable[Photo], field: str) -> bool:
    return len({getattr(photo, field) for photo in group}) > 1


def _lines(groups: Iterable[list[Photo]]) -> list[str]:
    return [" = ".join(map(_called, group)) for group in groups]


def _called(photo: Photo) -> str:
    return f"{shown(photo.name)} ({shown(photo.split)})"


def _near_copies(photos: Sequence[Photo], seen: Sequence[Seen]) -> Iterator[str]:
    """Pairs of two splits that look alike, but for those whose bytes are equal."""
    rows = np.array([row for row, look in enumerate(seen) if not look.problem], int)
    looks = np.array([seen[row].look for row in rows], np.int64)
    splits = np.array([photos[row].split for row in rows])
    for place, row in enumerate(rows):
        near = (differing_bits(seen[row].look, looks[:place]) <= _BITS) & (
            splits[:place] != splits[place]
        )
        for other in rows[:place][near]:
            one, two = seen[other], seen[row]
            differ = np.abs(one.thumbnail - two.thumbnail).mean()
            if one.digest != two.digest and differ <= _LEVELS:
                yield f"{_called(photos[other])} ~ {_called(photos[row])}"
