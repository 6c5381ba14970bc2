"""A dataset -> Grain pipeline -> numpy batches: P x K training batches, and evaluation batches.

One element of the pipeline is one whole batch, and a training batch is a pure function of
``(seed, step)``. So a run resumes by starting at another step, and the number of workers or of
processes may change between runs without changing a single pixel.
"""

import contextlib
import functools
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.data.augmentation import train_image
from cbam_jax.data.images import eval_image
from cbam_jax.data.sampling import AUGMENTATION, class_balanced_indices, images_by_class
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.preprocessing import Preprocessing

Batches = Generator[dict[str, np.ndarray], None, None]

_SHARED_MEMORY = "/dev/shm"  # of Linux; 64 MB in a container, unless asked for more
_BATCHES_PER_WORKER = 5  # that Grain was seen to hold there


def train_batches(
    dataset: RetrievalDataset,
    *,
    seed: int,
    classes_per_batch: int,
    images_per_class: int,
    image_size: int,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    color_jitter: float = 0.0,
    random_erasing: float = 0.0,
    crop_to_box: bool = False,
    skip_singletons: bool = False,
    resize: str = "crop",
    interpolation: str = "bilinear",
    pad_color: tuple[int, ...] = (127, 127, 127),
    workers: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Class-balanced, augmented training batches: P classes, K images of each, in shuffled order.

    Classes and images come from shuffled decks (:func:`class_balanced_indices`). After any number
    of batches, the numbers of times that two classes were drawn differ by one at most, and so do
    those of two images of one class: every image of a class is seen before one is seen again. A
    batch holds no class twice, and no image twice unless its class has fewer than K images.

    Batches ``start_step, ..., start_step + num_steps - 1`` are delivered, so resuming a run that
    stopped after step s is ``start_step=s``. Process p of n gets its n-th part of the rows, in
    order: the parts of all processes, concatenated, are the batch of a single process.

    Args:
        dataset: the images and their labels; one split.
        seed: of everything random here, in [0, 2**32).
        classes_per_batch: P, at least 2 and at most the number of classes.
        images_per_class: K, at least 2, or an anchor would have no positive.
        image_size: side of the square images delivered, in pixels.
        crop_scale: least and greatest area of the random crop, as a fraction of the image's.
        crop_ratio: least and greatest width / height of the random crop.
        flip: whether to mirror half of the images.
        color_jitter: strength c; brightness, contrast and saturation are each multiplied by a
            factor from [max(0, 1 - c), 1 + c]. 0 switches it off.
        random_erasing: probability that a rectangle is replaced by noise.
        crop_to_box: whether to use only the part of an image inside its ``dataset.bbox``.
        skip_singletons: leave out the labels that have one image, which no other can match, as
            datasets labelled by item have. False refuses them.
        resize: how the random crop becomes a square, with ``"letterbox"`` on a border of
            ``pad_color``, else squashed; see ``Preprocessing``, of which are the next two as well.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        pad_color: red, green, blue.
        workers: processes that load batches; 0 loads them in threads of this process, one a core
            (at most 16), which starts at once and is as fast on a machine of few cores. Workers
            are spawned, so a script that uses them needs ``if __name__ == "__main__":``.
        start_step: the first batch to deliver.
        num_steps: how many batches to deliver; None never ends.
        process_index: which of the processes this is.
        process_count: processes that train together; divides P x K.

    Returns:
        An iterator of dicts: ``image`` uint8 [b, s, s, 3], ``label`` int32 [b] and ``index``
        int64 [b] (rows of the dataset), where b = P K / process_count and s = image_size. Its
        ``close()`` stops threads and workers: use ``contextlib.closing`` when leaving it early.

    Raises:
        InputError: at the call, for an argument that is out of range, a dataset without images,
            with fewer than P classes or with a class of one image (unless ``skip_singletons``);
            while iterating, for an image that cannot be read.

    Example:
        >>> png, everyone = cv2.imencode(".png", np.ones((8, 9, 3)))[1].tobytes(), np.ones(6, bool)
        >>> dataset = RetrievalDataset(
        ...     name="toy", split="train", label=np.array([0, 0, 0, 1, 1, 1]),
        ...     label_names=("coat", "hat"), id=np.array(list("abcdef")), is_query=everyone,
        ...     is_gallery=everyone, item=None, series=None, bbox=None, images=[png] * 6)
        >>> batches = train_batches(
        ...     dataset, seed=0, classes_per_batch=2, images_per_class=2, image_size=4, num_steps=3)
        >>> [batch["image"].shape for batch in batches]
        [(4, 4, 4, 3), (4, 4, 4, 3), (4, 4, 4, 3)]
    """
    _check_common(dataset, image_size, crop_to_box, workers, process_index, process_count)
    _check_augmentation(crop_scale, crop_ratio, color_jitter, random_erasing)
    geometry = {"resize": resize, "interpolation": interpolation, "pad_color": tuple(pad_color)}
    Preprocessing(image_size, **geometry)
    _check_steps(seed, start_step, num_steps)
    batch_size = classes_per_batch * images_per_class
    images = images_by_class(dataset.label)
    if skip_singletons:
        images = [rows for rows in images if len(rows) > 1]
    _check_classes(dataset, images, classes_per_batch, images_per_class)
    if batch_size % process_count:
        raise InputError(
            f"a batch of {classes_per_batch} classes x {images_per_class} images = {batch_size} "
            f"cannot be divided among {process_count} processes; "
            f"change classes_per_batch or images_per_class"
        )
    _check_shared_memory(workers, batch_size // process_count, image_size)
    load = functools.partial(
        _train_batch,
        label=dataset.label,
        indices=functools.partial(
            class_balanced_indices,
            images,
            seed=seed,
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
        ),
        rows=_rows(batch_size, process_index, process_count),
        seed=seed,
        image_size=image_size,
        image=functools.partial(
            train_image,
            dataset,
            image_size=image_size,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            crop_to_box=crop_to_box,
            flip=flip,
            color_jitter=color_jitter,
            random_erasing=random_erasing,
            **geometry,
        ),
    )
    stop = sys.maxsize if num_steps is None else start_step + num_steps
    return _iterate(load, start_step, stop, workers)


def eval_batches(
    dataset: RetrievalDataset,
    *,
    image_size: int,
    batch_size: int,
    crop_to_box: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    **geometry: Any,
) -> Batches:
    """Every image of the dataset exactly once, in order, without anything random.

    The last batch is filled up with zeros and masked, never dropped: all batches have one shape,
    and every process gets equally many.

    Args:
        dataset: the images and their labels; one split.
        image_size: side of the square images delivered, in pixels.
        batch_size: images in a batch, over all processes; a multiple of process_count.
        crop_to_box: whether to use only the part of an image inside its ``dataset.bbox``.
        workers: as in :func:`train_batches`.
        process_index: which of the processes this is; it gets its part of each batch's rows.
        process_count: processes that evaluate together.
        **geometry: how an image becomes a square: ``crop_fraction``, ``resize``, ``interpolation``
            and ``pad_color`` of :class:`cbam_jax.preprocessing.Preprocessing`.

    Returns:
        An iterator of dicts: ``image`` uint8 [b, s, s, 3], ``label`` int32 [b], ``index``
        int64 [b] (rows of the dataset) and ``mask`` bool [b], False for a filled-up row, whose
        other entries are 0. b = batch_size / process_count, s = image_size.

    Raises:
        InputError: at the call, for an argument that is out of range or a dataset without images;
            while iterating, for an image that cannot be read.
    """
    _check_common(dataset, image_size, crop_to_box, workers, process_index, process_count)
    geometry["image_size"] = image_size
    Preprocessing(**geometry)
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size}: give a positive multiple of the number of processes, "
            f"{process_count}"
        )
    _check_shared_memory(workers, batch_size // process_count, image_size)
    load = functools.partial(
        _eval_batch,
        read=functools.partial(eval_image, dataset, crop_to_box=crop_to_box, **geometry),
        label=dataset.label,
        batch_size=batch_size,
        rows=_rows(batch_size, process_index, process_count),
        image_size=image_size,
    )
    return _iterate(load, 0, math.ceil(len(dataset) / batch_size), workers)


def _train_batch(
    step: int,
    *,
    image: Callable[[int, np.random.Generator], np.ndarray],
    label: np.ndarray,
    indices: Callable[..., np.ndarray],
    rows: range,
    seed: int,
    image_size: int,
) -> dict[str, np.ndarray]:
    index = indices(step=step)
    images = np.empty((len(rows), image_size, image_size, 3), np.uint8)
    for place, row in enumerate(rows):
        # The row within the global batch, not within the process, keys the augmentation.
        rng = np.random.default_rng((seed, AUGMENTATION, step, row))
        images[place] = image(index[row], rng)
    index = index[rows.start : rows.stop]
    return {
        "image": images,
        "label": label[index].astype(np.int32),
        "index": index.astype(np.int64),
    }


def _eval_batch(
    step: int,
    *,
    read: Callable[[int], np.ndarray],
    label: np.ndarray,
    batch_size: int,
    rows: range,
    image_size: int,
) -> dict[str, np.ndarray]:
    index = step * batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)
    mask = index < len(label)
    images = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
    for row in np.flatnonzero(mask):
        images[row] = read(index[row])
    index = np.where(mask, index, 0)
    labels = np.where(mask, label[index], 0).astype(np.int32)
    return {"image": images, "label": labels, "index": index, "mask": mask}


def _iterate(
    load: Callable[[int], dict[str, np.ndarray]], start: int, stop: int, workers: int
) -> Batches:
    """Batches ``start, ..., stop - 1``, loaded ahead by threads or by worker processes.

    Without Grain, as on a machine that has no more than JAX, each is loaded when it is asked for.
    """
    try:
        import grain  # Late: the rest of this module is of use without it.
    except ImportError as error:
        if workers:
            raise InputError(
                f"workers={workers} needs grain: pip install grain, or set workers=0"
            ) from error
        yield from map(load, range(start, stop))
        return
    # A batch is one element, so threads work on different batches: with t threads, t batches are
    # held ready (64 images of 224 pixels are 10 MB). Workers get one thread each.
    threads = 1 if workers else min(16, os.cpu_count() or 1)
    batches = grain.MapDataset.range(start, stop).map(load)
    batches = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        from absl import flags

        # Grain reads its absl flags to start a worker and fails where absl.app did not parse any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options, worker_init_fn=_init_worker)
    iterator = iter(batches)
    # Closed here as well at the end and on an error: Grain's own iterators print tracebacks when
    # they live until the interpreter exits.
    with contextlib.closing(iterator), _worker_ends_told(workers):
        for batch in iterator:
            # Workers deliver in shared memory, of which containers often have little. A copy frees
            # it at once, however long the batch is kept.
            yield {name: np.array(array) for name, array in batch.items()} if workers else batch


@contextlib.contextmanager
def _worker_ends_told(workers: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = re.search(r"exit code (-?\d+)", str(error))
        status = f" (exit code {code[1]})" if code else ""
        raise InputError(
            f"a process that loads batches was ended{status}, often for want of memory: set "
            f"--config.data.workers={workers - 1}, or 0 for threads, or give it more memory"
        ) from error


def _init_worker(worker: int, workers: int) -> None:
    del worker, workers
    cv2.setNumThreads(1)  # the workers themselves fill the cores
    # A terminal sends these to its whole group; the training alone decides when it ends.
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks some.
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _name(dataset: RetrievalDataset) -> str:
    return f"{dataset.name}, split {dataset.split!r},"


def _check_common(
    dataset: RetrievalDataset,
    image_size: int,
    crop_to_box: bool,
    workers: int,
    process_index: int,
    process_count: int,
) -> None:
    if not len(dataset):
        raise InputError(f"{_name(dataset)} has no images; choose another split or add images")
    if image_size < 1:
        raise InputError(f"image_size={image_size}: give a positive number of pixels")
    if crop_to_box and dataset.bbox is None:
        raise InputError(f"crop_to_box=True: {_name(dataset)} has no boxes; set it to False")
    if workers < 0:
        raise InputError(f"workers={workers}: give 0 (threads) or a number of processes")
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index={process_index} of process_count={process_count}: "
            f"give an index from 0 to the count less one"
        )


def _check_shared_memory(workers: int, batch_size: int, image_size: int) -> None:
    """Beyond what there is, a worker would be killed without a word."""
    needed = workers * _BATCHES_PER_WORKER * batch_size * image_size**2 * 3
    if not needed or not os.path.isdir(_SHARED_MEMORY):
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"workers={workers} hold up to {needed >> 20} MiB of batches in {_SHARED_MEMORY}, "
            f"which has {free >> 20} MiB free: give it more (docker run --shm-size=1g), or set "
            "workers=0"
        )


def _check_augmentation(
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    color_jitter: float,
    random_erasing: float,
) -> None:
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise InputError(f"crop_scale={crop_scale}: give two fractions, 0 < least <= greatest <= 1")
    if len(crop_ratio) != 2 or not 0 < crop_ratio[0] <= crop_ratio[1] < math.inf:
        raise InputError(f"crop_ratio={crop_ratio}: give two numbers, 0 < least <= greatest")
    if not 0 <= color_jitter < math.inf:
        raise InputError(f"color_jitter={color_jitter}: give a strength of at least 0")
    if not 0 <= random_erasing <= 1:
        raise InputError(f"random_erasing={random_erasing}: give a probability in [0, 1]")


def _check_steps(seed: int, start_step: int, num_steps: int | None) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: give an integer in [0, 2**32)")
    if start_step < 0:
        raise InputError(f"start_step={start_step}: give a step of at least 0")
    if num_steps is not None and num_steps < 0:
        raise InputError(f"num_steps={num_steps}: give a number of at least 0, or None for no end")


def _check_classes(
    dataset: RetrievalDataset,
    images: Sequence[np.ndarray],
    classes_per_batch: int,
    images_per_class: int,
) -> None:
    if classes_per_batch < 2:
        raise InputError(
            f"classes_per_batch={classes_per_batch}: give at least 2, or no image has a negative"
        )
    if images_per_class < 2:
        raise InputError(
            f"images_per_class={images_per_class}: give at least 2, or no image has a positive"
        )
    if len(images) < classes_per_batch:
        raise InputError(
            f"{_name(dataset)} has {len(images)} classes, fewer than "
            f"classes_per_batch={classes_per_batch}; set --config.data.classes_per_batch="
            f"{max(len(images), 2)} or choose another split"
        )
    _check_class_sizes(dataset, images, images_per_class)


def _check_class_sizes(
    dataset: RetrievalDataset, images: Sequence[np.ndarray], images_per_class: int
) -> None:
    single = [dataset.label_names[dataset.label[rows[0]]] for rows in images if len(rows) < 2]
    if single:
        names = ", ".join(single[:10]) + (", ..." if len(single) > 10 else "")
        raise InputError(
            f"{_name(dataset)} has {len(single)} labels with one image, which no other image can "
            f"match: {names}; remove them, add images, or leave them out with "
            "--config.data.skip_singletons=True"
        )
    few = sum(len(rows) < images_per_class for rows in images)
    if few:
        logging.getLogger(__name__).info(
            "%s has %d labels with fewer than images_per_class=%d images: "
            "these repeat images within a batch",
            _name(dataset),
            few,
            images_per_class,
        )
