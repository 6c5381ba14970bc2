"""The sampler against a literal deck of cards, pixels against float64 loops, batches end to end."""

import collections
import contextlib
import functools
import io
import itertools
import logging
import math
import signal
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from shrinking import area_means, smooth

from cbam_jax import InputError, data
from cbam_jax.data import images as data_images
from cbam_jax.data import pipeline, sampling
from cbam_jax.datasets import RetrievalDataset, decode_image


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def make_dataset(label, images, **columns):
    label = np.asarray(label, np.int32)
    everyone = np.ones(len(label), bool)
    fields = {
        "name": "toy",
        "split": "train",
        "label": label,
        "label_names": tuple(f"label{i}" for i in range(int(label.max(initial=-1)) + 1)),
        "id": np.array([f"images/{i}.png" for i in range(len(label))]),
        "is_query": everyone,
        "is_gallery": everyone,
        "item": None,
        "series": None,
        "bbox": None,
        "images": images,
    }
    return RetrievalDataset(**(fields | columns))


@pytest.fixture
def dataset(rng):
    """47 random images of unequal sizes, in classes of 2 to 13 images whose labels have a gap."""
    label = rng.permutation(np.repeat([0, 1, 2, 4, 5, 6], [2, 13, 9, 11, 5, 7]))
    sizes = rng.integers(20, 40, size=(len(label), 2))
    return make_dataset(label, [png(rng.integers(256, size=(*s, 3), dtype="u1")) for s in sizes])


OPTIONS = {
    "seed": 3,
    "classes_per_batch": 4,
    "images_per_class": 4,
    "image_size": 16,
    "color_jitter": 0.4,
    "random_erasing": 0.5,
}


def take(dataset, num_steps, **options):
    return list(data.train_batches(dataset, num_steps=num_steps, **(OPTIONS | options)))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


# The sampler.


def literal_hands(key, size, hand, turns):
    """Deals by hand: takes cards off a pile, puts those that the hand holds back on its top."""
    numbers = itertools.count()
    pile = collections.deque()
    for _ in range(turns):
        held, back = [], []
        while len(held) < hand % size:
            if not pile:
                pile.extend(np.random.default_rng((*key, next(numbers))).permutation(size))
            card = int(pile.popleft())
            (back if card in held else held).append(card)
        pile.extendleft(reversed(back))
        yield list(range(size)) * (hand // size) + held


@pytest.mark.parametrize(
    ("size", "hand"),
    [(7, 3), (7, 4), (7, 6), (8, 6), (8, 4), (5, 5), (9, 6), (100, 16), (23, 12), (3, 4), (2, 7)],
)
def test_deal_is_a_literal_deck(size, hand):
    for turn, expected in enumerate(literal_hands((5, 1), size, hand, turns=60)):
        dealt = data.deal((5, 1), size=size, hand=hand, turn=turn)
        assert dealt.tolist() == expected, turn


@pytest.mark.parametrize(("size", "hand"), [(7, 3), (10, 9), (31, 8), (6, 6), (3, 7)])
def test_deal_gives_every_card_before_it_repeats_one(size, hand):
    counts = np.zeros(size, int)
    for turn in range(200):
        dealt = np.bincount(data.deal((2,), size=size, hand=hand, turn=turn), minlength=size)
        assert dealt.max() <= math.ceil(hand / size)
        counts += dealt
        assert counts.sum() == (turn + 1) * hand
        assert counts.max() - counts.min() <= 1


def test_a_far_turn_costs_as_much_as_the_first(monkeypatch):
    shuffles = []
    shuffle = sampling._shuffle
    monkeypatch.setattr(sampling, "_shuffle", lambda *a: (shuffles.append(a), shuffle(*a))[1])
    for turn in (3, 10**12):
        data.deal((2,), size=1000, hand=64, turn=turn)
    assert len(shuffles) <= 6


def test_batches_are_balanced_and_cover_every_class(dataset):
    images = data.images_by_class(dataset.label)
    seen = np.zeros(len(dataset), int)
    for step in range(300):
        index = data.class_balanced_indices(
            images, seed=1, classes_per_batch=4, images_per_class=4, step=step
        )
        labels = dataset.label[index].reshape(4, 4)
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0])) == 4
        for rows in index.reshape(4, 4):
            # A class of two images shows each twice; all others show four different images.
            assert len(set(rows)) == min(4, (dataset.label == dataset.label[rows[0]]).sum())
        np.add.at(seen, index, 1)
        by_class = [seen[rows] for rows in images]
        assert all(counts.max() - counts.min() <= 1 for counts in by_class)
        visits = [counts.sum() for counts in by_class]
        assert max(visits) - min(visits) in (0, 4)


