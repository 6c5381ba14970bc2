"""One thread that says why two photos are alike, beside the one that searches.

It computes gradients, and compiles them when it is first asked: searches do not wait for that.
"""

import base64
import os
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from cbam_jax.catalogue.alike import Alike, overlaid
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.server.asking import Answerer, answer
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
        self._answerer = Answerer(self._run, "explainer", _WAITING)

    def explain(self, pair: Pair) -> "Future[dict[str, Any]]":
        """Ask; the answer comes later. Raises `Busy` where too many wait."""
        return self._answerer.ask(pair)

    def close(self) -> None:
        """End the thread."""
        self._answerer.close()

    def _run(self, waiting: queue.Queue) -> None:
        while (asked := waiting.get()) is not None:
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
