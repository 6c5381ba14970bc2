"""Adding photos: what is new is read, embedded and written, batch by batch.

While one batch is embedded, threads read the files of the next. Each batch is one transaction with
the photos in the order given, so that an ended process loses the batch under way and nothing else,
and the same command again ends in the same catalogue.
"""

import contextlib
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.embedders import check_fingerprint
from cbam_jax.catalogue.near import Lookout
from cbam_jax.catalogue.nearest import LARGEST_NUMBER
from cbam_jax.catalogue.reading import Read, read_photo
from cbam_jax.catalogue.sources import Photo, parse_box
from cbam_jax.catalogue.store import Store
from cbam_jax.foreign_files import is_gone
from cbam_jax.progress import progress as telling

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

BATCH = 256  # Photos of a transaction.
_FIRST = 64  # Of the first: the model is prepared then, and who waits sees that it goes on.
_AHEAD = 64  # Photos read while a batch is embedded.
_BYTES = 2**27  # Of a batch's files, beyond which it ends.
_RACE = 2 * 10**9  # Nanoseconds: a file written later than this before it was read is read again.
Key = tuple[bytes | None, str]
Found = tuple[bytes | None, str | None]  # An embedding, or why there is none.

KINDS = ("new", "changed", "moved", "copies", "unchanged", "unreadable", "refused")


class Added(NamedTuple):
    """What became of the photos that a catalogue was given.

    Attributes:
        counts: how many are ``new``, ``changed``, ``moved`` (a known photo under another path),
            ``copies`` (of a known photo, which stays), ``unchanged``, ``unreadable``, or
            ``refused`` as nearly the same as another.
        vanished: paths in the catalogue, below the folders given, that are not there any more.
        seconds: that it took.
    """

    counts: Counter[str]
    vanished: list[str]
    seconds: float


def to_read(
    store: Store, photos: Sequence[Photo], *, checksum: bool, skip_near: bool = False
) -> list[Photo]:
    """Those of the photos whose file or box is another than the catalogue knows.

    Of the others what is known is brought up to date. Unless ``checksum``, a file is held to be
    the same where its size and its time of writing are.
    """
    left, told = [], []
    settled = "1" if skip_near else SETTLED
    for photo in photos:
        known = store.rows(
            f"SELECT id, size, modified, seen, box, payload FROM item WHERE path = ? AND {settled}",
            [_storable(photo.path)],
        )
        if checksum or not known or not _same(photo, known[0]):
            left.append(photo)
        elif photo.merged(known[0][5]) != known[0][5]:
            told.append((photo.merged(known[0][5]), known[0][0]))
    if told:
        with store.transaction(revised=False):
            for pair in told:
                store.run("UPDATE item SET payload = ? WHERE id = ?", pair)
    return left


def add_photos(
    store: Store,
    embedder: "Embedder",
    photos: Sequence[Photo],
    *,
    skip_near: bool = False,
    progress: bool = True,
) -> Counter[str]:
    """Read, embed and write photos; of how many became what: see `Added`.

    Raises:
        InputError: the disk is full, another process goes on writing; what was written stays.
    """
    counts: Counter[str] = Counter()
    lookout = Lookout(store) if skip_near else None
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        batches = read_ahead(pool, photos)
        if progress:
            print("preparing the model, up to a minute, then adding", file=sys.stderr, flush=True)
            batches = telling(batches, "adding", total=len(photos), unit=" photos", size=len)
        for batch in batches:
            counts += _write(store, embedder, batch, lookout)
    return counts


def checked_rows(
    names: Sequence[str],
    embeddings: np.ndarray,
    dimension: int,
    payloads: Sequence[Mapping[str, Any]] | None,
) -> list[tuple[Photo, bytes]]:
    """Embeddings made elsewhere, as they are kept; raises an InputError where they are none."""
    embeddings = np.asarray(embeddings)
    shape = len(names), dimension
    if embeddings.shape != shape or embeddings.dtype != np.float32:
        raise InputError(
            f"embeddings are {embeddings.dtype} {list(embeddings.shape)}, expected float32 "
            f"{list(shape)}: one for each name, by the catalogue's model"
        )
    if len(set(names)) < len(names) or (payloads is not None and len(payloads) != len(names)):
        raise InputError("names are to be given once each, and a payload for each or none")
    if not (np.abs(embeddings) <= LARGEST_NUMBER).all():  # Nor is NaN.
        raise InputError(
            f"embeddings have NaN, infinity or numbers beyond {LARGEST_NUMBER:g}: leave those "
            "photos out"
        )
    known = payloads if payloads is not None else [{}] * len(names)
    photos = [Photo(name, payload) for name, payload in zip(names, known, strict=True)]
    return [(p, row.tobytes()) for p, row in zip(photos, embeddings, strict=True)]


