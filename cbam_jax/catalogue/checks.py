"""Whether a catalogue is as it should be: its file, its photos, its embeddings."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.checksums import row_sums
from cbam_jax.catalogue.gallery import cache_path, kept_gallery, read_gallery
from cbam_jax.catalogue.indexing import embedded, read_ahead
from cbam_jax.catalogue.reading import read_photo
from cbam_jax.catalogue.sources import Photo
from cbam_jax.catalogue.store import Store

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

# Photos that have a file, of the types that were written; others are told among the rows.
_TYPED = "typeof(hash) = 'blob' AND typeof(path) = 'text' AND typeof(box) = 'text'"
_CLOSE = 1e-4  # Of the length of an embedding: another device may round otherwise.


def verify(store: Store, embedder: Callable[[], "Embedder"], sample: int) -> list[str]:
    """What is wrong, a line each; nothing where all is well. Nothing is changed.

    The database's own check; rows that are not as they were written; embeddings that are none; the
    copy of them beside the file; every photo's file, read and hashed; and some photos, evenly
    chosen, embedded again.

    Args:
        store: the catalogue.
        embedder: loads its model, when ``sample`` is not 0.
        sample: how many to embed again.
    """
    found = [f"the file: {line}" for (line,) in store.rows("PRAGMA integrity_check")]
    if found != ["the file: ok"]:
        return found  # What it holds cannot be relied on.
    return [
        *_rows(store),
        *_texts(store),
        *_copy(store),
        *_files(store),
        *_sample(store, embedder, sample),
    ]


def _rows(store: Store) -> Iterator[str]:
    """Rows that have neither an embedding nor a reason, and embeddings that are none or changed."""
    dimension = store.about("dimension")
    for number, embedding, known in store.embeddings():
        if problem := _problem(embedding, dimension, known):
            yield f"photo {number}: {problem}"
    both = "SELECT id FROM item WHERE (embedding IS NULL) = (problem IS NULL)"
    for (number,) in store.stream(both):
        yield f"photo {number}: neither an embedding nor a reason, or both"


def _texts(store: Store) -> Iterator[str]:
    """Rows whose texts are not as they were written, and how many have no sum by which to tell."""
    unknown = 0
    for number, whole in store.wholes():
        unknown += whole is None
        if whole is False:
            yield f"photo {number}: what is known of it is not as it was written"
    if unknown:
        yield (
            f"{unknown} photos have no checksum of what is known of them, from before there were "
            "any: the next `cbam-jax catalogue add` writes it"
        )


def _problem(embedding: object, dimension: int, known: int | None) -> str | None:
    """What is wrong with an embedding as it is kept."""
    if not isinstance(embedding, bytes):
        return "its embedding is none"
    if len(embedding) != 4 * dimension:
        return f"{len(embedding)} bytes of embedding, not {4 * dimension}"
    numbers = np.frombuffer(embedding, np.float32)
    if not np.isfinite(numbers).all():
        return "its embedding has numbers that are none"
    changed = known is not None and known != row_sums(numbers[None])[0]
    return "its embedding is not as it was written" if changed else None


def _copy(store: Store) -> Iterator[str]:
    """Whether what searches read is what the database holds."""
    with contextlib.suppress(ValueError):  # Embeddings of a wrong size or sum, told above.
        ours, kept = read_gallery(store), kept_gallery(store)
        if kept is None:
            return
        theirs, same = kept
        same = same and np.array_equal(ours.ids, theirs.ids)
        same = same and np.array_equal(ours.squares, theirs.squares)
        same = same and all(
            np.array_equal(ours.embeddings[i : i + 4096], theirs.embeddings[i : i + 4096])
            for i in range(0, len(ours.ids), 4096)
        )
        if not same:
            yield f"{cache_path(store.path)} is damaged: the next search makes it anew"


def _files(store: Store) -> Iterator[str]:
    """Photos whose file is gone, cannot be read, or has another content."""
    rows = store.rows(f"SELECT path, id, hash FROM item WHERE {_TYPED} ORDER BY id")
    known = {path: (number, content) for path, number, content in rows}
    photos = [Photo(path) for path in known]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for batch in read_ahead(pool, photos):
            for read in batch:
                number, content = known[read.photo.path]
                if read.problem:
                    yield f"photo {number}: {read.problem}: {read.photo.path}"
                elif read.hash != content:
                    yield f"photo {number}: changed since it was added: {read.photo.path}"


def _sample(store: Store, embedder: Callable[[], "Embedder"], sample: int) -> Iterator[str]:
    """Some photos whose embedding is another one today."""
    sql = f"SELECT id FROM item WHERE embedding IS NOT NULL AND {_TYPED}"
    ids = [number for (number,) in store.rows(sql)]
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(sample, len(ids))).astype(int))
    for place in chosen.tolist() if sample else []:
        number = ids[place]
        path, box, content, kept = store.rows(
            "SELECT path, box, hash, embedding FROM item WHERE id = ?", [number]
        )[0]
        read = read_photo(Photo(path, {}, box))
        if read.problem or read.hash != content:
            continue  # Told above.
        try:
            (again, problem) = embedded(embedder(), [read])[read.hash, box]
        except InputError as error:
            yield f"embeddings cannot be checked: {error}"
            return
        if again is None or not _close(again, kept):
            yield f"photo {number}: embedded again it is another one ({problem or 'numbers'})"


def _close(one: bytes, other: bytes) -> bool:
    x, y = np.frombuffer(one, np.float32), np.frombuffer(other, np.float32)
    return len(x) == len(y) and bool(np.linalg.norm(x - y) <= _CLOSE * np.linalg.norm(y))
