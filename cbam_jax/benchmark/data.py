"""How fast batches load: the measuring behind ``python -m cbam_jax.benchmark data``.

``benchmarks/torch_data.py`` measures PyTorch's DataLoader by the same functions.
"""

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.benchmark.timing import spread
from cbam_jax.data import Batches, train_batches
from cbam_jax.datasets import RetrievalDataset, open_dataset

UNITS = ("images_per_second", "images_per_second_per_core", "batch_ms")


def cpu_seconds() -> float:
    """CPU seconds of this process and of its live worker processes (Linux).

    Example:
      >>> cpu_seconds() > 0
      True
    """
    # The kernel's clock of another process, as clock_getcpuclockid(3) makes it of the id.
    workers = multiprocessing.active_children()
    clocks = [(~worker.pid << 3) | 2 for worker in workers if worker.pid]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


def _at_rest() -> float:
    """``cpu_seconds`` once what is loaded ahead is loaded."""
    before, now = -1.0, cpu_seconds()
    while now - before > 0.003:
        time.sleep(0.1)
        before, now = now, cpu_seconds()
    return now


def loading(batches: Iterator, count: int, ahead: int) -> dict[str, float]:
    """Wall and CPU milliseconds of a batch, over ``count`` of them.

    The wall clock starts after ``ahead`` more, which lie ready. The CPU time is that of as many as
    were taken: it is read when those that lie ready do so again.

    Example:
      >>> sorted(loading(iter(range(9)), count=2, ahead=1))
      ['cpu_ms', 'wall_ms']
    """
    before = _at_rest()
    for _ in range(ahead):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    wall = time.perf_counter() - start
    return {
        "wall_ms": 1e3 * wall / count,
        "cpu_ms": 1e3 * (_at_rest() - before) / (count + ahead),
    }


def photos(count: int, height: int = 533, width: int = 400) -> list[bytes]:
    """JPEGs of noise whose amplitude grows with its scale, the spectrum of photos.

    Example:
      >>> len(photos(2, 40, 30))
      2
    """
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        image = np.full((height, width, 3), 128, np.float32)
        for scale in (2, 4, 8, 16, 32, 64, 128):
            shape = (height // scale + 2, width // scale + 2, 3)
            noise = rng.standard_normal(shape, np.float32)
            noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
            image += scale**0.5 * 4 * noise
        image = np.clip(image, 0, 255).astype(np.uint8)
        jpegs.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())
    return jpegs


def photo_dataset(data: str | None, split: str = "train") -> RetrievalDataset:
    """A dataset by its name, or 16 synthetic photos in memory, 20 times each, of ten classes.

    Example:
      >>> len(photo_dataset(None))
      320
    """
    if data is not None:
        return open_dataset(data, split)
    images, every = photos(16) * 20, np.ones(320, bool)
    return RetrievalDataset(
        name="synthetic",
        split=split,
        label=np.arange(320, dtype=np.int32) % 10,
        label_names=tuple(f"class {number}" for number in range(10)),
        id=np.arange(320).astype(str),
        is_query=every,
        is_gallery=every,
        item=None,
        series=None,
        bbox=None,
        images=images,
    )


def our_batches(
    dataset: RetrievalDataset,
    *,
    image_size: int,
    batch_size: int,
    workers: int,
    color_jitter: float,
) -> Batches:
    """Training batches without end, of eight images a class.

    Raises:
        InputError: a batch that is not of eight images each of two classes or more.
    """
    if batch_size < 16 or batch_size % 8:
        raise InputError(f"batch_size={batch_size}: give a multiple of 8, at least 16")
    return train_batches(
        dataset,
        seed=0,
        classes_per_batch=batch_size // 8,
        images_per_class=8,
        image_size=image_size,
        color_jitter=color_jitter,
        skip_singletons=True,
        workers=workers,
    )


def lie_ready(workers: int) -> int:
    """How many batches a loader may hold: one a thread, or up to six a worker (Grain's).

    Example:
      >>> lie_ready(workers=20)
      120
    """
    return max(6 * workers, min(16, os.cpu_count() or 1))


def benchmark_data(
    *,
    data: str | None = None,
    split: str = "train",
    image_size: int = 224,
    batch_size: int = 64,
    workers: int = 0,
    color_jitter: float = 0.0,
    count: int = 8,
    repeats: int = 5,
) -> dict:
    """Images/s of the training batches: read, decoded, cropped, mirrored, stacked.

    Each repeat takes ``count`` batches (:func:`loading`), of eight images a class.
    ``images_per_second_per_core`` divides by CPU seconds, of workers too: other programs disturb
    that less than ``images_per_second``, which is by the wall clock. Without Grain batches are
    loaded one after another, and ``grain`` is False.

    Raises:
        InputError: an unsuitable dataset or batch.

    Example:
      >>> result = benchmark_data(image_size=8, batch_size=16, count=1, repeats=1)
      >>> result["images_per_second_per_core"]["median"] > 0
      True
    """
    arguments = dict(locals())
    dataset = photo_dataset(data, split)
    sizes = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    with contextlib.closing(our_batches(dataset, **sizes, color_jitter=color_jitter)) as batches:
        next(batches)
        times = [loading(batches, count, lie_ready(workers)) for _ in range(repeats)]
    return {
        "benchmark": "data",
        **arguments,
        "images": len(dataset),
        "grain": _has_grain(),
        **loading_rates(times, batch_size),
    }


def _has_grain() -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module("grain")
        return True
    return False


def loading_rates(times: list[dict[str, float]], batch_size: int) -> dict[str, dict[str, float]]:
    """Median, least and most of images/s, images/s a core and milliseconds a batch.

    Example:
      >>> rates = loading_rates([{"wall_ms": 50.0, "cpu_ms": 100.0}], batch_size=64)
      >>> rates["images_per_second_per_core"]["median"]
      640.0
    """
    values = (
        [1e3 * batch_size / time["wall_ms"] for time in times],
        [1e3 * batch_size / time["cpu_ms"] for time in times],
        [time["wall_ms"] for time in times],
    )
    return {name: spread(v) for name, v in zip(UNITS, values, strict=True)}
