"""A folder of class folders: a user's own photos, or ImageNet, read in place.

Either each split has its folder, or none has one::

    FOLDER/<split>/<class>/photo.jpg        FOLDER/<class>/photo.jpg

Equal class means "similar", and every image is query and gallery. A class folder's name is the
class; images are the files directly inside it that end like one (``.jpg``, ``.png``, ``.webp`` and
others) or, whatever their ending, begin like one. What else is there is passed over, and counted on
stderr; of what is hidden only files named like photos are counted. Without split folders the images
are split 80 % train, 10 % validation, 10 % test, as those of a manifest without a ``split`` column:
see :func:`cbam_jax.datasets.manifest.assign_splits`.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.image_files import (
    SUFFIXES,
    ImageFiles,
    good_images,
    is_photo,
    is_told,
    other_kind,
    passed_over,
    tell_copies,
)
from cbam_jax.datasets.manifest import ALL, assign_splits
from cbam_jax.datasets.retrieval import RetrievalDataset
from cbam_jax.datasets.tables import SPLITS, VALIDATION
from cbam_jax.foreign_files import expanded, shown_names
from cbam_jax.progress import tell


def open_class_folders(
    folder: str | os.PathLike, split: str, *, label: str = "label", on_bad_image: str = "fail"
) -> RetrievalDataset:
    """Opens one split of a folder of class folders. Nothing is converted or copied.

    Classes are numbered in the sorted order of their names over all splits, so that the splits
    agree. ``id`` is the path inside the folder. Bad images are treated as in a manifest
    (:func:`cbam_jax.datasets.manifest.open_manifest`), but with split folders only those of the
    split that is opened are looked at: ImageNet's training images take a while.

    Args:
        folder: the folder; ``~`` is one's home.
        split: a split's folder, where ``validation``, ``val`` and ``valid`` mean the same; or one
            of ``train``, ``validation`` and ``test``; or ``all``.
        label: ``"label"``, the class; a folder has no other column.
        on_bad_image: ``"fail"`` or ``"skip"``.

    Raises:
        InputError: not a folder, no images, one class only, an unknown split, a bad image.
    """
    root = expanded(folder)
    if label != "label":
        raise InputError(f"label='{label}': {folder} has classes only; set it to 'label'")
    found = _listing(root, split)
    classes = found.classes
    _check(found)
    paths = [f"{root}/{file}" for file in found.files]
    good = good_images(found.folder, paths, on_bad_image=on_bad_image)
    if found.dealt:
        _tell_copies(str(folder), found, paths, good)
    here = found.here & good
    files = [file for file, usable in zip(found.files, here, strict=True) if usable]
    number = {name: index for index, name in enumerate(classes)}
    every = np.ones(len(files), bool)
    return RetrievalDataset(
        name=str(folder),
        split=split,
        label=np.array([number[_class(file)] for file in files], np.int32),
        label_names=tuple(classes),
        id=np.array(files),
        is_query=every,
        is_gallery=every,
        item=None,
        series=None,
        bbox=None,
        images=ImageFiles(tuple(f"{root}/{file}" for file in files)),
    )


class _Listing(NamedTuple):
    """The folder that holds a split, all classes, the folder's files, and which are in the split.

    Images are paths inside the root, those of the split a bool [n]; ``others`` are passed over;
    as what and their names; ``dealt`` are the splits of all images where no folder says them.
    """

    folder: Path
    classes: list[str]
    files: list[str]
    others: list[tuple[str, str]]
    here: np.ndarray
    dealt: Sequence[str] = ()


def _listing(root: Path, split: str) -> _Listing:
    if _has_splits(root):
        splits = split_names(root)
        classes = sorted({_name(path) for other in splits for path in _folders(root / other)})
        everything = split == ALL and ALL not in splits
        names = splits if everything else [_split_folder(root, split)]
        parts = [_files(root, name) for name in names]
        files = [file for images, _ in parts for file in images]
        others = [other for _, part in parts for other in part]
        folder = root if everything else root / names[0]
        return _Listing(folder, classes, files, others, np.ones(len(files), bool))
    classes = sorted({_name(path) for path in _folders(root)})
    files, others = _files(root, ".")
    if split == ALL:
        return _Listing(root, classes, files, others, np.ones(len(files), bool))
    dealt = _hashed_splits(root, files, split)
    return _Listing(root, classes, files, others, np.array(dealt) == _usual(split), dealt)


def _tell_copies(name: str, found: _Listing, paths: Sequence[str], good: np.ndarray) -> None:
    rows = np.flatnonzero(good).tolist()
    parts = ([each[row] for row in rows] for each in (found.files, paths, found.dealt))
    tell_copies(name, *parts)


def check_images(folder: str | os.PathLike, *, on_bad_image: str = "fail") -> int:
    """Decodes every image of a folder (all splits), and returns how many can be used.

    Raises:
        InputError: as :func:`open_class_folders`.
    """
    root = expanded(folder)
    total = 0
    for listed in _folders(root) if _has_splits(root) else [root]:
        files, others = _files(listed, ".")
        classes = sorted({_name(path) for path in _folders(listed)})
        _check(_Listing(listed, classes, files, others, np.ones(len(files), bool)))
        paths = [f"{listed}/{file}" for file in files]
        total += int(good_images(listed, paths, on_bad_image=on_bad_image, decode=True).sum())
    return total


def photos(folder: str | os.PathLike) -> Iterator[tuple[str, str, str, str]]:
    """The split, the path inside the folder, the class and the path of every image there is.

    Raises:
        InputError: as :func:`open_class_folders`.
    """
    root = expanded(folder)
    found = _listing(root, ALL)
    _check(found)
    if _has_splits(root):
        splits = [file.split("/")[0] for file in found.files]
    else:
        splits = assign_splits({"label": list(map(_class, found.files)), "id": found.files})
    for split, file in zip(splits, found.files, strict=True):
        yield split, file, _class(file), f"{root}/{file}"


def split_names(folder: str | os.PathLike) -> list[str]:
    """The splits of a folder of class folders: its folders, or those that a hash makes.

    Raises:
        InputError: as :func:`open_class_folders`.
    """
    root = expanded(folder)
    return [path.name for path in _folders(root)] if _has_splits(root) else list(SPLITS)


def _has_splits(root: Path) -> bool:
    """Whether the folders in ``root`` hold folders (splits) or images (classes)."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give one with a folder of images a class")
    of_images = [path for path in _folders(root) if _holds_image(path)]
    of_folders = [path for path in _folders(root) if path not in of_images and _folders(path)]
    if of_images and of_folders:
        raise InputError(
            f"{of_images[0]} holds images and {of_folders[0]} folders: sort the images into one "
            "folder a class, or move one of the two elsewhere"
        )
    return bool(of_folders)


