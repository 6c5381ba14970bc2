"""Connections: each has a deadline while it says nothing, and gives its place to one that speaks.

uvicorn waits for a first request as long as a client likes. Here a connection on which no request
is being answered has `SECONDS`: from its opening, or from the last answer, to the whole head of the
next request. Where more than `CONNECTIONS` are open, the one that has been silent longest is closed
for the new one; where none is silent, `uploads.Guard` refuses what the new one asks.
"""

from typing import Any

from cbam_jax.catalogue.server.uploads import REQUESTS, refusal

# uvicorn is an extra: it is imported where it is used.
# pyright: reportMissingImports=false

CONNECTIONS = REQUESTS  # Those who are answered, and then the next is silent.
SECONDS = 15.0  # Without a request.


def protocol() -> type:
    """uvicorn's protocol of HTTP/1.1, with deadlines; for ``uvicorn.Config(http=...)``."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Deadlines(H11Protocol):
        deadline: Any = None  # The timer of a connection that is silent.

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                _close_longest(self.connections)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.speaks()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(refusal(400, msg.rstrip(".").lower()))
            self.transport.close()

        def watch(self) -> None:
            """Begin a deadline where there is none; a part of a head does not put it off."""
            if self.conn.their_state is not h11.IDLE and not self.transport.is_closing():
                self.speaks()
            elif self.deadline is None:  # Closing waits for the client to read: not for ever.
                self.deadline = self.loop.call_later(SECONDS, self.transport.abort)

        def speaks(self) -> None:
            """End the deadline."""
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Deadlines


def _close_longest(connections: Any) -> None:
    """Close the one that has been silent longest, if any is."""
    silent = [one for one in connections if getattr(one, "deadline", None)]
    if silent:
        one = min(silent, key=lambda one: one.deadline.when())
        connections.discard(one)  # At once: the next that comes counts before its end is told.
        one.transport.abort()
