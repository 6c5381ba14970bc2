"""A shard on disk: three files, of which the last to be written says that the others are whole.

Of shard 3 of 64 they are

* ``00003-of-00064.npy``: the embeddings [n, d] float32, a row for each photo in the order of the
  list, NaN where a photo could not be read;
* ``00003-of-00064.jsonl``: a line for each photo, what `Read` says of it and what is known of it;
* ``00003-of-00064.json``: `About`, with the SHA-256 of both.

Each is written beside its place and renamed.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.gallery import LONGEST
from cbam_jax.catalogue.nearest import LARGEST_NUMBER
from cbam_jax.catalogue.reading import Read
from cbam_jax.catalogue.sources import Photo, parse_box
from cbam_jax.command_line import to_json, write_json
from cbam_jax.foreign_files import map_array, open_regular, parse_json, read_file, shown
from cbam_jax.whole_files import written_whole

_NAME = re.compile(r"(\d{5,9})-of-(\d{5,9})\.json")
_BLOCK = 2**20  # Bytes read at a time.
_LARGEST = 2**20  # Bytes of a file that says what a shard is.
MOST_SHARDS = 100_000
# What a line says of a photo; whole numbers are those that SQLite holds.
_TYPES = {
    **dict.fromkeys(("path", "box", "hash", "problem"), str),
    **dict.fromkeys(("size", "modified", "seen", "look"), int),
    "payload": dict,
}


class About(NamedTuple):
    """What a shard is.

    Attributes:
        shard: which one, from 0.
        shards: of how many.
        count: photos in it.
        listed: `list_digest` of the photos of all shards.
        fingerprint: of the model.
        model: its name, None where it has none.
        dimension: numbers of an embedding.
        embeddings: SHA-256 of that file.
        rows: likewise.
    """

    shard: int
    shards: int
    count: int
    listed: str
    fingerprint: str
    model: str | None
    dimension: int
    embeddings: str = ""
    rows: str = ""


class Row(NamedTuple):
    """A photo of a shard: its file as it was read, its embedding or why there is none."""

    read: Read
    embedding: bytes | None
    problem: str | None


def stem(shard: int, shards: int) -> str:
    """What the files of a shard are called, but for their ending.

    >>> stem(3, 64)
    '00003-of-00064'
    """
    return f"{shard:05}-of-{shards:05}"


def list_digest(photos: Sequence[Photo]) -> str:
    """SHA-256 of a list of photos, with their boxes and what is known of them."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(to_json([os.fsencode(photo.path).hex(), photo.box, photo.payload]).encode())
    return digest.hexdigest()


def write_shard(folder: Path, about: About, batches: Iterator[Sequence[Row]]) -> int:
    """Write a shard's files, given its rows batch by batch; return how many have an embedding."""
    name = folder / stem(about.shard, about.shards)
    numbers, lines = name.with_suffix(".npy"), name.with_suffix(".jsonl")
    found = start = 0
    with written_whole(numbers) as partial, written_whole(lines) as text:
        shape = about.count, about.dimension
        array = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with open(text, "w", encoding="utf-8") as file:
            for batch in batches:
                for row in batch:
                    array[start] = np.nan if row.embedding is None else _numbers(row.embedding)
                    file.write(to_json(_document(row)) + "\n")
                    start, found = start + 1, found + (row.embedding is not None)
        array.flush()
        about = about._replace(embeddings=_sha256(partial), rows=_sha256(text))
    write_json(name.with_suffix(".json"), about._asdict())
    return found


def shard_about(folder: Path, shard: int, shards: int) -> About | None:
    """What a shard says of itself, None where it is not there or says nothing."""
    try:
        return _about(folder / f"{stem(shard, shards)}.json")
    except (OSError, ValueError, TypeError, InputError, RecursionError):
        return None


def wrong_with(folder: Path, shard: int, shards: int) -> str | None:
    """``missing`` or what is damaged of a shard; None: it is whole."""
    name = folder / stem(shard, shards)
    if not os.path.lexists(name.with_suffix(".json")):
        return "missing"
    about = shard_about(folder, shard, shards)
    if about is None or (about.shard, about.shards) != (shard, shards):
        return f"{name.name}.json is damaged"
    for ending, expected in ((".npy", about.embeddings), (".jsonl", about.rows)):
        path = name.with_suffix(ending)
        try:
            same = _sha256(path) == expected
        except (OSError, InputError):
            return f"{path.name} is not there or cannot be read"
        if not same:
            return f"{path.name} is not as it was written"
    return None


def shard_count(folder: Path) -> int:
    """Of how many shards a folder's are.

    Raises:
        InputError: it has none, or of different numbers of them.
    """
    counts = _counts(folder)
    if not counts:
        raise InputError(
            f"{folder} has no shards: make them with `cbam-jax embed --data PHOTOS "
            f"--out {shlex.quote(str(folder))}`"
        )
    if counts[-1] > MOST_SHARDS:
        raise InputError(
            f"{folder} has shards of {counts[-1]}, more than {MOST_SHARDS}: remove them"
        )
    if len(counts) > 1:
        those = " and of ".join(map(str, counts))
        raise InputError(f"{folder} has shards of {those}: remove those that are not meant")
    return counts[0]


