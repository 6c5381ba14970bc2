"""One part of a list of photos, read and embedded into a shard's files."""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cbam_jax import InputError
from cbam_jax.catalogue.indexing import embedded, read_ahead
from cbam_jax.catalogue.reading import Read
from cbam_jax.catalogue.shards.files import About, Row, shard_about, stem, write_shard, wrong_with
from cbam_jax.catalogue.sources import Photo
from cbam_jax.progress import progress as telling

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


def part(count: int, shards: int, shard: int) -> range:
    """Which of so many photos a shard has: all shards together have each once, in order.

    >>> [part(10, 4, i) for i in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    """
    return range(count * shard // shards, count * (shard + 1) // shards)


def make_shard(
    folder: Path,
    embedder: "Embedder",
    photos: Sequence[Photo],
    about: About,
    *,
    progress: bool = True,
) -> str:
    """Embed one part of a list of photos, unless that is there already; say what was done.

    Args:
        folder: where its files are written.
        embedder: the model.
        photos: the whole list; the shard's part is `part` of it.
        about: which shard it is, of which list and model.
        progress: show on stderr how far it is.

    Raises:
        InputError: the folder has that shard of another list or model; it cannot be written to.
    """
    before = shard_about(folder, about.shard, about.shards)
    if before is not None:
        _check_same(folder, before, about)
        if wrong_with(folder, about.shard, about.shards) is None:
            return f"{before.count} photos, there already"
    mine = [photos[i] for i in part(len(photos), about.shards, about.shard)]
    started = time.monotonic()
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            batches = read_ahead(pool, mine)
            if progress:
                name = f"shard {about.shard} of {about.shards}"
                batches = telling(batches, name, total=len(mine), unit=" photos", size=len)
            about = about._replace(count=len(mine))
            found = write_shard(folder, about, _rows(embedder, batches))
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; mend that and give the same command "
            "again: the shards that are there are kept"
        ) from error
    text = f"{found} of {len(mine)} photos embedded, {time.monotonic() - started:.1f} s"
    if found == len(mine):
        return text
    lines = shlex.quote(str(folder / f"{stem(about.shard, about.shards)}.jsonl"))
    return f"{text}; which not, and why: grep '\"problem\":' {lines}"


def _check_same(folder: Path, before: About, about: About) -> None:
    for what, one, other in (
        ("list of photos", before.listed, about.listed),
        ("model", before.fingerprint, about.fingerprint),
    ):
        if one != other:
            raise InputError(
                f"{folder} has shard {about.shard} of another {what}: give another --out, or "
                "remove the folder"
            )


def _rows(embedder: "Embedder", batches: Iterable[Sequence[Read]]) -> Iterator[list[Row]]:
    for batch in batches:
        found = embedded(embedder, batch)
        yield [_row(read, found) for read in batch]


def _row(read: Read, found: dict) -> Row:
    embedding, problem = found.get((read.hash, read.photo.box), (None, read.problem))
    return Row(read._replace(content=b""), embedding, problem)


def tell(shard: int, shards: int, text: str) -> None:
    """Say on stderr what became of a shard."""
    print(f"shard {shard} of {shards}: {text}", file=sys.stderr, flush=True)
