"""Copies of datasets at the training size, against float64 means and the CSV that was copied."""

import csv
import io

import cv2
import numpy as np
import pytest
from PIL import Image
from shrinking import area_means, smooth

from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import decode_image, open_dataset, resizing
from cbam_jax.datasets.resizing import resize_dataset

SIZES = [(90, 60), (48, 130), (20, 33), (64, 64), (61, 45), (100, 34)]


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture
def images(rng):
    return [smooth(rng, *size) for size in SIZES]


@pytest.fixture
def photos(tmp_path, images):
    """A CSV with every column, one of the user's own, PNGs, and a JPEG that EXIF turns."""
    names = [f"shop {i % 2}/{i}.{'jpg' if i % 2 else 'png'}" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        save(tmp_path / "in" / name, image, quality=97)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in" / names[5], np.rot90(images[5]), quality=97, exif=exif)
    rows = [
        {
            "price": f"{i},50",
            "path": name,
            "label": "hat" if i % 3 else "coat",
            "split": "train" if i < 4 else "test",
            "is_query": "yes",
            "is_gallery": i % 2,
            "item_id": f"item {i // 2}",
            "series": "é",
            "x1": 1,
            "y1": 2.5,
            "x2": 17 + i,
            "y2": 19,
        }
        for i, name in enumerate(names)
    ]
    path = tmp_path / "in" / "photos.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_manifest_is_copied_with_all_its_columns(tmp_path, photos, images, capsys):
    folder = tmp_path / "out" / "small"
    assert command.main(["resize", str(photos), str(folder), "--short_side=32"]) == 0
    assert f"--config.data.name={folder}/manifest.csv" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"manifest.csv", "shop 0", "shop 1"}
    rows = read(folder / "manifest.csv")
    for row, old, image in zip(rows, read(photos), images, strict=True):
        height, width = image.shape[:2]
        scale = min(1, 32 / min(height, width))
        small = decode_image((folder / row["path"]).read_bytes())
        assert small.shape[:2] == (round(height * scale), round(width * scale))
        assert np.abs(small - area_means(image, *small.shape[:2])).max() <= 6
        for side, factor in zip(("x1", "y1", "x2", "y2"), (1, 0, 1, 0), strict=True):
            ratio = small.shape[factor] / image.shape[factor]
            assert float(row.pop(side)) == pytest.approx(float(old.pop(side)) * ratio, abs=0.005)
        assert row.pop("path") == old["path"] + ".jpg" * old.pop("path").endswith(".png")
        assert row == old
    for split, count in (("train", 4), ("test", 2)):
        dataset = open_dataset(str(folder / "manifest.csv"), split)
        assert len(dataset) == count
        for index in range(count):
            assert min(dataset.image(index).shape[:2]) <= 32


def test_an_interrupted_copy_goes_on(tmp_path, photos, monkeypatch):
    folder = tmp_path / "small"
    whole = (photos.parent / "shop 1" / "3.jpg").read_bytes()
    (photos.parent / "shop 1" / "3.jpg").write_bytes(b"\xff\xd8\xff\xe0 damaged within \xff\xd9")
    assert command.main(["resize", str(photos), str(folder), "--short_side=32"]) == 2
    assert not folder.exists()
    done = {path.name for path in (tmp_path / "small.partial").rglob("*.jpg")}
    assert done
    assert "3.jpg" not in done
    (photos.parent / "shop 1" / "3.jpg").write_bytes(whole)
    written = []
    shrink = resizing.shrink
    monkeypatch.setattr(
        resizing, "shrink", lambda *a, name, **k: (written.append(name), shrink(*a, **k))[1]
    )
    assert resize_dataset(str(photos), folder, short_side=32) == 6
    assert {name.split("/")[1] for name in written} == set(
        f"{i}.jpg" if i % 2 else f"{i}.png.jpg" for i in range(6)
    ) - done
    assert not (tmp_path / "small.partial").exists()
    assert len(read(folder / "manifest.csv")) == 6


