"""The embeddings of a catalogue in memory: one array, mapped from a file beside the database.

The file is a copy of what the database holds, for speed alone: it names the catalogue and the
revision that it was made of, and is made anew where they are others, or where a byte of it is not
as it was written, which a sum of each row tells. A folder that may not be
written to has none, and the embeddings are read from the database each time.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax.catalogue.checksums import row_sums
from cbam_jax.catalogue.narrowing import Narrow, narrow
from cbam_jax.catalogue.nearest import LARGEST_NUMBER, nearest, squared_norms
from cbam_jax.catalogue.store import Store, damaged
from cbam_jax.foreign_files import open_regular
from cbam_jax.whole_files import written_whole

LONGEST = 65_536  # Numbers of an embedding.
_HEADER = 4096  # Bytes; what follows is then aligned to pages.


class Gallery:
    """Embeddings that can be searched.

    Attributes:
        ids: [n] int64, ascending.
        embeddings: [n, d] float32, likewise.
        revision: of the catalogue, that they are.
        narrowed: what `narrow` made of a large one, by which it is searched faster.
    """

    def __init__(self, ids: np.ndarray, embeddings: np.ndarray, revision: int):
        self.ids, self.embeddings, self.revision = ids, embeddings, revision
        self.narrowed: Narrow | None = None

    @functools.cached_property
    def squares(self) -> np.ndarray:
        """Squared norms of the embeddings, [n] float32; a copy beside the file has them too."""
        return squared_norms(self.embeddings)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding, d."""
        return self.embeddings.shape[1]

    def embedding(self, number: int) -> np.ndarray | None:
        """The embedding [d] of a photo, None where it has none."""
        rows = self.rows([number])
        return np.array(self.embeddings[rows[0]]) if len(rows) else None

    def among(self, ids: Sequence[int]) -> np.ndarray:
        """The embeddings [n, d] of photos that have one, in the order of the ids."""
        return np.array(self.embeddings[np.searchsorted(self.ids, ids)])

    def nearest(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each query the distances and the ids of the k nearest; see `nearest.nearest`."""
        options = {"squares": self.squares, "rows": rows, "narrowed": self.narrowed}
        found = nearest(queries, self.embeddings, k, **options)
        return [(distances, self.ids[places]) for distances, places in found]

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The positions of those of the ids that have an embedding, ascending."""
        wanted = np.unique(np.asarray(ids, np.int64))
        return np.flatnonzero(np.isin(self.ids, wanted, assume_unique=True))


class _Header(NamedTuple):
    identity: str
    revision: int
    count: int
    dimension: int


def cache_path(path: Path) -> Path:
    """Where the embeddings of a catalogue lie once more.

    >>> cache_path(Path("shop.db")).name
    'shop.db-embeddings'
    """
    return path.with_name(path.name + "-embeddings")


def open_gallery(store: Store) -> Gallery:
    """Map the embeddings of a catalogue, or read them where they were not kept or are others."""
    path = cache_path(store.path)
    header = _header(store)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return _whole(*_mapped(path, header))
    gallery, header = _read(store)
    if not header.count:
        return gallery
    with contextlib.suppress(OSError):  # A folder that may only be read, a full disk.
        _keep(path, header, gallery)
        return _mapped(path, header)[0]
    return gallery


def _header(store: Store) -> _Header:
    (count,) = store.rows("SELECT count(*) FROM item WHERE embedding IS NOT NULL")[0]
    identity, revision = store.about("identity"), store.about("revision")
    dimension = store.about("dimension") or 0
    if type(dimension) is not int or not 0 <= dimension <= LONGEST or type(revision) is not int:
        raise damaged(store.path, "what it says of its embeddings is nothing")
    return _Header(identity, revision, count, dimension)


def read_gallery(store: Store) -> Gallery:
    """The embeddings as the database itself holds them."""
    return _read(store)[0]


def _read(store: Store) -> tuple[Gallery, _Header]:
    """The embeddings of one moment, and what a copy of them is known by."""
    with store.snapshot():
        header = _header(store)
        ids = np.empty(header.count, np.int64)
        embeddings = np.empty((header.count, header.dimension), np.float32)
        row, sums = -1, []
        rows = itertools.islice(store.embeddings(), header.count)
        for row, (number, embedding, known) in enumerate(rows):
            if not isinstance(embedding, bytes) or len(embedding) != 4 * header.dimension:
                raise damaged(store.path, f"the embedding of photo {number} is none")
            ids[row], embeddings[row] = number, np.frombuffer(embedding, np.float32)
            sums.append(known)
    gallery = Gallery(ids, embeddings, header.revision)
    if row + 1 < header.count or (np.diff(ids) <= 0).any():
        raise damaged(store.path, "its photos are not in the order of their ids")
    _check_numbers(store, gallery)
    for number, known, now in zip(ids, sums, row_sums(embeddings).tolist(), strict=True):
        if known is not None and known != now:
            raise damaged(store.path, f"the embedding of photo {number} is not as it was written")
    return gallery, header


def _check_numbers(store: Store, gallery: Gallery) -> None:
    """Raise an InputError for embeddings that no model makes: bytes that were never numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        most = gallery.embeddings.shape[1] * np.float32(LARGEST_NUMBER) ** 2
        wrong = gallery.ids[~(gallery.squares <= most)]  # Nor is NaN.
    if len(wrong):
        raise damaged(store.path, f"the embedding of photo {wrong[0]} is none")


def kept_gallery(store: Store) -> tuple[Gallery, bool] | None:
    """The copy, and whether it is as it was kept; None where there is none of this revision."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        gallery, sums = _mapped(cache_path(store.path), _header(store))
        return gallery, np.array_equal(_sums(gallery), sums)
    return None


def _mapped(path: Path, expected: _Header) -> tuple[Gallery, np.ndarray]:
    """The kept embeddings and their sums; a ValueError where they are of something else."""
    with open_regular(path, sys.maxsize) as file:
        header = json.loads(file.read(_HEADER).rstrip(b"\0"))
    if not isinstance(header, list) or header[:-1] != list(expected):
        raise ValueError("the embeddings are of another revision")
    (count, dimension), width = expected[2:], header[-1]
    if type(width) is not int or not 0 <= width < max(1, dimension):
        raise ValueError("the copy is damaged")
    ids, squares, sums, embeddings, *narrowed = _arrays(path, count, dimension, width)
    gallery = Gallery(np.array(ids), embeddings, expected.revision)
    gallery.squares = np.array(squares)
    if width:
        gallery.narrowed = Narrow(*narrowed)
    return gallery, np.array(sums)


def _arrays(path: Path, count: int, dimension: int, width: int) -> list[np.ndarray]:
    """All arrays of a copy, in the order in which `_keep` writes them, left in the file."""
    shapes = [
        ((count,), np.int64),  # Ids,
        ((count,), np.float32),  # squares,
        ((count,), np.int64),  # sums,
        ((count, dimension), np.float32),
        ((dimension, width), np.float32),  # and what it is narrowed by.
        ((count, width + 1 if width else 0), np.float32),
    ]
    sizes = [_paged(np.dtype(dtype).itemsize * math.prod(shape)) for shape, dtype in shapes]
    if path.stat().st_size != _HEADER + sum(sizes):
        raise ValueError("the copy is cut off")
    starts = itertools.accumulate(sizes, initial=_HEADER)
    return [
        np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else np.empty(shape, dtype)
        for start, (shape, dtype) in zip(starts, shapes, strict=False)
    ]


def _whole(gallery: Gallery, sums: np.ndarray) -> Gallery:
    """The gallery; a ValueError where a byte of it is not as it was kept."""
    # Of zeros alone, as a machine that loses its power may leave them, the sums are right.
    ascending = (np.diff(gallery.ids, prepend=0) > 0).all()
    if not (ascending and np.array_equal(_sums(gallery), sums)):
        raise ValueError("the copy is damaged")
    return gallery


def _sums(gallery: Gallery) -> np.ndarray:
    """A sum of all that is kept of each photo, [n] int64."""
    sums = row_sums(gallery.embeddings) + gallery.ids + gallery.squares.view(np.int32)
    if gallery.narrowed is None:
        return sums
    return sums + row_sums(gallery.narrowed.along) + row_sums(gallery.narrowed.directions).sum()


def _paged(size: int) -> int:
    """The size, filled up to whole pages."""
    return -(-size // _HEADER) * _HEADER


def _keep(path: Path, header: _Header, gallery: Gallery) -> None:
    # Several processes may do so at once: each writes a file of its own.
    own = path.with_name(f"{path.name}-{os.getpid()}")
    gallery.narrowed = narrow(gallery.embeddings, gallery.squares)
    none = np.empty((header.dimension, 0), np.float32), np.empty((header.count, 0), np.float32)
    directions, along = gallery.narrowed or none
    about = [*header, directions.shape[1]]
    arrays = gallery.ids, gallery.squares, _sums(gallery), gallery.embeddings, directions, along
    with written_whole(own) as partial, open(partial, "wb") as file:
        file.write(json.dumps(about).encode().ljust(_HEADER, b"\0"))
        for array in arrays:
            array.tofile(file)
            file.write(bytes(-array.nbytes % _HEADER))
    os.replace(own, path)
