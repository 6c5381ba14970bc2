"""Photos, tables and copies of datasets that someone damaged, or made to do harm."""

import contextlib
import gzip
import hashlib
import io
import os
import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.datasets import clothing_dataset_small as clothing
from cbam_jax.datasets import decode_image, open_dataset, prepared
from cbam_jax.datasets.deepfashion import lists
from cbam_jax.datasets.manifest import ImageFiles

RNG = np.random.default_rng(21)
PHOTO = RNG.integers(0, 255, (24, 30, 3), np.uint8)


def encoded(kind, *options):
    return cv2.imencode(kind, PHOTO, list(options))[1].tobytes()


JPEG, PNG, WEBP = encoded(".jpg"), encoded(".png"), encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80)
FRAME = JPEG.index(b"\xff\xc0")


def png(width, height, *, depth=8, colour=2, data=b"", extra=()):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d))
        for name, d in chunks
    )


def patched(data, place, replacement):
    return data[:place] + replacement + data[place + len(replacement) :]


def tiff(width=20, height=20, packed=1, more=()):
    """Grey, of one strip; with ``more`` tags and their numbers."""
    tags = [(256, width), *more, (257, height), (258, 8), (259, packed), (262, 1), (273, 200)]
    tags += [(277, 1), (278, height), (279, 400)]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + bytes(4)
    return head.ljust(200, b"\0") + bytes(range(1, 201)) * 2


def test_a_tiff_without_compression_is_read():
    assert decode_image(tiff()).tobytes() == bytes(n for n in [*range(1, 201)] * 2 for _ in "RGB")


