"""LookBench (Gao et al. 2026, arXiv 2601.14706), from a user's copy of its parquet files.

A version of it, such as ``v20251201`` of ``srpone/look-bench`` on the Hugging Face hub, is a folder
of five: four subsets with ``query.parquet`` and ``gallery.parquet`` each, and ``noise``, whose
photos stand in every gallery and are relevant to no query. A row is a photo, ``image``, with its
``category``, ``main_attribute``, ``other_attributes`` and ``item_ID``; other columns are not read.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cbam_jax import InputError
from cbam_jax.datasets.image_headers import image_format
from cbam_jax.foreign_files import expanded, shown, shown_folder

SUBSETS = ("real_studio_flat", "aigen_studio", "real_streetlook", "aigen_streetlook")
_COLUMNS = ("category", "main_attribute", "other_attributes", "item_ID")
_FETCH = (
    "fetch one with `hf download srpone/look-bench --repo-type=dataset --local-dir=look-bench`, "
    "and give that folder"
)


class Known(NamedTuple):
    """What is known of some photos, a list of each: words in small letters, of items the id.

    ``attributes`` are the main one and the others; an item without an id has none, ``""``.
    """

    category: list[str]
    main: list[str]
    attributes: list[frozenset[str]]
    item: list[str]


class Parts(NamedTuple):
    """The files of a subset: of its queries, of its gallery, and of the distractors."""

    query: list[Path]
    gallery: list[Path]
    noise: list[Path]


def find_parts(folder: str | Path, subset: str, *, noise: bool = True) -> Parts:
    """The files of a subset, in a version's folder or the one above.

    Args:
        folder: of a version, or with one version in it.
        subset: of `SUBSETS`.
        noise: whether there are distractors.

    Raises:
        InputError: no such subset, a file that is missing or is none, or lacks a column.
    """
    if subset not in SUBSETS:
        raise InputError(f"--subsets has {subset!r}: give some of {','.join(SUBSETS)}")
    version = _version(expanded(folder))
    parts = Parts(
        _files(version / subset, "query"),
        _files(version / subset, "gallery"),
        _files(version / "noise", "") if noise else [],
    )
    for path in (*parts.query, *parts.gallery):
        _check_columns(path, ("image", *_COLUMNS))
    for path in parts.noise:
        _check_columns(path, ("image",))
    return parts


def count_photos(paths: list[Path]) -> int:
    """How many photos some files have."""
    return sum(_count(path) for path in paths)


def read_known(paths: list[Path]) -> Known:
    """What is known of the photos of some files, in their order."""
    known = Known([], [], [], [])
    for path in paths:
        for batch in _batches(path, list(_COLUMNS), 4096):
            columns = [batch.column(name).to_pylist() for name in _COLUMNS]
            for category, main, others, item in zip(*columns, strict=True):
                known.category.append(_word(category))
                known.main.append(_word(main))
                known.attributes.append(words(main) | words(others))
                known.item.append(_item(item))
    return known


def read_images(paths: list[Path], size: int = 512) -> Iterator[list[bytes]]:
    """The encoded photos of some files in their order, so many at a time.

    Raises:
        InputError: names the file and the row that has none, or a file that is damaged.
    """
    for path in paths:
        row = 0
        for batch in _batches(path, ["image"], size):
            images = [
                image["bytes"] if isinstance(image, dict) else image
                for image in batch.column("image").to_pylist()
            ]
            for place, image in enumerate(images):
                if not isinstance(image, bytes) or not image:
                    raise InputError(f"{shown(path)}: row {row + place} has no image; {_FETCH}")
            yield images
            row += len(images)


def check_images(paths: list[Path]) -> None:
    """InputError for a photo that is none by its first bytes: seconds, where embedding is long."""
    row = 0
    for batch in read_images(paths):
        for image in batch:
            if image_format(image[:64]) is None:
                raise InputError(f"{name_of(paths, row)} is no image; {_FETCH}")
            row += 1


def name_of(paths: list[Path], row: int) -> str:
    """The file and the row in it of a photo of some files, for a message."""
    for path in paths:
        count = _count(path)
        if row < count:
            return f"{shown(path)}: row {row}"
        row -= count
    raise IndexError(row)


def words(value: Any) -> frozenset[str]:
    """Attributes as a set, of whatever a column holds: a text, a list, names with values.

    A text is a list where it is written as one, else its parts between commas or semicolons.

    >>> sorted(words("Red; V-neck")), sorted(words(["Red", None])), words(None)
    (['red', 'v-neck'], ['red'], frozenset())
    >>> sorted(words("['Red', 'V-neck']")), sorted(words({"colour": "Red"}))
    (['red', 'v-neck'], ['colour: red'])
    """
    if isinstance(value, str):
        if value.strip().startswith(("[", "{")):
            try:
                return words(ast.literal_eval(value.strip()))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
        value = value.replace(";", ",").split(",")
    if isinstance(value, dict):
        value = [f"{name}: {part}" for name, part in value.items() if part is not None]
    if not isinstance(value, list | tuple | set):
        value = [value]
    return frozenset(filter(None, map(_word, value)))


def _word(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()


def _item(value: Any) -> str:
    """An item's id, the same of whole numbers in a column of fractions; of none, nothing."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.0f}" if value.is_integer() else str(value)
    return "" if value is None else str(value)


def _version(folder: Path) -> Path:
    """The folder of a version: the one given, or the only one in it."""
    if any((folder / subset).is_dir() for subset in SUBSETS):
        return folder
    below = sorted({path.parent for subset in SUBSETS for path in folder.glob(f"*/{subset}")})
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(shown(path.name) for path in below)
        raise InputError(f"{shown(folder)} has the versions {names}: give the folder of one")
    told = shown_folder(folder) if folder.is_dir() else f"{shown(folder)} is no folder"
    raise InputError(f"{told}: there is no version of LookBench; {_FETCH}")


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split: one, or its numbered parts in order."""
    paths = sorted(folder.glob(f"{split}*.parquet"))
    if not paths:
        raise InputError(f"{shown(folder / (split or '*'))}.parquet is missing; {_FETCH}")
    return paths


def _count(path: Path) -> int:
    with _opened(path) as file:
        return file.metadata.num_rows


def _opened(path: Path) -> Any:
    parquet, arrow = _arrow()
    try:
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _batches(path: Path, columns: list[str], size: int) -> Iterator[Any]:
    _, arrow = _arrow()
    try:
        with _opened(path) as file:
            yield from file.iter_batches(size, columns=columns)
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{shown(path)} cannot be read as parquet ({shown(str(error))}); {_FETCH}")


def _arrow() -> tuple[Any, Any]:
    """``pyarrow.parquet`` and ``pyarrow``, which few need."""
    try:
        return importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputError("LookBench needs pyarrow: pip install 'cbam_jax[lookbench]'") from error


def _check_columns(path: Path, wanted: tuple[str, ...]) -> None:
    with _opened(path) as file:
        names = file.schema_arrow.names
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{shown(path)} has no column {', '.join(missing)}, only {shown(', '.join(names))}: "
            "give a copy of LookBench as it is published"
        )
