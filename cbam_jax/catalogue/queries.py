"""From what is asked to one embedding: a photo, an id, an embedding, several of them at once."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.gallery import Gallery
from cbam_jax.catalogue.indexing import reason
from cbam_jax.catalogue.nearest import LARGEST_NUMBER
from cbam_jax.catalogue.reading import LARGEST
from cbam_jax.foreign_files import expanded, read_file

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


@dataclasses.dataclass(frozen=True)
class Ready:
    """A photo that was embedded before: its embedding [d], and the SHA-256 of its file."""

    embedding: np.ndarray
    hash: bytes


Part = str | os.PathLike | bytes | int | np.ndarray | Ready
_FEW = 4  # Photos that are embedded one by one.
_AWAY = 0.5  # The weight of what the answer is to be unlike.


def embeddings_of(
    parts: Sequence[Part],
    gallery: Gallery,
    embedder: "Callable[[], Embedder]",
    boxes: Sequence[Sequence[float] | None] | None = None,
) -> np.ndarray:
    """The embedding of each part, [n, d] float32.

    Args:
        parts: the path of a photo or its bytes, the id of one in the catalogue, an embedding [d],
            or a photo that is ready. Photos are embedded together.
        gallery: where ids are looked up.
        embedder: loads it, when there is a photo.
        boxes: of each part, ``x1, y1, x2, y2`` in pixels, or None for all of a photo.

    Raises:
        InputError: names the photo that cannot be read, the id that is not there, ...
    """
    found: list[np.ndarray | None] = [_without_model(part, gallery) for part in parts]
    photos = [place for place, row in enumerate(found) if row is None]
    boxes = boxes or [None] * len(parts)
    if photos:
        files = [_file(parts[place]) for place in photos]
        rows = embed_photos(embedder(), files, [boxes[place] for place in photos])
        for place, row in zip(photos, rows, strict=True):
            if isinstance(row, str):
                other = "--box" if "the box" in row and boxes[place] is not None else "photo"
                raise InputError(f"{row}; give another {other}")
            found[place] = row
    return np.array(found, np.float32).reshape(len(parts), -1)


def embed_photos(
    embedder: "Embedder",
    files: Sequence[str | bytes],
    boxes: Sequence[Sequence[float] | None],
) -> list[np.ndarray | str]:
    """The embedding of each photo, or what is wrong with it.

    A few are embedded one by one, each at once; more of them as batches, which are filled up.
    """
    if len(files) <= _FEW:
        return [_embed(embedder, *one) for one in zip(files, boxes, strict=True)]
    found: list[np.ndarray | str] = [""] * len(files)
    for boxed in (False, True):
        some = [place for place, box in enumerate(boxes) if (box is not None) == boxed]
        if not some:
            continue
        places = np.array([boxes[place] for place in some]) if boxed else None
        made = embedder.embed_files([files[i] for i in some], boxes=places, progress=False)
        reasons = iter(made.failed)
        for place, row, readable in zip(some, made.embeddings, made.readable, strict=True):
            found[place] = row if readable else ": ".join(next(reasons))
    return found


def _embed(
    embedder: "Embedder", file: str | bytes, box: Sequence[float] | None
) -> np.ndarray | str:
    try:
        return embedder.embed_file(file, box=box)
    except (InputError, OSError) as error:
        text = reason(str(error))
        known = isinstance(file, bytes) or Path(file).name in text
        return text if known else f"{file}: {text}"


def combined(like: np.ndarray, unlike: np.ndarray) -> np.ndarray:
    """One query of several embeddings, [d] float32.

    One alone is itself. Of several, the direction is the mean of their unit vectors, less half that
    of the unit vectors of what the answer is to be unlike; the length is the mean of theirs.

    Args:
        like: [n, d], at least one.
        unlike: [m, d], or none.

    Raises:
        InputError: they cancel out.

    >>> combined(np.float32([[2, 0], [0, 2]]), np.zeros((0, 2), np.float32)).round(3).tolist()
    [1.4140000343322754, 1.4140000343322754]
    """
    if len(like) == 1 and not len(unlike):
        return like[0]
    direction = _units(like).mean(axis=0)
    if len(unlike):
        direction = direction - _AWAY * _units(unlike).mean(axis=0)
    length = float(np.linalg.norm(direction))
    if length < 1e-6:
        raise InputError("what to be like and unlike cancel out: give fewer of them")
    mean = np.linalg.norm(like.astype(np.float64), axis=1).mean()
    return (direction * (mean / length)).astype(np.float32)


def part_of(text: str) -> str | int:
    """What is typed: an id where it is a number and no file is named so, else a path.

    >>> part_of("12"), part_of("a.jpg")
    (12, 'a.jpg')
    """
    return int(text) if text.isascii() and text.isdecimal() and not Path(text).exists() else text


def hash_of(part: Part) -> bytes | None:
    """The SHA-256 of a photo's file, None where there is none to be read.

    >>> hash_of(b"abc").hex()[:8], hash_of(7)
    ('ba7816bf', None)
    """
    if isinstance(part, Ready):
        return part.hash
    if isinstance(part, str | os.PathLike):
        with contextlib.suppress(InputError, OSError):
            part = read_file(expanded(part), LARGEST)
    return hashlib.sha256(part).digest() if isinstance(part, bytes) else None


def _without_model(part: Part, gallery: Gallery) -> np.ndarray | None:
    if isinstance(part, Ready):
        part = part.embedding
    if isinstance(part, np.ndarray):
        return _checked(part, gallery)
    if isinstance(part, int | np.integer) and not isinstance(part, bool):
        row = gallery.embedding(int(part)) if -(2**63) <= part < 2**63 else None
        if row is None:
            raise InputError(f"no photo {part} with an embedding is in the catalogue")
        return row
    return None


def _checked(embedding: np.ndarray, gallery: Gallery) -> np.ndarray:
    dimension = gallery.dimension
    if embedding.shape != (dimension,) or not np.issubdtype(embedding.dtype, np.floating):
        raise InputError(
            f"an embedding of {embedding.dtype} {list(embedding.shape)}, and those of the "
            f"catalogue are float32 [{dimension}]"
        )
    if not np.isfinite(embedding).all() or np.abs(embedding).max(initial=0) > LARGEST_NUMBER:
        raise InputError("an embedding with NaN, infinity or numbers beyond 1e15")
    return embedding.astype(np.float32)


def _file(part: Any) -> str | bytes:
    if isinstance(part, str | bytes | os.PathLike):
        return part if isinstance(part, bytes) else str(os.fspath(part))
    raise InputError(
        f"{type(part).__name__} is no query: give a path, bytes, an id or an embedding [d]"
    )


def _units(embeddings: np.ndarray) -> np.ndarray:
    rows = embeddings.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
