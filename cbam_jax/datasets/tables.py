"""The table of a CSV manifest, as it is written and as it is meant; all its mistakes in one error.

Spreadsheets and other programs write the same thing in many ways: ``1.0`` for a flag where a column
has gaps, accents in one character or in two, ``\\`` between folders. What can mean one thing only
is taken for that.
"""

import csv
import functools
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from cbam_jax import InputError
from cbam_jax.foreign_files import MOST_TABLE, read_file, shown, shown_names
from cbam_jax.progress import tell

BOX = ("x1", "y1", "x2", "y2")
COLUMNS = ("path", "label", "split", "is_query", "is_gallery", "item_id", "series", *BOX)
SPLITS = ("train", "validation", "test")
# One split goes by any of these names: ImageNet's folder is val, TFDS's split validation.
VALIDATION = ("validation", "val", "valid")
_TRUE, _FALSE = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n")
_TOLD = 10  # mistakes that one error names
# An array of texts has room for the longest in each of its rows.
_LONGEST = 1_000
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FARTHEST = 1 << 24  # Pixels; float32 has whole numbers up to here.

Mistakes = list[tuple[int, str]]  # rows, and what is wrong with them and how to mend it
Row = tuple[int, list[str]]  # its number, as a spreadsheet counts: the header is row 1


