"""`add` ended by SIGKILL at random moments, again and again, until it has come to its end."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakes import FakeEmbedder, write_photos

from cbam_jax.catalogue import Catalogue

DRIVER = Path(__file__).with_name("add_driver.py")
_COLUMNS = "id, path, hash, box, payload, look, problem, embedding"


def content(path):
    """Everything that does not depend on when it was written."""
    with Catalogue.open(path, FakeEmbedder()) as shop:
        return shop.store.rows(f"SELECT {_COLUMNS} FROM item ORDER BY id")


def campaign(folder, kills, seed, longest, photos=150):
    """Kill `add` that many times, in as many catalogues as it takes; return how many rounds.

    Each time ``verify`` finds nothing and all that was committed is there again; each catalogue
    ends with what an uninterrupted one holds, byte for byte.
    """
    write_photos(folder / "photos", photos)
    (folder / "photos" / "bad.jpg").write_bytes(b"no picture")
    run(folder / "whole.db", folder, None)
    expected = content(folder / "whole.db")
    draw, done, rounds = random.Random(seed), 0, 0
    while done < kills:
        path, rows = folder / f"{rounds}.db", []
        while run(path, folder, draw.uniform(0, longest) if done < kills else None):
            done += 1
            rows = checked(path, rows, expected)
        assert content(path) == expected
        rounds += 1
    return rounds


def checked(path, before, expected):
    """The rows of a catalogue whose writer was killed: whole batches of the uninterrupted one."""
    if not path.exists():
        return []
    with Catalogue.open(path, FakeEmbedder()) as shop:
        assert shop.verify() == []
    rows = content(path)
    assert rows == expected[: len(rows)]
    assert len(rows) >= len(before)
    assert len(rows) % 7 == 0 or len(rows) == len(expected)
    return rows


def run(path, folder, after):
    """Add; kill it ``after`` seconds, if it still runs then. Whether it was killed."""
    command = [sys.executable, str(DRIVER), str(path), str(folder / "photos")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # Imports are behind it: what follows is the catalogue's.
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        status = process.wait()
    assert status in (0, -signal.SIGKILL)
    return status != 0
