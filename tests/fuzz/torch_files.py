"""Search for files that read_torch mishandles, guided by the lines that each file reaches.

Not a test: it runs as long as it is told to, and needs atheris (``pip install atheris``).

    python tests/fuzz/torch_files.py CORPUS -max_total_time=1800

An input's first byte says what the rest is: an archive's pickle, a whole archive, or a file from
before torch 1.6. It ends with what broke a promise of cbam_jax.pretrained.torch_files: an exception
that is no InputError, an array outside its storage, or too much memory or time.
"""

import os
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "pretrained"), str(HERE.parent), str(HERE.parent.parent)]

# What is imported in this block tells atheris which lines an input reaches.
with atheris.instrument_imports(include=["cbam_jax", "zipfile"]):
    from cbam_jax import InputError
    from cbam_jax.pretrained import read_torch

# ruff: noqa: E402
from test_hostile_torch_files import HOSTILE
from test_random_torch_files import SNIPPETS, check_inside, golden_pickle
from torch_writing import FOUR, zipped

GOLDEN = HERE.parent / "golden"
SCRATCH = Path(f"/dev/shm/torch-files-{os.getpid()}.pth")
CONTENTS = golden_pickle()[1] | {"0": FOUR}


def as_file(data: bytes) -> bytes:
    """The file that an input stands for."""
    return zipped(data[1:], CONTENTS) if data[:1] == b"p" else data[1:]


def try_one(data: bytes) -> None:
    SCRATCH.write_bytes(as_file(data))
    try:
        saved = read_torch(SCRATCH)
    except InputError as error:
        line = str(error)
        assert line.isprintable(), line
    else:
        check_inside(saved)


def write_corpus(folder: Path) -> None:
    """Start from the golden files, the hostile ones of the tests, and single instructions."""
    folder.mkdir(exist_ok=True, parents=True)
    files = [(GOLDEN / f"torch_{kind}.pth").read_bytes() for kind in ("zip", "legacy")]
    inputs = [b"f" + data for data in files]
    inputs += [b"f" + data for data, _ in HOSTILE.values() if len(data) < 20_000]
    inputs += [b"p" + golden_pickle()[0][:-1], *(b"p" + code for code in SNIPPETS)]
    for number, data in enumerate(inputs):
        (folder / f"start-{number}").write_bytes(data)


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
    atheris.Setup([*sys.argv, "-rss_limit_mb=1024", "-timeout=10", "-max_len=20000"], try_one)
    try:
        atheris.Fuzz()
    finally:
        SCRATCH.unlink(missing_ok=True)
