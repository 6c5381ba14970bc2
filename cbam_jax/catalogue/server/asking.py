"""A thread that answers what connections ask, of which a bounded number waits."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Busy(Exception):
    """More questions wait than are taken."""


class Answerer:
    """A thread of one's own. ``close`` ends it, after what waits has been answered.

    Args:
        run: what the thread does, with the queue of questions and their futures; None is the end.
        name: of the thread.
        most: questions that may wait.
    """

    def __init__(self, run: Callable[[queue.Queue], None], name: str, most: int):
        self._waiting: queue.Queue[tuple[Any, Future] | None] = queue.Queue(most)
        self._thread = threading.Thread(target=run, args=(self._waiting,), name=name, daemon=True)
        self._thread.start()

    def ask(self, question: Any) -> "Future[Any]":
        """Ask; the answer comes later. Raises `Busy` where too many wait."""
        future: Future[Any] = Future()
        try:
            self._waiting.put_nowait((question, future))
        except queue.Full:
            raise Busy from None
        return future

    def close(self) -> None:
        """End the thread."""
        self._waiting.put(None)
        self._thread.join()


def answer(future: Future, function: Callable[[], Any]) -> None:
    """Do what a future is of, unless nobody waits for it any more."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
