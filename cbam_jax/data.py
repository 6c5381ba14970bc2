"""A dataset -> Grain pipeline -> numpy batches: P x K training batches, and evaluation batches.

One element of the pipeline is one whole batch, and a training batch is a pure function of
``(seed, step)``. So a run resumes by starting at another step, and the number of workers or of
processes may change between runs without changing a single pixel.

Images are decoded by OpenCV (:func:`cbam_jax.datasets.decode_image`): on photos of 400 x 533 pixels
it is three times as fast as Pillow, with the same pixels, and a tenth slower than simplejpeg, which
reads JPEG only (``benchmarks/decode.py``). Where a JPEG is shrunk to less than half anyway, it is
decoded at 1/2, 1/4 or 1/8 (:func:`decode_resized`). Images stay uint8 here and are normalised on
the device, inside the jitted step.
"""

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets import RetrievalDataset, decode_image, jpeg_size

Batches = Generator[dict[str, np.ndarray], None, None]
Part = tuple[int, int, int, int]  # top, left, height and width in pixels

# The second word of every random key, so that no two streams share numbers.
_CLASS_DECK, _IMAGE_DECK, _AUGMENTATION = range(3)

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
        ),
    )
    stop = sys.maxsize if num_steps is None else start_step + num_steps
    return _iterate(load, start_step, stop, workers)


