"""A catalogue of photos, opened: add, find, list, remove."""

import functools
import itertools
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue import checks, embedders, indexing, queries, shards, sources
from cbam_jax.catalogue.alike import Alike, Photo, pair_heat
from cbam_jax.catalogue.filters import Where, categories, check, photos_of, selected
from cbam_jax.catalogue.folding import Content, Known, Own, Row, nearest_folded
from cbam_jax.catalogue.gallery import Gallery, open_gallery
from cbam_jax.catalogue.indexing import Added
from cbam_jax.catalogue.items import Copy, Item, Neighbour
from cbam_jax.catalogue.milvus import address as parsed
from cbam_jax.catalogue.milvus import is_address
from cbam_jax.catalogue.near import duplicates
from cbam_jax.catalogue.queries import Part
from cbam_jax.catalogue.reading import LARGEST
from cbam_jax.catalogue.rebuilding import rebuild
from cbam_jax.catalogue.reranking import parsed as parsed_steps
from cbam_jax.catalogue.reranking import ranked_again
from cbam_jax.catalogue.store import Kept, Store, damaged
from cbam_jax.foreign_files import expanded, read_file

if TYPE_CHECKING:
    from cbam_jax.catalogue.milvus.syncing import Synced
    from cbam_jax.embedder import Embedder


