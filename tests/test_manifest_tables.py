"""Tables that others wrote: many mistakes at once, and what means the same in another way."""

import os
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cbam_jax import InputError, data, experiment
from cbam_jax.configs import default
from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import decoding, image_files, open_dataset
from cbam_jax.datasets.tables import read_rows, read_table


def write(folder, lines, names=()):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((40, 30, 3), len(name), np.uint8))
    path = folder / "photos.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def mistakes(path):
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        [
            "path,label,is_query,x1,y1,x2,y2",
            "a.png,hat,1,1,2,3,4",
            "b.png,,maybe,1,2,3,4",
            "c.png,hat,1,1,2,1,4",
            "d.png,hat",
            "./a.png,coat,1,,,,",
            "",
            "e.png,hat,0,1,2,wide,4",
        ],
    )
    told = mistakes(path)
    assert told.startswith(f"{path} has 6 mistakes: row 3: is_query is 'maybe': write 1 or 0, true")
    assert "; row 3: label is empty: fill it or remove the row; row 4: the box [1.0, " in told
    assert "; row 5: it has 2 cells and the header 7: fill it up" in told
    assert "; row 6: the path a.png is also in row 2: remove one of them; row 8: x2 is 'wi" in told


def test_of_many_mistakes_ten_are_named_and_all_counted(tmp_path):
    path = write(tmp_path, ["path,label", *(f"{i}.png," for i in range(500))])
    told = mistakes(path)
    assert "has 500 mistakes: row 2: label is empty" in told
    assert "row 11: " in told
    assert "row 12: " not in told
    assert told.endswith("; and 490 more mistakes")


def test_separators_and_capitals_as_spreadsheets_write_them(tmp_path):
    path = write(
        tmp_path,
        ["\ufeffPath;LABEL;Split;Brand", "a,b.png;hat;train;Ö", '"c;d.png";coat;test;'],
        ["a,b.png", "c;d.png"],
    )
    table = read_table(path)
    assert table["id"] == ["a,b.png", "c;d.png"]
    assert (table["label"], table["split"]) == (["hat", "coat"], ["train", "test"])
    assert [*read_rows(path)[0]] == ["path", "label", "split", "Brand"]
    # With a comma in the header a semicolon is text; beside path another Path is not taken for it.
    path = write(tmp_path, ["path,label,Path", "a;b.png,hat;cap,x"], ["a;b.png"])
    assert (read_table(path)["id"], read_table(path)["label"]) == (["a;b.png"], ["hat;cap"])


def test_flags_as_other_programs_write_them(tmp_path):
    words = ["1.0", "T", "t", "Y", "TRUE", "yes", "0.0", "F", "f", "n", "False", "0"]
    lines = [f"{i}.png,hat,{word}" for i, word in enumerate(words)]
    table = read_table(write(tmp_path, ["path,label,is_query", *lines]))
    assert table["is_query"] == [True] * 6 + [False] * 6


