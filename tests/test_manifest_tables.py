"""Tables that others wrote: many mistakes at once, and what means the same in another way."""

import os
import unicodedata

import cv2
import numpy as np
import pytest

from cbam_jax import InputError, data
from cbam_jax.datasets import open_dataset
from cbam_jax.datasets.tables import read_table


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