def test_seed_and_order_of_draws(dataset):
    images = data.images_by_class(dataset.label)
    draw = {"classes_per_batch": 4, "images_per_class": 4}
    first, other = (
        np.stack([data.class_balanced_indices(images, seed=s, step=t, **draw) for t in range(40)])
        for s in (0, 1)
    )
    assert (first != other).mean() > 0.5
    # Each pass is shuffled anew: a class of 13 is not walked in one order again and again.
    walk = [i for i in first.ravel() if dataset.label[i] == 1]
    assert walk[:13] != walk[13:26]
    assert sorted(walk[:13]) == sorted(walk[13:26])
    # Classes of one size are shuffled independently.
    pair = [np.arange(40), np.arange(40)]
    rows = data.class_balanced_indices(
        pair, seed=1, classes_per_batch=2, images_per_class=39, step=0
    )
    assert (rows[:39] != rows[39:]).any()


# Training batches.


def test_a_batch_is_augmented_images_of_the_index(dataset):
    (batch,) = take(
        dataset, 1, crop_scale=(1, 1), crop_ratio=(1, 1), color_jitter=0.0, random_erasing=0.0
    )
    assert batch["image"].shape == (16, 16, 16, 3)
    assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == ("u1", "i4", "i8")
    np.testing.assert_array_equal(batch["label"], dataset.label[batch["index"]])
    mirrored = 0
    for image, index in zip(batch["image"], batch["index"], strict=True):
        source = dataset.image(index)
        side = min(source.shape[:2])
        top, left = (source.shape[0] - side) // 2, (source.shape[1] - side) // 2
        expected = bilinear(source[top : top + side, left : left + side], 16, 16)
        if source.shape[0] != source.shape[1] and side <= 32:
            plain = np.abs(image - expected).max() <= 1
            mirrored += not plain
            assert plain or np.abs(image[:, ::-1] - expected).max() <= 1
    assert 0 < mirrored < 16


def test_the_seed_decides_everything(dataset):
    batches = take(dataset, 3)
    assert_same(batches, take(dataset, 3))
    others = take(dataset, 3, seed=4)
    assert all((a["index"] != b["index"]).any() for a, b in zip(batches, others, strict=True))


def test_augmentation_differs_by_step_and_row(rng):
    image = png(rng.integers(256, size=(30, 40, 3), dtype="u1"))
    batches = take(make_dataset(np.repeat(range(4), 4), [image] * 16), 3)
    images = np.concatenate([batch["image"] for batch in batches])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.slow
def test_worker_processes_change_no_pixel(dataset):
    assert_same(take(dataset, 5, workers=2), take(dataset, 5))