def check_count(folder: Path, shards: int) -> None:
    """Refuse a folder that has shards of another number of them: together they are nothing.

    Raises:
        InputError: names the files to remove.
    """
    others = [count for count in _counts(folder) if count != shards]
    if others:
        those = " and of ".join(map(str, others))
        files = " ".join(f"{shlex.quote(str(folder))}/*-of-{count:05}.*" for count in others)
        raise InputError(
            f"{folder} has shards of {those}, and these are of {shards}: give another --out, or "
            f"first `rm {files}`"
        )


def _counts(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted({int(found[2]) for name in names if (found := _NAME.fullmatch(name))})


def findings(folder: Path, shards: int) -> dict[int, str]:
    """What is wrong with the shards of a folder, by their number; nothing where all are whole."""
    found, first = {}, None
    for shard in range(shards):
        wrong = wrong_with(folder, shard, shards)
        about = None if wrong else shard_about(folder, shard, shards)
        first = first or about
        if about and first and _common(about) != _common(first):
            wrong = f"of another list of photos or model than shard {first.shard}"
        if wrong:
            found[shard] = wrong
    return found


def read_shard(folder: Path, shard: int, shards: int) -> Iterator[Row]:
    """The rows of a shard that is whole, in order.

    Raises:
        InputError: they are no rows.
    """
    name = folder / stem(shard, shards)
    try:
        array = _array(name.with_suffix(".npy"), _about(name.with_suffix(".json")))
        with open_regular(name.with_suffix(".jsonl"), sys.maxsize) as file:
            for row, line in zip(array, file, strict=True):
                yield _row(parse_json(line), row)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{name}: no rows of photos ({shown(str(error))}): embed shard {shard} anew"
        ) from None


def _array(path: Path, about: About) -> np.ndarray:
    array = map_array(path)
    if array.dtype != np.float32 or array.shape != (about.count, about.dimension):
        raise ValueError(f"embeddings are {array.dtype} {list(array.shape)}")
    return array


def _common(about: About) -> tuple:
    return about.shards, about.listed, about.fingerprint, about.dimension


def _about(path: Path) -> About:
    about = About(**json.loads(read_file(path, _LARGEST)))
    numbers = about.shard, about.shards, about.count, about.dimension
    texts = about.listed, about.fingerprint, about.embeddings, about.rows, about.model or ""
    if not all(type(x) is int for x in numbers) or not all(type(x) is str for x in texts):
        raise ValueError("not what a shard is")
    if about.count < 0 or not 0 < about.dimension <= LONGEST:
        raise ValueError("a shard of no photos")
    return about


def _numbers(embedding: bytes) -> np.ndarray:
    return np.frombuffer(embedding, np.float32)


def _document(row: Row) -> dict:
    """A row as it is written: what is not known is left out."""
    read = row.read
    known = {
        "path": os.fsencode(read.photo.path).decode(errors="backslashreplace"),
        "box": read.photo.box,
        "payload": dict(read.photo.payload),
        "hash": read.hash.hex() if read.hash else None,
        "size": read.size,
        "modified": read.modified,
        "seen": read.seen,
        "look": read.look,
        "problem": row.problem,
    }
    return {name: value for name, value in known.items() if value not in (None, "", {})}


def _row(document: dict, numbers: np.ndarray) -> Row:
    _check(document)
    photo = Photo(document["path"], document.get("payload", {}), document.get("box", ""))
    content = bytes.fromhex(document["hash"]) if "hash" in document else None
    problem = document.get("problem")
    read = Read(photo, hash=content, problem=None if content else problem)
    kept = {name: document.get(name) for name in ("size", "modified", "seen", "look")}
    read = read._replace(**kept)
    if problem is None and not (np.abs(numbers) <= LARGEST_NUMBER).all():  # Nor is NaN.
        raise ValueError("an embedding of no finite numbers")
    return Row(read, None if problem else numbers.tobytes(), problem)


def _check(document: dict) -> None:
    """Raise a ValueError or the like where a line does not say what `_document` would."""
    if type(document) is not dict:
        raise ValueError("a row that is no object")
    wrong = [name for name, value in document.items() if type(value) is not _TYPES.get(name)]
    wrong += [name for name, value in document.items() if type(value) is int and abs(value) >> 63]
    if wrong or len(document.get("hash", "")) not in (0, 64):
        raise ValueError(f"a row whose {shown(', '.join(wrong) or 'hash')} is none")
    document["path"].encode()
    if "box" in document:
        parse_box(document["box"])


def _sha256(path: Path) -> str:
    with open_regular(path, sys.maxsize) as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