def eval_batches(
    dataset: RetrievalDataset,
    *,
    image_size: int,
    batch_size: int,
    crop_fraction: float = 0.875,
    crop_to_box: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every image of the dataset exactly once, in order, without anything random.

    The last batch is filled up with zeros and masked, never dropped: all batches have one shape,
    and every process gets equally many.

    Args:
        dataset: the images and their labels; one split.
        image_size: side of the square images delivered, in pixels.
        batch_size: images in a batch, over all processes; a multiple of process_count.
        crop_fraction: the short side is resized to image_size / crop_fraction before the centre
            is cut out (:func:`center_crop`).
        crop_to_box: whether to use only the part of an image inside its ``dataset.bbox``.
        workers: as in :func:`train_batches`.
        process_index: which of the processes this is; it gets its part of each batch's rows.
        process_count: processes that evaluate together.

    Returns:
        An iterator of dicts: ``image`` uint8 [b, s, s, 3], ``label`` int32 [b], ``index``
        int64 [b] (rows of the dataset) and ``mask`` bool [b], False for a filled-up row, whose
        other entries are 0. b = batch_size / process_count, s = image_size.

    Raises:
        InputError: at the call, for an argument that is out of range or a dataset without images;
            while iterating, for an image that cannot be read.
    """
    _check_common(dataset, image_size, crop_to_box, workers, process_index, process_count)
    if not 0 < crop_fraction <= 1:
        raise InputError(f"crop_fraction={crop_fraction}: give a fraction in (0, 1]")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size}: give a positive multiple of the number of processes, "
            f"{process_count}"
        )
    _check_shared_memory(workers, batch_size // process_count, image_size)
    geometry = {
        "image_size": image_size, "crop_fraction": crop_fraction, "crop_to_box": crop_to_box
    }  # fmt: skip
    load = functools.partial(
        _eval_batch,
        read=functools.partial(eval_image, dataset, **geometry),
        label=dataset.label,
        batch_size=batch_size,
        rows=_rows(batch_size, process_index, process_count),
        image_size=image_size,
    )
    return _iterate(load, 0, math.ceil(len(dataset) / batch_size), workers)


def train_image(
    dataset: RetrievalDataset,
    index: int,
    rng: np.random.Generator,
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    crop_to_box: bool,
    flip: bool,
    color_jitter: float,
    random_erasing: float,
) -> np.ndarray:
    """One image, augmented as :func:`train_batches` says, uint8 [s, s, 3].

    Raises:
        InputError: the image cannot be read, or its box holds no pixel.
    """

    def part(height: int, width: int) -> Part:
        top, left, height, width = _whole_or_box(dataset, index, crop_to_box)(height, width)
        crop = random_crop(rng, height, width, scale=crop_scale, ratio=crop_ratio)
        return top + crop[0], left + crop[1], *crop[2:]

    image = _read_resized(dataset, index, part=part, size=lambda *_: (image_size, image_size))
    return augment(image, rng, flip=flip, color_jitter=color_jitter, random_erasing=random_erasing)


def eval_image(
    dataset: RetrievalDataset,
    index: int,
    *,
    image_size: int,
    crop_fraction: float = 0.875,
    crop_to_box: bool = False,
) -> np.ndarray:
    """One image as :func:`eval_batches` delivers it, uint8 [s, s, 3].

    Raises:
        InputError: the image cannot be read, or its box holds no pixel.
    """
    part = _whole_or_box(dataset, index, crop_to_box)
    short = round(image_size / crop_fraction)
    image = _read_resized(dataset, index, part=part, size=functools.partial(_fit, short=short))
    return _centre(image, image_size)


def eval_mask(
    dataset: RetrievalDataset,
    index: int,
    *,
    image_size: int,
    crop_fraction: float = 0.875,
    crop_to_box: bool = False,
) -> np.ndarray:
    """Where the garment is in :func:`eval_image`'s pixels, bool [s, s]; see ``dataset.mask``.

    A pixel belongs to it when at least half of what it was resized from does.

    Raises:
        InputError: as for :func:`eval_image`; also where the dataset has neither masks nor boxes.
    """
    mask = dataset.mask(index).astype(np.uint8) * np.uint8(255)
    mask = _cut(mask, *_whole_or_box(dataset, index, crop_to_box)(*mask.shape))
    return center_crop(mask, image_size=image_size, crop_fraction=crop_fraction) >= 128


def decode_resized(
    encoded: bytes,
    *,
    part: Callable[[int, int], Part],
    size: Callable[[int, int], tuple[int, int]],
    name: str = "an image",
) -> np.ndarray:
    """A part of an image, resized as :func:`resize` does, decoding no more than that needs.

    Where ``resize`` would halve the part of a JPEG once, twice or three times, the JPEG is decoded
    at 1/2, 1/4 or 1/8 instead, in 1/2 to 1/4 of the time: libjpeg leaves out the frequencies that
    the mean of 2 x 2 would suppress. The result is as near to the area average as by halving
    (benchmarks/decode.py). The part's edges are then rounded to pixels of the reduced image.

    Args:
        encoded: the bytes of the file.
        part: height and width of the whole image -> the part, in its pixels.
        size: height and width of the part -> those of the result.
        name: what the error message calls the image.

    Returns:
        uint8 [height, width, 3].

    Raises:
        InputError: the image cannot be decoded.

    Example:
        >>> jpeg = cv2.imencode(".jpg", np.full((400, 300, 3), 7, np.uint8))[1].tobytes()
        >>> part, size = lambda height, width: (8, 0, 96, width), lambda *_: (20, 60)
        >>> decode_resized(jpeg, part=part, size=size).shape
        (20, 60, 3)
    """
    whole = jpeg_size(encoded)
    if whole is not None:
        rectangle = part(*whole)
        reduction = _reduction(rectangle, size(*rectangle[2:]))
        image = decode_image(encoded, name=name, reduction=reduction)
        if image.shape[:2] == tuple(-(-side // reduction) for side in whole):
            image = _cut(image, *_reduced(rectangle, reduction))
            return resize(image, *size(*rectangle[2:]))
    # No JPEG, or one whose headers are not what OpenCV makes of them.
    image = decode_image(encoded, name=name)
    rectangle = part(*image.shape[:2])
    return resize(_cut(image, *rectangle), *size(*rectangle[2:]))


def _reduction(part: Part, size: tuple[int, int]) -> int:
    """2 to the number of times that :func:`resize` would halve the part, at most 8."""
    height, width, reduction = *part[2:], 1
    while (
        reduction < 8
        and (height // (2 * reduction)) * (width // (2 * reduction)) > size[0] * size[1]
    ):
        reduction *= 2
    return reduction


def _reduced(part: Part, reduction: int) -> Part:
    """The part in pixels of the reduced image; edges are rounded to the nearest."""
    top, left, height, width = part
    edges = (top, left, top + height, left + width)
    top, left, bottom, right = ((edge + reduction // 2) // reduction for edge in edges)
    return top, left, bottom - top, right - left


def deal(key: Sequence[int], *, size: int, hand: int, turn: int) -> np.ndarray:
    """The ``turn``-th hand out of an endless pile of shuffled decks of ``size`` cards.

    Cards are dealt from the top. When a deck ends within a hand, the hand is filled from the next
    deck, passing over (not removing) the cards that it already holds. So no card is twice in a
    hand, and each deck is dealt to its end before the next: after any number of hands, two cards
    were dealt equally often, or one of them once more. A hand greater than the deck holds whole
    decks first, and the rest is dealt by that rule.

    It costs a few shuffles whatever the turn is; nothing before it is replayed.

    Args:
        key: non-negative integers; another key, another pile.
        size: cards in a deck.
        hand: cards in a hand.
        turn: which hand, from 0.

    Returns:
        int64 [hand], the cards, each in [0, size).

    Example:
        >>> hands = [deal((7,), size=5, hand=3, turn=turn) for turn in range(5)]
        >>> np.bincount(np.concatenate(hands)).tolist()
        [3, 3, 3, 3, 3]
    """
    whole_decks, hand = divmod(hand, size)
    deck, place = divmod(turn * hand, size)
    cards = _deck(key, size, hand, deck)[place : place + hand]
    if len(cards) < hand:
        cards = np.concatenate([cards, _deck(key, size, hand, deck + 1)[: hand - len(cards)]])
    return np.concatenate([np.tile(np.arange(size), whole_decks), cards])


def _deck(key: Sequence[int], size: int, hand: int, deck: int) -> np.ndarray:
    """The order of one deck: its shuffle, with the cards passed over by its first hand later."""
    if hand == 0:
        return np.arange(size)
    # Passing over reorders no more than the first `hand` cards. So in a deck of two hands or more
    # the last cards, all that the next deck depends on, are as shuffled. Smaller decks are
    # followed from the last one that began with a new hand: `hand` decks at most.
    start = deck - deck % (hand // math.gcd(hand, size))
    if size >= 2 * hand:
        start = max(start, deck - 1)
    order = _shuffle(key, size, start)
    for number in range(start + 1, deck + 1):
        held = number * size % hand
        shuffled = _shuffle(key, size, number)
        # Without held cards the hand is new and `first` is empty.
        first = np.flatnonzero(~np.isin(shuffled, order[size - held :]))[: -held % hand]
        order = np.concatenate([shuffled[first], np.delete(shuffled, first)])
    return order


def _shuffle(key: Sequence[int], size: int, deck: int) -> np.ndarray:
    return np.random.default_rng((*key, deck)).permutation(size)


def images_by_class(label: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that has any, in the order of the labels.

    Example:
        >>> [rows.tolist() for rows in images_by_class(np.array([5, 2, 5, 2, 2]))]
        [[1, 3, 4], [0, 2]]
    """
    order = np.argsort(label, kind="stable")
    _, starts = np.unique(label[order], return_index=True)
    return np.split(order, starts[1:])


def class_balanced_indices(
    images: Sequence[np.ndarray],
    *,
    seed: int,
    classes_per_batch: int,
    images_per_class: int,
    step: int,
) -> np.ndarray:
    """Rows of the ``step``-th P x K batch: a hand of P classes, and of each a hand of K images.

    Every deck of classes holds each class once, so a class dealt from deck v is visited for the
    v-th time (from 0), which is the turn of its own deck of images: a pure function of the step.

    Args:
        images: for each class, the rows of its images (:func:`images_by_class`).
        seed: of all shuffles.
        classes_per_batch: P, at most the number of classes.
        images_per_class: K.
        step: which batch, from 0.

    Returns:
        int64 [P K], the K rows of a class side by side.
    """
    slots = step * classes_per_batch + np.arange(classes_per_batch)
    visits = slots // len(images)
    classes = deal((seed, _CLASS_DECK), size=len(images), hand=classes_per_batch, turn=step)
    rows = []
    for which, visit in zip(classes.tolist(), visits.tolist(), strict=True):
        key, size = (seed, _IMAGE_DECK, which), len(images[which])
        rows.append(images[which][deal(key, size=size, hand=images_per_class, turn=visit)])
    return np.concatenate(rows)


def augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    flip: bool,
    color_jitter: float,
    random_erasing: float,
) -> np.ndarray:
    """Mirror, change the colours of and erase from one image, as :func:`train_batches` says.

    Args:
        image: uint8 [h, w, 3].
        rng: drawn from in the order of the arguments.

    Returns:
        uint8 [h, w, 3].
    """
    if flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if color_jitter:
        image = jitter_colors(rng, image, strength=color_jitter)
    if random_erasing and rng.random() < random_erasing:
        image = erase_rectangle(rng, image)
    return image


