"""DeepFashion's builders and ``verify`` on tiny copies; the paper's draw on 289,225 rows."""

import collections
import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import cv2
import deepfashion_copies as copies
import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from cbam_jax import InputError, data, experiment
from cbam_jax.configs import default
from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import open_dataset
from cbam_jax.datasets.deepfashion import (
    BENCHMARKS,
    SPLITS,
    DeepfashionCategory,
    builders,
    draw_paper_splits,
)
from cbam_jax.datasets.deepfashion.images import to_pixels
from cbam_jax.datasets.deepfashion.layout import find_layout
from cbam_jax.datasets.deepfashion.lists import READERS, read_attributes
from cbam_jax.datasets.deepfashion.paper import SIZES, apportion, manifest_text

INSHOP, CONSUMER, CATEGORY = (
    "deepfashion_inshop",
    "deepfashion_consumer2shop",
    "deepfashion_category",
)
TITLES = dict(zip((INSHOP, CONSUMER, CATEGORY), copies.WRITERS, strict=True))
PARTITION, BOXES = "Eval/list_eval_partition.txt", "Anno/list_bbox_inshop.txt"
# What verify compares the copies with here.
COUNTS = {
    INSHOP: {
        "images": 16, "items": 8, "train images": 8, "query images": 4, "gallery images": 4,
        "train items": 4, "test items": 4,
    },
    CONSUMER: {"images": 11, "items": 4, "pairs": 8},
    CATEGORY: {
        "images": 12, "categories": 3, "train images": 6, "val images": 3, "test images": 3,
        "attributes": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """All three copies beside each other, as they come; not to be written to."""
    folder = tmp_path_factory.mktemp("DeepFashion")
    for title, write in copies.WRITERS.items():
        write(folder / title)
    return folder


@pytest.fixture(scope="module")
def opened(pristine, tmp_path_factory):
    """open_dataset of the pristine copies; each is prepared once."""
    data_dir = tmp_path_factory.mktemp("tfds")
    return functools.partial(open_dataset, data_dir=data_dir, manual_dir=pristine)


@pytest.fixture
def copy(pristine, tmp_path):
    """Makes a copy of one benchmark that a test may spoil."""

    def make(name, folder="copy"):
        return Path(shutil.copytree(pristine / TITLES[name], tmp_path / folder))

    return make


@pytest.fixture
def published(monkeypatch):
    for name, counts in COUNTS.items():
        benchmark = BENCHMARKS[name]._replace(published=counts)
        monkeypatch.setitem(BENCHMARKS, name, benchmark)


def names(dataset, rows=None):
    rows = np.arange(len(dataset)) if rows is None else np.flatnonzero(rows)
    return sorted(str(dataset.id[row]).removeprefix("img/") for row in rows)


def read(layout):
    return READERS[layout.benchmark](layout)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# The datasets.


def test_inshop(opened, pristine):
    training, validation, test = (opened(INSHOP, s) for s in ("train", "validation", "test"))
    # One item of the four is the validation split; the rest is the official partition.
    rows = {status: [] for status in ("train", "query", "gallery")}
    for name, status, _ in copies.INSHOP_ROWS:
        rows[status].append(name)
    assert sorted(names(training) + names(validation)) == sorted(rows["train"])
    assert len({name.split("/")[2] for name in names(validation)}) == 1
    assert not set(training.item) & set(validation.item)
    assert names(test, test.is_query) == sorted(rows["query"])
    assert names(test, test.is_gallery) == sorted(rows["gallery"])
    assert training.is_query.all()
    assert training.is_gallery.all()
    expected = ("MEN/Denim", "MEN/Tees_Tanks", "WOMEN/Denim", "WOMEN/Dresses")
    for dataset in (training, validation, test):
        assert dataset.label_names == expected
        for row, name in enumerate(str(name).removeprefix("img/") for name in dataset.id):
            category, item, file = name.rsplit("/", 2)
            assert expected[dataset.label[row]] == category
            assert dataset.item[row] == int(item[3:])
            assert dataset.series[row] == 100 * int(item[3:]) + int(file[:2])
            path = pristine / TITLES[INSHOP] / "Img" / "img" / name
            assert dataset.encoded(row) == path.read_bytes()  # byte for byte
    assert len(opened(INSHOP, "train+validation")) == len(rows["train"])
    # Once it is prepared, the copy is not needed.
    assert opened(INSHOP, "test", manual_dir=None).id.tolist() == test.id.tolist()


def test_inshop_by_item_trains_without_the_item_of_one_image(opened):
    config = default.get_config()
    config.data.update(image_size=16, classes_per_batch=2, images_per_class=2, label="item_id")
    training = opened(INSHOP, "train", label="item_id")
    assert [int(training.label_names[label]) for label in training.label] == training.item.tolist()
    singles = np.flatnonzero(np.bincount(training.label) == 1)
    assert [training.label_names[label] for label in singles] == ["3"]
    with pytest.raises(InputError, match="1 labels with one image.*: 3; .*skip_singletons=True"):
        experiment.train_batches(config, training, step=0)
    config.data.skip_singletons = True
    config.train.steps = 6
    rows = np.concatenate(
        [batch["index"] for batch in experiment.train_batches(config, training, 0)]
    )
    assert set(rows) == set(np.flatnonzero(training.label != singles[0]))


def test_consumer2shop_takes_pairs_apart(opened):
    rows = {split: set() for split in ("train", "val", "test")}
    for folder, consumer, shop, status in copies.PAIRS:
        rows[status] |= {(f"{folder}/{consumer}.jpg", 2), (f"{folder}/{shop}.jpg", 1)}
    assert [len(found) for found in rows.values()] == [5, 3, 3]
    gallery = sorted(name for name, source in rows["val"] | rows["test"] if source == 1)
    for split, status in (("train", "train"), ("validation", "val"), ("test", "test")):
        dataset = opened(CONSUMER, split)
        queries = sorted(name for name, source in rows[status] if source == 2)
        assert names(dataset, dataset.is_query) == queries
        assert all("/comsumer_" in name for name in queries)
        shops = sorted(name for name, source in rows["train"] if source == 1)
        assert names(dataset, dataset.is_gallery) == (shops if split == "train" else gallery)
        assert not (dataset.is_query & dataset.is_gallery).any()
        assert dataset.label_names == ("DRESSES/Dress", "TOPS/T_Shirt", "TROUSERS/Jeans")
        # Every pair is a query and a relevant image, by item.
        place = {str(name): row for row, name in enumerate(dataset.id)}
        for folder, consumer, shop, of in copies.PAIRS:
            if of == status:
                query = place[f"img/{folder}/{consumer}.jpg"]
                found = place[f"img/{folder}/{shop}.jpg"]
                assert dataset.item[query] == dataset.item[found] == int(folder[-8:])
                assert dataset.series[query] != dataset.series[found]


def test_category_and_attributes(opened, pristine):
    datasets = {split: opened(CATEGORY, split) for split in SPLITS}
    assert {split: len(dataset) for split, dataset in datasets.items()} == {
        "train": 6, "validation": 3, "test": 3,
    }  # fmt: skip
    for dataset in datasets.values():
        assert dataset.label_names == ("Blouse", "Cape", "Jeans")
        folder = [str(name).split("/")[1] for name in dataset.id]
        assert [label + 1 for label in dataset.label] == [copies.FOLDERS[name] for name in folder]
        order = sorted(copies.FOLDERS)
        assert dataset.item.tolist() == [order.index(name) for name in folder]
        for row in range(len(dataset)):  # grey and CMYK files among them
            assert dataset.image(row).shape == (300, 200, 3)


def test_category_attributes_and_landmarks_of_tfds(opened, pristine):
    opened(CATEGORY, "train")
    builder = DeepfashionCategory(data_dir=opened.keywords["data_dir"])
    features = builder.info.features
    assert features["attributes"].feature.names == [
        "abstract chevron print", "cotton", "a-line", "cotton (3)",
    ]  # fmt: skip
    lists = pristine / TITLES[CATEGORY] / "Anno_coarse"
    expected = {}
    for line in (lists / "list_attr_img.txt").read_text().splitlines()[2:]:
        name, *values = line.split()
        expected[name] = [i for i, value in enumerate(values) if value == "1"]
    marks = {}
    for line in (lists / "list_landmarks.txt").read_text().splitlines()[2:]:
        name, _, _, *values = line.split()
        triples = np.array(values, int).reshape(-1, 3)
        marks[name] = triples[:, [1, 2, 0]]
    found = list(builder.as_data_source("train"))
    assert len(found) == 6
    for record in found:
        name = record["id"].decode()
        assert list(record["attributes"]) == expected[name]
        np.testing.assert_array_equal(record["landmarks"], marks[name])
        assert len(record["landmarks"]) == (4 if "Jeans" in name else 6)  # ragged


def test_no_optional_lists(copy, tmp_path, capsys):
    root = copy(CATEGORY)
    for name in ("list_landmarks.txt", "list_attr_img.txt"):
        (root / "Anno_coarse" / name).unlink()
    dataset = open_dataset(CATEGORY, "test", data_dir=tmp_path / "tfds", manual_dir=root)
    assert len(dataset) == 3
    report = capsys.readouterr().err
    assert "no list_landmarks.txt: there are no landmarks" in report
    assert "no list_attr_img.txt: there are no attributes" in report
    builder = DeepfashionCategory(data_dir=tmp_path / "tfds")
    (record, *_) = builder.as_data_source("test")
    assert list(record["attributes"]) == []
    assert record["landmarks"].shape == (0, 3)


def test_spilling_to_disk_gives_the_same_records(opened, pristine, tmp_path, monkeypatch):
    """Beyond 1,000 MiB, which DeepFashion has, TFDS shuffles on disk."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    spilled = open_dataset(INSHOP, "test", data_dir=tmp_path, manual_dir=pristine)
    dataset = opened(INSHOP, "test")
    assert spilled.id.tolist() == dataset.id.tolist()
    assert [spilled.encoded(i) for i in range(8)] == [dataset.encoded(i) for i in range(8)]


# Boxes.


def crop(dataset, row, size=32):
    """One image inside its box, as evaluation sees it."""
    one = dataclasses.replace(
        dataset,
        **{field: getattr(dataset, field)[[row]] for field in ("label", "id", "bbox")},
        images=[dataset.encoded(row)],
    )
    (batch,) = data.eval_batches(
        one, image_size=size, batch_size=1, crop_fraction=1.0, crop_to_box=True
    )
    return batch["image"][0]


def inshop_rows(dataset):
    """(row, number of the image) of those whose box is right."""
    number = {f"img/{name}": i for i, (name, _, _) in enumerate(copies.INSHOP_ROWS)}
    return [
        (row, number[name]) for row, name in enumerate(dataset.id) if number[name] not in (1, 4)
    ]


@pytest.mark.parametrize("config", ["lowres", "highres"])
def test_inshop_boxes_hold_the_garment_in_both_resolutions(opened, config):
    for split in SPLITS:
        dataset = opened(f"{INSHOP}/{config}", split)
        for row, number in inshop_rows(dataset):
            garment = np.array(copies.inshop_box(number), np.float64)
            if config == "lowres":
                scale = 256 / 1101
                garment = garment * scale + np.tile([(256 - 750 * scale) / 2, 0], 2)
            shape = (256, 256, 3) if config == "lowres" else (1101, 750, 3)
            assert dataset.image(row).shape == shape
            # Boxes are rounded to a pixel of 256, which is 4.3 of 1101.
            atol = 1.0 if config == "lowres" else 1101 / 256 / 2 + 0.1
            np.testing.assert_allclose(dataset.bbox[row], garment, atol=atol)
            middle = crop(dataset, row)[4:-4, 4:-4].reshape(-1, 3).astype(int)
            assert np.abs(middle - copies.GARMENT).max() < 12  # nothing but the garment


def test_highres_without_its_lowres_twin_takes_256_for_granted(opened, copy, tmp_path):
    root = copy(INSHOP)
    shutil.rmtree(root / "Img" / "img")
    alone = open_dataset(f"{INSHOP}/highres", "test", data_dir=tmp_path, manual_dir=root)
    np.testing.assert_allclose(alone.bbox, opened(f"{INSHOP}/highres", "test").bbox, rtol=1e-6)


@pytest.mark.parametrize("twin", [True, False])
def test_highres_of_the_others_scales_by_the_ratio(copy, tmp_path, twin):
    root = copy(CONSUMER)
    for path in (root / "Img" / "img").rglob("*.jpg"):
        high = root / "Img" / "img_highres" / path.relative_to(root / "Img" / "img")
        high.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(high), cv2.resize(cv2.imread(str(path)), (601, 900)))
    if not twin:
        shutil.rmtree(root / "Img" / "img")
    boxes = read(find_layout(CONSUMER, root, highres=True)).boxes
    dataset = open_dataset(f"{CONSUMER}/highres", "train", data_dir=tmp_path, manual_dir=root)
    for row, name in enumerate(dataset.id):
        listed = np.array(boxes[str(name)])
        width = 601 / 200 if twin else 3.0  # without a twin, both sides are a third
        np.testing.assert_allclose(dataset.bbox[row], listed * [width, 3, width, 3], rtol=1e-6)


def test_boxes_are_clamped_and_an_empty_or_missing_one_is_the_image(copy, tmp_path, capsys):
    root = copy(INSHOP)
    lists = root / BOXES
    lines = lists.read_text().splitlines()
    del lines[2 + 5]
    lists.write_text("\n".join(["15", *lines[1:]]))
    boxes = {}
    for split in ("train", "validation"):
        dataset = open_dataset(INSHOP, split, data_dir=tmp_path / "tfds", manual_dir=root)
        boxes |= dict(zip(dataset.id.tolist(), dataset.bbox.tolist(), strict=True))
    name = [f"img/{row[0]}" for row in copies.INSHOP_ROWS]
    assert boxes[name[1]] == [0, 10, 256, 250]  # was -4, 10, 300, 250
    assert boxes[name[4]] == boxes[name[5]] == [0, 0, 256, 256]
    report = capsys.readouterr().err.splitlines()
    told = [line for line in report if "no box with pixels in it" in line]
    assert sum(int(line.split(": ")[1].split()[0]) for line in told) == 2


def test_to_pixels_undoes_the_padding(rng):
    """Against drawing: mark a pixel in high resolution, shrink and centre, look for it."""
    for size in ((750, 1101), (1101, 750), (800, 800)):
        for point in rng.uniform(0.1, 0.9, (5, 2)) * size:
            image = np.zeros((size[1], size[0], 3), np.uint8)
            cv2.circle(image, tuple(int(v) for v in point), 6, (255, 255, 255), -1)
            square = copies.padded(255 - image)[..., 0] < 128
            low = np.argwhere(square).mean(axis=0)[::-1] + 0.5
            back = to_pixels(low, (256, 256), size, padded=True)
            np.testing.assert_allclose(back, point, atol=1.5 * max(size) / 256)


# Layouts.


def move_to_flat(root):
    for name in ("Anno", "Anno_coarse", "Eval"):
        for path in (root / name).glob("*.txt"):
            path.rename(root / path.name)
    (root / "Img" / "img").rename(root / "img")
    (root / "Img").rename(root / "empty")


def old_names(root):
    (root / "Anno_coarse").rename(root / "Anno")
    shutil.rmtree(root / "Anno_fine")


@pytest.mark.parametrize("name", list(TITLES))
@pytest.mark.parametrize("change", [lambda root: None, move_to_flat], ids=["folders", "flat"])
def test_layouts_are_found_and_say_the_same(copy, pristine, name, change, tmp_path):
    root = copy(name, "a copy/with another name")
    change(root)
    expected = read(find_layout(name, pristine))
    for manual_dir in (root, root.parent, root.parent.parent):
        layout = find_layout(name, manual_dir)
        assert layout.root == root
        found = read(layout)
        assert found.photos == expected.photos
        assert found.boxes == expected.boxes
        assert found.problems == []
        assert all(layout.file(photo.path).is_file() for photo in found.photos)


def test_old_names_of_the_category_lists(copy, pristine):
    root = copy(CATEGORY)
    old_names(root)
    assert read(find_layout(CATEGORY, root)).photos == read(find_layout(CATEGORY, pristine)).photos


def pack(folder):
    shutil.rmtree(folder)
    Path(f"{folder}.zip").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (INSHOP, lambda root: shutil.rmtree(root / "Anno"),
         "expected list_bbox_inshop.txt in Anno/.*found Eval/, Img/"),
        (INSHOP, lambda root: (root / PARTITION).unlink(),
         "lacks list_eval_partition.txt: expected in Eval/.*found Anno/, Eval/, Img/"),
        (INSHOP, lambda root: pack(root / "Img" / "img"),
         "expected the folder Img/img or img, .*not unpacked: Img/img.zip"),
        (INSHOP, lambda root: (root / "Img" / "img").rename(root / "Img" / "images"),
         "has no images: expected .*found Anno/, Eval/, Img/"),
        (CATEGORY, lambda root: shutil.rmtree(root / "Anno_coarse"),
         "Anno_fine, which covers a part only"),
        (CATEGORY, lambda root: (root / "Anno_coarse" / "list_category_cloth.txt").unlink(),
         "lacks list_category_cloth.txt"),
    ],
)  # fmt: skip
def test_another_layout_is_told_before_anything_is_read(copy, tmp_path, name, change, message):
    root = copy(name)
    change(root)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(name, "train", data_dir=tmp_path / "tfds", manual_dir=root)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))


def test_other_mistakes_about_the_folder(pristine, copy, tmp_path):
    options = {"data_dir": tmp_path / "tfds"}
    with pytest.raises(
        InputError, match=r"is not downloaded: sign the agreement on https://.*manual_dir"
    ):
        open_dataset(INSHOP, "train", **options)
    with pytest.raises(InputError, match=r"it holds what deepfashion_inshop wants\); found Anno/"):
        open_dataset(CONSUMER, "train", manual_dir=pristine / TITLES[INSHOP], **options)
    with pytest.raises(
        InputError, match=r"img_highres, .*without highres the low resolution is used"
    ):
        open_dataset(f"{CATEGORY}/full_highres", "train", manual_dir=pristine, **options)
    copy(INSHOP, "one")
    copy(INSHOP, "two")
    with pytest.raises(
        InputError, match="more than once: give one of .*/one, .*/two as manual_dir"
    ):
        open_dataset(INSHOP, "train", manual_dir=tmp_path, **options)
    with pytest.raises(InputError, match=r"configs are \['highres', 'lowres'\]"):
        open_dataset(f"{INSHOP}/full", "train", manual_dir=pristine, **options)


# Mistakes in the lists and among the images.
LIST_MISTAKES = [
    (INSHOP, PARTITION, "16\n", "52712\n", "partition.txt announces 52712 rows and has 16"),
    (INSHOP, PARTITION, "16\n", "", "announces image_name item_id evaluation_status rows"),
    (INSHOP, PARTITION, " gallery", " galery", "has an unknown row: .*galery"),
    (INSHOP, PARTITION, "  id_00000002", "  00000002", "has an unknown row: .* 00000002 train"),
    (INSHOP, PARTITION, " train ", " ", "line 3 has 2 words, not 3"),
    (INSHOP, PARTITION, "/02_3_back.jpg ", "/02_1_front.jpg ", None),
    (INSHOP, PARTITION, "WOMEN/Dresses/id_00000005/01_2_side.jpg",
     "WOMEN/Dresses/id_00000005/01_1_front.jpg", "is listed twice, with different items or splits"),
    (INSHOP, BOXES, "  076  ", "  0x7  ", "has no whole numbers for img/WOMEN/.*0x7"),
    (INSHOP, "Anno/list_landmarks_inshop.txt", "  0 076 ", "  076 ",
     "breaks off in the landmarks of"),
    (INSHOP, "Anno/list_item_inshop.txt", "8\nid_00000001", "7\n",
     "lacks id_00000001, which the partition"),
    (CONSUMER, PARTITION, " val ", " valid ", "has an unknown row: .*TROUSERS/Jeans"),
    (CONSUMER, PARTITION, "img/DRESSES/Dress/id_00000004/shop_01.jpg",
     "img/TROUSERS/Jeans/id_00000003/shop_01.jpg", "shop_01.jpg is listed twice, with different"),
    (CATEGORY, "Anno_coarse/list_category_img.txt", "   3  ", "   4  ", "unknown category 4|words"),
    (CATEGORY, "Anno_coarse/list_attr_img.txt", "   1  ", "      ", "has 3 attributes for"),
    (CATEGORY, PARTITION, "img_00000003.jpg", "img_00000009.jpg", "unknown row or no category"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), LIST_MISTAKES)
def test_mistakes_in_lists(copy, name, file, old, new, message):
    root = copy(name)
    edit(root / file, old, new)
    layout = find_layout(name, root)
    problems = read(layout).problems
    if name == CATEGORY:
        read_attributes(layout, problems)
    if message is None:  # a row that is there twice is one photo
        assert problems == []
    else:
        assert len(problems) >= 1
        assert any(re.search(message, problem) for problem in problems), problems


def test_mistakes_in_lists_stop_the_preparation(copy, tmp_path):
    root = copy(INSHOP)
    edit(root / PARTITION, "16\n", "52712\n")
    with pytest.raises(
        InputError, match="1 mistakes in the lists of .*52712.* verify deepfashion_in"
    ):
        open_dataset(INSHOP, "train", data_dir=tmp_path / "tfds", manual_dir=root)


def test_bad_images_fail_or_are_skipped(copy, tmp_path, capsys):
    root = copy(INSHOP)
    images = root / "Img" / "img"
    cut, gone = (images / copies.INSHOP_ROWS[i][0] for i in (0, 9))
    cut.write_bytes(cut.read_bytes()[:-500])
    gone.unlink()
    options = {"data_dir": tmp_path / "tfds", "manual_dir": root}
    told = "2 of 16 images in .* 02_1_front.jpg cannot be decoded; .*01_2_side.jpg is missing: "
    with pytest.raises(
        InputError, match=told.replace(" 02_1", " img/.*02_1") + ".*on_bad_image='skip'"
    ):
        open_dataset(INSHOP, "test", **options)
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))
    test = open_dataset(INSHOP, "test", on_bad_image="skip", **options)
    assert f"img/{copies.INSHOP_ROWS[9][0]}" not in test.id
    assert len(test) == 7
    assert "skipped: 2 of 16" in capsys.readouterr().err
    (listed,) = (tmp_path / "tfds").rglob("skipped_images.txt")
    assert len(listed.read_text().splitlines()) == 2
    with pytest.raises(InputError, match="is not complete"):
        open_dataset(INSHOP, "test", **options)


# The paper's splits.

OFFICIAL = {"train": 209_222, "validation": 40_000, "test": 40_000}


@functools.cache
def official_like_rows():
    """289,225 images of 46 categories with a long tail, in folders of 1 to 100, split by image.

    Folders are mixed: one image in 37 has another category than the rest of its folder.
    Arithmetic modulo a prime stands for chance, so that every machine has the same rows.
    """
    weights = [1 / (c + 1) ** 1.3 for c in range(46)]
    rows, state = [], 1
    for category in range(46):
        wanted = round(289_222 * weights[category] / sum(weights))
        folder = 0
        while wanted > 0:
            state = state * 48_271 % 2_147_483_647
            size = min(wanted, 1 + state % 100)
            for image in range(size):
                rows.append((f"img/Item_{category}_{folder}/img_{image + 1:08d}.jpg", category))
            wanted, folder = wanted - size, folder + 1
    drawn = []
    for path, category in rows:
        state = state * 48_271 % 2_147_483_647
        share = state % 289_222
        split = "train" if share < 209_222 else "validation" if share < 249_222 else "test"
        drawn.append((path, max(0, category - (state % 37 == 0)), split))
    return drawn


def folder_of(path):
    return path.rpartition("/")[0]


# The same on every machine, under Python 3.11, 3.12 and 3.13: a change of it is another dataset.
CHECKSUM = "8240d067ce8a1bcfda4fd1f1c9552906427854f910ce2c1a587da7e88550dc13"
CHECKSUM_BY_IMAGE = "65370add1691d31a89a0c45e4729b06921d9790401f0cbd4d1e78508eba5e5e3"
NAMES = [f"Category {i}" for i in range(46)]


@pytest.mark.slow
@pytest.mark.parametrize("by_folder", [True, False])
def test_paper_splits_of_as_many_rows_as_the_official(by_folder):
    rows = official_like_rows()
    drawn = draw_paper_splits(rows, by_folder=by_folder)
    counts = collections.Counter(split for _, _, split in drawn)
    assert counts == SIZES == {"train": 40_000, "validation": 10_000, "test": 10_000}
    assert len({path for path, _, _ in drawn}) == 60_000
    assert set(drawn) <= set(rows)  # each within its official split
    assert {category for _, category, _ in drawn} == set(range(30))
    home = collections.defaultdict(set)
    for path, _, split in drawn:
        home[folder_of(path)].add(split)
    assert (max(map(len, home.values())) == 1) == by_folder
    text = manifest_text(drawn, NAMES)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    assert checksum == (CHECKSUM if by_folder else CHECKSUM_BY_IMAGE)
    # Stratified: each category's share is that of all its images, to an image or, where its
    # folders do not suffice, less.
    total = collections.Counter(category for _, category, _ in rows)
    whole = sum(total[category] for category in range(30))
    for split, size in SIZES.items():
        found = collections.Counter(c for _, c, s in drawn if s == split)
        for category in range(30):
            share = size * total[category] / whole
            assert abs(found[category] - share) < (0.25 * share + 2 if by_folder else 1)


def test_paper_splits_do_not_depend_on_the_order_of_the_rows(rng):
    rows = [row for row in official_like_rows() if row[1] < 4][::40]
    options = {"sizes": {"train": 400, "validation": 100, "test": 100}, "num_categories": 4}
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    assert draw_paper_splits(shuffled, **options) == draw_paper_splits(rows, **options)


def test_paper_splits_that_the_lists_do_not_allow():
    rows = official_like_rows()
    with pytest.raises(InputError) as caught:
        draw_paper_splits(rows[:150_000])
    assert "need 40000 train, 10000 validation, 10000 test images of 30 categories" in str(
        caught.value
    )
    assert "with each folder in one split: complete the lists, or use" in str(caught.value)
    assert "\n" not in str(caught.value)
    few = [(path, category % 29, split) for path, category, split in rows]
    with pytest.raises(InputError, match="and 29 of 29 categories with 2 images in every split"):
        draw_paper_splits(few)
    # A category that is in one folder only cannot be in three splits.
    lone = [(path, 99, split) for path, category, split in rows if path.startswith("img/Item_0_7/")]
    with pytest.raises(InputError, match="of 3 categories, .* and 2 of 3 categories"):
        draw_paper_splits(
            [row for row in rows if row[1] in (1, 2)] + lone,
            sizes={"train": 40, "validation": 10, "test": 10}, num_categories=3,
        )  # fmt: skip


def test_apportion_is_websters(rng):
    for _ in range(50):
        n = int(rng.integers(1, 8))
        weights, capacity = rng.integers(1, 500, n).tolist(), rng.integers(2, 90, n).tolist()
        total = int(rng.integers(2 * n, sum(capacity) + 1))
        shares = apportion(total, weights, capacity)
        assert sum(shares) == total
        for i in range(n):
            assert 2 <= shares[i] <= capacity[i]
            for j in range(n):
                # No image would be better placed with j than with i.
                if shares[i] > 2 and shares[j] < capacity[j]:
                    assert (2 * shares[i] - 1) * weights[j] <= (2 * shares[j] + 1) * weights[i]


@pytest.fixture
def small_paper(tmp_path, monkeypatch):
    """A copy of 12 folders of 9 images in two categories, and sizes that it can fill."""
    root = tmp_path / TITLES[CATEGORY]
    folders = {f"Blouse_{i}": 1 for i in range(6)} | {f"Jeans_{i}": 3 for i in range(6)}
    copies.write_category(root, folders, ("train", "val", "test") * 3)
    draw = functools.partial(
        draw_paper_splits, sizes={"train": 10, "validation": 6, "test": 6}, num_categories=2
    )
    monkeypatch.setattr(builders, "draw_paper_splits", draw)
    return root


@pytest.mark.parametrize("config", ["paper", "paper_by_image"])
def test_paper_config(small_paper, tmp_path, config, capsys):
    options = {"data_dir": tmp_path / "tfds", "manual_dir": small_paper}
    datasets = {split: open_dataset(f"{CATEGORY}/{config}", split, **options) for split in SPLITS}
    assert [len(dataset) for dataset in datasets.values()] == [10, 6, 6]
    assert datasets["test"].label_names == ("Blouse", "Jeans")  # Cape is not one of the two
    homes = collections.defaultdict(set)
    for split, dataset in datasets.items():
        for item in dataset.item.tolist():
            homes[item].add(split)
    assert (max(map(len, homes.values())) == 1) == (config == "paper")
    (manifest,) = (tmp_path / "tfds").rglob("manifest.csv")
    checksum = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert Path(f"{manifest}.sha256").read_text() == f"{checksum}  manifest.csv\n"
    assert checksum in capsys.readouterr().err
    # Beside img/ it is a manifest that says the same.
    shutil.copy(manifest, small_paper / "Img")
    for split, dataset in datasets.items():
        same = open_dataset(str(small_paper / "Img" / "manifest.csv"), split)
        assert sorted(same.id) == sorted(dataset.id)
        labels = dict(zip(dataset.id, dataset.label, strict=True))
        assert [labels[name] for name in same.id] == same.label.tolist()
    # verify draws the same.
    assert command.main(["verify", f"{CATEGORY}/{config}", f"--manual_dir={small_paper}"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["manifest_sha256"] == checksum
    assert (report["folders_in_two_splits"] == 0) == (config == "paper")
    assert {kind for kind, count in report["wrong"].items() if count} == {"counts"}


def test_paper_is_not_drawn_from_lists_with_mistakes(small_paper, capsys):
    edit(small_paper / PARTITION, "108\n", "289222\n")
    status, _, error = run_verify(capsys, f"{CATEGORY}/paper", small_paper)
    assert status == 2
    assert re.search("error: 1 mistakes in the lists of .*: .*announces 289222 rows and", error)


# verify.


def run_verify(capsys, name, root, *flags):
    status = command.main(["verify", name, f"--manual_dir={root}", *flags])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    return status, lines, json.loads(lines[-1]) if lines else output.err


@pytest.mark.parametrize("name", [INSHOP, f"{INSHOP}/highres", CONSUMER, CATEGORY])
def test_verify_is_content_with_what_is_right(published, pristine, capsys, name):
    status, lines, report = run_verify(capsys, name, pristine)
    assert status == 0, lines
    assert report["ok"]
    assert not any(report["wrong"].values())
    found = {kind: count["found"] for kind, count in report["counts"].items()}
    assert found == COUNTS[name.partition("/")[0]]
    assert "everything is as it should be" in lines
    if INSHOP in name:
        assert report["boxes"] == {"outside": 1, "empty": 1, "missing": 0}


def remove(path):
    return lambda root: (root / "Img" / "img" / path).unlink()


def truncate(path):
    def change(root):
        file = root / "Img" / "img" / path
        file.write_bytes(file.read_bytes()[:-400])

    return change


def overwrite(path, other):
    return lambda root: shutil.copy(root / "Img" / "img" / other, root / "Img" / "img" / path)


def replace(file, old, new):
    return lambda root: edit(root / file, old, new)


def rename_case(root):
    (root / "Img" / "img" / "MEN").rename(root / "Img" / "img" / "men")


ROWS = [row[0] for row in copies.INSHOP_ROWS]
C2S = "TOPS/T_Shirt/id_00000001/comsumer_01.jpg"
C2S_TEST = "DRESSES/Dress/id_00000004/comsumer_01.jpg"


@pytest.mark.parametrize(
    ("name", "change", "wrong", "line"),
    [
        (INSHOP, remove(ROWS[3]), {"missing_images": 1}, f"  img/{ROWS[3]} is missing"),
        (
            INSHOP,
            rename_case,
            {"missing_images": 8},
            f"is missing, but there is img/men/{ROWS[3][4:]}",
        ),
        (INSHOP, truncate(ROWS[0]), {"unreadable_images": 1}, f"  img/{ROWS[0]} cannot be decoded"),
        (
            INSHOP,
            overwrite(ROWS[0], ROWS[2]),
            {"duplicate_images": 1},
            "n: img/",
        ),
        (INSHOP, overwrite(ROWS[0], ROWS[15]), {"leaking_images": 1}, f"img/{ROWS[15]} (test)"),
        (INSHOP, overwrite(ROWS[8], ROWS[9]), {"duplicate_images": 1}, "test: img/"),
        (
            INSHOP,
            replace(PARTITION, "id_00000005 ", "id_00000001 "),
            {"leaking_items": 1},
            "  item 1 is in ",
        ),
        (INSHOP, replace(PARTITION, "16\n", "17\n"), {"lists": 1}, "announces 17 rows and has 16"),
        (CONSUMER, overwrite(C2S, C2S_TEST), {"leaking_images": 1}, f"img/{C2S_TEST} (test)"),
        (
            CONSUMER,
            replace(PARTITION, "id_00000003  val", "id_00000001  val"),
            {"leaking_items": 1, "lists": 1},
            "  item 1 is in train and validation",
        ),
        (CATEGORY, remove("Slim_Jeans/img_00000001.jpg"), {"missing_images": 1}, "img/Slim_Jeans/"),
    ],
)
def test_verify_finds_what_is_planted(published, copy, capsys, name, change, wrong, line):
    root = copy(name)
    change(root)
    status, lines, report = run_verify(capsys, name, root)
    assert status == 1
    assert not report["ok"]
    found = {kind: count for kind, count in report["wrong"].items() if count and kind != "counts"}
    assert found == wrong, lines
    assert any(line in text for text in lines), lines


def test_verify_compares_with_the_published_counts(pristine, capsys):
    status, lines, report = run_verify(capsys, CONSUMER, pristine)
    assert status == 1
    assert "pairs: 8 of 195540 published: wrong" in lines
    assert report["wrong"]["counts"] == 3


def test_verify_shows_ten_findings_or_all(published, copy, capsys):
    root = copy(INSHOP)
    for path in sorted((root / "Img" / "img").rglob("*.jpg"))[:12]:
        path.unlink()
    _, lines, _ = run_verify(capsys, INSHOP, root)
    assert sum("is missing" in line for line in lines) == 10
    assert "  and 2 more: --all shows them" in lines
    _, lines, _ = run_verify(capsys, INSHOP, root, "--all")
    assert sum("is missing" in line for line in lines) == 12


def test_verify_of_nothing(pristine, tmp_path, capsys):
    status, _, error = run_verify(capsys, INSHOP, tmp_path)
    assert status == 2
    assert "expected list_bbox_inshop.txt" in error
    assert "found nothing" in error
    status, _, error = run_verify(capsys, f"{INSHOP}/big", pristine)
    assert status == 2
    assert "configs are ['highres', 'lowres']" in error