def test_a_row_without_a_box_is_its_whole_image(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    lines = [
        "path,label,x1,y1,x2,y2",
        "a.png,hat,4,5,20,21",
        "b.png,hat,,,,",
        "c.png,hat,nan,nan,,",
    ]
    dataset = open_dataset(str(write(tmp_path, lines, names)), "all")
    assert np.isnan(dataset.bbox).tolist() == [[False] * 4, [True] * 4, [True] * 4]
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    cv2.imwrite(str(tmp_path / "b.png"), image)
    options = {"image_size": 16, "crop_fraction": 0.8}
    whole = data.eval_image(dataset, 1, crop_to_box=False, **options)
    np.testing.assert_array_equal(data.eval_image(dataset, 1, crop_to_box=True, **options), whole)
    assert not dataset.mask(1).any()
    told = mistakes(write(tmp_path, ["path,label,x1,y1,x2,y2", "a.png,hat,4,5,20,"]))
    assert "row 2: the box [4.0, 5.0, 20.0, nan] is empty" in told


NFC, NFD = (unicodedata.normalize(form, "p\u00e9ch\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        ("a\\0.png", "a/0.png"),
        ("a\\b c\\0.png", "a/b c/0.png"),
        ("a/0.png", "a/0.PNG"),
        ("A/Photo.png", "a/photo.png"),
        (f"{NFD}/0.png", f"{NFC}/0.png"),
        (f"{NFC}\\0.JPG", f"{NFD}/0.jpg"),
        ("../x/a\\0.png", "a/0.png"),
    ],
)
def test_a_path_from_another_system_is_found(tmp_path, written, on_disk, capsys):
    lines = ["path,label", f'"{written}",hat', "b.png,hat"]
    path = write(tmp_path / "x", lines, [on_disk, "b.png"])
    table = read_table(path)
    assert os.path.samefile(table["path"][0], tmp_path / "x" / on_disk)
    assert table["id"][0].endswith(on_disk)
    assert len(open_dataset(str(path), "all")) == 2
    told = f"1 paths are spelled in another way on the disk ({written} is "
    assert told in capsys.readouterr().err


def test_a_path_that_could_be_two_files_is_not_guessed(tmp_path):
    path = write(tmp_path, ["path,label", "A.png,hat", "a.png,hat"], ["a.png", "a.PNG"])
    with pytest.raises(InputError, match=r"1 of 2 images .*A\.png \(no such file\)"):
        open_dataset(str(path), "all")


def test_labels_with_accents_in_one_character_and_in_two_are_one_class(tmp_path):
    lines = ["path,label,split", f"a.png,{NFC},{NFD}", f"b.png,{NFD},{NFC}"]
    path = write(tmp_path, lines, ["a.png", "b.png"])
    dataset = open_dataset(str(path), NFC)
    assert dataset.label_names == (NFC,)
    assert len(dataset) == 2
    assert len(open_dataset(str(path), NFD)) == 2


def test_a_photo_by_its_relative_and_its_absolute_path_is_one(tmp_path):
    path = write(tmp_path, ["path,label", "a.png,hat", f"{tmp_path}/a.png,coat"], ["a.png"])
    assert "row 3: the path " in mistakes(path)


def test_what_is_read_is_what_was_written(tmp_path):
    lines = ["label,path,price", 'hat,"a, b.png","1,50"', ",,", "coat,./c.png,2"]
    table = read_table(write(tmp_path, lines))
    assert table["id"] == ["a, b.png", "c.png"]
    assert table["label"] == ["hat", "coat"]


def boxed(tmp_path):
    """Photos of 30 x 40 pixels and boxes: on the edge, beyond it on either side, none; a PNG that
    EXIF turns, so that it is 40 x 30."""
    boxes = ["28,2,90,9", "30,0,35,9", "-9,-9,-1,5", ",,,", "35,1,39,9", "0,39.5,5,99"]
    names = [f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(6)]
    lines = [f"{name},hat,{box}" for name, box in zip(names, boxes, strict=True)]
    path = write(tmp_path, ["path,label,x1,y1,x2,y2", *lines], names)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 40)).save(tmp_path / "4.jpg", "PNG", exif=exif)
    return path


def test_boxes_are_checked_when_they_will_be_cut_out(tmp_path, capsys):
    path = boxed(tmp_path)
    assert len(open_dataset(str(path), "all")) == 6
    message = (
        r"2 of 6 boxes of .*photos\.csv hold no pixel of their image: "
        r"1\.png \(\[30\.0, 0\.0, 35\.0, 9\.0\], 30 x 40 pixels\); 2\.jpg .*"
        "on_bad_image='skip', or set crop_to_box=False$"
    )
    with pytest.raises(InputError, match=message):
        open_dataset(str(path), "all", crop_to_box=True)
    kept = open_dataset(str(path), "all", crop_to_box=True, on_bad_image="skip")
    assert kept.id.tolist() == ["0.jpg", "3.png", "4.jpg", "5.png"]
    assert "skipped: 2 of 6 boxes of" in capsys.readouterr().err
    for index in range(4):  # What is kept can be cut out; what is not, cannot.
        data.eval_image(kept, index, image_size=8, crop_to_box=True)
    every = open_dataset(str(path), "all")
    for index in (1, 2):
        with pytest.raises(InputError, match="holds no pixel"):
            data.eval_image(every, index, image_size=8, crop_to_box=True)


def test_a_run_with_a_box_off_its_photo_is_refused_when_its_data_is_opened(tmp_path):
    config = default.get_config()
    config.data.name, config.data.crop_to_box = str(boxed(tmp_path)), True
    with pytest.raises(InputError, match="2 of 6 boxes of"):
        experiment.open_split(config, "all")


