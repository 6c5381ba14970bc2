"""Search for files that our readers mishandle, guided by the lines that each file reaches.

Not a test: it runs as long as it is told to, and needs atheris (``pip install atheris``).

    python tests/fuzz/readers.py safetensors CORPUS -max_total_time=1800

What is read is ``safetensors``, ``hub`` (config.json of an exported model), ``run`` (config.json of
a run), ``log`` (metrics.jsonl), ``manifest``, ``headers`` (of images) or ``lists`` (DeepFashion's).
It ends with what broke a promise of docs/security.md: an exception that is no InputError (or
ValueError, where that is promised), or too much memory or time.
"""

import contextlib
import os
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / folder) for folder in ("security", "pretrained", ".", "..")]

# What is imported in this block tells atheris which lines an input reaches.
with atheris.instrument_imports(include=["cbam_jax"]):
    from cbam_jax import InputError, hub_config, saved_config
    from cbam_jax.datasets import decoding, image_headers, manifest
    from cbam_jax.datasets.deepfashion import lists
    from cbam_jax.foreign_files import shown_names
    from cbam_jax.pretrained.sources import read_arrays
    from cbam_jax.runlog import read_log

# ruff: noqa: E402
import test_damaged_logs
import test_hostile_datasets
import test_hostile_models
import test_hostile_runs

SCRATCH = Path(f"/dev/shm/readers-{os.getpid()}")


def written(name, data):
    path = SCRATCH / name
    path.write_bytes(data)
    return path


def safetensors(data):
    for array in read_arrays(written("x.safetensors", data)).values():
        array.sum()


def run(data):
    try:
        saved_config.read(written("config.json", data))
    except ValueError as error:
        raise InputError(shown_names([str(error)])) from error


def log(data):
    written("metrics.jsonl", data)
    assert all(type(record["step"]) is int for record in read_log(SCRATCH))


def headers(data):
    """All that is asked of an image before it is decoded."""
    assert all(height * width >= 0 for height, width in image_headers.claimed_sizes(data))
    assert decoding.affordable(data, 1000) in range(1001)
    assert len(image_headers.png_of_pixels_alone(data) or b"") <= len(data)
    for asked in ("keeps_coefficients", "scan_count", "holds_less_than_it_claims"):
        getattr(image_headers, asked)(data)
    image_headers.is_packed_otherwise(data)
    decoding.jpeg_size(data)


def listed(data):
    path, problems = written("list.txt", data), []
    layout = test_hostile_datasets.Layout(path)
    for boxes in lists._read_boxes(layout, 7, problems).values():
        assert all(abs(number) < 10**9 for number in boxes)
    lists._read_landmarks(layout, problems)


def first(inputs):
    return [made[0] if isinstance(made, tuple) else made for made in inputs.values()]


# By name: what reads an input, and what to begin with.
READERS = {
    "safetensors": (
        safetensors,
        [test_hostile_models.WEIGHTS, *first(test_hostile_models.SAFETENSORS)],
    ),
    "hub": (
        lambda data: hub_config.read_config(written("config.json", data)),
        first(test_hostile_models.CONFIGS),
    ),
    "run": (run, [test_hostile_runs.changed(), *first(test_hostile_runs.CONFIGS)]),
    "log": (log, [b"\n".join(test_damaged_logs.LINES), *first(test_damaged_logs.DAMAGED_LINES)]),
    "manifest": (
        lambda data: manifest.read_table(written("x.csv", data)),
        [
            test_hostile_datasets.HEADER + test_hostile_datasets.ROW * 2,
            *first(test_hostile_datasets.MANIFESTS),
        ],
    ),
    "headers": (headers, first(test_hostile_datasets.IMAGES)),
    "lists": (
        listed,
        [b"1\nname x\n" + row.encode() for row in first(test_hostile_datasets.LISTED)],
    ),
}


def guarded(read):
    def try_one(data):
        with contextlib.suppress(InputError):
            read(data)

    return try_one


if __name__ == "__main__":
    name, folder = sys.argv.pop(1), Path(sys.argv[1])
    read, beginnings = READERS[name]
    SCRATCH.mkdir(exist_ok=True)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, what the readers tell
    folder.mkdir(exist_ok=True, parents=True)
    for number, data in enumerate(beginnings):
        (folder / f"start-{number}").write_bytes(data[:20_000])
    atheris.Setup([*sys.argv, "-rss_limit_mb=2048", "-timeout=10", "-max_len=20000"], guarded(read))
    atheris.Fuzz()
