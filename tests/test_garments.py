import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from cbam_jax import InputError
from cbam_jax.datasets import open_dataset, synthetic_garments
from cbam_jax.datasets import prepared as opening
from cbam_jax.datasets.__main__ import main as datasets_command
from cbam_jax.datasets.garments import (
    CATEGORIES,
    DOMAINS,
    TEXTILES,
    SyntheticGarments,
    SyntheticGarmentsConfig,
    contact_sheet,
    draw_garment,
)
from cbam_jax.datasets.garments.__main__ import main
from cbam_jax.datasets.garments.builder import is_consumer, make_example

TINY = {
    "image_size": 48, "train_items": 3, "validation_items": 1, "test_items": 2,
    "views_per_item": 4, "clutter": 0.7, "seed": 5,
}  # fmt: skip


def draw(number: int, **options):
    """A mixed bag of garments: category, item and view follow from one number."""
    category = CATEGORIES[number % len(CATEGORIES)]
    options = {"seed": 3, "image_size": 64, **options}
    return draw_garment(category=category, item=number // 16, view=number % 5, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = SyntheticGarmentsConfig(name="tiny", **TINY)
    folder = str(tmp_path_factory.mktemp("data"))
    builder = SyntheticGarments(config=config, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_a_picture_depends_on_its_arguments_alone():
    numbers = np.arange(48)
    in_order = [draw(n) for n in numbers]
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(draw, numbers[::-1]))[::-1]
    for first, second in zip(in_order, again, strict=True):
        assert first["image"].tobytes() == second["image"].tobytes()
        np.testing.assert_array_equal(first["mask"], second["mask"])


def test_seed_item_and_view_each_change_the_picture():
    base = {"seed": 1, "category": "shirt", "item": 2, "view": 0, "domain": "shop"}
    changes = [{}, {"seed": 2}, {"item": 3}, {"view": 1}, {"category": "coat"}]
    images = {draw_garment(**base | change)["image"].tobytes() for change in changes}
    assert len(images) == len(changes)


def test_image_size_changes_the_resolution_only():
    for number in range(0, 64, 3):
        large = draw(number, image_size=128, domain="shop")
        small = draw(number, image_size=64, domain="shop")
        shrunk = cv2.resize(large["image"], (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(int) - small["image"]).mean() < 12  # fine textiles blur
        cover = cv2.resize(large["mask"].astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
        # Lines, such as fringes, are whole pixels wide.
        assert ((cover > 0.5) ^ small["mask"]).sum() < 0.12 * small["mask"].sum()


def test_box_is_the_extent_of_the_mask():
    for number in range(0, 96, 3):
        drawn = draw(number, clutter=1.0, domain="consumer")
        seen = [(x, y) for y in range(64) for x in range(64) if drawn["mask"][y, x]]
        xs, ys = [x for x, _ in seen], [y for _, y in seen]
        expected = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        np.testing.assert_array_equal(drawn["bbox"], np.array(expected, np.float32))


def test_mask_leaves_out_what_is_hidden_and_nothing_else():
    hidden = []
    for number in range(48):
        free = draw(number, clutter=0.0, domain="consumer")["mask"]
        occluded = draw(number, clutter=1.0, domain="consumer")["mask"]
        assert not (occluded & ~free).any()
        hidden.append(1 - occluded.sum() / free.sum())
    assert 0.05 < np.mean(hidden) < 0.35
    assert np.max(hidden) < 0.85


def test_garment_pixels_are_the_garment():
    """Inside the mask a plain item has its own hue, outside it the shop's light background."""
    inside, outside = [], []
    for number in range(64):
        drawn = draw(number, domain="shop")
        grown = cv2.dilate(drawn["mask"].astype(np.uint8), np.ones((9, 9))) > 0
        inside.append(drawn["image"][drawn["mask"]].mean())
        outside.append(drawn["image"][~grown].mean())
    assert min(outside) > 190
    assert np.mean(inside) < 150


def background_variance(clutter: float) -> float:
    """Of what is left when the light's ramp, a plane, is taken out."""
    variances = []
    for number in range(40):
        drawn = draw(number, clutter=clutter, domain="consumer")
        # The shadow falls beside the garment, on any background.
        beside = cv2.dilate(drawn["mask"].astype(np.uint8), np.ones((13, 13))) > 0
        y, x = np.nonzero(~beside)
        plane = np.stack([x, y, np.ones_like(x)], axis=1).astype(float)
        colours = drawn["image"][y, x].astype(float)
        fit = plane @ np.linalg.lstsq(plane, colours)[0]
        variances.append(np.mean((colours - fit) ** 2))
    return float(np.median(variances))


def test_clutter_runs_from_a_plain_to_a_busy_background():
    plain, some, heavy = (background_variance(clutter) for clutter in (0.0, 0.5, 1.0))
    assert plain < 50
    assert some > 20 * plain
    assert heavy > 1.2 * some


def test_every_textile_occurs():
    seen = {draw(number, image_size=32)["textile"] for number in range(160)}
    assert seen == set(TEXTILES)


def nearest_centroid_accuracy(features: np.ndarray, labels: np.ndarray, split: int) -> float:
    classes = np.unique(labels)
    centroids = np.stack([features[:split][labels[:split] == c].mean(0) for c in classes])
    distances = ((features[split:, None] - centroids[None]) ** 2).sum(2)
    return float((classes[distances.argmin(1)] == labels[split:]).mean())


@pytest.mark.slow
def test_silhouettes_tell_categories_apart_and_colours_do_not():
    masks, colours, labels = [], [], []
    for item in range(24):
        for label, category in enumerate(CATEGORIES):
            drawn = draw_garment(
                seed=0, category=category, item=item, view=item % 3, image_size=64, domain="shop"
            )
            x1, y1, x2, y2 = drawn["bbox"].astype(int)
            silhouette = drawn["mask"][y1:y2, x1:x2].astype(np.float32)
            aspect = (x2 - x1) / (y2 - y1)
            small = cv2.resize(silhouette, (16, 16), interpolation=cv2.INTER_AREA)
            masks.append(np.append(small.ravel(), 5 * aspect))
            colours.append(drawn["image"][drawn["mask"]].mean(0))
            labels.append(label)
    features, means, labels = np.stack(masks), np.stack(colours), np.array(labels)
    split = 16 * len(CATEGORIES)
    assert nearest_centroid_accuracy(features, labels, split) > 0.6
    assert nearest_centroid_accuracy(means, labels, split) < 0.25


@pytest.mark.slow
def test_neighbours_by_colour_are_of_other_categories():
    colours, labels = [], []
    for label, category in enumerate(CATEGORIES):
        for item in range(10):
            for view in range(2):  # as in validation and test
                drawn = draw_garment(seed=0, category=category, item=item, view=view, image_size=48)
                counts = cv2.calcHist([drawn["image"]], [0, 1, 2], None, [6] * 3, [0, 256] * 3)
                colours.append(np.sqrt(counts.ravel() / counts.sum()))
                labels.append(label)
    labels = np.array(labels)
    similarity = np.stack(colours) @ np.stack(colours).T
    np.fill_diagonal(similarity, -1)
    neighbours = labels[np.argsort(-similarity, axis=1)[:, :5]]
    assert (neighbours == labels[:, None]).mean() < 0.15


@pytest.mark.slow
def test_prepared_dataset_is_what_is_drawn(prepared):
    for split in ("train", "validation", "test"):
        source = prepared.as_data_source(split)
        views = 4 if split == "train" else 2
        assert len(source) == len(CATEGORIES) * TINY[f"{split}_items"] * views
        for record in [source[i] for i in range(0, len(source), 5)]:
            category, item, view = record["id"].decode().split("/")
            domain = DOMAINS[record["domain"]]
            drawn = draw_garment(
                seed=5, category=category, item=int(item), view=int(view), image_size=48,
                clutter=0.7, domain=domain,
            )  # fmt: skip
            assert CATEGORIES[record["label"]] == category
            assert TEXTILES[record["textile"]] == drawn["textile"]
            np.testing.assert_array_equal(record["mask"][..., 0], drawn["mask"] * np.uint8(255))
            np.testing.assert_array_equal(record["bbox"], drawn["bbox"])
            error = np.abs(record["image"].astype(int) - drawn["image"])
            assert error.mean() < 6  # JPEG; another garment is off by 40 and more
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_opened_dataset_has_the_masks_of_its_images(prepared, monkeypatch):
    monkeypatch.setattr(opening, "prepare", lambda *args, **kwargs: prepared)
    dataset = pickle.loads(pickle.dumps(open_dataset("synthetic_garments/tiny", "test")))
    for i in (0, 7, len(dataset) - 1):
        category, item, view = dataset.id[i].split("/")
        drawn = draw_garment(
            seed=5, category=category, item=int(item), view=int(view), image_size=48, clutter=0.7,
            domain=DOMAINS[dataset.series[i] % 2],
        )  # fmt: skip
        np.testing.assert_array_equal(dataset.mask(i), drawn["mask"])


def test_splits_share_no_item_and_have_every_category(prepared):
    columns = {}
    for split in ("train", "validation", "test"):
        source = prepared.as_data_source(split)
        rows = [source[i] for i in range(len(source))]
        assert {int(row["label"]) for row in rows} == set(range(len(CATEGORIES)))
        assert all(row["is_query"] and row["is_gallery"] for row in rows)
        assert {int(row["domain"]) for row in rows} == {0, 1}
        columns[split] = {int(row["item_id"]) for row in rows}
        assert len({row["id"] for row in rows}) == len(rows)
        # Each item is seen in both domains.
        assert len({int(row["series"]) for row in rows}) == 2 * len(columns[split])
    assert len(set.union(*columns.values())) == sum(map(len, columns.values())) == 16 * 6


def test_more_items_of_one_split_change_no_other(prepared):
    config = SyntheticGarmentsConfig(name="more", **TINY | {"train_items": 9})
    record = prepared.as_data_source("test")[7]
    category, item, view = record["id"].decode().split("/")
    assert int(item) in config.items("test")
    example = make_example(config, category, int(item), int(view))
    np.testing.assert_array_equal(example["bbox"], record["bbox"])
    assert example["item_id"] == record["item_id"]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.5, 0.9, 1.0])
def test_consumer_fraction_counts_views(fraction):
    assert sum(is_consumer(view, fraction) for view in range(20)) == round(20 * fraction)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"category": "hat"}, "'hat' is none of t_shirt"),
        ({"domain": "street"}, "'street' is neither"),
        ({"clutter": 1.5}, r"1\.5 is not in \[0, 1\]"),
        ({"image_size": 16}, "16 is below 32"),
        ({"view": -1}, "negative"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    right = {"seed": 0, "category": "coat", "item": 0, "view": 0}
    with pytest.raises(ValueError, match=message):
        draw_garment(**right | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clutter": -0.1}, "clutter=-0.1"),
        ({"consumer_fraction": 2}, "consumer_fraction=2"),
        ({"test_items": 0}, "test_items=0"),
        ({"views_per_item": 0}, "views_per_item=0"),
    ],
)
def test_wrong_config_is_an_input_error(wrong, message):
    with pytest.raises(InputError, match=message):
        SyntheticGarmentsConfig(name="wrong", **wrong)


