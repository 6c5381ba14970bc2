"""What of a request is taken: bytes and pixels have limits, and a host is one of ours."""

import asyncio
import contextlib
import http
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cbam_jax import InputError
from cbam_jax.datasets import jpeg_size
from cbam_jax.datasets.decoding import affordable, image_format
from cbam_jax.datasets.image_headers import claimed_sizes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LARGEST = 32 << 20  # Bytes of a photo that is sent.
PIXELS = 64 << 20  # Of a usual photo that is sent, by its header: 67 megapixels.
SECONDS = 30  # That a request may take to arrive.
REQUESTS = 512  # That may be answered at once: beyond them the answer is 503.
_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob:; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def check_photo(content: bytes, kind: str = "", instead: str = "id") -> None:
    """Raise an InputError, before anything is decoded, for what is no photo or too large.

    Args:
        content: what was sent.
        kind: its content type.
        instead: the parameter that names a photo of the catalogue.

    >>> check_photo(b"<html>")
    Traceback (most recent call last):
    ...
    cbam_jax.InputError: this is no photo: send a JPEG, PNG, WebP or another image file
    >>> check_photo(b"", instead="query")
    Traceback (most recent call last):
    ...
    cbam_jax.InputError: no photo: send one, curl --data-binary @FILE, or give query=ID of one
    """
    if image_format(content[:64]) is None:
        if kind.lower().startswith("multipart/form-data"):
            raise InputError("this is a form: send the photo itself: curl --data-binary @FILE")
        if not content:
            remedy = f"send one, curl --data-binary @FILE, or give {instead}=ID of one"
            raise InputError(f"no photo: {remedy}")
        raise InputError("this is no photo: send a JPEG, PNG, WebP or another image file")
    size, most = jpeg_size(content), affordable(content, PIXELS)
    for height, width in [size] if size else claimed_sizes(content):
        if height * width > most:
            raise InputError(f"the photo has {width} x {height} pixels: shrink it first")


class Guard:
    """ASGI middleware around an app: limits before it, headers behind it.

    Args:
        app: the app.
        hosts: names that the server answers to; None: any. A page of another name that leads
            to this machine could otherwise read what only this machine may.
    """

    def __init__(self, app: Any, hosts: set[str] | None = None):
        self._app, self._hosts = app, hosts
        self._answering = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        headers = dict(scope["headers"])
        if not self._is_ours(headers.get(b"host", b"").decode("latin-1")):
            await refuse(with_headers, 421, "this server answers to another name")
            return
        if self._answering >= REQUESTS:
            await refuse(with_headers, 503, "too many requests are being answered: try again")
            return
        self._answering += 1
        try:
            body = await _body(headers, receive, with_headers)
            if body is not None:
                await self._app(scope, _replay(body, receive), with_headers)
        finally:
            self._answering -= 1

    def _is_ours(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return self._hosts is None or name in self._hosts


async def refuse(send: Send, status: int, error: str) -> None:
    """Answer with one line of JSON, and close the connection."""
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def refusal(status: int, error: str) -> bytes:
    """A whole answer of HTTP/1.1, for what is no request that an app could be asked.

    >>> refusal(400, "no request").splitlines()[::5]
    [b'HTTP/1.1 400 Bad Request', b'{"error": "no request"}']
    """
    content = json.dumps({"error": error})
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return (head + content).encode()


async def _body(headers: dict[bytes, bytes], receive: Receive, send: Send) -> bytes | None:
    """The whole body; None where it was too large or too slow, which is then answered."""
    with contextlib.suppress(ValueError):
        if int(headers.get(b"content-length", b"0")) > LARGEST:
            await refuse(send, 413, f"a photo has at most {LARGEST >> 20} MB")
            return None
    parts, size, until = [], 0, time.monotonic() + SECONDS
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0.01, until - time.monotonic()))
        except TimeoutError:
            await refuse(send, 408, f"the request took more than {SECONDS} s to arrive")
            return None
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST:
            await refuse(send, 413, f"a photo has at most {LARGEST >> 20} MB")
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