def random_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Part:
    """A rectangle of random area and aspect: torchvision's RandomResizedCrop.

    The area is uniform in ``scale`` times the image's, width / height is log-uniform in ``ratio``
    and the place is uniform. When ten such rectangles do not fit, it is the greatest in the centre
    whose aspect lies in ``ratio``.

    Returns:
        top, left, height and width in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    # At least one pixel: for a sliver, rounding could give none.
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear; an image of more than four pixels for one is first halved by the mean of 2 x 2.

    Bilinear interpolation reads four pixels for one, so beyond that it would skip some (aliasing).
    Halving takes about a fifth of the time of OpenCV's INTER_AREA at other ratios, which costs more
    than decoding (benchmarks/decode.py). It leaves out a last odd row or column. Training and
    evaluation share this rule: features of differently resized images match less well.

    Args:
        image: uint8 [h, w, 3] or [h, w].
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        uint8 [height, width, 3] or [height, width].
    """
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    if rows * columns > height * width:
        halved = cv2.resize(
            image[: 2 * rows, : 2 * columns], (columns, rows), interpolation=cv2.INTER_AREA
        )
        return resize(halved, height, width)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def center_crop(image: np.ndarray, *, image_size: int, crop_fraction: float) -> np.ndarray:
    """Resize the short side to ``round(image_size / crop_fraction)``; cut out the centre.

    Args:
        image: uint8 [h, w, 3] or [h, w].
        image_size: side of the result, in pixels.
        crop_fraction: side of the result / short side of the resized image, in (0, 1].

    Returns:
        uint8 [image_size, image_size, 3] or [image_size, image_size].

    Example:
        >>> center_crop(np.zeros((40, 30, 3), np.uint8), image_size=14, crop_fraction=0.875).shape
        (14, 14, 3)
    """
    image = resize(image, *_fit(*image.shape[:2], short=round(image_size / crop_fraction)))
    return _centre(image, image_size)


