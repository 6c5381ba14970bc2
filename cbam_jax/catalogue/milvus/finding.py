"""A collection as a catalogue that can be searched and listed; it is changed by `sync` alone."""

import functools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue import embedders
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.filters import Photos, Where, check, text_of
from cbam_jax.catalogue.folding import Content, Known, Own, Row
from cbam_jax.catalogue.gallery import Gallery
from cbam_jax.catalogue.items import Copy, Item, Neighbour
from cbam_jax.catalogue.milvus.addresses import Address, address
from cbam_jax.catalogue.milvus.collection import PHOTO, Collection
from cbam_jax.catalogue.milvus.conditions import expression, named, numeric
from cbam_jax.catalogue.milvus.searching import neighbours
from cbam_jax.catalogue.store import Store

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


class MilvusCatalogue(Catalogue):
    """A collection, opened; `Catalogue.open` makes one of an address.

    Attributes:
        index: how it is searched: ``flat`` is exact, another approximate.
    """

    def __init__(
        self, collection: Collection, embedder: "Embedder | None" = None, source: str | None = None
    ):
        about = collection.about()
        if about is None:
            raise _missing(collection.address)
        super().__init__(_Copy(collection.address, about), embedder, source)
        self._collection = collection
        self.index = about["index"]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        embedder: "Embedder | str | os.PathLike | None" = None,
        *,
        create: bool = False,
    ) -> Self:
        """Open a collection; ``create`` means nothing here: see `Catalogue.open`."""
        del create
        where = address(str(path))
        if where.file and not where.file.exists():  # Lite would make it.
            raise _missing(where)
        collection = Collection(where)
        try:
            if embedder is None or isinstance(embedder, str | os.PathLike):
                source = None if embedder is None else os.fspath(embedder)
                return cls(collection, None, source)
            catalogue = cls(collection, embedder)
            embedders.check_fingerprint(catalogue.store, embedder.fingerprint)
            return catalogue
        except BaseException:
            collection.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._collection.close()

    def __len__(self) -> int:
        """How many photos can be found."""
        return self._collection.count()

    @property
    def gallery(self) -> "_Remote":
        """What answers searches."""
        if self._gallery is None:
            self._gallery = _Remote(self._collection, self.store.about("dimension"), self.index)
        assert isinstance(self._gallery, _Remote)
        return self._gallery

    def items(self, where: Where = None) -> Iterator[Item]:
        """The photos, by id."""
        rows = self._collection.each(PHOTO, self._rows(self.gallery, where))
        yield from sorted(map(_item, rows))

    def categories(self, most: int) -> list[str]:
        """Values of ``category``, of as many photos as Milvus tells at once."""
        rows = self._collection.query(named("category"), ["payload"])
        return sorted({str(row["payload"]["category"]) for row in rows})[:most]

    def find_all(self, *asked: Any, **options: Any) -> list[list[Neighbour]]:
        """As that of a file."""
        try:
            return super().find_all(*asked, **options)
        finally:
            self.gallery.forget()

    @property
    def _more(self) -> str:
        return f"cbam-jax catalogue sync CATALOGUE {shlex.quote(str(self.store.path))}"

    def _item(self, number: int) -> Item | None:
        known = self.gallery.found.get(number)
        rows = [known] if known else self._collection.query(f"id == {number}", PHOTO)
        return _item(rows[0]) if rows and number > 0 else None

    def _content(self, number: int) -> Content:
        known = self.gallery.found.get(number)
        rows = [known] if known else self._collection.query(f"id == {number}", PHOTO)
        return _content(rows[0]) if rows else (None, "")

    def _beside(self, own: Own) -> int:
        return len(own.ids) + len(own.hashes)  # One of each, likely: to count them would take long.

    def _known(self, gallery: Gallery, found: Sequence[np.ndarray], where: Where) -> Known:
        del gallery, where  # What was found is kept, and is of it.
        numbers = set(np.concatenate(found).tolist()) if found else set()
        rows = {i: self.gallery.found[i] for i in numbers if i > 0}
        known = {i: Row(row["path"], row["payload"], _content(row)) for i, row in rows.items()}
        copies = {
            _content(group[0]): [Copy(row["id"], row["path"]) for row in group]
            for group in self.gallery.copies.values()
        }
        return Known(known, copies, lambda _, payload: dict(payload))

    def _rows(self, gallery: Gallery, where: Where) -> Any:
        check(_photos_of(self._collection), where)
        return expression(where)