def _split_folder(root: Path, split: str) -> str:
    found = [path.name for path in _folders(root)]
    names = (split, *VALIDATION) if split in VALIDATION else (split,)
    for name in names:
        if name in found:
            return name
    raise InputError(f"{root} has no split '{split}': choose one of {shown_names([*found, ALL])}")


def _usual(split: str) -> str:
    return "validation" if split in VALIDATION else split


def _hashed_splits(root: Path, files: list[str], split: str) -> list[str]:
    """The splits of the images, where no folder says them; ``split`` is the one asked for."""
    if _usual(split) not in SPLITS:
        raise InputError(
            f"{root} has no split '{split}': it has no folders for splits, so choose one of "
            f"{[*SPLITS, ALL]}"
        )
    splits = assign_splits({"label": [_class(file) for file in files], "id": files})
    counts = {name: splits.count(name) for name in SPLITS}
    tell(f"{root} has no folders for splits; split by hash into {counts}")
    return splits


def _check(found: _Listing) -> None:
    """Tell what is passed over; refuse what is left where it is too little."""
    others = passed_over(found.others)
    if not found.files:
        raise InputError(
            f"no images in {found.folder}: put them into one folder a class "
            f"({', '.join(SUFFIXES)})" + f"; passed over: {others}" * bool(others)
        )
    if others:
        tell(f"{found.folder}: passed over: {others}")
    if len(found.classes) < 2:
        raise InputError(
            f"{found.folder} has one class only, '{found.classes[0]}': give at least two folders"
        )


def _folders(root: Path) -> list[Path]:
    return [path for path in _entries(root) if path.is_dir()]


def _files(root: Path, split: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The images of one folder of class folders, as paths inside ``root``, sorted; what else is."""
    images, others = [], []
    for folder in _folders(root / split):
        for path in _entries(folder):
            inside = path.relative_to(root).as_posix()
            if is_photo(path):
                images.append(inside)
            else:
                others.append((other_kind(path), inside))
    beside = [path for path in _entries(root / split) if not path.is_dir()]
    others += [(f"{other_kind(path)} beside the class folders", path.name) for path in beside]
    return images, others


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if is_told(entry.path))
    except PermissionError as error:
        raise InputError(
            f"{folder} may not be read ({error.strerror}): make it readable, or move it elsewhere"
        ) from error


def _holds_image(folder: Path) -> bool:
    return any(map(is_photo, _entries(folder)))


def _class(file: str) -> str:
    return _name(Path(file).parent)


def _name(folder: Path) -> str:
    """A class folder's name, in which an accent and its letter are one character (NFC)."""
    return unicodedata.normalize("NFC", folder.name)
