"""A collection of Milvus: rows of photos, and one row, of id 0, that says what they are.

The index is FLAT, which is exact, or one that was asked for by name and is not; the distance is
Euclidean; every answer waits for all that was written before (consistency Strong). Whatever Milvus
refuses is told in one line.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.milvus.addresses import Address
from cbam_jax.catalogue.milvus.conditions import texts_and_numbers
from cbam_jax.foreign_files import shown

MOST = 16_384  # Rows of an answer: Milvus's own limit.
PHOTO = ["id", "path", "payload", "content"]
# What each index is built and searched with; those that are not FLAT are approximate.
INDEXES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "flat": ({}, {}),
    "hnsw": ({"M": 16, "efConstruction": 200}, {"ef": 256}),
    "ivf": ({"nlist": 1024}, {"nprobe": 64}),
}
_KINDS = {"flat": "FLAT", "hnsw": "HNSW", "ivf": "IVF_FLAT"}
_WAIT = 20.0  # Seconds for a server to answer that it is there.
_ANSWER = 2**25  # Bytes of the embeddings in an answer.
_LONG = 600.0  # Seconds for what it is then asked for.


class Collection:
    """A collection, connected to; ``with`` closes the connection.

    Raises:
        InputError: pymilvus is not installed; nobody answers.
    """

    def __init__(self, address: Address):
        self.address = address
        self._client = _connected(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a file's process is the only one that may have it open."""
        with _told(self.address):
            self._client.close()

    def about(self) -> dict[str, Any] | None:
        """What the photos are, as `create` was told; None: there is no such collection.

        Raises:
            InputError: it is there, and not ours.
        """
        with _told(self.address):
            if not self._client.has_collection(self.address.collection):
                return None
            self._client.load_collection(self.address.collection)
            fields = self._client.describe_collection(self.address.collection)["fields"]
        if {field["name"] for field in fields} < {"stamp", "number", "text", *PHOTO}:
            raise self._foreign()
        rows = self.query("id == 0", ["payload"])
        if not rows:
            raise self._foreign()
        return dict(rows[0]["payload"])

    def create(self, about: dict[str, Any], dimension: int, index: str) -> None:
        """Make the collection, with one of `INDEXES`."""
        from pymilvus import DataType, MilvusClient  # pyright: ignore[reportMissingImports]

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dimension)
        schema.add_field("path", DataType.VARCHAR, max_length=65_535)
        schema.add_field("content", DataType.VARCHAR, max_length=256)
        schema.add_field("stamp", DataType.INT64)
        for name in ("payload", "text", "number"):
            schema.add_field(name, DataType.JSON)
        chosen = MilvusClient.prepare_index_params()
        chosen.add_index("embedding", _KINDS[index], metric_type="L2", params=INDEXES[index][0])
        with _told(self.address):
            self._client.create_collection(
                self.address.collection, schema=schema, index_params=chosen,
                consistency_level="Strong",
            )  # fmt: skip
            self.put([row(0, np.zeros(dimension, np.float32), "", "", 0, about)], fresh=True)

    def put(self, rows: Sequence[dict[str, Any]], *, fresh: bool) -> None:
        """Write rows: ``fresh`` ones, or in the place of those with the same ids."""
        write = self._client.insert if fresh else self._client.upsert
        with _told(self.address):
            write(self.address.collection, list(rows), timeout=_LONG)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove rows."""
        with _told(self.address):
            for i in range(0, len(ids), MOST):
                self._client.delete(self.address.collection, ids=list(ids[i : i + MOST]))

    def settle(self) -> None:
        """Have all that was written kept and indexed."""
        with _told(self.address):
            self._client.flush(self.address.collection, timeout=_LONG)
            self._client.load_collection(self.address.collection, timeout=_LONG)

    def query(self, filter_: str, fields: Sequence[str], limit: int = MOST) -> list[dict[str, Any]]:
        """Fields of the rows, at most ``limit`` of them, that a filter passes."""
        with _told(self.address):
            return list(
                self._client.query(
                    self.address.collection, filter=filter_, output_fields=list(fields),
                    limit=limit, consistency_level="Strong", timeout=_LONG,
                )
            )  # fmt: skip

    def each(self, fields: Sequence[str], filter_: str = "id > 0") -> Iterator[dict[str, Any]]:
        """Fields of every row that a filter passes, in whatever order."""
        with _told(self.address):
            pages = self._client.query_iterator(
                self.address.collection, filter=filter_, output_fields=list(fields),
                batch_size=4096, consistency_level="Strong", timeout=_LONG,
            )  # fmt: skip
            try:
                while page := pages.next():
                    yield from page
            finally:
                pages.close()

    def count(self, filter_: str = "id > 0") -> int:
        """How many rows a filter passes."""
        with _told(self.address):
            found = self._client.query(
                self.address.collection, filter=filter_, output_fields=["count(*)"],
                consistency_level="Strong", timeout=_LONG,
            )  # fmt: skip
        return int(found[0]["count(*)"])

    def search(
        self, queries: np.ndarray, limit: int, filter_: str, fields: Sequence[str], index: str
    ) -> Iterator[list[dict[str, Any]]]:
        """Of each query [q, d] the rows near it, nearest first as Milvus has them.

        ``embedding`` is among the fields.
        """
        # Lite holds the differences of all queries and all rows; an answer is of bounded bytes.
        size = 1 if self.address.file else max(1, _ANSWER // (4 * limit * queries.shape[1]))
        for start in range(0, len(queries), size):
            with _told(self.address):
                found = self._client.search(
                    self.address.collection, data=queries[start : start + size].tolist(),
                    anns_field="embedding", filter=filter_, limit=limit,
                    output_fields=[*fields, "embedding"],
                    search_params={"metric_type": "L2", "params": _searched(index, limit)},
                    consistency_level="Strong", timeout=_LONG,
                )  # fmt: skip
            yield from ([{**hit["entity"], "id": hit["id"]} for hit in hits] for hits in found)

    def _foreign(self) -> InputError:
        return InputError(
            f"{self.address.text} is a collection that this program did not make: name another"
        )


def row(
    number: int, embedding: np.ndarray, path: str, content: str, stamp: int, payload: dict[str, Any]
) -> dict[str, Any]:
    """A row as it is written; ``content`` is the same for copies: see `content_of`."""
    texts, numbers = texts_and_numbers(payload) if number else ({}, {})
    return {
        "id": number, "embedding": embedding, "path": path, "content": content, "stamp": stamp,
        "payload": payload, "text": texts, "number": numbers,
    }  # fmt: skip


def content_of(digest: bytes | None, box: str) -> str:
    """What an embedding depends on, as a row has it: empty where the file's hash is not known.

    >>> content_of(bytes.fromhex("c0de"), "1,2,3,4"), content_of(None, "")
    ('c0de 1,2,3,4', '')
    """
    return f"{digest.hex()} {box}" if digest else ""


def _searched(index: str, limit: int) -> dict[str, int]:
    chosen = dict(INDEXES[index][1])
    if "ef" in chosen:
        chosen["ef"] = max(chosen["ef"], limit)  # Milvus refuses less.
    return chosen


def _connected(address: Address) -> Any:
    for name in ("pymilvus", *(["milvus_lite"] if address.file else [])):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{address.text} needs {name}: pip install 'cbam_jax[milvus]'")
    from pymilvus import MilvusClient  # pyright: ignore[reportMissingImports]

    # It tells each error with its traceback before it raises it.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)

    with _told(address):
        # A password on the command line could be read by all who list the processes.
        return MilvusClient(
            uri=address.uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=_WAIT
        )


@contextlib.contextmanager
def _told(address: Address) -> Iterator[None]:
    """What Milvus refuses, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pymilvus raises its own, grpc's and others.
        text = shown(" ".join(str(error).split()))[:300]
        raise InputError(_reason(address, text)) from error


def _reason(address: Address, text: str) -> str:
    low = text.lower()
    if address.file and ("open" in low or "lock" in low):
        return (
            f"cannot open {address.file}: another process has it open, or it is no file of Milvus "
            f"Lite ({text})"
        )
    if "connect" in low or "unavailable" in low or "deadline" in low:
        return f"no Milvus answers at {address.uri}: start it, or give its address ({text})"
    if "auth" in low:
        return f"{address.uri} refuses us: set MILVUS_TOKEN=USER:PASSWORD ({text})"
    return f"{address.text}: {text}"