class _Remote(Gallery):
    """A collection that answers as a gallery in memory does.

    Attributes:
        found: rows that it found, by id.
        copies: by their content, ids and paths of all photos that may be found and have it.
    """

    def __init__(self, collection: Collection, dimension: int, index: str):
        self._collection, self._dimension, self._index = collection, dimension, index
        self.found: dict[int, dict[str, Any]] = {}
        self.copies: dict[str, list[dict[str, Any]]] = {}
        self.revision = 0

    @functools.cached_property
    def _count(self) -> int:
        return self._collection.count()

    def __len__(self) -> int:
        return self._count  # As it was at first: it tells an empty one, and each count takes long.

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return self._dimension

    def embedding(self, number: int) -> np.ndarray | None:
        """The embedding [d] of a photo, None where it is not there."""
        rows = self._collection.query(f"id == {number}", ["embedding"]) if number > 0 else []
        return np.array(rows[0]["embedding"], np.float32) if rows else None

    def among(self, ids: Sequence[int]) -> np.ndarray:
        """The embeddings [n, d] of photos that were found, in the order of the ids."""
        rows = [self.found[number]["embedding"] for number in ids]
        return np.array(rows, np.float32).reshape(-1, self._dimension)

    def nearest(
        self, queries: np.ndarray, k: int, rows: Any = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each query the distances and the ids of the k nearest that a filter passes."""
        answers = neighbours(self._collection, queries, k, rows, self._index)
        rows_found = [row for _, _, found in answers for row in found]
        self.found |= {row["id"]: row for row in rows_found}
        self._find_copies({row["content"] for row in rows_found} - {""}, rows)
        return [(distances, ids) for distances, ids, _ in answers]

    def forget(self) -> None:
        """Forget what was found: it may change."""
        self.found, self.copies = {}, {}

    def _find_copies(self, contents: set[str], filter_: str) -> None:
        """Ask for all that have these contents at once: each answer waits."""
        contents -= set(self.copies)
        if not contents:
            return
        among = f"{filter_} and content in {json.dumps(sorted(contents))}"
        rows = sorted(
            self._collection.each(["id", "path", "content"], among), key=lambda row: row["id"]
        )
        for row in rows:
            self.copies.setdefault(row["content"], []).append(row)


class _Copy(Store):
    """What a collection says of itself, where a catalogue asks its file; the rest is refused."""

    def __init__(self, address: Address, about: dict[str, Any]):
        self.path: Any = address.text
        self._about = about

    def about(self, key: str) -> Any:
        """What is known of the photos as a whole."""
        return self._about.get(key)

    def _refused(self, *_, **__) -> NoReturn:
        raise InputError(
            f"{self.path} is a copy that is found in and listed: for all else take the "
            f"catalogue's file, then `cbam-jax catalogue sync CATALOGUE {self.path}`"
        )

    rows = stream = kept = wholes = run = tell = transaction = snapshot = check_pages = _refused


def _photos_of(collection: Collection) -> Photos:
    """The photos of a copy, as many of them as Milvus tells at once where names are listed."""

    def some(filter_: str) -> bool:
        return bool(collection.query(filter_, ["id"], limit=1))

    def payloads(filter_: str) -> list[dict[str, Any]]:
        return [row["payload"] for row in collection.query(filter_, ["payload"])]

    return Photos(
        lambda where: some(expression(where)),
        lambda name: some(named(name)),
        lambda name: some(numeric(name)),
        lambda: {name for payload in payloads("id > 0") for name in payload},
        lambda name: {text_of(payload[name]) for payload in payloads(named(name))},
    )


def _missing(where: Address) -> InputError:
    return InputError(
        f"{where.text} is not there: make it with `cbam-jax catalogue sync CATALOGUE "
        f"{shlex.quote(where.text)}`"
    )


def _item(row: dict[str, Any]) -> Item:
    return Item(row["id"], row["path"], dict(row["payload"]), None)


def _content(row: dict[str, Any]) -> Content:
    digest, _, box = row["content"].partition(" ")
    return bytes.fromhex(digest) or None, box
