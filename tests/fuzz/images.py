"""Damage image files of every kind at random, and see that decoding them stays cheap.

Not a test: it runs as long as it is told to.

    python tests/fuzz/images.py --seconds=60 --seed=0

Printed is each file that ends in another exception than InputError, takes a second, or 200 MB more
than any before it; the last line counts them.
"""

import argparse
import io
import os
import resource
import time

import cv2
import numpy as np
from PIL import Image

from cbam_jax import InputError
from cbam_jax.datasets import decode_image

# Format, mode, and options of Pillow's.
PILLOW = (
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "1", {}), ("PNG", "RGBA", {}),
    ("WEBP", "RGB", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {}),
    ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    ("JPEG2000", "RGB", {}), ("PPM", "RGB", {}), ("AVIF", "RGB", {}), ("AVIF", "RGBA", {}),
)  # fmt: skip


def whole_files(rng):
    pixels = cv2.GaussianBlur(rng.integers(0, 255, (60, 80, 3), np.uint8), (5, 5), 0)
    files = {}
    for kind, mode, options in PILLOW:
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
        files[f"{kind} {mode} {options or ''}"] = buffer.getvalue()
    for kind in ("hdr", "ras"):
        image = pixels.astype(np.float32) if kind == "hdr" else pixels
        files[kind] = cv2.imencode(f".{kind}", image)[1].tobytes()
    return files


def damaged(whole, rng):
    data, head = bytearray(whole), min(len(whole), 200)
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(0, head, rng.integers(1, 4)):
            data[place] = rng.integers(256)
    elif kind == 1:  # A large number.
        place = rng.integers(0, head)
        data[place : place + 4] = b"\x7f\xff\xff\xff"[: len(data) - place]
    elif kind == 2:
        for place in rng.integers(0, len(data), rng.integers(1, 10)):
            data[place] = rng.integers(256)
    else:
        del data[rng.integers(1, len(data)) :]
    return bytes(data)


def decoded(data):
    """How it ends, and how many seconds it took."""
    start = time.perf_counter()
    try:
        decode_image(data)
        end = "an image"
    except InputError:
        end = "refused"
    except Exception as error:
        end = f"TRACEBACK {error!r:.200}"
    return end, time.perf_counter() - start


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # What the decoders tell.
    rng = np.random.default_rng(flags.seed)
    files = whole_files(rng)
    for data in files.values():
        decode_image(data)
    names, before, counts = list(files), peak(), {}
    until = time.perf_counter() + flags.seconds
    while time.perf_counter() < until:
        name = names[rng.integers(len(names))]
        data = damaged(files[name], rng)
        end, seconds = decoded(data)
        counts[end] = counts.get(end, 0) + 1
        if end[0].isupper() or seconds > 1 or peak() > before + 200:
            print(f"{name}: {end} after {seconds:.1f} s, {peak()} MB: {data[:60]!r}", flush=True)
            before = max(before, peak())
    print(counts, f"{peak()} MB")


if __name__ == "__main__":
    main()
