"""What a catalogue is given, as one list of photos: files, folders with all below, manifests.

A folder's photos are those of its files that end or begin like one; the name of the folder that a
photo lies in is its ``category``, unless that is the folder given. A manifest is a CSV file as
``cbam_jax.datasets`` reads it, whose columns, but for the path and the box, become the payload; of
them only ``path`` must be there.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cbam_jax import InputError
from cbam_jax.command_line import to_json
from cbam_jax.datasets import is_manifest
from cbam_jax.datasets.image_files import is_photo, is_told, other_kind, passed_over
from cbam_jax.datasets.tables import BOX, Row, at_home, read_lines, refuse
from cbam_jax.foreign_files import expanded, is_gone, parse_json, shown
from cbam_jax.progress import few


class Photo(NamedTuple):
    """A photo to be added: its absolute path, what is known of it, and where the garment is.

    What ``payload`` does not name stays as it is known; what it says is None is forgotten. ``box``
    is ``x1,y1,x2,y2`` in pixels, or empty.
    """

    path: str
    payload: Mapping[str, Any] = {}
    box: str = ""

    def merged(self, known: str) -> str:
        """What is known of the photo, in JSON, with what is said now.

        >>> Photo("/a.jpg", {"price": 5, "size": None}).merged('{"size": 8, "shop": "north"}')
        '{"shop": "north", "price": 5}'
        """
        try:
            both = known_as(known) | dict(self.payload)
        except ValueError as error:
            raise InputError(
                f"what the catalogue knows of {shown(self.path)} is no JSON ({shown(str(error))}): "
                "forget the photo by `cbam-jax catalogue remove`, and add it again"
            ) from error
        text = to_json({name: value for name, value in both.items() if value is not None})
        if "\\ud" in text and not _is_text(both):
            raise InputError(f"the payload of {shown(self.path)} holds half a letter: give UTF-8")
        return text


def _is_text(document: Any) -> bool:
    """Whether all texts are UTF-8: half a letter, as JSON may hold it, is none."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def known_as(payload: str) -> dict[str, Any]:
    """What a catalogue keeps of a photo; raises a ValueError where that is no JSON object.

    >>> known_as('{"price": 5}')
    {'price': 5}
    """
    found = parse_json(payload)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


class Listed(NamedTuple):
    """What was given: photos, each once, the folders searched, and those that may not be read."""

    photos: list[Photo]
    folders: list[str]
    closed: list[str]


def listed(
    sources: Iterable[str | os.PathLike], payload: Mapping[str, Any] | None = None
) -> Listed:
    """The photos of files, folders and manifests.

    A folder that may not be read is told on stderr, and the others are listed.

    Args:
        sources: paths; ``~`` is one's home.
        payload: of all of them, beside what a manifest or a folder says.

    Raises:
        InputError: a source that is not there, a manifest that cannot be read, and photos of which
            none is seen because their folder may not be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()).resolve()
        >>> (folder / "hat").mkdir()
        >>> (folder / "hat" / "1.jpg").touch()
        >>> [photo.payload for photo in listed([folder], {"shop": "north"}).photos]
        [{'category': 'hat', 'shop': 'north'}]
    """
    photos: dict[str, Photo] = {}
    folders, closed, sources = [], [], list(sources)
    check(sources)
    for source in sources:
        path = Path(os.path.abspath(expanded(source)))
        if path.is_dir():
            folders.append(str(path))
        for photo in _of(path, closed):
            if payload:
                photo = photo._replace(payload={**photo.payload, **payload})
            photos[photo.path] = photo
    if closed and not photos:
        raise InputError(closed[0])
    for line in closed:
        print(line, file=sys.stderr)
    return Listed(list(photos.values()), folders, closed)


def box_text(box: Iterable[float]) -> str:
    """A box as the catalogue keeps it.

    >>> box_text([1.0, 2.5, 30, 40])
    '1,2.5,30,40'
    """
    return ",".join(f"{float(x):g}" for x in box)


def parse_box(text: str) -> list[float]:
    """A box from ``x1,y1,x2,y2``.

    Raises:
        InputError: it is not four numbers, or holds nothing.
    """
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--box={text}: give x1,y1,x2,y2, four numbers of pixels") from None
    if not (all(map(math.isfinite, (x1, y1, x2, y2))) and x1 < x2 and y1 < y2):
        raise InputError(f"--box={text} is empty: x1 < x2 and y1 < y2 must hold")
    return [x1, y1, x2, y2]


def check(sources: Iterable[str | os.PathLike]) -> None:
    """Raise an InputError for the first source that is not there, or may not be looked at.

    >>> check(["/nowhere/photos"])
    Traceback (most recent call last):
    ...
    cbam_jax.InputError: /nowhere/photos is not there: give photos, folders or manifests, x.csv
    """
    for source in sources:
        path = expanded(source)
        if is_gone(path):
            raise InputError(f"{source} is not there: give photos, folders or manifests, x.csv")
        try:
            path.stat()
        except OSError as error:
            raise InputError(_closed(error)) from None


