"""A collection brought up to a catalogue: what is new, changed or gone since the last time.

Each row carries a stamp of all that it was written from. The stamps of the collection are compared
with those of the catalogue, so that a process that was ended, at whatever moment, leaves nothing
that the same command again would not mend. One process at a time writes to a collection.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.gallery import Gallery, open_gallery
from cbam_jax.catalogue.milvus.addresses import Address
from cbam_jax.catalogue.milvus.collection import INDEXES, Collection, content_of, row
from cbam_jax.catalogue.milvus.conditions import expression
from cbam_jax.catalogue.milvus.searching import neighbours
from cbam_jax.catalogue.store import Store
from cbam_jax.progress import progress as telling

_BYTES = 2**23  # Of the embeddings that are sent at once.
_QUERIES, _K = 100, 10  # By which recall is measured.


class Synced(NamedTuple):
    """What was done to a collection.

    Attributes:
        new: photos written for the first time.
        changed: photos written anew.
        removed: photos that the catalogue has no longer.
        count: photos in the collection now.
        index: how it is searched; ``flat`` is exact.
        recall: of another index, recall@10 against exact search, measured; None for ``flat``.
    """

    new: int
    changed: int
    removed: int
    count: int
    index: str
    recall: float | None


def sync(
    store: Store, address: Address, index: str | None = None, *, progress: bool = True
) -> Synced:
    """Bring a collection up to a catalogue; make it where there is none.

    Args:
        store: the catalogue.
        address: of the collection.
        index: ``flat``, exact; ``hnsw`` or ``ivf``, approximate; None: that of the collection, or
            ``flat``.
        progress: show on stderr how far it is.

    Raises:
        InputError: the catalogue is empty; the collection is of another catalogue, model or index;
            nobody answers.
    """
    if store.about("fingerprint") is None:
        raise InputError(f"{store.path} is empty: add photos first")
    with Collection(address) as collection:
        index = _prepared(store, collection, index)
        theirs = {row["id"]: row["stamp"] for row in collection.each(["id", "stamp"])}
        ours = dict(_stamps(store))
        new = [number for number in ours if number not in theirs]
        changed = [i for i, stamp in ours.items() if i in theirs and theirs[i] != stamp]
        gone = [number for number in theirs if number not in ours]
        collection.remove(gone)
        gallery = open_gallery(store)
        for numbers, fresh in ((changed, False), (new, True)):
            _write(store, gallery, collection, numbers, fresh=fresh, progress=progress)
        if gone or changed or new:
            collection.settle()
        count = collection.count()
        if count != len(ours):
            raise InputError(
                f"{address.text} has {count} photos and {store.path} {len(ours)}: another process "
                "writes to one of them; give the same command again when it has ended"
            )
        recall = None if index == "flat" else _recall(gallery, collection, index)
    return Synced(len(new), len(changed), len(gone), count, index, recall)


def _prepared(store: Store, collection: Collection, index: str | None) -> str:
    """Make the collection, or check that it is that of the catalogue; return its index."""
    keys = ("identity", "fingerprint", "dimension", "model")
    ours: dict[str, Any] = {key: store.about(key) for key in keys}
    theirs = collection.about()
    if theirs is None:
        index = index or "flat"
        collection.create({**ours, "index": index}, ours["dimension"], index)
        return index
    name, other = collection.address.text, "name another collection"
    if theirs.get("identity") != ours["identity"]:
        raise InputError(f"{name} holds the photos of another catalogue: {other}")
    if theirs.get("fingerprint") != ours["fingerprint"]:
        raise InputError(f"{name} holds embeddings of another model than {store.path}: {other}")
    if index not in (None, theirs["index"]):
        raise InputError(f"{name} has the index {theirs['index']}, not {index}: {other}")
    return theirs["index"] if theirs["index"] in INDEXES else "flat"


_SELECT = "SELECT id, path, hash, box, payload, embedding FROM item WHERE embedding IS NOT NULL"


def _stamps(store: Store) -> Iterator[tuple[int, int]]:
    for number, *parts in store.stream(_SELECT):
        yield number, _stamp(*parts)


def _stamp(path: str, digest: bytes | None, box: str, payload: str, embedding: bytes) -> int:
    """64 bits that change when a row must be written anew."""
    parts = path.encode(), digest or b"", box.encode(), payload.encode(), embedding
    lengths = json.dumps([len(part) for part in parts]).encode()
    found = hashlib.sha256(b"".join([lengths, *parts])).digest()
    return int.from_bytes(found[:8], "big", signed=True)


def _write(
    store: Store,
    gallery: Gallery,
    collection: Collection,
    numbers: Iterable[int],
    *,
    fresh: bool,
    progress: bool,
) -> None:
    numbers = list(numbers)
    size = max(1, _BYTES // (4 * gallery.dimension))
    batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    if progress and numbers:
        what = "sending new photos" if fresh else "sending changed photos"
        batches = telling(batches, what, total=len(numbers), unit=" photos", size=len)
    for batch in batches:
        collection.put([_row(store, number) for number in batch], fresh=fresh)


def _row(store: Store, number: int) -> dict[str, Any]:
    found = store.rows(_SELECT + " AND id = ?", [number])
    if not found:
        raise InputError(f"photo {number} was removed meanwhile: give the same command again")
    _, path, digest, box, payload, embedding = found[0]
    stamp = _stamp(path, digest, box, payload, embedding)
    numbers = np.frombuffer(embedding, np.float32)
    return row(number, numbers, path, content_of(digest, box), stamp, json.loads(payload))


def _recall(gallery: Gallery, collection: Collection, index: str) -> float:
    """Of some photos, the share of their ten nearest that the index finds."""
    places = np.unique(np.linspace(0, len(gallery) - 1, min(_QUERIES, len(gallery))).astype(int))
    exact = gallery.nearest(gallery.embeddings[places], _K)
    found = neighbours(collection, gallery.embeddings[places], _K, expression(None), index)
    shares = [
        len(np.intersect1d(ids, theirs)) / len(ids)
        for (_, ids), (_, theirs, _) in zip(exact, found, strict=True)
    ]
    return float(np.mean(shares))