def put_embedding(store: Store, photo: Photo, embedding: bytes) -> None:
    """Write the row of a photo whose file was not read, inside a transaction."""
    old = store.rows(f"SELECT {_ROW} FROM item WHERE path = ?", [photo.path])
    _put(store, Read(photo), old, (None, embedding))


def vanished(store: Store, folders: Sequence[str], given: Sequence[Photo]) -> list[str]:
    """The paths in the catalogue, below some folders, where no file is any more, nor was given."""
    found, there = [], {_storable(photo.path) for photo in given}  # A name may be no UTF-8.
    for folder in folders:
        prefix = os.path.join(_storable(folder), "")
        rows = store.stream(
            "SELECT path FROM item WHERE substr(path, 1, ?) = ? ORDER BY path",
            [len(prefix), prefix],
        )
        found += [path for (path,) in rows if path not in there and is_gone(path)]
    return found


def lost_folder(path: str, folders: Sequence[str]) -> str | None:
    """The outermost folder of a path that is gone or, of ``folders``, empty; None where none is.

    So a disk looks that is not connected: what was in it is not known to be deleted.

    >>> lost_folder("/nowhere/dress/a.jpg", []), lost_folder("/a.jpg", [])
    ('/nowhere', None)
    """
    parents = [str(folder) for folder in reversed(Path(path).parents)]
    return next((f for f in parents if is_gone(f) or (f in folders and _is_empty(f))), None)


def _is_empty(folder: str) -> bool:
    with contextlib.suppress(OSError):  # It may not be read.
        return not os.listdir(folder)
    return False


def _same(photo: Photo, known: tuple) -> bool:
    _, size, modified, seen, box, _ = known
    try:
        state = os.stat(photo.path)
    except OSError:
        return False
    settled = modified is not None and modified + _RACE < seen
    return settled and (state.st_size, state.st_mtime_ns, photo.box) == (size, modified, box)


def _storable(path: str) -> str:
    """A path as text that SQLite takes: a name that is not UTF-8 is shown as it is."""
    return os.fsencode(path).decode(errors="backslashreplace")


def read_ahead(pool: ThreadPoolExecutor, photos: Sequence[Photo]) -> Iterator[list[Read]]:
    """Batches of files, of which the next is read meanwhile; the first is a small one."""
    most = min(_FIRST, BATCH)
    waiting: list[Future[Read]] = []
    given = iter(photos)

    def ask(count: int) -> None:
        waiting.extend(pool.submit(read_photo, photo) for photo in itertools.islice(given, count))

    ask(_AHEAD)
    try:
        while waiting:
            batch, size = [], 0
            while waiting and len(batch) < most and size < _BYTES:
                batch.append(waiting.pop(0).result())
                size += len(batch[-1].content)
                ask(1)
            yield batch
            most = BATCH
    finally:
        for future in waiting:
            future.cancel()


def _write(
    store: Store, embedder: "Embedder", batch: list[Read], lookout: Lookout | None
) -> Counter[str]:
    """One batch: decide where each embedding comes from, embed what is new, write all at once."""
    known = _known(store, batch)
    fresh = embedded(embedder, [read for read in batch if _key(read) not in known])
    return put(store, embedder.fingerprint, batch, fresh, known=known, lookout=lookout)


def put(
    store: Store,
    fingerprint: str,
    batch: Sequence[Read],
    fresh: dict[Key, Found],
    *,
    known: dict[Key, Found] | None = None,
    lookout: Lookout | None = None,
    moves: bool = True,
) -> Counter[str]:
    """Write one batch at once; of how many became what.

    Args:
        store: the catalogue.
        fingerprint: of the model that embedded them.
        batch: files that were read.
        fresh: their embeddings, or problems, by hash and box.
        known: those that the catalogue has already; None: they are looked up.
        lookout: finds what is nearly the same, and refuses it.
        moves: take a content that is known, and whose file is not there, to have been moved.
    """
    known = _known(store, batch) if known is None else known
    counts: Counter[str] = Counter()
    with store.transaction():
        check_fingerprint(store, fingerprint)  # Another process may have embedded all anew.
        for read in batch:
            counts[_write_one(store, read, known, fresh, lookout, moves)] += 1
    return counts


# Not what was refused as nearly the same: another time it may be wanted.
SETTLED = "(embedding IS NOT NULL OR problem NOT LIKE 'nearly %')"