def test_the_same_photo_in_two_splits_is_counted_and_told(tmp_path, rng, capsys):
    names = [f"{split}{i}.png" for split in ("train", "test") for i in range(5)]
    lines = ["path,label,split", *(f"{name},hat,{name[:-5]}" for name in names)]
    path = write(tmp_path, lines)
    for name in names:
        cv2.imwrite(str(tmp_path / name), rng.integers(0, 256, (9, 9, 3), np.uint8))
    open_dataset(str(path), "train")
    assert "two splits" not in capsys.readouterr().err
    (tmp_path / "test1.png").write_bytes((tmp_path / "train3.png").read_bytes())
    (tmp_path / "test2.png").unlink()
    (tmp_path / "test2.png").symlink_to("train0.png")
    (tmp_path / "train4.png").write_bytes((tmp_path / "train1.png").read_bytes())
    for split in ("train", "test"):
        assert len(open_dataset(str(path), split)) == 5
    told = capsys.readouterr().err
    assert told.count("2 images are in two splits, equal to the byte") == 1  # Told once.
    assert "train3.png (train) = test1.png (test)" in told
    assert "train1.png" not in told  # Twice in one split: verify tells.


def test_a_heic_that_is_listed_is_named_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path, ["path,label", "a.png,hat", "b.heic,hat"], ["a.png"])
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60))
    monkeypatch.setattr(decoding, "_reads_heic", lambda: False)
    with pytest.raises(InputError, match=r"1 of 2 .*b\.heic \(HEIC, .*pip install 'cbam_jax\[heic"):
        open_dataset(str(path), "all")
    assert open_dataset(str(path), "all", on_bad_image="skip").id.tolist() == ["a.png"]


@pytest.mark.parametrize("arguments", [["prepare"], ["verify"], ["resize", "~/small"]])
def test_every_command_finds_a_manifest_at_home(tmp_path, monkeypatch, capsys, arguments):
    write(tmp_path, ["path,label", "a.png,hat", "bb.png,hat"], ["a.png", "bb.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.main([arguments[0], "~/photos.csv", *arguments[1:]]) == 0, (
        capsys.readouterr().err
    )
    assert (tmp_path / "small" / "manifest.csv").exists() == (arguments[0] == "resize")


def test_a_path_at_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write(tmp_path / "home", [], ["a.png"])
    path = write(tmp_path / "csv", ["path,label", "~/a.png,hat", "~/b.png,hat"], ["~/b.png"])
    table = read_table(path)
    assert table["id"] == [f"{tmp_path}/home/a.png", "~/b.png"]
    assert all(map(os.path.exists, table["path"]))


MISSPELT = {
    ("train", "trian", "test"): "'trian' (first in row 4) for 'train'",
    ("Train", "test"): "'Train' (first in row 2) for 'train'",
    ("train", "val"): "'val' (first in row 4) for 'validation'",
    ("tests", "tes", "tezt"): "'tests' (first in row 2) for 'test', 'tes' (first in row 4) for",
    ("mine", "Mine"): "'Mine' (first in row 4) for 'mine'",
    ("train", "validation", "test", "dev", "tester", "trainval", "gallery", "rain2"): None,
}


@pytest.mark.parametrize("splits", MISSPELT)
def test_splits_that_look_misspelt_are_told_with_their_row(splits, tmp_path, capsys):
    lines = [f"{i}.png,hat,{split}" for i, split in enumerate(np.repeat(splits, 2))]
    read_table(write(tmp_path, ["path,label,split", *lines]))
    told, expected = capsys.readouterr().err, MISSPELT[splits]
    assert told.count("\n") == (expected is not None)
    assert (expected or "") in told


def test_prepare_counts_each_split(tmp_path, capsys):
    names = ["a.png", "bb.png", "ccc.png", "dddd.png"]
    splits = ["train", "train", "Train", "test"]
    lines = [f"{name},hat,{split}" for name, split in zip(names, splits, strict=True)]
    path = write(tmp_path, ["path,label,split", *lines], names)
    (tmp_path / "bb.png").write_bytes(b"")
    assert command.main(["prepare", str(path), "--on_bad_image=skip"]) == 0
    assert capsys.readouterr().out.endswith(" 3 images can be used: train 1, Train 1, test 1\n")


def test_only_files_of_one_length_are_read(tmp_path, monkeypatch):
    contents = [b"a" * 9000, b"a" * 9000, b"b" * 9000, b"a" * 8999, b"a" * 8999 + b"c", b"", b"d"]
    files = [str(tmp_path / str(i)) for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        Path(file).write_bytes(content)
    assert image_files.equal_files([*files, str(tmp_path / "absent")]) == [[0, 1]]
    monkeypatch.setattr(image_files, "open_regular", None)
    assert image_files.equal_files(files[3:4] + files[5:]) == []