def _closed(error: OSError) -> str:
    return (
        f"{shown(str(error.filename))} may not be read ({error.strerror}): make it readable and "
        "give the same command again"
    )


def _of(path: Path, closed: list[str]) -> Iterator[Photo]:
    if path.is_dir():
        yield from _in_folder(path, closed)
    elif is_manifest(str(path)):
        yield from _in_manifest(path)
    else:
        yield Photo(str(path))


def _in_folder(root: Path, closed: list[str]) -> Iterator[Photo]:
    """All photos below a folder, by path; what is none is counted as in a dataset's folder.

    Of folders that may not be read a line each is put into ``closed``.
    """
    others = []
    for folder, names, files in os.walk(root, onerror=lambda e: closed.append(_closed(e))):
        names[:] = sorted(name for name in names if not name.startswith("."))
        payload = {} if folder == str(root) else {"category": os.path.basename(folder)}
        for name in sorted(files):
            path = os.path.join(folder, name)
            if is_photo(path):
                yield Photo(path, payload)
            elif is_told(path):
                others.append((other_kind(path), os.path.relpath(path, root)))
    if others:
        print(f"{root}: passed over: {passed_over(others)}", file=sys.stderr)


def _in_manifest(path: Path) -> Iterator[Photo]:
    """The photos of all rows; where a row is wrong, all that is wrong is told."""
    header, rows = _read(path)
    _tell_texts(path, header, rows)
    mistakes = [(number, told) for number, cells in rows for told in _mistakes(header, cells)]
    if mistakes:  # Alone, files that are not there are kept as photos with that problem.
        full = [(number, cells) for number, cells in rows if len(cells) == len(header)]
        refuse(path, mistakes + list(_absent(path, header, full)))
    for _, cells in rows:
        row = dict(zip(header, cells, strict=True))
        box, file = _box(row), _file(path, row)
        yield Photo(file, {name: value_of(row[name]) for name in _known(header)}, box)


def _known(header: Iterable[str]) -> list[str]:
    """The columns that become the payload."""
    return [name for name in header if name not in ("path", *BOX)]


def _file(path: Path, row: Mapping[str, str]) -> str:
    return os.path.abspath(path.parent / at_home(path.parent, row["path"]))


def _mistakes(header: list[str], cells: list[str]) -> Iterator[str]:
    if len(cells) != len(header):
        yield (
            f"it has {len(cells)} cells and the header {len(header)}: fill it up or remove it, "
            "and put quotes around text that holds a comma"
        )
        return
    row = dict(zip(header, cells, strict=True))
    if not row["path"]:
        yield "path is empty: fill it or remove the row"
    try:
        _box(row)
    except InputError as error:
        yield str(error)


def _absent(path: Path, header: list[str], rows: list[Row]) -> Iterator[tuple[int, str]]:
    for number, cells in rows:
        row = dict(zip(header, cells, strict=True))
        if row["path"] and is_gone(_file(path, row)):
            yield number, f"there is no file {shown(row['path'])}: correct it or remove the row"


def _tell_texts(path: Path, header: list[str], rows: list[Row]) -> None:
    """Say on stderr which columns of numbers hold a text, which never compares as a number."""
    for place, name in enumerate(header):
        if name not in _known(header):
            continue
        cells = [(row, value_of(line[place])) for row, line in rows if place < len(line)]
        texts = [f"'{shown(cell, 80)}' in row {n}" for n, cell in cells if isinstance(cell, str)]
        numbers = sum(isinstance(cell, int | float) for _, cell in cells)
        if 0 < len(texts) < numbers:
            told = f"column {shown(name, 80)} has {numbers} numbers, and texts: {few(texts)}"
            print(f"{path}: {told}", file=sys.stderr)


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """The header, and the rows that are not empty with their numbers, as a spreadsheet counts."""
    filled = [(number, line) for number, line in enumerate(read_lines(path), 1) if any(line)]
    header = filled[0][1] if filled else []
    if "path" not in header or len(set(header)) < len(header):
        raise InputError(
            f"{path}: its first line must name the columns, each once, path among them, and is "
            f"{','.join(header)!r}"
        )
    return header, filled[1:]


def _box(row: Mapping[str, str]) -> str:
    texts = [row.get(name, "") for name in BOX]
    return box_text(parse_box(",".join(texts))) if any(texts) else ""


def value_of(text: str) -> Any:
    """A cell as a number where it is written like one, so that prices compare as numbers.

    >>> value_of("12.5"), value_of("0042"), value_of("nan")
    (12.5, '0042', 'nan')
    """
    try:
        number = json.loads(text)
    except ValueError:
        return text or None
    # Beyond 2**53 JSON's numbers are rounded, and those of articles are names.
    return number if type(number) in (int, float) and abs(number) < 2**53 else text