def read_table(path: Path) -> dict[str, list]:
    """Reads and checks the columns of a manifest.

    Returns:
        A list of each column that the table has: texts, and for ``is_query`` and ``is_gallery``
        bools; ``bbox`` in place of ``x1, y1, x2, y2``, NaN where a row has none; ``id``, the path
        as it is spelled on the disk, and ``path``, that joined to the CSV's folder.

    Raises:
        InputError: one line with all mistakes, or the first ten and how many more there are.
    """
    header, rows, mistakes = _read_rows(path)
    ignored = [column for column in header if column not in COLUMNS]
    if ignored:
        told = f"ignored the columns {shown_names(ignored)}; known are {list(COLUMNS)}"
        tell(f"{path}: {told}")
    columns = {name: [(n, cells[i]) for n, cells in rows] for i, name in enumerate(header)}
    table: dict[str, list] = {
        name: [_text(name, row, text, mistakes) for row, text in columns[name]]
        for name in ("path", "label", "split", "item_id", "series")
        if name in columns
    }
    table |= {
        name: [_flag(name, row, text, mistakes) for row, text in columns[name]]
        for name in ("is_query", "is_gallery")
        if name in columns
    }
    if BOX[0] in columns:
        boxes = zip(*(columns[side] for side in BOX), strict=True)
        table["bbox"] = [_box(cells, mistakes) for cells in boxes]
    table["id"] = _spelled(path, [at_home(path.parent, name) for name in table["path"]])
    table["path"] = [os.path.join(path.parent, name) for name in table["id"]]
    _check_unique([number for number, _ in rows], table, mistakes)
    refuse(path, mistakes)
    _tell_misspelt(path, columns.get("split", []))
    return table


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads a manifest as it is written, a dict a row, with the columns that others ignore."""
    header, rows, mistakes = _read_rows(path)
    refuse(path, mistakes)
    return [dict(zip(header, cells, strict=True)) for _, cells in rows]


def refuse(path: Path, mistakes: Mistakes) -> None:
    """Raises InputError with the first of the mistakes, in the order of the rows, if any are."""
    if not mistakes:
        return
    told = "; ".join(f"row {row}: {text}" for row, text in sorted(mistakes)[:_TOLD])
    more = f"; and {len(mistakes) - _TOLD} more mistakes" if len(mistakes) > _TOLD else ""
    if len(mistakes) == 1:
        raise InputError(f"{path} {told}")
    raise InputError(f"{path} has {len(mistakes)} mistakes: {told}{more}")


def read_lines(path: Path) -> list[list[str]]:
    """Reads the cells of a CSV file, line by line, without the spaces around them.

    Semicolons separate them where the header has some and no comma, as spreadsheets write where the
    comma is in numbers. Known columns have small letters, however the header writes them.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is no CSV.
    """
    lines: list[list[str]] = []
    try:
        text = read_file(path, MOST_TABLE).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text), strict=True)
        for cells in reader:
            lines.append([cell.strip() for cell in cells])
    except FileNotFoundError:
        raise InputError(f"there is no manifest {path}: give the path of a CSV file") from None
    except OSError as error:
        raise InputError(f"cannot read the manifest {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as 'CSV UTF-8'") from error
    except csv.Error as error:
        # An open quote makes one row of all that follows, up to the next quote or the end.
        raise InputError(
            f"{path} is not a CSV file: row {len(lines) + 1}: {error}; close each quote that opens "
            "a cell there, and write two for each one within a text"
        ) from error
    header = next((cells for cells in lines if any(cells)), [])
    header[:] = [_small(name, header) for name in header]
    return lines


def _separator(text: str) -> str:
    """What is between the cells, by the first line that is not empty.

    >>> _separator("path;label\\nhat,1.jpg;hat"), _separator("path,label;kind")
    (';', ',')
    """
    header = text.lstrip().partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","


def _small(name: str, header: list[str]) -> str:
    small = name.lower()
    return small if small in COLUMNS and small not in header else name


def _read_rows(path: Path) -> tuple[list[str], list[Row], Mistakes]:
    """The header, the rows that have as many cells, and what is wrong with the others."""
    lines = read_lines(path)
    header = lines[0] if lines else []
    _check_header(path, header)
    rows = [(number, cells) for number, cells in enumerate(lines[1:], 2) if any(cells)]
    if not rows:
        raise InputError(f"{path} has no rows below its header: list one image a row")
    mistakes = [
        (
            number,
            f"it has {len(cells)} cells and the header {len(header)}: fill it up or remove it, "
            "and put quotes around text that holds a comma",
        )
        for number, cells in rows
        if len(cells) != len(header)
    ]
    return header, [row for row in rows if len(row[1]) == len(header)], mistakes


def _check_header(path: Path, header: list[str]) -> None:
    missing = [column for column in ("path", "label") if column not in header]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}: its first line must name path and label, "
            f"separated by commas or semicolons, and has {shown_names(header)}"
        )
    repeated = min((name for name, count in Counter(header).items() if count > 1), default=None)
    if repeated is not None:
        told = shown(repeated, 80)
        raise InputError(f"{path} names the column '{told}' twice: rename or remove one")
    box = [column for column in BOX if column in header]
    if box and len(box) < 4:
        raise InputError(f"{path} has the box columns {box} only: give x1,y1,x2,y2 or none")


def _text(column: str, row: int, text: str, mistakes: Mistakes) -> str:
    """A cell's text, in which an accent and its letter are one character (NFC)."""
    if not text:
        mistakes.append((row, f"{column} is empty: fill it or remove the row"))
    if len(text) > _LONGEST:
        remedy = f"shorten it to {_LONGEST} or remove the row"
        mistakes.append((row, f"{column} has {len(text)} letters: {remedy}"))
    if column == "path":
        return text
    if _NO_TEXT.search(text):
        told = f"{column} is '{shown(text, 80)}', with control characters: write it without"
        mistakes.append((row, told))
    return unicodedata.normalize("NFC", text)


def _flag(column: str, row: int, text: str, mistakes: Mistakes) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        remedy = "write 1 or 0, true or false, yes or no"
        mistakes.append((row, f"{column} is '{shown(text, 80)}': {remedy}"))
    return text.lower() in _TRUE