LARGE, DAMAGED = "pixels, more than the ", "cannot be decoded"
# What is in each file, and a part of the line that refuses it.
IMAGES = {
    "an empty file": (b"", DAMAGED),
    "text named .jpg": (b"hello, I am a photo\n" * 9, DAMAGED),
    "zeros": (bytes(4096), DAMAGED),
    "an HTML page": (b"<!DOCTYPE html><html><script>alert(1)</script></html>", DAMAGED),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="x()"/>', DAMAGED),
    "half a JPEG": (JPEG[: len(JPEG) // 2], DAMAGED),
    "a JPEG without its last two bytes": (JPEG[:-2], DAMAGED),
    "a JPEG's beginning alone": (JPEG[:2], DAMAGED),
    "half a PNG": (PNG[: len(PNG) // 2], DAMAGED),
    "half a WebP": (WEBP[: len(WEBP) // 2], DAMAGED),
    "a PNG with a changed byte": (patched(PNG, 500, bytes([PNG[500] ^ 1])), DAMAGED),
    "a JPEG that claims 32,000 x 32,000": (
        patched(JPEG, FRAME + 5, struct.pack(">HH", 32_000, 32_000)),
        LARGE,
    ),
    "a JPEG that claims 4,000 x 4,000 and holds 24 x 30": (
        patched(JPEG, FRAME + 5, struct.pack(">HH", 4_000, 4_000)),
        DAMAGED,
    ),
    "a JPEG with a size of nothing": (patched(JPEG, FRAME + 5, bytes(4)), DAMAGED),
    "a PNG that claims 50,000 x 50,000": (png(50_000, 50_000), LARGE),
    "a PNG that claims 2**31 - 1 x 1": (png(2**31 - 1, 1), LARGE),
    "a PNG of one bit and a palette, 16,000 x 16,000": (
        png(16_000, 16_000, depth=1, colour=3, extra=((b"PLTE", bytes(6)), (b"tRNS", b"\0"))),
        LARGE,
    ),
    "a PNG with a chunk of 2 GB": (
        png(10, 10, extra=((b"tEXt", b""),)).replace(b"\0\0\0\0tEXt", b"\x7f\xff\xff\xfftEXt"),
        DAMAGED,
    ),
    "a PNG with pixels of 2 GB": (patched(PNG, 33, b"\x7f\xff\xff\xff"), DAMAGED),
    "a PNG without its end": (PNG[:-12], DAMAGED),
    "a PNG of no rows": (png(10, 0), DAMAGED),
    "a PNG without pixels": (png(10, 10), DAMAGED),
    "a GIF that claims 65,535 x 65,535": (b"GIF89a" + b"\xff" * 4 + bytes(9), LARGE),
    "a BMP that claims 20,000 x 20,000, packed": (
        b"BM" + struct.pack("<IHHIIiiHHII", 1080, 0, 0, 1078, 40, 20_000, 20_000, 1, 8, 1, 2)
        + bytes(1040),
        LARGE,
    ),
    "a TIFF that claims 60,000 x 60,000": (
        b"II*\0" + struct.pack("<IH", 8, 2)
        + struct.pack("<HHII", 256, 4, 1, 60_000) + struct.pack("<HHII", 257, 4, 1, 60_000)
        + bytes(4),
        LARGE,
    ),
    "a TIFF that claims two sizes": (tiff(width=60_000, more=((256, 20),), height=60_000), LARGE),
    "a TIFF in a compression that is not read": (tiff(packed=34712), DAMAGED),
    "a TIFF in a compression that is none": (tiff(packed=65_000), DAMAGED),
    "a TIFF whose list of tags is itself": (b"II*\0" + struct.pack("<I", 4) * 9, DAMAGED),
    "a TIFF whose tags lie beyond all files": (
        b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(16),
        DAMAGED,
    ),
    "a WebP that claims 16,383 x 16,383": (patched(WEBP, 26, b"\xff\x3f\xff\x3f"), LARGE),
    "an AVIF that claims 40,000 x 40,000": (
        b"\0\0\0\x1cftypavif" + bytes(12)
        + b"\0\0\0\x14ispe" + struct.pack(">III", 0, 40_000, 40_000),
        LARGE,
    ),
    "a JPEG 2000 that claims 100,000 x 100,000": (
        b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x16ihdr" + struct.pack(">II", 100_000, 100_000),
        LARGE,
    ),
    "a PPM that claims 99,999 x 99,999": (b"P6\n# a\n99999 99999\n255\n" + bytes(30), LARGE),
    "a Radiance picture that claims 30,000 x 30,000": (
        b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n" + bytes(30),
        LARGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", IMAGES)
def test_an_image_is_refused_in_one_line(what):
    data, message = IMAGES[what]
    with pytest.raises(InputError, match=message) as caught:
        decode_image(data, name="a.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp", ".bmp", ".tiff"])
def test_damaged_bytes_end_in_an_image_or_in_one_line(kind, rng):
    whole = encoded(kind)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), 3):
            data[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            image = decode_image(bytes(data[: rng.integers(1, len(data) + 1)]))
            assert image.dtype == np.uint8
            assert image.shape[2] == 3


def link(target):
    return lambda path: path.symlink_to(target)


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 40)


# What stands in the place of a file, and a part of the line that refuses it.
NO_FILES = {
    "a pipe": (os.mkfifo, "is a pipe"),
    "a folder": (os.mkdir, "is a folder"),
    "a link to a device without end": (link("/dev/zero"), "is a device"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links|cannot read"),
    "a link to nothing": (link("nothing"), "No such file|no such file|no manifest"),
    "a file of a terabyte": (sparse, "has 1099511627776 bytes"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_stands_in_a_photos_place(what, tmp_path):
    make, message = NO_FILES[what]
    path = tmp_path / "photo.jpg"
    make(path)
    with pytest.raises(InputError, match=message):
        ImageFiles((str(path),))[0]


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("on_bad_image", ["fail", "skip"])
def test_what_stands_in_the_place_of_a_manifests_photo(what, on_bad_image, tmp_path, capsys):
    path = tmp_path / "photo.jpg"
    NO_FILES[what][0](path)
    (tmp_path / "photo.png").write_bytes(PNG)
    (tmp_path / "x.csv").write_text("path,label,split\nphoto.jpg,a,test\nphoto.png,b,test\n")
    if on_bad_image == "skip":
        dataset = open_dataset(str(tmp_path / "x.csv"), "test", on_bad_image="skip")
        assert dataset.id.tolist() == ["photo.png"]
        assert "1 of 2 images" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match="1 of 2 .*(not a regular|no such|Too many|larger)"):
            open_dataset(str(tmp_path / "x.csv"), "test")


@pytest.mark.parametrize("what", NO_FILES)
def test_what_stands_in_a_manifests_place(what, tmp_path):
    make, message = NO_FILES[what]
    make(tmp_path / "x.csv")
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(str(tmp_path / "x.csv"), "test")
    assert "\n" not in str(caught.value)


ROW = b"photo.png,a,test\n"
HEADER = b"path,label,split\n"
# A manifest beside photo.png, and a part of the line that refuses it.
MANIFESTS = {
    "an empty manifest": (b"", "no column path"),
    "a manifest of another encoding": (HEADER + b"\xff\xfe,a,b\n", "not UTF-8"),
    "a manifest in UTF-16": ((HEADER + ROW).decode().encode("utf-16"), "not UTF-8"),
    "a photo as a manifest": (PNG, "not UTF-8|not a CSV"),
    "a quote that never ends": (HEADER + b'"photo.png,a,test\n' * 5, "not a CSV file: row 2: "),
    "a cell of a megabyte": (HEADER + b"x" * (1 << 20) + b",a,test\n", "not a CSV"),
    "a column twice": (b"path,label,label\nphoto.png,a,b\n", "twice"),
    "a row of one cell more": (HEADER + b"photo.png,a,test,x\n", "4 cells and the header 3"),
    "a path with a zero byte": (HEADER + b"pho\0to.png,a,test\n", "cannot be used"),
    "a path of 100,000 letters": (
        HEADER + b"p" * 100_000 + b",a,test\n",
        "path has 100000 letters",
    ),
    "a path to a device": (HEADER + b"/dev/zero,a,test\n", "not a regular file"),
    "a path to a folder": (HEADER + b".,a,test\n", "not a regular file"),
    "a path that clears the screen": (HEADER + b"\x1b[2Jp.png,a,test\n", "cannot be used"),
    "50,000 columns": (b",".join(b"c%d" % n for n in range(50_000)) + b"\n", "no column path"),
    "20,000 columns beside the two": (
        b"path,label," + b",".join(b"c%d" % n for n in range(20_000)) + b"\nphoto.png,a\n",
        "row 2: it has 2 cells and the header 20002",
    ),
    "a label that 2,000 rows would make room for": (
        b"path,label\n" + b"l" * 130_000 + b"," + b"l" * 130_000 + b"\np,a" * 2_000,
        "label has 130000 letters",
    ),
    "a path of 50,000 folders above": (
        HEADER + b"../" * 40_000 + b"p,a,test\n",
        "letters: shorten",
    ),
    "a split of 100,000 letters": (
        HEADER + b"photo.png,a," + b"t" * 100_000 + b"\n",
        "split has 100000 letters",
    ),
    "a label of two lines": (HEADER + b'photo.png,"a\nb",test\n', "control characters"),
    "a label that clears the screen": (HEADER + b"photo.png,\x1b[2J,test\n", "control characters"),
    "a label with a zero byte": (HEADER + b"photo.png,hat\0,test\n", "control characters"),
    "a column that clears the screen, twice": (
        b"path,label,\x1b[2J,\x1b[2J\nphoto.png,a,1,1\n",
        r"'\\x1b\[2J' twice",
    ),
    "a box of 10**300": (b"path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,1e300\n", "is of no image"),
    "a box with an underscore": (b"path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,1_0\n", "y2 is"),
    "a box in other digits": (
        "path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,\u0661\n".encode(),
        "y2 is",
    ),
    "a box that is no number": (b"path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,nine\n", "y2 is"),
    "a box of infinity": (b"path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,inf\n", "box"),
    "a box of NaN": (b"path,label,x1,y1,x2,y2\nphoto.png,a,1,1,9,nan\n", "box"),
    "a box turned around": (b"path,label,x1,y1,x2,y2\nphoto.png,a,9,1,1,9\n", "box"),
    "a flag of 2": (b"path,label,is_query\nphoto.png,a,2\n", "is_query is '2'"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_is_refused_in_one_line(what, tmp_path):
    content, message = MANIFESTS[what]
    (tmp_path / "photo.png").write_bytes(PNG)
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(str(tmp_path / "x.csv"), "all")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5_000


def test_class_folders_with_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"coat", b"hat"):
        os.mkdir(os.path.join(folder, name))
        for file in (b"a.png", b"b.png", b"c.png"):
            with open(os.path.join(folder, name, file), "wb") as opened:
                opened.write(PNG)
    for file in (b"\xff\xfe.png", b"a\x1b[2J\n.png"):
        with open(os.path.join(folder, b"hat", file), "wb") as opened:
            opened.write(PNG)
    with pytest.raises(InputError, match="2 of 8 images.*control characters or is not UTF-8"):
        open_dataset(f"{tmp_path}/", "all")
    for _ in range(2):  # The second time by the list that the first has written.
        dataset = open_dataset(f"{tmp_path}/", "all", on_bad_image="skip")
        assert len(dataset) == 6


def packed(*members, kind="gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = ("x/train/hat/a.jpg", JPEG, {})
ARCHIVES = {
    "half an archive": packed(GOOD)[:500],
    "an archive with a changed byte": patched(packed(GOOD), 200, b"\x55\xaa\x55"),
    "an archive that is text": b"hello",
    "an empty archive": b"",
    "an archive in xz, cut off": packed(GOOD, kind="xz")[:500],
    "an archive in bzip2, cut off": packed(GOOD, kind="bz2")[:500],
    "a member of two gigabytes of zeros": gzip.compress(
        tarfile.TarInfo("x/other").tobuf()[:124] + b"%011o\0" % (2 << 30) + bytes(376)
    ),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_is_refused_in_one_line(what, tmp_path):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(ARCHIVES[what])
    with pytest.raises(InputError, match="x.tar.gz is damaged"):
        clothing.read_archive(path)


def test_links_devices_and_other_paths_of_an_archive_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(packed(
        GOOD,
        ("../../train/hat/b.jpg", JPEG, {}),
        ("/train/hat/c.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("x/train/hat/d.jpg", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("x/train/hat/e.jpg", b"", {"type": tarfile.FIFOTYPE}),
    ))  # fmt: skip
    before = sorted(tmp_path.parent.rglob("*"))
    assert clothing.read_archive(path) == {"train/hat/a.jpg": JPEG, "train/hat/b.jpg": JPEG}
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("what", ["a pipe", "a link to a device without end"])
def test_what_stands_in_an_archives_place(what, tmp_path):
    path = tmp_path / "clothing-dataset-small.tar"
    NO_FILES[what][0](path)
    with pytest.raises(InputError, match=NO_FILES[what][1]):
        clothing.read_manual_dir(tmp_path)


# A row of a list of DeepFashion's, and a part of the problem that is told.
LISTED = {
    "a path that leads out of its folder": ("img/../../secret.jpg 1 1 1 2 3 4", "leads out of"),
    "a whole path": ("/etc/passwd 1 1 1 2 3 4", "leads out of"),
    "a listed path with a zero byte": ("img/a\0.jpg 1 1 1 2 3 4", "leads out of"),
    "a box of 400 digits": (f"img/a.jpg 1 1 1 2 3 {'9' * 400}", "no whole numbers"),
    "a box of 10**30": (f"img/a.jpg 1 1 1 2 3 {10**30}", "no whole numbers"),
    "a number with an underscore": ("img/a.jpg 1 1 1 2 3 1_0", "no whole numbers"),
    "a number in other digits": ("img/a.jpg 1 1 1 2 3 \u0661", "no whole numbers"),
    "a row cut off": ("img/a.jpg 1 1 1", "has 4 words"),
}


class Layout:
    def __init__(self, path):
        self.lists = {"boxes": path, "landmarks": path}


@pytest.mark.parametrize("what", LISTED)
def test_a_list_tells_what_is_wrong(what, tmp_path):
    row, message = LISTED[what]
    path = tmp_path / "list.txt"
    path.write_text(f"1\nimage numbers\n{row}\n")
    problems = []
    assert lists._read_boxes(Layout(path), 7, problems) == {}
    assert len(problems) == 1
    assert message in problems[0]
    assert problems[0].isprintable()
    assert len(problems[0]) < 600


def test_numbers_beyond_any_picture_in_other_lists(tmp_path):
    assert lists._item_number("id_" + "9" * 30) is None
    assert lists._item_number("id_" + "9" * 5_000) is None
    assert lists._shoot("img/A/B/id_1/" + "9" * 30 + "_1_front.jpg", 7) == 700
    path = tmp_path / "list.txt"
    path.write_text("1\nname kind\nimg/a.jpg 1 1 0 1000000000000 5\n")
    problems = []
    assert lists._read_landmarks(Layout(path), problems) == {}
    assert "no whole numbers" in problems[0]


@pytest.mark.parametrize("what", ["a pipe", "a link to a device without end"])
def test_what_stands_in_a_lists_place(what, tmp_path):
    NO_FILES[what][0](tmp_path / "list.txt")
    with pytest.raises(InputError, match=NO_FILES[what][1]):
        lists.read_list(tmp_path / "list.txt", [], columns=2)


TRAIN_LABEL = b"train\nlabel"


# What stands in the place of a prepared dataset's dataset_info.json.
INFOS = {
    "an empty info of a dataset": b"",
    "half an info of a dataset": b'{"name": "synthetic_garments", ',
    "an info that is no UTF-8": b'{"name": "\xff\xfe"}',
    "an info that is a list": b"[]",
    "an info nested 100,000 deep": b'{"name":' * 100_000,
    "an info with a field that is none": b'{"no_such_field": 1}',
    "an info of another type": b'{"splits": 5}',
}


@pytest.mark.parametrize("what", INFOS)
def test_a_prepared_dataset_whose_info_is_damaged(what, tmp_path):
    folder = prepared.make_builder("synthetic_garments/clean", tmp_path, None, "fail").data_path
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_bytes(INFOS[what])
    with pytest.raises(InputError, match="is damaged .*delete") as caught:
        open_dataset("synthetic_garments/clean", "test", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def write_columns(path, **changes):
    columns = {"label": np.arange(4), "id": np.array(list("abcd"))}
    state = prepared._digest_of(columns, "state")
    np.savez(path, **{**columns, "state": np.array(state), **changes})


COLUMNS = {
    "other labels": {"label": np.array([3, 2, 1, 0])},
    "labels out of range": {"label": np.arange(1000, 1004)},
    "labels that are text": {"label": np.array(list("abcd"))},
    "labels of another length": {"label": np.arange(5)},
    "objects": {"label": np.array([{}, 1, 2, 3], dtype=object)},
    "another state": {"state": np.array("x" * 64)},
    "a column more": {"bbox": np.zeros((4, 4))},
}


def assert_read_anew(tmp_path, monkeypatch):
    """The columns in the folder are not believed, but collected again, and then believed."""

    class Builder:
        data_dir = str(tmp_path)

    collected = {"label": np.array([7, 7, 7]), "id": np.array(list("xyz"))}
    monkeypatch.setattr(prepared, "_state", lambda folder: "state")
    monkeypatch.setattr(prepared, "_collect_columns", lambda *_: dict(collected))
    read = prepared._read_columns(Builder(), (), "train", "label")
    np.testing.assert_equal(read, collected)
    monkeypatch.setattr(prepared, "_collect_columns", None)
    np.testing.assert_equal(prepared._read_columns(Builder(), (), "train", "label"), collected)


@pytest.fixture
def column_file(tmp_path):
    return tmp_path / f"columns-{hashlib.sha256(TRAIN_LABEL).hexdigest()[:12]}.npz"


@pytest.mark.parametrize("what", COLUMNS)
def test_kept_columns_are_not_believed(what, tmp_path, column_file, monkeypatch):
    write_columns(column_file, **COLUMNS[what])
    assert_read_anew(tmp_path, monkeypatch)


@pytest.mark.parametrize("what", ["a pipe", "a link to a device without end"])
def test_what_stands_in_the_place_of_kept_columns(what, tmp_path, column_file, monkeypatch):
    NO_FILES[what][0](column_file)
    assert_read_anew(tmp_path, monkeypatch)


def test_kept_columns_that_grow_in_memory(tmp_path, column_file, monkeypatch):
    columns = {"label": np.zeros(1 << 16, np.int64)}
    state = np.array(prepared._digest_of(columns, "state"))
    np.savez_compressed(column_file, state=state, **columns)
    assert_read_anew(tmp_path, monkeypatch)


def test_kept_columns_with_damaged_bytes(tmp_path, column_file, monkeypatch, rng):
    write_columns(column_file)
    whole = column_file.read_bytes()
    for place in rng.integers(0, len(whole), 40):
        column_file.write_bytes(patched(whole, int(place), bytes([whole[place] ^ 0x41])))
        try:
            read = prepared._load_arrays(column_file)
        except Exception:
            continue
        state = str(read.pop("state"))
        good = state == prepared._digest_of(read, "state")
        assert not good or read["label"].tolist() == [0, 1, 2, 3]