def _fit(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width of an image resized so that its short side is ``short``."""
    scale = short / min(height, width)
    return round(height * scale), round(width * scale)


def _centre(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    return _cut(image, (height - side) // 2, (width - side) // 2, side, side)


def _cut(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return image[top : top + height, left : left + width]


def jitter_colors(rng: np.random.Generator, image: np.ndarray, *, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation by random factors, in random order.

    Each factor f is uniform in [max(0, 1 - strength), 1 + strength] and blends f x + (1 - f) y,
    where y is 0 for brightness, the image's mean grey for contrast and the pixel's grey for
    saturation (torchvision's ColorJitter without hue; grey is 0.299 R + 0.587 G + 0.114 B).
    Every step rounds to uint8.

    Args:
        rng: draws the order, then a factor a step.
        image: uint8 [h, w, 3].
        strength: at least 0.

    Returns:
        uint8 [h, w, 3].
    """
    for step in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if step == 2:
            grey = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
            image = cv2.addWeighted(image, factor, grey, 1 - factor, 0)
        else:
            other = (0, grey.mean())[step]
            table = np.rint(factor * np.arange(256) + (1 - factor) * other)
            image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
    return image


def erase_rectangle(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Replace a rectangle by uniform noise (Zhong et al., "Random Erasing", 2020).

    Its area is 2 to 33 % of the image's and its height / width log-uniform in [0.3, 3.3], as in
    torchvision. The image comes back unchanged when ten such rectangles do not fit.

    Args:
        rng: draws the rectangle, then the noise.
        image: uint8 [h, w, 3].

    Returns:
        uint8 [h, w, 3].
    """
    height, width, channels = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            image = image.copy()
            noise = rng.integers(256, size=(tall, wide, channels), dtype=np.uint8)
            image[top : top + tall, left : left + wide] = noise
            break
    return image


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
        rng = np.random.default_rng((seed, _AUGMENTATION, step, row))
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


def _read_resized(dataset: RetrievalDataset, index: int, **geometry: Callable) -> np.ndarray:
    name = f"{dataset.id[index]} of {dataset.name}"
    return decode_resized(dataset.encoded(index), name=name, **geometry)


def _whole_or_box(
    dataset: RetrievalDataset, index: int, crop_to_box: bool
) -> Callable[[int, int], Part]:
    """Height and width of an image -> all of it, or what lies in its box, rounded outwards."""

    def part(height: int, width: int) -> Part:
        if not crop_to_box:
            return 0, 0, height, width
        box = dataset.bbox[index]  # pyright: ignore[reportOptionalSubscript] (checked at the call)
        left, top = np.floor(np.clip(box[:2], 0, (width, height)))
        right, bottom = np.ceil(np.clip(box[2:], 0, (width, height)))
        if not (left < right and top < bottom):  # NaN is refused too
            raise InputError(
                f"{dataset.id[index]} of {dataset.name}: the box {box.tolist()} (x1, y1, x2, y2) "
                f"holds no pixel of an image of {width} x {height}; correct it or set "
                "crop_to_box=False"
            )
        return int(top), int(left), int(bottom - top), int(right - left)

    return part


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
    with contextlib.closing(iterator):
        for batch in iterator:
            # Workers deliver in shared memory, of which containers often have little. A copy frees
            # it at once, however long the batch is kept.
            yield {name: np.array(array) for name, array in batch.items()} if workers else batch


def _init_worker(worker: int, workers: int) -> None:
    del worker, workers
    cv2.setNumThreads(1)  # the workers themselves fill the cores


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
            f"classes_per_batch={classes_per_batch}; lower it or choose another split"
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
            f"match: {names}; remove them, add images, or leave them out with skip_singletons=True"
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