def _box(cells: tuple[tuple[int, str], ...], mistakes: Mistakes) -> tuple[float, ...]:
    """The box of a row; NaN where all four cells are empty: the whole image is meant."""
    row, texts = cells[0][0], [text for _, text in cells]
    if all(text.lower() in ("", "nan") for text in texts):
        return (math.nan,) * 4
    try:
        box = tuple(_number(text or "nan") for text in texts)
    except ValueError:
        wrong = next((s, t) for s, t in zip(BOX, texts, strict=True) if not _is_number(t))
        what = f"{wrong[0]} is '{shown(wrong[1], 80)}': boxes are numbers, in pixels"
        mistakes.append((row, what))
        return (math.nan,) * 4
    if not (all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]):
        mistakes.append((row, f"the box {list(box)} is empty: x1 < x2 and y1 < y2 must hold"))
    elif max(map(abs, box)) > _FARTHEST:
        mistakes.append((row, f"the box {list(box)} is of no image: its numbers are pixels"))
    return box


def _number(text: str) -> float:
    """Raise a ValueError for what is no number, or one as Python alone writes it."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def _is_number(text: str) -> bool:
    try:
        _number(text or "nan")
    except ValueError:
        return False
    return True


def _tell_misspelt(path: Path, splits: list[tuple[int, str]]) -> None:
    """Says on stderr which names of splits look like another one; a split may have any name."""
    known = {name.casefold(): name for name in SPLITS}
    told = []
    first: dict[str, int] = {}
    for row, text in splits:
        first.setdefault(unicodedata.normalize("NFC", text), row)
    for name, row in first.items():
        meant = known.setdefault(name.casefold(), name)
        if meant == name and name not in SPLITS:
            off = (split for split in SPLITS if _one_letter_off(name.casefold(), split))
            meant = "validation" if name.casefold() in VALIDATION else next(off, name)
        if meant != name:
            told.append(f"'{shown(name, 80)}' (first in row {row}) for '{shown(meant, 80)}'")
    if told:
        tell(f"{path}: splits that may be misspelt: {', '.join(told[:_TOLD])}")


def _one_letter_off(one: str, other: str) -> bool:
    """Whether a letter more, less or another, or two that changed places, make the difference."""
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


def at_home(root: Path, name: str) -> str:
    """A path with ``~`` expanded, unless the CSV's folder holds one that is spelled so."""
    if not name.startswith("~/") or "\0" in name or os.path.lexists(root / name):
        return name
    return os.path.expanduser(name)


def _check_unique(rows: list[int], table: dict[str, list], mistakes: Mistakes) -> None:
    first: dict[str, int] = {}
    for row, name, file in zip(rows, table["id"], table["path"], strict=True):
        earlier = first.setdefault(os.path.abspath(file), row) if name else row
        if earlier != row:
            told = f"the path {shown(name)} is also in row {earlier}: remove one of them"
            mistakes.append((row, told))


def _spelled(path: Path, names: list[str]) -> list[str]:
    """Paths as they are spelled on the disk, where only ``\\``, accents or upper case differ."""
    listing = functools.cache(_listing)
    found = [_on_disk(path.parent, name, listing) for name in names]
    changed = [(n, f) for n, f in zip(names, found, strict=True) if f not in (n, _posix(n))]
    if changed:
        name, file = (shown(text) for text in changed[0])
        tell(
            f"{path}: {len(changed)} paths are spelled in another way on the disk ({name} is "
            f"{file})"
        )
    return found


def _on_disk(root: Path, name: str, listing: Callable[[str], dict[str, list[str]]]) -> str:
    if not name or "\0" in name or len(name) > _LONGEST:
        return name
    if os.path.lexists(os.path.join(root, name)):
        return _posix(name)
    folder = str(root)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    found = []
    for part in parts:
        same = [part] if part in ("/", "..") else listing(folder).get(_loosely(part), [])
        if len(same) != 1 and part not in same:
            return _posix(name)
        found.append(part if part in same else same[0])
        folder = os.path.join(folder, found[-1])
    return str(PurePosixPath(*found))


def _posix(name: str) -> str:
    return Path(name).as_posix() if name else name


def _listing(folder: str) -> dict[str, list[str]]:
    """The names in a folder by what they are but for accents' form and case."""
    names: dict[str, list[str]] = {}
    try:
        for name in os.listdir(folder):
            names.setdefault(_loosely(name), []).append(name)
    except OSError:  # It is none, or may not be read: nothing is found there.
        return {}
    return names


def _loosely(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
