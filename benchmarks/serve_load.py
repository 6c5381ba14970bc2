"""Load on a catalogue's server: ``python benchmarks/serve_load.py shop.db photos/``.

The server is a process of its own, ``cbam-jax catalogue serve``, of a catalogue that is there. Once
with one connection, and once with 50, photos are sent to be searched; the embedder alone, in this
process with the server idle, embeds the same photos one by one and in batches. Then 10,000 searches
by id go over 50 connections: none is lost, and the server's memory is read at the start, after
1,000 and at the end. Last, up to 10,000 connections are opened and left idle, as many as this
process may have files, while 50 others search. The last line on stdout is JSON: ``many_to_one``
has the latencies of 50 connections over those of one, ``served_to_embedder`` the photos a second
over those of the embedder at its best, and ``bars`` what is promised: nothing lost, and no memory
that goes on growing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from cbam_jax.benchmark import judged, machine

# The most of each figure; growth is of the server's memory from the thousandth search to the last.
BARS = {"lost": 0, "memory_growth": 1.02}


async def post(reader, writer, address: str, body: bytes) -> dict:
    """A search on a connection that stays open."""
    head = f"POST {address} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    status = await reader.readline()
    length = 0
    while (line := await reader.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    answer = await reader.readexactly(length)
    return json.loads(answer) if b" 200 " in status else {"error": status.decode()}


async def load(port: int, connections: int, searches: list[tuple[str, bytes]]) -> dict:
    """Latencies and the rate of searches shared by some connections; how many were lost."""
    times, lost, left = [], 0, iter(searches)

    async def work():
        nonlocal lost
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError, EOFError, ValueError):  # What is not answered is lost.
            for address, body in left:
                started = time.monotonic()
                answer = await post(reader, writer, address, body)
                times.append(time.monotonic() - started)
                lost += "neighbours" not in answer
        writer.close()

    started = time.monotonic()
    await asyncio.gather(*(work() for _ in range(connections)))
    rate = len(times) / (time.monotonic() - started)
    lost += len(searches) - len(times)
    p50, p99 = np.percentile(times or [np.nan], [50, 99])
    return {"connections": connections, "searches": len(searches), "per_second": rate,
            "p50": p50, "p99": p99, "lost": lost}  # fmt: skip


async def idle(port: int, count: int, searches: list[tuple[str, bytes]]) -> dict:
    """Connections that are opened and say nothing, while 50 others search; then one searches."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    held = []

    async def flood():
        for _ in range(min(count, limit - 128)):
            try:
                opened = asyncio.open_connection("127.0.0.1", port)
                held.append(await asyncio.wait_for(opened, 5))
            except (OSError, TimeoutError):
                return

    started = time.monotonic()
    _, meanwhile = await asyncio.gather(flood(), load(port, 50, searches))
    took = time.monotonic() - started
    left = sum(not reader.at_eof() for reader, _ in held)
    afterwards = await load(port, 1, searches[:1])
    for _, writer in held:
        writer.close()
    return {"asked": count, "opened": len(held), "left": left, "files_limit": limit,
            "seconds": took, "meanwhile": meanwhile, "afterwards": afterwards}  # fmt: skip


def memory(pid: int) -> float:
    """The process's memory in MB."""
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1e3


def alone(catalogue: Path, photos: list[bytes]) -> dict:
    """Photos/s of the embedder by itself, one by one and in the server's batches."""
    from cbam_jax.catalogue import embedders
    from cbam_jax.catalogue.server import TOGETHER
    from cbam_jax.catalogue.store import Store

    with Store(catalogue) as store:
        embedder = embedders.load_embedder(None, store, TOGETHER)
    rates = {}
    for name, embed in (
        ("one_by_one", lambda: [embedder.embed_file(photo) for photo in photos]),
        ("batches", lambda: embedder.embed_files(photos, progress=False)),
    ):
        embedder.embed_file(photos[0])
        embedder.embed_files(photos[:1], progress=False)
        started = time.monotonic()
        embed()
        rates[name] = len(photos) / (time.monotonic() - started)
    return rates


def measure(options: argparse.Namespace) -> dict:
    files = sorted(p for p in options.photos.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    photos = [path.read_bytes() for path in files[: options.sent]]
    sent = [("/search?k=12", photo) for photo in photos]
    result = {"benchmark": "serve_load", "embedder": alone(options.catalogue, photos)}
    command = [sys.executable, "-m", "cbam_jax.catalogue", "serve", str(options.catalogue)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that `finally` ends the server.
    server = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline().split("/")[2].split(":")[1])
        by_id = [(f"/search?id={1 + i % options.ids}&k=12", b"") for i in range(options.requests)]
        asyncio.run(load(port, 2, sent[:8]))
        result["one"] = asyncio.run(load(port, 1, sent))
        result["many"] = asyncio.run(load(port, 50, sent))
        result["memory_start"] = memory(server.pid)
        result["early"] = asyncio.run(load(port, 50, by_id[:1000]))
        result["memory_1000"] = memory(server.pid)
        result["by_id"] = asyncio.run(load(port, 50, by_id[1000:]))
        result["memory_end"] = memory(server.pid)
        result["idle"] = asyncio.run(idle(port, 10_000, by_id[:1000]))
    finally:
        server.terminate()
        server.wait(30)
    return {**result, **compared(result), **machine()}


def compared(result: dict) -> dict:
    """The figures against each other, and whether what is promised holds."""
    one, many = result["one"], result["many"]
    promised = {
        "lost": sum(result[name]["lost"] for name in ("one", "many", "early", "by_id")),
        "memory_growth": result["memory_end"] / result["memory_1000"],
    }
    return {
        "many_to_one": {name: many[name] / one[name] for name in ("p50", "p99", "per_second")},
        "served_to_embedder": many["per_second"] / max(result["embedder"].values()),
        "bars": judged(promised, BARS),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("photos", type=Path, help="to be searched by")
    parser.add_argument("--sent", type=int, default=200, help="photos, of each load")
    parser.add_argument("--requests", type=int, default=10_000, help="by id")
    parser.add_argument("--ids", type=int, default=100, help="of the catalogue, from 1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(json.dumps(measure(parser.parse_args())))
