"""Manifests of SOP, CUB and Cars from copies of a few images."""

import csv

import numpy as np
import pytest
from scipy.io import savemat

from cbam_jax import InputError
from cbam_jax.datasets.__main__ import main
from cbam_jax.datasets.benchmarks import write_manifest


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def make_sop(folder):
    header = "image_id class_id super_class_id path\n"
    (folder / "Ebay_train.txt").write_text(header + "1 1 1 a/1.JPG\n2 1 1 a/2.JPG\n3 2 1 b/3.JPG\n")
    (folder / "Ebay_test.txt").write_text(header + "4 11319 1 c/4.JPG\n")
    touch(folder, ["a/1.JPG", "a/2.JPG", "b/3.JPG", "c/4.JPG"])
    return [("a/1.JPG", 1, 1), ("a/2.JPG", 1, 1), ("b/3.JPG", 2, 1), ("c/4.JPG", 11319, 0)]


def make_cub(folder):
    (folder / "images.txt").write_text("1 001.A/x.jpg\n2 100.B/y.jpg\n3 101.C/z.jpg\n")
    # In another order, and with the halves it came with, which are not those of retrieval.
    (folder / "image_class_labels.txt").write_text("3 101\n1 1\n2 100\n")
    (folder / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n")
    touch(folder, ["images/001.A/x.jpg", "images/100.B/y.jpg", "images/101.C/z.jpg"])
    return [
        ("images/001.A/x.jpg", 1, 1), ("images/100.B/y.jpg", 100, 1),
        ("images/101.C/z.jpg", 101, 0),
    ]  # fmt: skip


def make_cars(folder):
    kind = [("relative_im_path", object), ("bbox_x1", int), ("class", int), ("test", int)]
    rows = [("car_ims/1.jpg", 3, 98, 1), ("car_ims/2.jpg", 5, 99, 0), ("car_ims/3.jpg", 5, 2, 0)]
    savemat(folder / "cars_annos.mat", {"annotations": np.array(rows, kind)[None]})
    touch(folder, [row[0] for row in rows])
    return [("car_ims/1.jpg", 98, 1), ("car_ims/2.jpg", 99, 0), ("car_ims/3.jpg", 2, 1)]


MAKERS = {"sop": make_sop, "cub": make_cub, "cars": make_cars}


@pytest.mark.parametrize("name", MAKERS)
def test_halves_are_parted_by_class(name, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    rows = MAKERS[name](folder)
    path = tmp_path / "out.csv"
    assert main(["manifest", name, str(folder), str(path)]) == 0
    assert f"{len(rows)} images" in capsys.readouterr().out
    with path.open(newline="") as file:
        found = [(row["path"], int(row["label"]), row["split"]) for row in csv.DictReader(file)]
    halves = {0: "test", 1: "train"}
    assert found == [(str(folder / image), label, halves[half]) for image, label, half in rows]
    write_manifest(name, folder, path, validation=1)
    with path.open(newline="") as file:
        kept = {row["label"] for row in csv.DictReader(file) if row["split"] == "validation"}
    assert kept == {str(max(label for _, label, half in rows if half))}


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_folder_gets_one_line(name, tmp_path, capsys):
    assert main(["manifest", name, str(tmp_path), str(tmp_path / "out.csv")]) == 2
    error = capsys.readouterr().err
    assert "is missing: give the folder that has it" in error
    assert error.count("\n") == 1
    MAKERS[name](tmp_path)
    last = {"sop": "c/4.JPG", "cub": "images/101.C/z.jpg", "cars": "car_ims/3.jpg"}[name]
    (tmp_path / last).unlink()
    with pytest.raises(InputError, match=f"{last} is missing: unpack the images"):
        write_manifest(name, tmp_path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_damaged_lists_are_named(tmp_path):
    make_sop(tmp_path)
    with pytest.raises(InputError, match="--validation=2: sop trains on 2 classes"):
        write_manifest("sop", tmp_path, tmp_path / "out.csv", validation=2)
    (tmp_path / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n4 1 c/4.JPG\n")
    with pytest.raises(InputError, match="Ebay_test.txt:2 has 3 fields, expected 4"):
        write_manifest("sop", tmp_path, tmp_path / "out.csv")
    make_cub(tmp_path)
    (tmp_path / "image_class_labels.txt").write_text("1 one\n2 100\n3 101\n")
    with pytest.raises(InputError, match="is no copy of cub .*: give CUB_200_2011, with images"):
        write_manifest("cub", tmp_path, tmp_path / "out.csv")
    (tmp_path / "cars_annos.mat").write_bytes(b"no matrix")
    with pytest.raises(InputError, match="is no copy of cars"):
        write_manifest("cars", tmp_path, tmp_path / "out.csv")


@pytest.mark.parametrize("image", ["../a/1.JPG", "/etc/passwd", "a/../../x.JPG"])
def test_a_list_does_not_lead_out_of_its_folder(image, tmp_path):
    make_sop(tmp_path)
    header = "image_id class_id super_class_id path\n"
    (tmp_path / "Ebay_train.txt").write_text(
        f"{header}1 1 1 a/1.JPG\n2 1 1 {image}\n3 2 1 b/3.JPG\n"
    )
    with pytest.raises(InputError, match=f"leads out of the folder: {image}"):
        write_manifest("sop", tmp_path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