def test_rows_without_a_box_keep_none(tmp_path, images):
    lines = ["path,label,split,x1,y1,x2,y2", "a.png,hat,train,10,20,30,40", "b.png,hat,train,,,,"]
    for name, image in zip(("a.png", "b.png"), images, strict=False):
        save(tmp_path / "in" / name, image)
    (tmp_path / "in" / "photos.csv").write_text("\n".join(lines))
    assert resize_dataset(f"{tmp_path}/in/photos.csv", tmp_path / "out", short_side=24) == 2
    rows = read(tmp_path / "out" / "manifest.csv")
    boxes = [[row[side] for side in ("x1", "y1", "x2", "y2")] for row in rows]
    assert boxes[1] == [""] * 4
    assert np.allclose([float(x) for x in boxes[0]], np.array([10, 20, 30, 40]) * 24 / 60, atol=0.3)


def test_what_no_jpeg_can_hold_is_named(tmp_path, capsys):
    lines = ["path,label,split"]
    for name, size in (("long.png", (9, 65_600)), ("tall.png", (65_600, 9)), ("a.png", (9, 9))):
        save(tmp_path / "in" / name, np.zeros((*size, 3), np.uint8))
        lines.append(f"{name},hat,train")
    (tmp_path / "in" / "photos.csv").write_text("\n".join(lines))
    arguments = ["resize", f"{tmp_path}/in/photos.csv", str(tmp_path / "out")]
    assert command.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert "error: long.png.jpg of 65600 x 9 would become 65600 x 9 pixels" in told[-1]
    assert "give a smaller --short_side" in told[-1]
    assert command.main([*arguments[:2], str(tmp_path / "smaller"), "--short_side=8"]) == 0
    assert decode_image((tmp_path / "smaller" / "long.png.jpg").read_bytes()).shape[0] == 8


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_folder_of_class_folders_becomes_a_manifest(tmp_path, rng, with_splits):
    for split in ("train", "val") if with_splits else (".",):
        for name in ("hat", "coat"):
            for i in range(6):
                save(tmp_path / "in" / split / name / f"{i}.jpg", smooth(rng, 50, 40))
    assert resize_dataset(f"{tmp_path}/in", tmp_path / "out", short_side=20) == 24 // (
        1 if with_splits else 2
    )
    for split in ("train", "validation"):
        dataset = open_dataset(str(tmp_path / "out" / "manifest.csv"), split)
        source = open_dataset(f"{tmp_path}/in", split)
        assert dataset.label_names == ("coat", "hat")
        assert dataset.label.tolist() == source.label.tolist()
        for index in range(len(dataset)):
            assert dataset.id[index].endswith(source.id[index].removeprefix("val/"))
            expected = area_means(source.image(index), 25, 20)
            assert np.abs(dataset.image(index) - expected).max() <= 8


def test_mistakes_are_told_in_one_line(tmp_path, photos, capsys):
    def mistake(*arguments):
        assert command.main(["resize", *map(str, arguments)]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    out = tmp_path / "out"
    assert "exists already" in mistake(photos, tmp_path)
    assert "short_side=4: give at least 8" in mistake(photos, out, "--short_side=4")
    assert "there is no manifest" in mistake(tmp_path / "no.csv", out)
    assert "cannot write" in mistake(photos, photos / "out")
    (tmp_path / "out.partial").mkdir()
    assert "out.partial holds an unfinished copy of something else" in mistake(photos, out)
    with open(photos, "a") as file:
        file.write('"9",../q/1.jpg,hat,train,1,1,i,s,1,1,2,2\n')
        file.write('"9",q/1.jpg,hat,train,1,1,i,s,1,1,2,2\n')
    save(tmp_path / "q" / "1.jpg", np.ones((9, 9, 3), np.uint8))
    assert "1 of 8 images" in mistake(photos, out)
    save(photos.parent / "q" / "1.jpg", np.zeros((9, 9, 3), np.uint8))
    assert "two images would be written to q/1.jpg: rename" in mistake(photos, out)


def test_a_small_png_becomes_a_jpeg_of_its_size_and_a_small_jpeg_stays(rng):
    image = smooth(rng, 20, 33)
    png = cv2.imencode(".png", image)[1].tobytes()
    encoded = resizing.shrink(png, short_side=32, quality=95)
    assert Image.open(io.BytesIO(encoded)).format == "JPEG"
    assert np.abs(decode_image(encoded).astype(int) - decode_image(png)).max() <= 6
    assert resizing.shrink(encoded, short_side=32, quality=95) == encoded
