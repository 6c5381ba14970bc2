"""The server's process: a port of this machine, uvicorn, and the end."""

import math
import os
import socket
from typing import TYPE_CHECKING

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.server import connections
from cbam_jax.catalogue.server.app import create_app
from cbam_jax.catalogue.server.finding import TOGETHER

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder

_LOCAL = {"127.0.0.1", "localhost", "[::1]", "::1"}
_ACCEPTED = 256  # New connections at once, at most: with those that are open, under 1,024 files.


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there, taken before anything slow begins.

    Raises:
        InputError: the port is taken or none, or the host is none of this machine's.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port={port}: give 1 to {2**16 - 1}, or 0, any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {host}:{port} ({reason}): give another --host or --port"
        ) from error
    return made


def warm(embedder: "Embedder") -> None:
    """Compile what searches need, for one photo and for several, before anyone waits for it."""
    grey = cv2.imencode(".png", np.full((64, 64, 3), 128, np.uint8))[1].tobytes()
    embedder.embed_file(grey)
    embedder.embed_files([grey] * TOGETHER, progress=False)


def serve(path: str | os.PathLike, embedder: "Embedder", listening: socket.socket) -> None:
    """Serve a catalogue until the process is told to end."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    warm(embedder)

    host = listening.getsockname()[0]
    app = create_app(path, embedder, hosts=_LOCAL if host in _LOCAL else None)
    name = f"[{host}]" if ":" in host else host
    listening.listen()  # Whoever reads the address may connect at once, and waits for the server.
    print(f"http://{name}:{listening.getsockname()[1]}/ ; end it by Ctrl-C", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        http=connections.protocol(),
        ws="none",
        backlog=_ACCEPTED,
        timeout_keep_alive=math.ceil(connections.SECONDS),
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