def _key(read: Read) -> Key:
    """What an embedding depends on: the file's content, and the part of it that is used."""
    return read.hash, read.photo.box


def _known(store: Store, batch: Sequence[Read]) -> dict[Key, Found]:
    """Embeddings, or problems, of contents that the catalogue has already."""
    known = {}
    for read in batch:
        found = store.rows(
            f"SELECT embedding, problem FROM item WHERE hash = ? AND box = ? AND {SETTLED} LIMIT 1",
            [read.hash, read.photo.box],
        )
        if found:
            known[_key(read)] = found[0]
    return known


def embedded(embedder: "Embedder", reads: Sequence[Read]) -> dict[Key, Found]:
    """Embeddings, or problems, of files that were read, by hash and box, each embedded once."""
    found: dict[Key, Found] = {}
    unique = {_key(read): read for read in reads if read.problem is None}
    for boxed in (False, True):
        some = [read for read in unique.values() if bool(read.photo.box) == boxed]
        if not some:
            continue
        boxes = [parse_box(read.photo.box) for read in some] if boxed else None
        files = [read.content for read in some]
        made = embedder.embed_files(files, boxes=boxes, progress=False)
        reasons = iter(made.failed)
        for read, row in zip(some, np.asarray(made.embeddings, np.float32), strict=True):
            readable = bool((np.abs(row) <= LARGEST_NUMBER).all())
            problem = None if readable else reason(next(reasons, ("", "no finite numbers"))[1])
            found[_key(read)] = (row.tobytes() if readable else None, problem)
    return found


def reason(text: str) -> str:
    """What an embedder says of bytes, without the name that it gave them and its remedies.

    >>> reason("image 3 cannot be decoded (9 bytes): replace the file")
    'cannot be decoded (9 bytes)'
    """
    return re.split(": replace|; correct", re.sub(r"^image \d+:? ", "", text))[0]


def _write_one(
    store: Store,
    read: Read,
    known: dict[Key, Found],
    fresh: dict[Key, Found],
    lookout: Lookout | None,
    moves: bool,
) -> str:
    """Insert or update a photo's row; return what became of it."""
    here = store.rows(f"SELECT {_ROW} FROM item WHERE path = ?", [read.photo.path])
    if here and read.hash is None:
        return "unreadable"  # What is known of a file stays, though it cannot be read now.
    embedding, problem = known.get(_key(read)) or fresh.get(_key(read), (None, read.problem))
    old = here or (_gone(store, read) if embedding and moves else [])
    kind = _kind(read, here, old, known)
    if lookout and embedding and kind not in ("unchanged", "moved"):
        problem = lookout.like(old[0][0] if old else None, read.look, embedding)
        embedding = None if problem else embedding
        kind = "refused" if problem else kind
    number = _put(store, read, old, (problem, embedding))
    if embedding:
        known[_key(read)] = embedding, None
        if lookout:
            lookout.note(number, read.look, embedding)
    return "unreadable" if problem and kind != "refused" else kind


def _put(store: Store, read: Read, old: list[tuple], found: tuple[str | None, bytes | None]) -> int:
    """Write a row in the place of an old one, or a new one; return its id."""
    payload = read.photo.merged(old[0][3] if old else "{}")
    values = [read.photo.path, read.hash, read.size, read.modified, read.seen, read.photo.box]
    values += [payload, read.look, *found]
    if not old:
        marks = ", ".join("?" * len(values))
        return store.run(f"INSERT INTO item ({', '.join(_COLUMNS)}) VALUES ({marks})", values)
    sets = ", ".join(f"{name} = ?" for name in _COLUMNS)
    store.run(f"UPDATE item SET {sets} WHERE id = ?", [*values, old[0][0]])
    return old[0][0]


_COLUMNS = (
    "path", "hash", "size", "modified", "seen", "box", "payload", "look", "problem", "embedding",
)  # fmt: skip
_ROW = "id, hash, box, payload, embedding IS NOT NULL, path"


def _gone(store: Store, read: Read) -> list[tuple]:
    """The row of the same content whose file is not there any more: it has been moved."""
    rows = store.rows(f"SELECT {_ROW} FROM item WHERE hash = ? AND box = ? ORDER BY id", _key(read))
    return [row for row in rows if is_gone(row[5])][:1]


def _kind(read: Read, here: list[tuple], old: list[tuple], known: dict[Key, Found]) -> str:
    if here and here[0][1:3] == _key(read):
        return "unchanged" if here[0][4] else "new"
    if here:
        return "changed"
    if old:
        return "moved"
    return "copies" if _key(read) in known else "new"
