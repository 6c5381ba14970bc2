"""Datasets: manifests, TFDS builders without TensorFlow, downloads, and what users do wrong."""

import csv
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle

from cbam_jax import InputError
from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import clothing_dataset_small as clothing
from cbam_jax.datasets import decode_image, open_dataset, prepared
from cbam_jax.datasets.download import download
from cbam_jax.datasets.manifest import assign_splits

REAL_TAR = Path(__file__).parents[2] / "shared" / "data" / "clothing-dataset-small.tar"
COUNTS = {"train": 7, "validation": 3, "test": 4}


def jpeg(rng, height=24, width=20) -> bytes:
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


# -------------------------------------------------------------------------------------- manifests


def write_csv(path: Path, rows: list[dict], encoding="utf-8") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def photos(tmp_path, rng, count) -> list[str]:
    (tmp_path / "photos").mkdir(exist_ok=True)
    names = [f"photos/{index}.jpg" for index in range(count)]
    for name in names:
        (tmp_path / name).write_bytes(jpeg(rng))
    return names


def full_rows(names: list[str]) -> list[dict]:
    """A manifest with every column; labels and items in no particular order."""
    labels = ["shirt", "hat", "dress", "hat", "shirt", "hat"]
    return [
        {
            "is_gallery": ["yes", "no"][index % 2],
            "path": name,
            "label": labels[index],
            "split": "test" if index > 1 else "train",
            "is_query": ["1", "0", "TRUE", "false"][index % 4],
            "item_id": f"id_{9 - index // 2}",
            "series": f"s{index % 3}",
            "x1": index,
            "y1": 1.5,
            "x2": index + 4,
            "y2": 9,
        }
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_manifest_with_every_column(tmp_path, rng, encoding):
    names = photos(tmp_path, rng, 6)
    path = write_csv(tmp_path / "photos.csv", full_rows(names), encoding)
    dataset = open_dataset(str(path), "test")
    assert dataset.label_names == ("dress", "hat", "shirt")
    assert dataset.label.tolist() == [0, 1, 2, 1]
    assert dataset.label.dtype == np.int32
    assert dataset.id.tolist() == names[2:]
    assert dataset.is_query.tolist() == [True, False, True, False]
    assert dataset.is_gallery.tolist() == [True, False, True, False]
    assert dataset.item is not None
    assert dataset.item.tolist() == [1, 1, 0, 0]  # id_7, id_8, id_9 are 0, 1, 2
    assert dataset.series is not None
    assert dataset.series.tolist() == [2, 0, 1, 2]
    assert dataset.bbox is not None
    np.testing.assert_array_equal(dataset.bbox[1], np.array([3, 1.5, 7, 9], np.float32))
    assert len(dataset) == 4
    for index, name in enumerate(names[2:]):
        assert dataset.encoded(index) == (tmp_path / name).read_bytes()
    by_item = open_dataset(str(path), "test", label="item_id")
    assert by_item.label.tolist() == [1, 1, 0, 0]
    assert by_item.label_names == ("id_7", "id_8", "id_9")


def test_manifest_defaults_and_pickle(tmp_path, rng, monkeypatch):
    names = photos(tmp_path, rng, 3)
    rows = [{"path": name, "label": "hat", "split": "all"} for name in names]
    path = write_csv(tmp_path / "photos.csv", rows)
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset("photos.csv", "all")
    assert dataset.is_query.all()
    assert dataset.is_gallery.all()
    assert dataset.item is None
    assert dataset.series is None
    assert dataset.bbox is None
    copy = pickle.loads(pickle.dumps(open_dataset(str(path), "all")))
    assert [copy.encoded(i) for i in range(3)] == [dataset.encoded(i) for i in range(3)]


def test_assign_splits_is_stratified_disjoint_and_independent_of_row_order(rng):
    items = [f"item{n}" for n in range(300) for _ in range(1 + n % 3)]
    label_of = {item: "hat" if int(item[4:]) < 60 else "shoes" for item in set(items)}
    names = [f"{n}.jpg" for n in range(len(items))]
    table = {"label": [label_of[item] for item in items], "item_id": items, "id": names}
    splits = assign_splits(table)
    split_of = {}
    for item, split in zip(items, splits, strict=True):
        assert split_of.setdefault(item, split) == split
    for label, count in (("hat", 60), ("shoes", 240)):
        got = [split_of[item] for item in split_of if label_of[item] == label]
        assert [got.count(name) for name in ("train", "validation", "test")] == [
            count * 8 // 10,
            count // 10,
            count // 10,
        ]
    order = rng.permutation(len(items))
    shuffled = {key: [column[i] for i in order] for key, column in table.items()}
    assert assign_splits(shuffled) == [splits[i] for i in order]


@pytest.mark.parametrize("count", range(1, 40))
def test_assign_splits_gives_a_label_two_images_or_none(count):
    names = [f"{i}.jpg" for i in range(count)]
    splits = assign_splits({"label": ["hat"] * count, "id": names})
    train, validation, test = (splits.count(name) for name in ("train", "validation", "test"))
    assert train >= min(count, 2)
    assert validation >= 2 if count >= 4 else validation == 0
    assert test >= 2 if count >= 6 else test == 0
    if count >= 15:
        assert validation == test == round(count / 10)


def test_manifest_without_split_column_is_split_and_says_so(tmp_path, rng, capsys):
    names = photos(tmp_path, rng, 20)
    rows = [{"path": name, "label": "hat"} for name in names]
    path = str(write_csv(tmp_path / "photos.csv", rows))
    parts = [open_dataset(path, split).id.tolist() for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(names)
    assert "no split column" in capsys.readouterr().err


def change(row, column, value):
    return lambda rows: rows[row].update({column: value})


def without(column):
    return lambda rows: [row.pop(column) for row in rows]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("label"), "has no column label"),
        (without("path"), "has no column path"),
        (without("y1"), "has the box columns .*'x1', 'x2', 'y2'"),
        (change(2, "label", " "), "row 4: label is empty"),
        (change(1, "split", ""), "row 3: split is empty"),
        (change(1, "item_id", ""), "row 3: item_id is empty"),
        (change(3, "path", "./photos/1.jpg"), "row 5: the path photos/1.jpg is also in row 3"),
        (change(0, "is_query", "maybe"), "row 2: is_query is 'maybe'"),
        (change(5, "is_gallery", ""), "row 7: is_gallery is ''"),
        (change(4, "x2", "wide"), "row 6: x2 is 'wide'"),
        (change(4, "y2", "nan"), "row 6: the box .* is empty"),
        (change(4, "x2", "1"), "row 6: the box .* is empty"),
        (change(3, "path", "photos/none.jpg"), r"1 of 6 images .*none\.jpg \(no such file\)"),
        (change(3, "path", "photos.csv"), r"1 of 6 images .*photos\.csv \(not an image\)"),
    ],
)
def test_manifest_mistakes_are_told_in_one_line(tmp_path, rng, edit, message):
    rows = full_rows(photos(tmp_path, rng, 6))
    edit(rows)
    path = write_csv(tmp_path / "photos.csv", rows)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(str(path), "test")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column path"),
        (b"path,label\n\n\n", "has no rows"),
        (b"path:label\na.jpg:hat\n", "separated by commas or semicolons"),
        (b"path,label,label\na.jpg,hat,hat\n", "names the column 'label' twice"),
        (b"path,label\na.jpg,hat\nb.jpg\n", "row 3: it has 1 cells and the header 2"),
        (b"path,label\na.jpg,hat, red\n", "row 2: it has 3 cells"),
        ("path,label\na.jpg,hat\n".encode("utf-16"), "is not UTF-8"),
        (
            b'path,label\nb.jpg,a\n"a.jpg,hat\n',
            "not a CSV file: row 3: unexpected end of data; close each",
        ),
        (b'path,label\n"a.jpg,hat\n"b.jpg",hat', "row 2: .* close each quote"),
    ],
)
def test_manifest_that_is_no_table(tmp_path, content, message):
    (tmp_path / "photos.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path / "photos.csv"), "train")


def test_manifest_unknown_file_split_label_option(tmp_path, rng):
    path = str(write_csv(tmp_path / "photos.csv", full_rows(photos(tmp_path, rng, 6))))
    with pytest.raises(InputError, match=r"there is no manifest .*nope\.csv"):
        open_dataset(str(tmp_path / "nope.csv"), "test")
    with pytest.raises(InputError, match=r"split 'val' .*\['test', 'train', 'all'\]"):
        open_dataset(path, "val")
    with pytest.raises(InputError, match=r"label='domain' .*\['label', 'item_id', 'series'\]"):
        open_dataset(path, "test", label="domain")
    with pytest.raises(InputError, match="on_bad_image='ignore': choose 'fail' or 'skip'"):
        open_dataset(path, "test", on_bad_image="ignore")
    with pytest.raises(InputError, match="manual_dir /no/such is not a folder"):
        open_dataset(path, "test", manual_dir="/no/such")


def test_manifest_ignored_column_is_named(tmp_path, rng, capsys):
    rows = [{"path": name, "label": "a", "is_qurey": 0} for name in photos(tmp_path, rng, 2)]
    open_dataset(str(write_csv(tmp_path / "photos.csv", rows)), "train")
    assert "ignored the columns ['is_qurey']" in capsys.readouterr().err


def test_manifest_skips_bad_images_counts_and_lists_them(tmp_path, rng, capsys):
    names = photos(tmp_path, rng, 6)
    path = str(write_csv(tmp_path / "photos.csv", full_rows(names)))
    good = (tmp_path / names[4]).read_bytes()
    (tmp_path / names[3]).unlink()
    (tmp_path / names[4]).write_bytes(good[:-20])
    dataset = open_dataset(path, "test", on_bad_image="skip")
    assert dataset.id.tolist() == [names[2], names[5]]
    assert dataset.label_names == ("dress", "hat", "shirt")
    assert dataset.label.tolist() == [0, 1]
    report = capsys.readouterr().err
    assert "2 of 6 images" in report
    listed = (tmp_path / "photos.skipped.txt").read_text()
    assert f"{tmp_path / names[3]}\tno such file" in listed
    assert f"{tmp_path / names[4]}\tcannot be decoded" in listed
    # A list that still holds is used; one of other files is not.
    again = open_dataset(path, "test", on_bad_image="skip")
    assert again.id.tolist() == dataset.id.tolist()
    assert "checking images" not in capsys.readouterr().err
    (tmp_path / names[4]).write_bytes(good)
    repaired = open_dataset(path, "test", on_bad_image="skip")
    assert repaired.id.tolist() == [names[2], names[4], names[5]]


def test_manifest_half_copied_files_are_found_when_it_is_opened(tmp_path, rng, capsys):
    names = photos(tmp_path, rng, 6)
    path = str(write_csv(tmp_path / "photos.csv", full_rows(names)))
    for name in names[1:3]:
        encoded = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(encoded[: len(encoded) // 2])
    (tmp_path / names[4]).write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 6 images .*1\.jpg .*2\.jpg .*4\.jpg \(not an im"):
        open_dataset(path, "test")
    assert open_dataset(path, "test", on_bad_image="skip").id.tolist() == [names[3], names[5]]
    assert "skipped: 3 of 6 images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "BMP", "PNG", "GIF", "TIFF", "JPEG2000"])
def test_manifest_half_copied_files_of_every_format_are_found(tmp_path, rng, kind):
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    for name in ("whole", "half"):
        image.save(tmp_path / name, kind)
    path = write_csv(tmp_path / "a.csv", [{"path": n, "label": "hat"} for n in ("whole", "half")])
    assert len(open_dataset(str(path), "all")) == 2
    encoded = (tmp_path / "half").read_bytes()
    (tmp_path / "half").write_bytes(encoded[: len(encoded) // 2])
    with pytest.raises(InputError, match="1 of 2 images .*half .(cut off|cannot be decoded).: rep"):
        open_dataset(str(path), "all")


def test_manifest_what_is_no_file_is_told_and_not_waited_for(tmp_path, rng):
    names = photos(tmp_path, rng, 6)
    path = str(write_csv(tmp_path / "photos.csv", full_rows(names)))
    for name in names[:2]:
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / names[0])
    (tmp_path / names[1]).mkdir()
    with pytest.raises(
        InputError, match=r"2 of 6 .*0\.jpg \(not a regular file\); .*1\.jpg \(not a"
    ):
        open_dataset(path, "test")


def test_manifest_damaged_file_fails_late_with_its_path(tmp_path, rng):
    names = photos(tmp_path, rng, 6)
    path = str(write_csv(tmp_path / "photos.csv", full_rows(names)))
    (tmp_path / names[3]).write_bytes(b"\xff\xd8\xff\xe0 damaged within \xff\xd9")
    dataset = open_dataset(path, "test")
    with pytest.raises(InputError, match=r"photos/3\.jpg of .*photos\.csv cannot be decoded"):
        dataset.image(1)
    (tmp_path / names[3]).unlink()
    with pytest.raises(InputError, match=r"cannot read .*photos/3\.jpg .*remove its row"):
        dataset.encoded(1)


def test_manifest_with_no_good_image_fails_also_with_skip(tmp_path):
    rows = [{"path": "a.jpg", "label": "hat"}]
    path = str(write_csv(tmp_path / "photos.csv", rows))
    with pytest.raises(InputError, match="nothing is left; paths are relative to"):
        open_dataset(path, "train", on_bad_image="skip")


# ----------------------------------------------------------- clothing_dataset_small, a tiny copy


def make_tree(folder: Path, rng) -> dict[str, bytes]:
    """A tiny copy of the official layout: {path: bytes}, also written below ``folder``."""
    images = {}
    for split, count in COUNTS.items():
        for index in range(count):
            name = f"{split}/{clothing.CLASSES[(index * 3) % 10]}/{split[0]}{index}.jpg"
            images[name] = jpeg(rng, 300 + index, 280 if index % 2 else 320)
    for name, encoded in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded)
    (folder / "README.md").write_text("a copy")
    return images


def reference_fingerprint(images: dict[str, bytes]) -> str:
    lines = [f"{name} {hashlib.sha256(images[name]).hexdigest()}\n" for name in sorted(images)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def copy(tmp_path, rng, monkeypatch):
    """A tiny dataset in ``manual/clothing-dataset-small-main``, its archive, and its constants."""
    tree = tmp_path / "manual" / "clothing-dataset-small-main"
    images = make_tree(tree, rng)
    archive = tmp_path / "served" / "copy.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
    monkeypatch.setattr(clothing, "NUM_IMAGES", COUNTS)
    monkeypatch.setattr(clothing, "FINGERPRINT", reference_fingerprint(images))
    monkeypatch.setattr(clothing, "URL", "http://127.0.0.1:9/unreachable.tar.gz")
    return images, tree, archive


def open_copy(tmp_path, split="train", config="", **options):
    options = {"data_dir": tmp_path / "tfds", "manual_dir": tmp_path / "manual"} | options
    return open_dataset(f"clothing_dataset_small{config}", split, **options)


def assert_complete(tmp_path, images, **options):
    for split in COUNTS:
        dataset = open_copy(tmp_path, split, **options)
        expected = {name: data for name, data in images.items() if name.startswith(f"{split}/")}
        assert {n: dataset.encoded(i) for i, n in enumerate(dataset.id)} == expected
        names = [dataset.label_names[label] for label in dataset.label]
        assert names == [name.split("/")[1] for name in dataset.id]
        assert dataset.label_names == clothing.CLASSES


def test_clothing_from_extracted_folder_keeps_every_byte(tmp_path, copy, capfd):
    assert_complete(tmp_path, copy[0])
    output = capfd.readouterr()
    assert output.out == ""  # stdout belongs to results
    assert "WARNING" not in output.err
    assert "tensorflow" not in sys.modules


def test_clothing_from_archive_in_manual_dir(tmp_path, copy):
    images, tree, archive = copy
    shutil.rmtree(tree)
    shutil.move(archive, tree.parent / "clothing-dataset-small-main.tar.gz")
    assert_complete(tmp_path, images)


def test_clothing_256px_shrinks_the_short_side(tmp_path, copy):
    images = copy[0]
    dataset = open_copy(tmp_path, "train", "/256px")
    assert sorted(dataset.id) == sorted(name for name in images if name.startswith("train/"))
    for index, name in enumerate(dataset.id):
        image, original = dataset.image(index), decode_image(images[name])
        height, width = original.shape[:2]
        scale = 256 / min(height, width)
        assert image.shape == (round(height * scale), round(width * scale), 3)
        assert min(image.shape[:2]) == 256
        pil = Image.fromarray(original).resize(image.shape[1::-1], Image.Resampling.BOX)
        # Channels in the right order, the same content: JPEG and resampling differ by a little.
        assert np.abs(image.astype(int) - np.asarray(pil)).mean() < 3


def test_clothing_opens_without_its_sources_once_prepared(tmp_path, copy):
    open_copy(tmp_path)
    shutil.rmtree(tmp_path / "manual")
    assert_complete(tmp_path, copy[0], manual_dir=None)
    dataset = pickle.loads(pickle.dumps(open_copy(tmp_path, "train[:3]", manual_dir=None)))
    assert [dataset.encoded(i) for i in range(3)] == [copy[0][name] for name in dataset.id]


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_clothing_bad_images_fail_or_are_skipped(tmp_path, copy, rng, damage, capsys):
    images, tree, _ = copy
    victim = next(iter(images))
    data = {"truncated": images[victim][:-30], "changed": jpeg(rng), "missing": b""}[damage]
    (tree / victim).write_bytes(data)
    if damage == "missing":
        (tree / victim).unlink()
    told = {
        "truncated": f"13 of 14 images .*{victim}: cannot be decoded",
        "missing": "13 of 14 images .*train: has 6 images instead of 7",
        "changed": "14 of 14 images .*differ from the published",
    }[damage]
    with pytest.raises(InputError, match=f"^{told}.*on_bad_image='skip'$"):
        open_copy(tmp_path)
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))
    capsys.readouterr()
    dataset = open_copy(tmp_path, on_bad_image="skip")
    assert (victim in dataset.id) == (damage == "changed")
    assert len(dataset) == (7 if damage == "changed" else 6)
    assert len(capsys.readouterr().err.split("skipped: ")) == 2
    # The choice of an earlier preparation does not slip through.
    with pytest.raises(InputError, match="prepared with on_bad_image='skip' and is not complete"):
        open_copy(tmp_path)
    assert len(open_copy(tmp_path, on_bad_image="skip")) == len(dataset)


def test_clothing_skip_without_a_bad_image_satisfies_fail(tmp_path, copy):
    open_copy(tmp_path, on_bad_image="skip")
    assert_complete(tmp_path, copy[0], on_bad_image="fail")


def test_clothing_empty_manual_dir(tmp_path, copy):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds neither clothing-dataset-small"):
        open_copy(tmp_path, manual_dir=tmp_path / "empty")


def test_clothing_damaged_archive_in_manual_dir(tmp_path, copy):
    _, tree, archive = copy
    shutil.rmtree(tree)
    data = archive.read_bytes()
    (tree.parent / "clothing-dataset-small.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is damaged"):
        open_copy(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TAR.exists(), reason="the real archive is not beside the checkout")
def test_clothing_real_archive(tmp_path):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / REAL_TAR.name).symlink_to(REAL_TAR)
    counts = {split: len(open_copy(tmp_path, split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 3068, "validation": 341, "test": 372}
    dataset = open_copy(tmp_path, "test")
    with tarfile.open(REAL_TAR) as tar:
        file = tar.extractfile(f"clothing-dataset-small-master/{dataset.id[5]}")
        assert file is not None
        assert file.read() == dataset.encoded(5)
    assert set(dataset.label) == set(range(10))


# --------------------------------------------------------------------------------------- download


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` at ``url``, with ranges if ``ranges``, and stops after ``limit`` bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.limit = content, True, 1 << 30
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/copy.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if self.path != "/copy.tar.gz":
            return self.send_error(404)
        start = int(asked.split("=")[1].rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : start + server.limit])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(copy):
    with Server(copy[2].read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_then_prepare(tmp_path, copy, server, monkeypatch):
    monkeypatch.setattr(clothing, "URL", server.url)
    assert_complete(tmp_path, copy[0], manual_dir=None)
    open_copy(tmp_path, config="/256px", manual_dir=None)
    assert server.asked == [None]  # once, for both configs


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_or_starts_over(tmp_path, server, ranges):
    path = tmp_path / "downloads" / "copy.tar.gz"
    server.ranges, server.limit = ranges, 1000
    with pytest.raises(InputError, match=r"ended after 1000 of .* run again to resume, or DO THIS"):
        download(server.url, path, remedy="DO THIS")
    assert not path.exists()
    server.limit = 1 << 30
    download(server.url, path, remedy="")
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=1000-"]
    assert [file.name for file in path.parent.iterdir()] == ["copy.tar.gz"]


def test_download_discards_a_part_that_is_too_long(tmp_path, server):
    path = tmp_path / "copy.tar.gz"
    part = tmp_path / "copy.tar.gz.part"
    part.write_bytes(server.content + b"more")
    download(server.url, path, remedy="")
    assert path.read_bytes() == server.content


def test_corrupt_download_is_removed_and_told(tmp_path, copy, server, monkeypatch):
    monkeypatch.setattr(clothing, "URL", server.url)
    content = server.content
    for broken in (b"<html>sign in</html>", content[: len(content) // 2]):
        server.content = broken
        with pytest.raises(InputError, match=r"sent is damaged .* manual_dir"):
            open_copy(tmp_path, manual_dir=None)
    server.content = content
    assert_complete(tmp_path, copy[0], manual_dir=None)


def test_download_of_other_images_is_refused(tmp_path, copy, server, monkeypatch):
    monkeypatch.setattr(clothing, "URL", server.url)
    monkeypatch.setattr(clothing, "FINGERPRINT", "0" * 64)
    with pytest.raises(InputError, match="checksum differs"):
        open_copy(tmp_path, manual_dir=None, on_bad_image="skip")


def test_unreachable_download_fails_at_once_and_names_the_remedy(tmp_path, copy, server):
    with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:9/.*manual_dir"):
        open_copy(tmp_path, manual_dir=None)
    url = server.url.replace("copy.tar.gz", "nothing.gz")
    with pytest.raises(InputError, match=r"nothing\.gz \(HTTP 404 .*manual_dir"):
        download(url, tmp_path / "file", remedy="put it into manual_dir")


# ------------------------------------------------------------------- interruption and concurrency

CHILD = """
import os, signal, sys
from cbam_jax.datasets import clothing_dataset_small as clothing, open_dataset
data_dir, manual_dir, fingerprint, kill_after = sys.argv[1:]
clothing.NUM_IMAGES = {counts}
clothing.FINGERPRINT = fingerprint
if int(kill_after):
    calls, shrink = [], clothing.shrink
    def dying_shrink(encoded, **options):
        calls.append(encoded)
        if len(calls) == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)
        return shrink(encoded, **options)
    clothing.shrink = dying_shrink
dataset = open_dataset("clothing_dataset_small/256px", "test", data_dir=data_dir,
                       manual_dir=manual_dir)
print(len(dataset))
"""


def start_child(tmp_path, copy, data_dir, kill_after=0) -> subprocess.Popen:
    arguments = [data_dir, tmp_path / "manual", reference_fingerprint(copy[0]), kill_after]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(counts=COUNTS), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def records(tmp_path, data_dir: str, config="/256px") -> dict[str, list[tuple]]:
    """All records in their order. (The files may differ in their padding.)"""
    found = {}
    for split in COUNTS:
        dataset = open_copy(tmp_path, split, config, data_dir=tmp_path / data_dir)
        columns = zip(dataset.id.tolist(), dataset.label.tolist(), strict=True)
        found[split] = [(*row, dataset.encoded(i)) for i, row in enumerate(columns)]
    assert {split: len(rows) for split, rows in found.items()} == COUNTS
    return found


def test_killed_preparation_leaves_nothing_to_trip_over(tmp_path, copy):
    child = start_child(tmp_path, copy, tmp_path / "tfds", kill_after=9)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    versions = tmp_path / "tfds" / "clothing_dataset_small" / "256px"
    assert [path.name[:11] for path in versions.iterdir()] == ["incomplete."]
    assert records(tmp_path, "tfds") == records(tmp_path, "uninterrupted")
    assert [path.name for path in versions.iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_two_processes_prepare_the_same_dataset(tmp_path, copy):
    children = [start_child(tmp_path, copy, tmp_path / "tfds") for _ in range(2)]
    outputs = [child.communicate() for child in children]
    assert [output for output, _ in outputs] == [f"{COUNTS['test']}\n"] * 2, outputs
    assert sum("writing train" in errors for _, errors in outputs) == 1
    assert records(tmp_path, "tfds") == records(tmp_path, "alone")


def test_incomplete_folder_of_another_kind_is_named(tmp_path, copy):
    folder = tmp_path / "tfds" / "clothing_dataset_small" / "full" / "1.0.0"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"full/1\.0\.0 is not a complete dataset: delete it"):
        open_copy(tmp_path)
    folder.rmdir()
    open_copy(tmp_path)
    next(folder.glob("*train*")).unlink()
    with pytest.raises(InputError, match="train.* is missing: delete"):
        open_copy(tmp_path)


def test_another_splits_records_are_told(tmp_path, copy):
    open_copy(tmp_path)
    folder = tmp_path / "tfds" / "clothing_dataset_small" / "full" / "1.0.0"
    (train,) = folder.glob("*train.array_record*")
    (test,) = folder.glob("*-test.array_record*")
    shutil.copyfile(train, test)
    with pytest.raises(InputError, match="-test.array_record-.* is not the file that was written"):
        open_copy(tmp_path, "test")
    assert len(open_copy(tmp_path)) == COUNTS["train"]
    (folder / "sizes.json").unlink()  # As earlier versions prepared it.
    assert len(open_copy(tmp_path)) == COUNTS["train"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "overwritten"])
def test_damaged_records_are_told(tmp_path, copy, damage):
    dataset = open_copy(tmp_path)
    (path,) = (tmp_path / "tfds").rglob("*train.array_record*")
    data = path.read_bytes()
    middle = len(data) // 2
    overwritten = data[: middle // 4] + bytes(middle) + data[middle // 4 + middle :]
    changed = {"truncated": data[:middle], "empty": b"", "overwritten": overwritten}[damage]
    path.write_bytes(changed)
    with pytest.raises(InputError, match=r"full/1\.0\.0 are damaged .* delete that folder"):
        open_copy(tmp_path)
    if damage == "overwritten":  # under an open dataset
        with pytest.raises(InputError, match="are damaged"):
            [dataset.encoded(index) for index in range(7)]


# ------------------------------------------------------------------------- TFDS without TensorFlow


def test_shuffling_on_disk_gives_the_same_records(tmp_path, copy, monkeypatch):
    in_memory = records(tmp_path, "memory", "")
    spilled = []
    add = shuffle._Bucket.add
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    monkeypatch.setattr(
        shuffle._Bucket, "add", lambda self, *args: spilled.append(0) or add(self, *args)
    )
    assert records(tmp_path, "disk", "") == in_memory
    assert len(spilled) == sum(COUNTS.values())
    assert not list((tmp_path / "disk").rglob("bucket_*"))


def test_columns_are_cached_but_not_trusted_after_a_new_preparation(tmp_path, copy, monkeypatch):
    first = open_copy(tmp_path)
    folder = tmp_path / "tfds" / "clothing_dataset_small" / "full" / "1.0.0"
    (cache,) = folder.glob("columns-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_collect_columns", None)  # not called: the cache serves
        assert open_copy(tmp_path).id.tolist() == first.id.tolist()
    # The same number of records with other ids: prepared anew from renamed files.
    images, tree, _ = copy
    renamed = {name.replace(".jpg", "_.jpg"): data for name, data in images.items()}
    for name in images:
        (tree / name).rename(tree / name.replace(".jpg", "_.jpg"))
    monkeypatch.setattr(clothing, "FINGERPRINT", reference_fingerprint(renamed))
    stale = cache.read_bytes()
    shutil.rmtree(folder)
    open_copy(tmp_path, "test")
    cache.write_bytes(stale)
    assert_complete(tmp_path, renamed)
    cache.write_bytes(b"PK, but no archive")
    assert_complete(tmp_path, renamed)


class TinyBoxes(tfds.core.GeneratorBasedBuilder):
    """What a stranger's builder may look like."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=4),
            "item_id": np.int64,
            "weight": np.float32,
            "is_query": np.bool_,
            "bbox": tfds.features.BBoxFeature(),
            "series": tfds.features.Text(),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5, 0), "test": self._generate_examples(3, -1)}

    def _generate_examples(self, count, label):
        for index in range(count):
            image = np.full((10, 20, 3), index * 10, np.uint8)
            yield (
                index,
                {
                    "image": io.BytesIO(cv2.imencode(".png", image)[1].tobytes()),
                    "label": label if label < 0 else index % 3,
                    "item_id": 70 - 10 * (index // 2),
                    "weight": 0.5,
                    "is_query": index % 2 == 0,
                    "bbox": tfds.features.BBox(ymin=0.1, xmin=0.25, ymax=0.9, xmax=0.75),
                    "series": f"shoot {9 - index % 2}",
                    "id": "same for all",
                },
            )


def test_any_tfds_dataset(tmp_path):
    dataset = open_dataset("tiny_boxes", "train", data_dir=tmp_path)
    brightness = [int(dataset.image(i)[0, 0, 0]) // 10 for i in range(5)]
    assert sorted(brightness) == [0, 1, 2, 3, 4]
    assert dataset.label.tolist() == [index % 3 for index in brightness]
    assert dataset.label_names == ("0", "1", "2", "3")
    assert dataset.is_query.tolist() == [index % 2 == 0 for index in brightness]
    assert dataset.is_gallery.all()
    assert dataset.item is not None
    assert dataset.item.tolist() == [70 - 10 * (index // 2) for index in brightness]
    assert dataset.series is not None
    assert dataset.series.tolist() == [1 - index % 2 for index in brightness]
    assert dataset.bbox is not None
    np.testing.assert_allclose(dataset.bbox, [[5, 1, 15, 9]] * 5, rtol=1e-6)
    assert dataset.id.tolist() == [f"train/{index:06d}" for index in range(5)]
    by_item = open_dataset("tiny_boxes", "train", data_dir=tmp_path, label="item_id")
    assert by_item.label_names == ("50", "60", "70")
    assert [int(by_item.label_names[label]) for label in by_item.label] == dataset.item.tolist()


def test_tfds_dataset_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"no integer feature 'weight'.*item_id \(Tensor\)"):
        open_dataset("tiny_boxes", "train", data_dir=tmp_path, label="weight")
    assert not (tmp_path / "tiny_boxes").exists()  # told before anything is written
    with pytest.raises(InputError, match="3 of 3 images of 'tiny_boxes' have no label"):
        open_dataset("tiny_boxes", "test", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no split 'val': choose one of \['train', 'test'\]"):
        open_dataset("tiny_boxes", "val", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no split 'val\[:2\]'"):
        open_dataset("tiny_boxes", "val[:2]", data_dir=tmp_path)


def test_builder_of_a_named_module(tmp_path, monkeypatch):
    source = """
import tensorflow_datasets as tfds
class OnlyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))
    def _split_generators(self, dl_manager): ...
    def _generate_examples(self): ...
"""
    (tmp_path / "my_builders.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"no feature image \(Image\): it has text \(Text\)"):
        open_dataset("my_builders.only_text", "train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["clothes", "clothes/a/b", "a b", ""])
def test_unknown_dataset(tmp_path, name):
    with pytest.raises(
        InputError, match=r"ours are clothing_dataset_small.*CSV manifest"
    ) as caught:
        open_dataset(name, "train", data_dir=tmp_path)
    assert f"'{name}'" in str(caught.value)


def test_unknown_config_and_unusable_data_dir(tmp_path, copy):
    for config in ("/64px", "/full:9.0.0", "/full/x"):
        with pytest.raises(
            InputError, match=r"version is 1.0.0, .*configs are \['256px', 'full'\]"
        ):
            open_copy(tmp_path, config=config)
    with pytest.raises(InputError, match="'no.such.name' needs the module 'no'"):
        open_dataset("no.such.name", "train", data_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another data_dir"):
        open_copy(tmp_path, data_dir=tmp_path / "file" / "tfds")


# ---------------------------------------------------------------------------------------- command


def test_command_prepares_and_checks(tmp_path, copy, capsys):
    options = [f"--data_dir={tmp_path / 'tfds'}", f"--manual_dir={tmp_path / 'manual'}"]
    assert command.main(["prepare", "clothing_dataset_small", *options]) == 0
    output = capsys.readouterr().out
    assert "train: 7 images\nvalidation: 3 images\ntest: 4 images\n" in output
    _, tree, _ = copy
    rows = [{"path": name, "label": "hat"} for name in copy[0]]
    path = write_csv(tree / "photos.csv", rows)
    assert command.main(["prepare", str(path)]) == 0
    assert "14 images can be used" in capsys.readouterr().out
    victim = tree / next(iter(copy[0]))
    victim.write_bytes(victim.read_bytes()[:-40])
    assert command.main(["prepare", str(path)]) == 2  # only decoding finds it
    told = capsys.readouterr().err
    assert "error: 1 of 14 images" in told
    assert told.endswith("leave them out with --on_bad_image=skip\n")
    assert command.main(["prepare", str(path), "--on_bad_image=skip"]) == 0
    assert "13 images can be used" in capsys.readouterr().out
    assert command.main(["prepare", "clothes"]) == 2
