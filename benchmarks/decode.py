"""Images that a second of CPU time decodes, and decodes and resizes to a square, by library.

    python benchmarks/decode.py --images PATH [--output benchmarks/results/decode_cpu.json]

PATH is a folder or a tar with JPEGs; without it, synthetic ones are used (400 x 400, smooth and
fine structure as in a photo). Measured are those libraries that are installed:

* pil: Pillow, bilinear (it widens the kernel when shrinking, so it never aliases)
* pil_draft: the same, after ``Image.draft``, which lets libjpeg decode at 1/2, 1/4 or 1/8
* opencv: ``cbam_jax.datasets.decode_image`` and ``cbam_jax.data.resize``
* opencv_area: the same, resized by INTER_AREA alone
* opencv_reduced: ``cbam_jax.data.decode_resized``, what this project uses: the same where the rule
  of ``resize`` halves nothing, and else the JPEG decoded at 1/2, 1/4 or 1/8 in its place
* simplejpeg: libjpeg-turbo by a thin wrapper; resized as opencv

One thread is measured by its CPU time: it waits for nothing, and other programs on the machine
disturb that less than the wall clock. Methods take turns within each repeat, so that a slow moment
meets them all. The last line on stdout is one JSON document: median, least and greatest rate over
the repeats, the fraction of images whose decoded pixels equal Pillow's, and the mean absolute
difference, in grey levels of 256, of the resized pixels from INTER_AREA's: means over exactly the
area that a pixel covers.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import statistics
import tarfile
import time
from collections.abc import Callable

import cv2
import numpy as np

from cbam_jax.benchmark import photos
from cbam_jax.data import decode_resized, resize
from cbam_jax.datasets import decode_image, jpeg_size

Decode = Callable[[bytes], np.ndarray]


def read_jpegs(path: str, limit: int) -> list[bytes]:
    if os.path.isfile(path):
        with tarfile.open(path) as archive:
            names = sorted(n for n in archive.getnames() if n.lower().endswith((".jpg", ".jpeg")))
            return [archive.extractfile(name).read() for name in spread(names, limit)]
    files = sorted(
        f for f in pathlib.Path(path).rglob("*") if f.suffix.lower() in (".jpg", ".jpeg")
    )
    return [file.read_bytes() for file in spread(files, limit)]


def spread(items: list, limit: int) -> list:
    return items[:: max(1, len(items) // limit)][:limit]


def decoders(size: int) -> dict[str, tuple[Decode, Decode]]:
    """For each library installed: decode alone, and decode and resize to [size, size, 3]."""

    def by_cv2(decode: Decode) -> tuple[Decode, Decode]:
        return decode, lambda jpeg: resize(decode(jpeg), size, size)

    def reduced(jpeg):
        whole = lambda height, width: (0, 0, height, width)  # noqa: E731
        return decode_resized(jpeg, part=whole, size=lambda *_: (size, size))

    def area(jpeg):
        return cv2.resize(decode_image(jpeg), (size, size), interpolation=cv2.INTER_AREA)

    methods = {
        "opencv": by_cv2(decode_image),
        "opencv_area": (decode_image, area),
        "opencv_reduced": (decode_image, reduced),
    }
    if importlib.util.find_spec("PIL"):
        methods |= pil_decoders(size)
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        methods["simplejpeg"] = by_cv2(simplejpeg.decode_jpeg)
    return methods


def pil_decoders(size: int) -> dict[str, tuple[Decode, Decode]]:
    from PIL import Image

    def load(jpeg, draft):
        image = Image.open(io.BytesIO(jpeg))
        if draft:
            image.draft("RGB", (size, size))
        return image.convert("RGB")

    def pair(draft):
        return (
            lambda jpeg: np.asarray(load(jpeg, draft)),
            lambda jpeg: np.asarray(load(jpeg, draft).resize((size, size), Image.BILINEAR)),
        )

    return {"pil": pair(False), "pil_draft": pair(True)}


def images_per_second(function: Decode, jpegs: list[bytes]) -> float:
    start = time.thread_time()
    for jpeg in jpegs:
        function(jpeg)
    return len(jpegs) / (time.thread_time() - start)


def measure(jpegs: list[bytes], size: int, repeats: int) -> dict[str, dict]:
    methods = decoders(size)
    stages = ("decode", "decode_and_resize")
    rates = {name: {stage: [] for stage in stages} for name in methods}
    for repeat in range(repeats + 1):
        for name, functions in methods.items():
            for stage, function in zip(stages, functions, strict=True):
                rate = images_per_second(function, jpegs)
                if repeat:  # the first warms up
                    rates[name][stage].append(rate)
    return {
        name: {stage: summary(values) for stage, values in by_stage.items()}
        | {
            "same_pixels_as_pil": same_pixels(methods, name, jpegs),
            "difference_from_area": difference(methods["opencv_area"][1], methods[name][1], jpegs),
        }
        for name, by_stage in rates.items()
    }


def summary(rates: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "greatest": round(max(rates), 1),
    }


def same_pixels(methods: dict, name: str, jpegs: list[bytes]) -> float | None:
    if "pil" not in methods:
        return None
    pairs = [(methods["pil"][0](jpeg), methods[name][0](jpeg)) for jpeg in jpegs]
    return round(float(np.mean([np.array_equal(a, b) for a, b in pairs])), 4)


def difference(expected: Decode, actual: Decode, jpegs: list[bytes]) -> float:
    gaps = [np.abs(expected(jpeg).astype(np.float32) - actual(jpeg)).mean() for jpeg in jpegs]
    return round(float(np.mean(gaps)), 3)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("numpy", "opencv-python-headless", "pillow", "simplejpeg"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder or tar with JPEGs; default: synthetic ones")
    parser.add_argument("--limit", type=int, default=200, help="images, spread over all found")
    parser.add_argument("--size", type=int, default=224, help="side of the result in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    parser.add_argument("--note", default="", help="what else a reader of the result must know")
    parser.add_argument("--output", type=pathlib.Path, help="write the JSON document here too")
    args = parser.parse_args()
    if args.images and not os.path.exists(args.images):
        parser.error(f"--images {args.images} does not exist: give a folder or a tar")
    cv2.setNumThreads(1)
    jpegs = read_jpegs(args.images, args.limit) if args.images else photos(args.limit, 400, 400)
    if not jpegs:
        parser.error(f"--images {args.images} holds no .jpg or .jpeg: give another")
    sizes = np.array([jpeg_size(jpeg) for jpeg in jpegs])
    report = {
        "benchmark": "decode",
        "date": datetime.date.today().isoformat(),
        "machine": args.machine,
        "note": args.note,
        "versions": versions(),
        "images": {
            "source": os.path.basename(args.images) if args.images else "synthetic",
            "count": len(jpegs),
            "median_height": int(np.median(sizes[:, 0])),
            "median_width": int(np.median(sizes[:, 1])),
            "median_bytes": int(np.median([len(jpeg) for jpeg in jpegs])),
        },
        "size": args.size,
        "repeats": args.repeats,
        "unit": "images per second of one thread's CPU time",
        "results": measure(jpegs, args.size, args.repeats),
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