class Catalogue:
    """Photos that can be searched, in one file. `Catalogue.open` makes or opens one.

    Example:
        >>> with Catalogue.open("shop.db", embedder="runs/mine") as shop:  # doctest: +SKIP
        ...     shop.add(["photos/"])
        ...     shop.find("new.jpg", k=12, where={"category": "dress"})
    """

    index: str = "flat"  # Exact; a copy in Milvus may have another.

    def __init__(
        self,
        store: Store,
        embedder: "Embedder | None" = None,
        source: str | None = None,
    ):
        self.store = store
        self._embedder, self._source = embedder, source
        self._gallery: Gallery | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        embedder: "Embedder | str | os.PathLike | None" = None,
        *,
        create: bool = True,
    ) -> Self:
        """Open a catalogue's file, or a copy of one in Milvus.

        Args:
            path: of the file; ``~`` is one's home. Or ``milvus://HOST:PORT/COLLECTION``, what
                `sync` wrote there: see `milvus`.
            embedder: what `cbam_jax.load` returned, or what it loads when a photo has to be
                embedded; None: the model that the catalogue was made with.
            create: make the file where there is none.

        Raises:
            InputError: no catalogue, a damaged one, or one that another model's embeddings are in.
        """
        if is_address(path):
            # Late: it stands on this module.
            from cbam_jax.catalogue.milvus.finding import MilvusCatalogue

            return MilvusCatalogue.open(path, embedder)  # pyright: ignore[reportReturnType]
        source = os.fspath(embedder) if isinstance(embedder, str | os.PathLike) else None
        if isinstance(embedder, str | os.PathLike):
            # A model that is none leaves no file behind.
            new = create and not expanded(path).exists()
            embedder = embedders.load_named(embedder) if new else None
        store = Store(path, create=create)
        try:
            if embedder is not None:
                embedders.check_fingerprint(store, embedder.fingerprint)
        except BaseException:
            store.close()
            raise
        return cls(store, embedder, source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __len__(self) -> int:
        """How many photos can be found."""
        return self.store.rows("SELECT count(*) FROM item WHERE embedding IS NOT NULL")[0][0]

    @property
    def embedder(self) -> "Embedder":
        """The model, loaded when it is first needed."""
        if self._embedder is None:
            self._embedder = embedders.load_embedder(self._source, self.store)
        return self._embedder

    @property
    def gallery(self) -> Gallery:
        """The embeddings in memory, as the catalogue has them now."""
        if self._gallery is None or self._gallery.revision != self.store.about("revision"):
            self._gallery = open_gallery(self.store)
        return self._gallery

    def add(
        self,
        photos: Iterable[str | os.PathLike] | str | os.PathLike,
        payload: Mapping[str, Any] | None = None,
        *,
        skip_near: bool = False,
        checksum: bool = False,
        progress: bool = True,
    ) -> Added:
        """Add photos, what is new of them, batch by batch; see `indexing`.

        Args:
            photos: files, folders with all below, manifests (``photos.csv``).
            payload: what is known of all of them, beside what a manifest or a folder says: any
                names with values of JSON.
            skip_near: leave out what is nearly the same as a photo that is there.
            checksum: read every file, also where its size and time are as before.
            progress: show on stderr how far it is.

        Raises:
            InputError: before anything is written, for a source that is not there or a model that
                does not fit; later, for a disk that is full: the batches before are kept then.
        """
        one = isinstance(photos, str | os.PathLike)
        given = sources.listed([photos] if one else photos, payload)  # pyright: ignore
        return self.add_listed(given, skip_near=skip_near, checksum=checksum, progress=progress)

    def add_listed(
        self,
        listed: sources.Listed,
        *,
        skip_near: bool = False,
        checksum: bool = False,
        progress: bool = True,
    ) -> Added:
        """As `add`, of what `sources.listed` returned."""
        started, given = time.monotonic(), listed.photos
        if given and (self._embedder or self._source):
            self._claim()
        left = indexing.to_read(self.store, given, checksum=checksum, skip_near=skip_near)
        counts = Counter(unchanged=len(given) - len(left))
        if left:
            self._claim()
            counts += indexing.add_photos(
                self.store, self.embedder, left, skip_near=skip_near, progress=progress
            )
        gone = indexing.vanished(self.store, listed.folders, given)
        self.store.complete()
        return Added(counts, gone, time.monotonic() - started)

    def add_embeddings(
        self,
        names: Sequence[str],
        embeddings: np.ndarray,
        payloads: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """Add embeddings that the catalogue's model made elsewhere, all or none.

        Args:
            names: of the photos, each once: their paths, or any text. What has the name of a photo
                that is there takes its place.
            embeddings: [n, d], float32.
            payloads: what is known of each.

        Returns:
            How many.

        Raises:
            InputError: they are not of that shape, or have NaN or infinity.
        """
        self._claim()
        rows = indexing.checked_rows(names, embeddings, self.embedder.dimension, payloads)
        with self.store.transaction():
            for row in rows:
                indexing.put_embedding(self.store, *row)
        return len(rows)

    def add_shards(self, folder: str | os.PathLike, *, progress: bool = True) -> Added:
        """Add what `cbam-jax embed` made in a folder, all shards of it; see `shards`.

        Raises:
            InputError: a shard is missing, damaged or of another model.
        """
        started = time.monotonic()
        path = expanded(folder)
        counts = shards.add_shards(self.store, path, progress=progress)
        return Added(counts, [], time.monotonic() - started)

    def sync(self, address: str, index: str | None = None, *, progress: bool = True) -> "Synced":
        """Bring a copy in Milvus up to this catalogue; see `milvus.syncing.sync`."""
        from cbam_jax.catalogue.milvus.syncing import sync  # Late: few want it.

        return sync(self.store, parsed(address), index, progress=progress)

    def _claim(self) -> None:
        """Write down whose embeddings the catalogue holds."""
        embedder = self.embedder
        embedders.check_fingerprint(self.store, embedder.fingerprint)
        about = {"fingerprint": embedder.fingerprint, "dimension": embedder.dimension}
        if self._source is not None:
            about["model"] = embedders.lasting(self._source)
        if any(self.store.about(key) != value for key, value in about.items()):
            with self.store.transaction(revised=False):
                embedders.check_fingerprint(self.store, embedder.fingerprint)
                self.store.tell(**about)

    def find(
        self,
        query: Part | Sequence[Part],
        k: int = 12,
        *,
        where: Where = None,
        box: Sequence[float] | None = None,
        unlike: Sequence[Part] = (),
        max_distance: float | None = None,
        copies: bool = False,
        rerank: str | None = None,
    ) -> list[Neighbour]:
        """The k photos most like one query, nearest first, exactly; equal distances by id.

        Photos with the same content are one: the first, or that whose path or id was asked for, has
        the others as ``copies``. A photo with the content of a query's file is told as the
        ``same``, beside the k; what is asked for by its id, only where it has copies.

        Args:
            query: a photo's path or bytes, an id, an embedding [d]; or several of them, which
                together are one query: see `queries.combined`.
            k: at least 1; fewer are found where there are fewer.
            where: only those of which it holds, such as ``"category=dress"``: see `filters`.
            box: ``x1, y1, x2, y2``, the part of the query's photo that is meant, in pixels.
            unlike: photos, ids or embeddings that the answer is to be unlike.
            max_distance: leave out what is farther.
            copies: tell each copy as a photo of its own; those of the query are beside the k.
            rerank: rank again by ``"aqe"``, ``"k_reciprocal"`` or both, with options as in
                ``"aqe:k=5:alpha=2"``; distances are then those of the last: see `reranking`.

        Raises:
            InputError: a query that cannot be read, an id that is not there, ...
        """
        parts: list[Any] = list(query) if isinstance(query, list | tuple) else [query]
        boxes = None if box is None else [box] * len(parts)
        return self.find_all(
            [parts], k, where=where, boxes=[boxes], unlike=unlike, max_distance=max_distance,
            copies=copies, rerank=rerank,
        )[0]  # fmt: skip

    def find_all(
        self,
        asked: Sequence[Sequence[Part]],
        k: int = 12,
        *,
        where: Where = None,
        boxes: Sequence[Sequence[Sequence[float] | None] | None] | None = None,
        unlike: Sequence[Part] = (),
        max_distance: float | None = None,
        copies: bool = False,
        rerank: str | None = None,
    ) -> list[list[Neighbour]]:
        """As `find`, of several queries at once, each of one or more parts, with their boxes."""
        if k < 1:
            raise InputError(f"k={k}: give at least 1")
        steps, gallery = parsed_steps(rerank), self.gallery
        if not len(gallery):
            raise InputError(
                f"{self.store.path} has no photo that can be found: add some with `{self._more}`"
            )
        rows = self._rows(gallery, where)
        embeddings = self._embeddings(gallery, asked, boxes, unlike)
        own = [self._own(parts, unlike) for parts in asked]
        look = functools.partial(
            nearest_folded,
            lambda some, count: gallery.nearest(some, count, rows),
            lambda found: self._known(gallery, found, where),
            own,
            max(map(self._beside, own), default=0),
        )
        options: dict[str, Any] = {"max_distance": max_distance, "copies": copies}
        found = ranked_again(look, gallery.among, embeddings, steps, k, **options)
        return found if copies else [*map(self._as_asked, found, asked)]

    @property
    def _more(self) -> str:
        """The command that brings photos."""
        return f"cbam-jax catalogue add {shlex.quote(str(self.store.path))} PHOTOS"

    def _as_asked(self, found: Sequence[Neighbour], parts: Sequence[Part]) -> list[Neighbour]:
        """A photo that was asked for by its path or id is told by that, not by a copy's."""
        asked = [part for part in parts if isinstance(part, str | os.PathLike)]
        paths = {os.path.abspath(expanded(part)) for part in asked}
        return [self._of_copies(n, paths) if n.same else n for n in found]

    def _of_copies(self, n: Neighbour, paths: set[str]) -> Neighbour:
        """Of a photo and its copies the one at these paths or asked for by its id, else itself."""
        wanted = (copy for copy in n.copies if copy.path in paths or copy.id == n.copy_of)
        copy = next(wanted, None)
        item = self._item(copy.id) if copy and n.path not in paths else None
        if item is None:  # None is asked for, or it was removed meanwhile.
            return n
        others = {Copy(n.id, n.path), *n.copies} - {copy}
        return Neighbour(*item[:3], n.distance, tuple(sorted(others)), same=True)

    def why(
        self,
        query: str | os.PathLike | bytes | int,
        result: int,
        box: Sequence[float] | None = None,
    ) -> Alike:
        """Two photos, and where either is like the other to the model; see `alike.pair_heat`.

        Args:
            query: a photo's path or bytes, or an id.
            result: the id of a photo.
            box: ``x1, y1, x2, y2``, the part of a query that is no id, in pixels.

        Raises:
            InputError: an id that is not there, a file that cannot be read.
        """
        return pair_heat(self.embedder, self._photo(query, box), self._photo(result))

    def _photo(self, part: Any, box: Sequence[float] | None = None) -> Photo:
        """A photo's file, and the part of it that was embedded."""
        if isinstance(part, bytes):
            return Photo(part, box)
        name = "the photo"
        if isinstance(part, int):
            path, name = self.item(part).path, f"photo {part}"
            text = self._content(part)[1]
            part, box = path, sources.parse_box(text) if text else None
        try:
            return Photo(read_file(expanded(part), LARGEST), box, name)
        except (InputError, OSError):
            raise InputError(f"{name}: its file cannot be read") from None

    def items(self, where: Where = None) -> Iterator[Item]:
        """The photos, by id, also those that could not be read."""
        condition, values = selected(where)
        check(photos_of(self.store), where)
        yield from map(self._listed, self.store.kept(condition, values))

    def categories(self, most: int) -> list[str]:
        """Values of ``category`` that photos have, in order, at most so many of them."""
        return categories(self.store, most)

    def item(self, number: int) -> Item:
        """One photo, by its id.

        Raises:
            InputError: it is not there.
        """
        found = self._item(number)
        if found is None:
            raise self._no(number)
        return found

    def _no(self, number: int) -> InputError:
        return InputError(f"no photo {number} is in {self.store.path}")

    def _item(self, number: int) -> Item | None:
        return next(map(self._listed, self.store.kept("id = ?", [number])), None)

    def _listed(self, row: Kept) -> Item:
        return Item(row.id, row.path, self._payload(row.id, row.payload), row.problem)

    def _payload(self, number: int, text: str) -> dict[str, Any]:
        try:
            return sources.known_as(text)
        except ValueError as error:
            reason = f"what is known of photo {number} is no JSON"
            raise damaged(self.store.path, reason) from error

    def remove(self, ids: Iterable[int]) -> int:
        """Forget photos, all or none; their files stay. Returns how many.

        Raises:
            InputError: names the first id that is not there.
        """
        numbers = sorted(set(ids))
        with self.store.transaction():
            for number in numbers:
                if not self.store.rows("SELECT 1 FROM item WHERE id = ?", [number]):
                    raise self._no(number)
                self.store.run("DELETE FROM item WHERE id = ?", [number])
        return len(numbers)

    def verify(self, sample: int = 16) -> list[str]:
        """What is wrong, a line each: in the file, with the photos, with ``sample`` embeddings."""
        return checks.verify(self.store, lambda: self.embedder, sample)

    def duplicates(self, *, near: bool = True) -> list[list[Item]]:
        """Groups of photos with the same content or, with ``near``, nearly the same; see `near`."""
        return [[self.item(i) for i in ids] for ids in duplicates(self.store, near=near)]

    @classmethod
    def rebuild(
        cls, path: str | os.PathLike, embedder: "Embedder | str | os.PathLike", **options: Any
    ) -> int:
        """Embed all photos anew, by another model; see `rebuilding.rebuild`. Returns how many."""
        source = os.fspath(embedder) if isinstance(embedder, str | os.PathLike) else None
        with Store(path) as store:
            if isinstance(embedder, str | os.PathLike):
                embedder = embedders.load_named(embedder)
            return rebuild(store, embedder, source, **options)

    def _rows(self, gallery: Gallery, where: Where) -> np.ndarray | None:
        if where is None:
            return None
        condition, values = selected(where)
        check(photos_of(self.store), where)
        sql = f"SELECT id FROM item WHERE embedding IS NOT NULL AND {condition}"
        return gallery.rows([number for (number,) in self.store.rows(sql, values)])

    def _embeddings(
        self,
        gallery: Gallery,
        asked: Sequence[Sequence[Part]],
        boxes: Sequence[Sequence[Sequence[float] | None] | None] | None,
        unlike: Sequence[Part],
    ) -> np.ndarray:
        """One embedding a query, [q, d]; all photos are embedded together."""
        parts = [part for query in asked for part in query] + list(unlike)
        places: list[Sequence[float] | None] = []
        for query, some in zip(asked, boxes or [None] * len(asked), strict=True):
            places += some or [None] * len(query)
        places += [None] * len(unlike)
        found = queries.embeddings_of(parts, gallery, lambda: self.embedder, places)
        away = found[len(parts) - len(unlike) :]
        edges = np.cumsum([0, *map(len, asked)])
        return np.array([queries.combined(found[i:j], away) for i, j in itertools.pairwise(edges)])

    def _own(self, parts: Sequence[Part], unlike: Sequence[Part]) -> Own:
        ids = {part for part in (*parts, *unlike) if isinstance(part, int)}
        known = {i: self._content(i)[0] for i in ids}
        hashes = [*known.values(), *map(queries.hash_of, parts)]
        asked = {known[i]: i for i in reversed(parts) if isinstance(i, int) and known[i]}
        return Own(ids, {digest for digest in hashes if digest is not None}, asked)

    def _beside(self, own: Own) -> int:
        """How many photos of the catalogue a query may be itself: they are found beside the k."""
        sql = "SELECT id FROM item WHERE embedding IS NOT NULL AND hash"
        return len({*own.ids, *(number for (number,) in self.store.among(sql, own.hashes))})

    def _known(self, gallery: Gallery, found: Sequence[np.ndarray], where: Where) -> Known:
        """What is known of photos that were found, those that were removed meanwhile left out."""
        numbers = set(np.concatenate(found).tolist()) if found else set()
        kept = self.store.kept(among=("id", numbers))
        rows = {row.id: Row(row.path, row.payload, (row.hash, row.box)) for row in kept}
        for number in numbers - rows.keys():
            self._check_removed(gallery, number)
        return Known(rows, self._copies({row.content[0] for row in rows.values()}, where),
                     self._payload)  # fmt: skip

    def _check_removed(self, gallery: Gallery, number: int) -> None:
        """Raise an InputError for a photo that is gone, though nobody removed it."""
        if self.store.about("revision") == gallery.revision:
            raise damaged(self.store.path, f"photo {number} is not there any more")

    def _content(self, number: int) -> Content:
        """What a photo's embedding depends on; nothing for one that was removed meanwhile."""
        rows = self.store.rows("SELECT hash, box FROM item WHERE id = ?", [number])
        return rows[0] if rows else (None, "")

    def _copies(self, hashes: set, where: Where) -> dict[Content, list[Copy]]:
        """All photos with these files, by their content, of those that may be found."""
        condition, values = selected(where)
        condition = f"embedding IS NOT NULL AND {condition}"
        copies: dict[Content, list[Copy]] = {}
        for row in sorted(self.store.kept(condition, values, among=("hash", hashes - {None}))):
            copies.setdefault((row.hash, row.box), []).append(Copy(row.id, row.path))
        return copies
