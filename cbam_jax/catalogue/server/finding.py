"""One thread that embeds and searches for any number of connections.

Photos that arrive within a few milliseconds are embedded together. The thread has the catalogue
open, and sees what another process has added since the last search.
"""

import hashlib
import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from cbam_jax import InputError
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.items import Neighbour
from cbam_jax.catalogue.queries import Ready, embed_photos
from cbam_jax.catalogue.server.asking import Answerer, answer

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

TOGETHER = 8  # Photos embedded together, at most: the batch size of the model.
_PATIENCE = 0.003  # Seconds that the first of them waits for others.
_WAITING = 256  # Searches that may wait.


class Search(NamedTuple):
    """What is asked: a photo's bytes, or an id, and how many of what."""

    photo: bytes | None
    id: int | None
    k: int
    where: tuple[str, ...]
    box: Sequence[float] | None
    copies: bool = False
    rerank: str | None = None


class Finder:
    """The thread. ``close`` ends it, after what waits has been answered.

    Args:
        path: of the catalogue.
        embedder: its model.
    """

    def __init__(self, path: str | os.PathLike, embedder: "Embedder"):
        self._path, self._embedder = path, embedder
        self._answerer = Answerer(self._run, "finder", _WAITING)

    def find(self, search: Search) -> "Future[list[Neighbour]]":
        """Ask; the answer comes later. Raises `Busy` where too many wait."""
        return self._answerer.ask(search)

    def close(self) -> None:
        """End the thread."""
        self._answerer.close()

    def _run(self, waiting: queue.Queue) -> None:
        with Catalogue.open(self._path, self._embedder, create=False) as catalogue:
            while (first := waiting.get()) is not None:
                batch, end = _batch(waiting, first)
                embeddings = self._embedded(batch)
                for (search, future), embedding in zip(batch, embeddings, strict=True):
                    answer(future, lambda s=search, e=embedding: _found(catalogue, s, e))
                if end:
                    return

    def _embedded(self, batch: Sequence[tuple[Search, Future]]) -> list:
        """Of each search its embedding, what is wrong with its photo, or None where it has none."""
        found: list = [None] * len(batch)
        photos = [row for row, (search, _) in enumerate(batch) if search.photo is not None]
        searches = [batch[row][0] for row in photos]
        files, boxes = [s.photo or b"" for s in searches], [s.box for s in searches]
        try:
            made: list = embed_photos(self._embedder, files, boxes)
        except Exception as error:  # The thread lives on: each of them is told.
            made = [error] * len(photos)
        for row, embedding in zip(photos, made, strict=True):
            found[row] = embedding
        return found


def _batch(
    waiting: queue.Queue, first: tuple[Search, Future]
) -> tuple[list[tuple[Search, Future]], bool]:
    """What came within a few milliseconds, and whether the end did."""
    batch, until = [first], time.monotonic() + _PATIENCE
    while len(batch) < TOGETHER:
        try:
            following = waiting.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        if following is None:
            return batch, True
        batch.append(following)
    return batch, False


def _found(catalogue: Catalogue, search: Search, embedding) -> list[Neighbour]:
    if isinstance(embedding, Exception):
        raise embedding
    if isinstance(embedding, str):
        raise InputError(embedding)
    query: Any = search.id if embedding is None else Ready(embedding, _hash(search.photo))
    return catalogue.find(
        query, search.k, where=search.where or None, copies=search.copies, rerank=search.rerank
    )


def _hash(photo: bytes | None) -> bytes:
    return hashlib.sha256(photo or b"").digest()
