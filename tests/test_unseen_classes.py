"""The folds of benchmarks/unseen_classes.py keep classes apart."""

import csv
from pathlib import Path

import pytest
from beside import beside

from cbam_jax import InputError, datasets


@pytest.fixture(scope="module")
def script():
    return beside("../benchmarks/unseen_classes.py")


def test_no_photo_of_an_unseen_class_is_trained_on_and_every_class_is_unseen_once(
    script, tmp_path, rng
):
    classes = [f"class {name}" for name in "cabed"]
    rows = [
        (f"{number}.jpg", rng.choice(classes), rng.choice(["train", "validation", "test"]))
        for number in range(300)
    ]
    data = tmp_path / "photos.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    unseen = []
    for fold in (0, 1):
        seen = script.write_fold(data, fold, tmp_path / "fold.csv")
        assert seen == [f"class {name}" for name in ("ace", "bd")[fold]]
        with (tmp_path / "fold.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        by_split = {name: {Path(row["path"]).name for row in written if row["split"] == name}
                    for name in ("train", "validation", "test", "unseen")}  # fmt: skip
        for split in ("train", "validation", "test"):
            assert by_split[split] == {
                path for path, label, of in rows if of == split and label in seen
            }
        assert by_split["unseen"] == {
            path for path, label, of in rows if of != "train" and label not in seen
        }
        unseen += by_split["unseen"]
        assert datasets.is_manifest(str(tmp_path / "fold.csv"))
        assert Path(written[0]["path"]).parent == tmp_path
    assert sorted(unseen) == sorted(path for path, _, split in rows if split != "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\na.jpg,coat\n", "photos.csv has no column split: give a manifest with splits"),
        ("", "photos.csv has no column path, label, split"),
        (None, "photos.csv cannot be read .*No such file"),
    ],
)
def test_what_is_no_manifest_with_splits_gets_one_line(script, tmp_path, rows, message):
    data = tmp_path / "photos.csv"
    if rows is not None:
        data.write_text(rows)
    with pytest.raises(InputError, match=message):
        script.write_fold(data, 0, tmp_path / "fold.csv")
    assert not (tmp_path / "fold.csv").exists()