def test_the_earlier_name_still_works():
    assert synthetic_garments.SyntheticGarments is SyntheticGarments
    assert synthetic_garments.main is main


def test_sheet_command(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    options = ["--items", "1", "--views", "2", "--image_size", "32", "--clutter", "0.3"]
    assert main(["--sheet", str(path), *options]) == 0
    sheet = contact_sheet(items=1, views=2, image_size=32, clutter=0.3)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], sheet)
    first = draw_garment(seed=0, category=CATEGORIES[0], item=0, view=1, image_size=32, clutter=0.3)
    np.testing.assert_array_equal(sheet[:32, -32:], first["image"])
    assert main(["--sheet", str(tmp_path / "none" / "sheet.png"), *options]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_photos_are_drawn_into_class_folders_and_again_goes_on(tmp_path, capsys):
    command = ["draw", str(tmp_path / "photos"), "--image_size=32"]
    assert datasets_command([*command, "--number=20"]) == 0
    files = sorted(path.relative_to(tmp_path / "photos") for path in tmp_path.rglob("*.jpg"))
    assert len(files) == 20
    assert {file.parent.name for file in files} == set(CATEGORIES)
    first = tmp_path / "photos" / CATEGORIES[0] / "0000_0.jpg"
    content = first.read_bytes()
    first.unlink()
    assert datasets_command([*command, "--number=40"]) == 0
    assert "21 photos drawn" in capsys.readouterr().out
    assert first.read_bytes() == content
    assert len({path.read_bytes() for path in tmp_path.rglob("*.jpg")}) == 40
    assert datasets_command([*command, "--number=0"]) == 2
    (tmp_path / "file").touch()
    assert datasets_command(["draw", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize("other", ["mine.jpg", "Hats/a.jpg", "Dress/IMG_1.jpg"])
def test_photos_are_not_drawn_among_others(other, tmp_path, capsys):
    other = other.replace("Dress", CATEGORIES[3])
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).touch()
    (tmp_path / CATEGORIES[0]).mkdir(exist_ok=True)
    for ours in (".DS_Store", f"{CATEGORIES[0]}/partial-0000_0.jpg"):
        (tmp_path / ours).touch()
    command = ["draw", str(tmp_path), "--image_size=32", "--number=1"]
    assert datasets_command(command) == 2
    told = capsys.readouterr().err
    assert "which was not drawn here: give a new folder" in told
    assert other.partition("/")[0] in told
    (tmp_path / other).unlink()
    if other.startswith("Hats"):
        (tmp_path / "Hats").rmdir()
    assert datasets_command(command) == 0
