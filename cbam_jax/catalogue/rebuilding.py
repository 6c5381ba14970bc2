"""All photos of a catalogue embedded anew, by another model.

The new embeddings are collected beside the old ones, batch by batch, and take their place in one
transaction at the end: until then searches answer as before. An ended process goes on where it was.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cbam_jax.catalogue.embedders import lasting
from cbam_jax.catalogue.indexing import SETTLED, embedded, read_ahead
from cbam_jax.catalogue.reading import Read
from cbam_jax.catalogue.sources import Photo
from cbam_jax.catalogue.store import Store
from cbam_jax.progress import progress as telling

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


def rebuild(
    store: Store, embedder: "Embedder", source: str | None = None, *, progress: bool = True
) -> int:
    """Embed all photos by another model; ids, paths and what is known stay.

    Args:
        store: the catalogue.
        embedder: the other model.
        source: its name, to be found by next time; None where it has none.
        progress: show on stderr how far it is.

    Returns:
        How many photos have an embedding now. One whose file is not there any more has none.

    Raises:
        InputError: the disk is full, ...; the same call again goes on.
    """
    _begin(store, embedder.fingerprint)
    left = store.rows(
        "SELECT id, path, box FROM item WHERE id NOT IN (SELECT id FROM rebuilt) "
        f"AND {SETTLED} ORDER BY id"
    )
    ids = {path: number for number, path, _ in left}
    photos = [Photo(path, {}, box) for _, path, box in left]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        batches = read_ahead(pool, photos)
        if progress:
            batches = telling(batches, "embedding", total=len(photos), unit=" photos", size=len)
        for batch in batches:
            _collect(store, embedder, batch, ids)
    return _exchange(store, embedder, source)


def _begin(store: Store, fingerprint: str) -> None:
    """Forget what was collected for another model."""
    if store.about("rebuilding") != fingerprint:
        with store.transaction(revised=False):
            store.run("DELETE FROM rebuilt")
            store.tell(rebuilding=fingerprint)


def _collect(
    store: Store, embedder: "Embedder", batch: Sequence[Read], ids: dict[str, int]
) -> None:
    found = embedded(embedder, batch)
    with store.transaction(revised=False):
        for read in batch:
            key = read.hash, read.photo.box
            embedding, problem = found.get(key, (None, read.problem))
            values = [ids[read.photo.path], read.hash, problem, embedding]
            store.run("INSERT OR REPLACE INTO rebuilt VALUES (?, ?, ?, ?)", values)


def _exchange(store: Store, embedder: "Embedder", source: str | None) -> int:
    """Put the new embeddings in the place of the old ones, all at once."""
    with store.transaction():
        # What another process added meanwhile, by the old model, is read when it is added again.
        store.run(
            "UPDATE item SET embedding = r.embedding, problem = r.problem, "
            "hash = coalesce(r.hash, item.hash) "
            "FROM rebuilt r WHERE r.id = item.id"
        )
        store.run(
            "UPDATE item SET embedding = NULL, hash = NULL, modified = NULL, "
            "problem = 'of another model: add it again' "
            f"WHERE id NOT IN (SELECT id FROM rebuilt) AND {SETTLED}"
        )
        store.run("DELETE FROM rebuilt")
        store.tell(fingerprint=embedder.fingerprint, dimension=embedder.dimension, rebuilding="")
        store.tell(model=None if source is None else lasting(source))
        (count,) = store.rows("SELECT count(*) FROM item WHERE embedding IS NOT NULL")[0]
    return count
