"""Connections that are silent, and more of them than are kept; timers are fired by hand."""

import asyncio
import itertools
import json

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'cbam_jax[serve]'")
import uvicorn
from uvicorn.server import ServerState

from cbam_jax.catalogue.server import connections, uploads

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Transport(asyncio.Transport):
    """What a connection was sent, and how it ended."""

    def __init__(self):
        super().__init__()
        self.sent, self.ended = b"", None

    def write(self, data):
        self.sent += data

    def close(self):
        self.ended = self.ended or "closed"

    def abort(self):
        self.ended = "aborted"

    def is_closing(self):
        return self.ended is not None

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


class Timer:
    """A timer of a clock that stands still but for the order of its timers."""

    def __init__(self, when, function):
        self.when, self.fire, self.cancelled = lambda: when, function, False

    def cancel(self):
        self.cancelled = True


class Clock:
    """Of a loop the tasks, with such timers."""

    def __init__(self):
        self._times = itertools.count()

    def call_later(self, seconds, function):
        return Timer(next(self._times) + seconds, function)

    def create_task(self, *arguments, **options):
        return asyncio.get_running_loop().create_task(*arguments, **options)


class Server:
    """Connections to an app that answers once it may."""

    def __init__(self):
        self.may = asyncio.Event()
        self._config = uvicorn.Config(
            uploads.Guard(self._app), http=connections.protocol(), ws="none", log_level="critical"
        )
        self._config.load()
        self._state, self._clock = ServerState(), Clock()

    async def _app(self, scope, receive, send):
        await self.may.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def connect(self):
        made = self._config.http_protocol_class(
            config=self._config, server_state=self._state, app_state={}, _loop=self._clock
        )
        made.connection_made(Transport())
        return made

    async def until(self, condition):
        for _ in range(100):
            await asyncio.sleep(0)
            if condition():
                return
        raise AssertionError


def refused(connection):
    """The status and error of an answer that is one line of JSON."""
    head, content = connection.transport.sent.split(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(content)["error"]


def test_who_says_nothing_is_closed_and_a_part_of_a_head_is_nothing():
    async def trial():
        one = Server().connect()
        timer = one.deadline
        for part in (REQUEST[:1], REQUEST[1:9]):
            one.data_received(part)
        assert one.deadline is timer
        assert not timer.cancelled
        timer.fire()
        assert (one.transport.ended, one.transport.sent) == ("aborted", b"")
        one.connection_lost(None)
        assert timer.cancelled

    asyncio.run(trial())


def test_who_is_answered_has_time_and_then_a_new_deadline():
    async def trial():
        server = Server()
        one = server.connect()
        for _ in range(2):
            timer = one.deadline
            one.data_received(REQUEST)
            assert timer.cancelled
            assert one.deadline is None
            server.may.set()
            await server.until(lambda: one.deadline)
            server.may.clear()
            assert one.deadline is not timer
        assert one.transport.sent.count(b"204") == 2

    asyncio.run(trial())


def test_who_does_not_read_the_last_answer_is_closed_too():
    async def trial():
        server = Server()
        server.may.set()
        one = server.connect()
        one.data_received(REQUEST.replace(b"x\r\n", b"x\r\nconnection: close\r\n"))
        await server.until(lambda: one.deadline)
        assert one.transport.ended == "closed"
        one.deadline.fire()
        assert one.transport.ended == "aborted"

    asyncio.run(trial())


def test_the_longest_silent_gives_its_place_to_one_that_comes(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 3)

    async def trial():
        server = Server()
        first, second, third, fourth = (server.connect() for _ in range(4))
        assert first.transport.ended == "aborted"
        second.data_received(REQUEST)
        third.data_received(REQUEST[:5])
        server.connect()
        assert third.transport.ended == "aborted"
        assert second.transport.ended is fourth.transport.ended is None

    asyncio.run(trial())


def test_where_all_speak_the_next_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 2)
    monkeypatch.setattr(uploads, "REQUESTS", 2)

    async def trial():
        server = Server()
        busy = [server.connect(), server.connect()]
        for one in busy:
            one.data_received(REQUEST)
        await asyncio.sleep(0)
        late = server.connect()
        late.data_received(REQUEST)
        await server.until(lambda: late.transport.ended)
        assert refused(late) == (503, "too many requests are being answered: try again")
        late.connection_lost(None)
        server.may.set()
        await server.until(lambda: all(one.deadline for one in busy))
        again = server.connect()
        again.data_received(REQUEST)
        await server.until(lambda: b"204" in again.transport.sent)

    asyncio.run(trial())


def test_what_is_no_request_is_told_in_one_line():
    async def trial():
        one = Server().connect()
        one.data_received(b"\x16\x03\x01 hello\r\n\r\n")
        assert refused(one) == (400, "invalid http request received")
        assert one.transport.ended == "closed"

    asyncio.run(trial())
