"""One thread that says why two photos are alike, beside the one that searches.

It computes gradients, and compiles them when it is first asked: searches do not wait for that.
"""

import base64
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from cbam_jax.catalogue.alike import Alike, overlaid
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.server.finding import Busy, answer
from cbam_jax.pages import encode_jpeg

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

_WAITING = 16  # Pairs that may wait.


class Pair(NamedTuple):
    """What is asked: a photo's bytes, or an id, the part of it, and the id of the other."""

    query: bytes | int
    box: Sequence[float] | None
    result: int


class Explainer:
    """The thread. ``close`` ends it, after what waits has been answered.

    Args:
        path: of the catalogue.
        embedder: its model.
    """

    def __init__(self, path: str | os.PathLike, embedder: "Embedder"):
        self._path, self._embedder = path, embedder
        self._waiting: queue.Queue[tuple[Pair, Future] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="explainer", daemon=True)
        self._thread.start()

    def explain(self, pair: Pair) -> "Future[dict[str, Any]]":
        """Ask; the answer comes later. Raises `Busy` where too many wait."""
        future: Future[dict[str, Any]] = Future()
        try:
            self._waiting.put_nowait((pair, future))
        except queue.Full:
            raise Busy from None
        return future

    def close(self) -> None:
        """End the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._waiting.get()) is not None:
            pair, future = asked
            answer(future, lambda p=pair: told(self._why(p)))

    def _why(self, pair: Pair) -> Alike:
        with Catalogue.open(self._path, self._embedder, create=False) as catalogue:
            return catalogue.why(pair.query, pair.result, pair.box)


def told(alike: Alike) -> dict[str, Any]:
    """Two pictures as JSON has them: JPEG in base64, and whether no place stands out."""
    pictures = {
        "query": overlaid(alike.query, alike.query_heat),
        "result": overlaid(alike.result, alike.result_heat),
    }
    encoded = {
        name: base64.b64encode(encode_jpeg(image, quality=88)).decode()
        for name, image in pictures.items()
    }
    return {**encoded, "empty": alike.empty}