def test_without_grain_the_batches_are_the_same(dataset, monkeypatch):
    batches = take(dataset, 3)
    monkeypatch.setitem(sys.modules, "grain", None)
    assert_same(take(dataset, 3), batches)
    with pytest.raises(InputError, match="workers=2 needs grain: pip install grain, or set"):
        take(dataset, 3, workers=2)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_shards_of_processes_concatenate_to_the_batch(dataset, process_count):
    shards = [
        take(dataset, 3, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, take(dataset, 3))


class Recorded(list):
    """Images, and the rows of those that were read."""

    def __init__(self, images):
        super().__init__(images)
        self.rows = []

    def __getitem__(self, row):
        self.rows.append(int(row))
        return super().__getitem__(row)


def test_a_process_reads_its_own_images_alone(dataset):
    for kind in (take_steps := functools.partial(take, num_steps=3), take_all):
        read = []
        for process in range(4):
            images = Recorded(dataset.images)
            counted = make_dataset(dataset.label, images)
            batches = kind(counted, process_index=process, process_count=4)
            own = [batch["index"][batch.get("mask", slice(None))] for batch in batches]
            assert sorted(images.rows) == sorted(np.concatenate(own).tolist())  # By threads.
            read += images.rows
        assert len(read) == (3 * 16 if kind is take_steps else 47)
    assert sorted(read) == list(range(47))  # An evaluation reads each once, though 20 do not fit.


def take_all(dataset, **options):
    return list(data.eval_batches(dataset, image_size=14, batch_size=20, **options))


def test_resuming_is_a_slice(dataset):
    batches = take(dataset, 9)
    assert_same(batches[4:7], take(dataset, 3, start_step=4))
    assert take(dataset, 0, start_step=4) == []


def test_training_never_ends_and_can_be_closed(dataset):
    with contextlib.closing(data.train_batches(dataset, start_step=10**9, **OPTIONS)) as batches:
        assert len(list(itertools.islice(batches, 20))) == 20
    assert list(batches) == []


def test_crop_to_box(rng):
    image = rng.integers(256, size=(30, 40, 3), dtype="u1")
    boxes = np.array([[3.6, 5, 19.2, 21]] * 16, np.float32)
    boxes[1] = [-4, 20, 12, 99]
    images = [png(image)] * 16
    toy = make_dataset(np.repeat(range(4), 4), images, bbox=boxes)
    (batch,) = data.eval_batches(
        toy, image_size=16, batch_size=16, crop_fraction=1.0, crop_to_box=True
    )
    expected = data.center_crop(image[5:21, 3:20], image_size=16, crop_fraction=1.0)
    np.testing.assert_array_equal(batch["image"][0], expected)
    expected = data.center_crop(image[20:30, 0:12], image_size=16, crop_fraction=1.0)
    np.testing.assert_array_equal(batch["image"][1], expected)
    pixels = set(map(tuple, image[5:21, 3:20].reshape(-1, 3)))
    whole = {"crop_scale": (0.02, 0.02), "image_size": 2, "crop_ratio": (1, 1)}
    plain = {"color_jitter": 0.0, "random_erasing": 0.0}
    (batch,) = take(toy, 1, crop_to_box=True, **whole, **plain)
    inside = [set(map(tuple, picture.reshape(-1, 3))) <= pixels for picture in batch["image"]]
    assert sum(inside) >= 12  # all but those of images[1], whose box is another


def test_singletons_can_be_left_out(rng):
    images = [png(rng.integers(256, size=(8, 9, 3), dtype="u1"))] * 7
    toy = make_dataset([0, 1, 1, 2, 2, 3, 1], images)
    options = OPTIONS | {"classes_per_batch": 2, "images_per_class": 2, "num_steps": 9}
    with pytest.raises(InputError, match="2 labels with one image.*: label0, label3; .*skip_si"):
        data.train_batches(toy, **options)
    batches = list(data.train_batches(toy, skip_singletons=True, **options))
    drawn = collections.Counter(np.concatenate([batch["index"] for batch in batches]).tolist())
    assert drawn == {1: 6, 2: 6, 6: 6, 3: 9, 4: 9}
    with pytest.raises(InputError, match="has 2 classes, fewer than classes_per_batch=3"):
        data.train_batches(toy, skip_singletons=True, **options | {"classes_per_batch": 3})


@pytest.mark.parametrize("box", [[9, 5, 9, 20], [50, 5, 60, 20], [np.nan, 5, 60, 20]])
def test_a_box_without_pixels_names_its_image(box, rng):
    images = [png(rng.integers(256, size=(30, 40, 3), dtype="u1"))] * 2
    toy = make_dataset([0, 1], images, bbox=np.array([[0, 0, 4, 4], box], np.float32))
    with pytest.raises(InputError, match=r"images/1\.png of toy: the box .* holds no pixel"):
        list(data.eval_batches(toy, image_size=8, batch_size=2, crop_to_box=True))


# Evaluation batches.


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_delivers_every_image_once_and_masks_the_rest(dataset, process_count):
    parts = [
        list(
            data.eval_batches(
                dataset,
                image_size=14,
                batch_size=20,
                process_index=i,
                process_count=process_count,
            )
        )
        for i in range(process_count)
    ]
    assert [len(part) for part in parts] == [3] * process_count
    batches = [
        {name: np.concatenate([b[name] for b in group]) for name in group[0]}
        for group in zip(*parts, strict=True)
    ]
    assert [batch["mask"].sum() for batch in batches] == [20, 20, 7]
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert (whole["label"].dtype, whole["index"].dtype, whole["mask"].dtype) == ("i4", "i8", "?")
    np.testing.assert_array_equal(whole["index"][whole["mask"]], np.arange(47))
    np.testing.assert_array_equal(whole["label"][whole["mask"]], dataset.label)
    for name in ("image", "label", "index"):
        assert not whole[name][~whole["mask"]].any()
    for index in range(47):
        source = dataset.image(index)
        height, width = source.shape[:2]
        scale = 16 / min(height, width)  # 14 / 0.875
        resized = bilinear(source, round(height * scale), round(width * scale))
        top, left = (resized.shape[0] - 14) // 2, (resized.shape[1] - 14) // 2
        if max(height / resized.shape[0], width / resized.shape[1]) <= 2:
            expected = resized[top : top + 14, left : left + 14]
            assert np.abs(whole["image"][index] - expected).max() <= 1


@pytest.mark.slow
def test_evaluation_is_not_random_and_workers_change_nothing(dataset):
    options = {"image_size": 14, "batch_size": 32}
    once = list(data.eval_batches(dataset, **options))
    assert_same(once, list(data.eval_batches(dataset, **options)))
    assert_same(once, list(data.eval_batches(dataset, workers=3, **options)))


# Pixels.


def bilinear(image, height, width):
    """Half-pixel-centred bilinear interpolation with clamped borders, in float64 loops."""
    rows, columns = image.shape[:2]
    image = image.astype(np.float64)
    out = np.empty((height, width, 3))
    for i, j in np.ndindex(height, width):
        y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
        x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        upper = image[top, left] * (left + 1 - x) + image[top, right] * (x - left)
        lower = image[bottom, left] * (left + 1 - x) + image[bottom, right] * (x - left)
        out[i, j] = upper * (top + 1 - y) + lower * (y - top)
    return out


def halved(image):
    """The rounded means of 2 x 2 pixels; a last odd row or column is left out."""
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    blocks = image[: 2 * rows, : 2 * columns].astype(np.float64)
    return np.floor(blocks.reshape(rows, 2, columns, 2, 3).mean((1, 3)) + 0.5)


@pytest.mark.parametrize("size", [(40, 50), (13, 17), (10, 40), (30, 11)])
def test_resize_is_bilinear_up_to_twofold_shrinking(rng, size):
    image = rng.integers(256, size=(20, 22, 3), dtype="u1")
    resized = data.resize(image, *size)
    assert resized.dtype == np.uint8
    assert np.abs(resized - bilinear(image, *size)).max() <= 1


@pytest.mark.parametrize(
    ("size", "halvings"),
    [((22, 25), 0), ((21, 25), 1), ((12, 40), 1), ((12, 16), 1), ((11, 11), 2), ((3, 5), 3)],
)
def test_resize_halves_first_when_shrinking_more(rng, size, halvings):
    image = rng.integers(256, size=(45, 51, 3), dtype="u1")
    expected = image
    for _ in range(halvings):
        expected = halved(expected)
    assert np.abs(data.resize(image, *size) - bilinear(expected, *size)).max() <= 1


# Decoding at reduced scale.


def jpeg(image, orientation=1):
    """JPEG without loss of colour, stored so that turning by ``orientation`` gives ``image``."""
    undo = {1: image, 3: image[::-1, ::-1], 6: np.rot90(image), 8: np.rot90(image, -1)}
    pillow, exif, file = Image.fromarray(undo[orientation]), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pillow.save(file, "JPEG", quality=98, subsampling=0, exif=exif)
    return file.getvalue()


@pytest.fixture
def reductions(monkeypatch):
    """The reductions that images were decoded at, in order."""
    seen = []

    def decode(encoded, *, name, reduction=1):
        seen.append(reduction)
        return decode_image(encoded, name=name, reduction=reduction)

    monkeypatch.setattr(data_images, "decode_image", decode)
    return seen


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("size", "reduction"), [((150, 140), 1), ((100, 74), 2), ((40, 61), 4), ((20, 27), 8)]
)
def test_a_part_decoded_at_reduced_scale_has_the_means_of_its_area(
    rng, reductions, orientation, size, reduction
):
    image = smooth(rng, 333, 417)
    part = (37, 101, 203, 210)
    asked = []

    def choose(height, width):
        asked.append((height, width))
        return part

    encoded = jpeg(image, orientation)
    resized = data.decode_resized(encoded, part=choose, size=lambda *_: size)
    assert asked == [(333, 417)]
    assert reductions == [reduction]
    top, left, height, width = part
    expected = area_means(image[top : top + height, left : left + width], *size)
    # Edges are off by half a pixel of the reduced image at most, and neighbours in the image differ
    # by 1.5 grey levels at most along each side.
    assert np.abs(resized - expected).max() <= 3 + 1.5 * (reduction if reduction > 1 else 0)


