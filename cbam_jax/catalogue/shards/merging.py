"""All shards of a folder into a catalogue; no photo is read again and no model loaded."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cbam_jax import InputError
from cbam_jax.catalogue.embedders import check_fingerprint
from cbam_jax.catalogue.indexing import BATCH, Found, Key, put
from cbam_jax.catalogue.shards.files import (
    About,
    Row,
    findings,
    read_shard,
    shard_about,
    shard_count,
)
from cbam_jax.catalogue.store import Store


def add_shards(store: Store, folder: Path, *, progress: bool = True) -> Counter[str]:
    """Add what a folder's shards hold, in the order of their list; of how many became what.

    The catalogue is then what ``add`` of the same list would have made, ids included. A process
    that is ended keeps the batches that it has written, and the same call goes on.

    Raises:
        InputError: a shard is missing, damaged or of another model than the catalogue's.
    """
    shards = check_whole(folder)
    counts: Counter[str] = Counter()
    for shard in range(shards):
        about = shard_about(folder, shard, shards)
        assert about is not None
        if not shard:
            _claim(store, about)
        for rows in _batches(read_shard(folder, shard, shards)):
            counts += _write(store, about, rows)
        if progress:
            print(f"shard {shard} of {shards}: {about.count} photos", file=sys.stderr)
    return counts


def check_whole(folder: Path) -> int:
    """Of how many shards a folder's are; raises an InputError where one of them is not whole."""
    shards = shard_count(folder)
    wrong = findings(folder, shards)
    if wrong:
        shard, text = next(iter(wrong.items()))
        raise InputError(
            f"{folder}: {len(wrong)} of {shards} shards cannot be taken (shard {shard}: {text}): "
            "give the `cbam-jax embed` command again, which makes those anew"
        )
    return shards


def _claim(store: Store, about: About) -> None:
    """Write down whose embeddings the catalogue holds."""
    with store.transaction(revised=False):
        check_fingerprint(store, about.fingerprint)
        if store.about("fingerprint") is None:
            store.tell(fingerprint=about.fingerprint, dimension=about.dimension, model=about.model)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def _write(store: Store, about: About, rows: list[Row]) -> Counter[str]:
    made: dict[Key, Found] = {
        (row.read.hash, row.read.photo.box): (row.embedding, row.problem)
        for row in rows
        if row.read.hash is not None
    }
    # Files that are not there need not have been moved: the photos may be on another machine.
    return put(store, about.fingerprint, [row.read for row in rows], made, moves=False)