@pytest.mark.parametrize("kind", ["png", "damaged header"])
def test_what_has_no_jpeg_header_is_decoded_whole(rng, reductions, monkeypatch, kind):
    image = smooth(rng, 120, 160)
    encoded = png(image) if kind == "png" else jpeg(image)
    if kind == "damaged header":  # What OpenCV makes of it counts.
        monkeypatch.setattr(data_images, "jpeg_size", lambda encoded: (160, 120))
    part = lambda height, width: (0, 0, height, width)  # noqa: E731
    resized = data.decode_resized(encoded, part=part, size=lambda h, w: (h // 8, w // 8))
    assert resized.shape == (15, 20, 3)
    assert reductions[-1] == 1
    assert np.abs(resized - area_means(image, 15, 20)).max() <= 3


def test_training_and_evaluation_read_reduced_jpegs_in_their_boxes(rng, reductions):
    image = smooth(rng, 301, 403)
    boxes = np.array([[41, 22, 345, 290]] * 16, np.float32)
    toy = make_dataset(np.repeat(range(4), 4), [jpeg(image)] * 16, bbox=boxes)
    (batch,) = data.eval_batches(toy, image_size=32, batch_size=16, crop_to_box=True)
    assert set(reductions) == {4}
    cut = image[22:290, 41:345]
    expected = area_means(cut, 37, 42)[2:34, 5:37]  # short side 32 / 0.875
    assert np.abs(batch["image"] - expected).max() <= 9
    reductions.clear()
    whole = {"crop_scale": (1, 1), "crop_ratio": (1.1, 1.2), "flip": False}
    plain = {"color_jitter": 0.0, "random_erasing": 0.0, "crop_to_box": True, "image_size": 32}
    (batch,) = take(toy, 1, **whole, **plain)
    assert set(reductions) == {8}
    assert np.abs(batch["image"] - area_means(cut, 32, 32)).max() <= 14
    assert_same([batch], take(toy, 1, **whole, **plain))


@pytest.mark.parametrize("size", [(9, 400), (400, 9), (17, 33), (8, 8), (100, 101)])
def test_odd_sizes_and_slivers_are_read(rng, size):
    toy = make_dataset([0] * 4, [jpeg(smooth(rng, *size))] * 4)
    for side in (1, 2, 5):
        (batch,) = data.eval_batches(toy, image_size=side, batch_size=4)
        assert batch["image"].shape == (4, side, side, 3)
    crop = {"crop_scale": (0.01, 1.0), "crop_ratio": (0.1, 10.0), "crop_to_box": False}
    rest = {"flip": True, "color_jitter": 0.0, "random_erasing": 0.0}
    for seed in range(50):
        image = data.train_image(toy, 0, np.random.default_rng(seed), image_size=2, **crop, **rest)
        assert image.shape == (2, 2, 3)


def reference_crop(draws, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, written out with the numbers it draws."""
    for _ in range(10):
        area = draws.uniform(*scale) * height * width
        aspect = np.exp(draws.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draws.integers(0, height - h + 1), draws.integers(0, width - w + 1), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(300, 400), (40, 30), (300, 20), (10, 170)])
def test_random_crop(size):
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    areas = []
    for seed in range(300):
        crop = data.random_crop(np.random.default_rng(seed), *size, scale=scale, ratio=ratio)
        draws = np.random.default_rng(seed)
        assert crop == reference_crop(draws, *size, scale, ratio)
        top, left, height, width = crop
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        areas.append(height * width / (size[0] * size[1]))
    if size == (300, 400):
        assert min(areas) < 0.23
        assert max(areas) > 0.9


def test_jitter_is_the_formula(rng):
    image = rng.integers(256, size=(9, 7, 3), dtype="u1")
    orders = set()
    for seed in range(40):
        draws = np.random.default_rng(seed)
        expected = image.astype(np.float64)
        order = draws.permutation(3)
        orders.add(tuple(order))
        for step in order:
            factor = draws.uniform(0.6, 1.4)
            grey = expected @ [0.299, 0.587, 0.114]
            other = [0, grey.mean(), grey[..., None]][step]
            expected = np.clip(factor * expected + (1 - factor) * other, 0, 255)
        jittered = data.jitter_colors(np.random.default_rng(seed), image, strength=0.4)
        assert jittered.dtype == np.uint8
        # Each of the three steps rounds, and the next multiplies that by up to 1.4.
        assert np.abs(jittered - expected).max() <= 3
        assert np.abs(jittered - expected).mean() <= 0.75
        assert np.abs(jittered - image.astype(np.float64)).max() > 3
    assert len(orders) == 6


def test_a_strength_above_one_never_inverts(rng):
    image = rng.integers(256, size=(9, 7, 3), dtype="u1")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).ravel().astype(float)
    for seed in range(30):
        jittered = data.jitter_colors(np.random.default_rng(seed), image, strength=1.5)
        after = cv2.cvtColor(jittered, cv2.COLOR_RGB2GRAY).ravel().astype(float)
        assert np.cov(grey, after)[0, 1] > -1e-9


def test_erased_rectangle():
    image = np.full((40, 60, 3), 77, np.uint8)
    fractions, aspects, noise = [], [], []
    for seed in range(300):
        erased = data.erase_rectangle(np.random.default_rng(seed), image)
        changed = (erased != image).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        # One full rectangle (a pixel of noise equals the image's once in 256 ** 3).
        assert changed.sum() == height * width
        fractions.append(height * width / 2400)
        aspects.append(height / width)
        noise.append(erased[changed].ravel())
    assert (image == 77).all()
    assert 0.015 <= min(fractions) < 0.05
    assert 0.29 < max(fractions) <= 0.34
    assert 0.25 < min(aspects) < 0.45
    assert 2.2 < max(aspects) < 4
    counts = np.bincount(np.concatenate(noise), minlength=256)
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


@pytest.mark.parametrize(("option", "low", "high"), [("flip", 70, 130), ("random_erasing", 35, 85)])
def test_augment_flips_half_and_erases_by_its_probability(rng, option, low, high):
    image = rng.integers(256, size=(12, 12, 3), dtype="u1")
    options = {"flip": option == "flip", "color_jitter": 0.0}
    options |= {"random_erasing": 0.3 if option == "random_erasing" else 0.0}
    results = [data.augment(image, np.random.default_rng(s), **options) for s in range(200)]
    changed = [result for result in results if (result != image).any()]
    assert low < len(changed) < high
    if option == "flip":
        assert all((result == image[:, ::-1]).all() for result in changed)


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes_per_batch": 7},
            "classes_per_batch=7; set --config.data.classes_per_batch=6",
        ),
        ({"classes_per_batch": 1}, "classes_per_batch=1: give at least 2"),
        ({"images_per_class": 1}, "images_per_class=1: give at least 2"),
        (
            {"process_count": 3},
            "4 classes x 4 images = 16 cannot be divided among 3 processes; change",
        ),
        ({"process_index": 2, "process_count": 2}, "process_index=2 of process_count=2: give"),
        ({"process_count": 0}, "process_index=0 of process_count=0: give"),
        ({"image_size": 0}, "image_size=0: give a positive number"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale=(0.0, 1.0): give two fractions"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale=(0.5, 1.2): give two fractions"),
        ({"crop_scale": (0.5,)}, "crop_scale=(0.5,): give two fractions"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio=(2.0, 1.0): give two numbers"),
        ({"color_jitter": -0.1}, "color_jitter=-0.1: give a strength"),
        ({"random_erasing": 1.5}, "random_erasing=1.5: give a probability"),
        ({"crop_to_box": True}, "crop_to_box=True: toy, split 'train', has no boxes; set"),
        ({"workers": -1}, "workers=-1: give 0"),
        ({"seed": -1}, "seed=-1: give an integer"),
        ({"start_step": -1}, "start_step=-1: give a step"),
        ({"num_steps": -1}, "num_steps=-1: give a number"),
    ],
)
def test_mistakes_are_told_at_the_call(dataset, options, message):
    with pytest.raises(InputError) as error:
        data.train_batches(dataset, **(OPTIONS | options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": -2}, "image_size=-2: give a positive number"),
        ({"crop_fraction": 0.0}, "crop_fraction=0.0: give a fraction in (0, 1]"),
        ({"crop_fraction": 1.1}, "crop_fraction=1.1: give a fraction in (0, 1]"),
        ({"batch_size": 0}, "batch_size=0: give a positive multiple"),
        ({"batch_size": 15, "process_count": 2}, "batch_size=15: give a positive multiple of the"),
        ({"crop_to_box": True}, "has no boxes"),
        ({"workers": -1}, "workers=-1: give 0"),
    ],
)
def test_mistakes_of_evaluation_are_told_at_the_call(dataset, options, message):
    with pytest.raises(InputError) as error:
        data.eval_batches(dataset, **({"image_size": 16, "batch_size": 16} | options))
    assert message in str(error.value)


def test_workers_need_shared_memory(dataset, monkeypatch):
    usage = pipeline.shutil.disk_usage("/")._replace(free=2 * 5 * 16 * 16 * 16 * 3 - 1)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="workers=2 hold up to 0 MiB of batches in /dev/shm, whi"):
        take(dataset, 1, workers=2)
    take(dataset, 1, workers=0)
    with pytest.raises(InputError, match="workers=3 hold .*or set workers=0"):
        data.eval_batches(dataset, image_size=16, batch_size=16, workers=3)


def test_an_empty_dataset():
    empty = make_dataset([], [])
    with pytest.raises(InputError, match="toy, split 'train', has no images; choose another"):
        data.train_batches(empty, **OPTIONS)
    with pytest.raises(InputError, match="has no images"):
        data.eval_batches(empty, image_size=16, batch_size=4)


def test_labels_of_one_image_are_named():
    toy = make_dataset([0, 0, 3, 1, 1, 2, 2, 4, 4, 5], [b""] * 10)
    with pytest.raises(InputError, match="2 labels with one image.*: label3, label5; remove them"):
        data.train_batches(toy, **OPTIONS)
    many = make_dataset([*range(12), 12, 12], [b""] * 14)
    with pytest.raises(InputError, match=r"12 labels .*label8, label9, \.\.\.; remove"):
        data.train_batches(many, **OPTIONS)


def test_small_classes_are_logged(dataset, caplog):
    with caplog.at_level(logging.INFO, logger="cbam_jax.data"):
        data.train_batches(dataset, **OPTIONS)
    assert "has 1 labels with fewer than images_per_class=4 images" in caplog.text


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_named(dataset, workers):
    images = list(dataset.images)
    images[33] = images[33][:100]
    broken = make_dataset(dataset.label, images)
    batches = data.eval_batches(broken, image_size=16, batch_size=10, workers=workers)
    with pytest.raises(InputError) as error:
        list(batches)
    assert "images/33.png of toy cannot be decoded" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loading_process_that_was_killed_is_one_line():
    message = "exit code -9.*want of memory: set --config.data.workers=1, or 0 for threads"
    killed = RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
    with pytest.raises(InputError, match=message), pipeline._worker_ends_told(2):
        raise killed
    with pytest.raises(RuntimeError, match="ours"), pipeline._worker_ends_told(2):
        raise RuntimeError("ours")


def test_a_terminals_signals_are_the_trainings_to_answer(monkeypatch):
    ignored = []
    monkeypatch.setattr(cv2, "setNumThreads", lambda count: None)
    monkeypatch.setattr(pipeline.signal, "signal", lambda *pair: ignored.append(pair))
    pipeline._init_worker(0, 2)
    names = {number.name for number, handler in ignored if handler == signal.SIG_IGN}
    # SIGTERM is what ends a worker.
    assert names == {"SIGINT", "SIGHUP", "SIGUSR1"}
