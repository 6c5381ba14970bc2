"""Folders of class folders, with and without folders for splits."""

import errno
import io
import os
import pickle
import shlex
import sys
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from cbam_jax import InputError
from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import decoding, open_dataset
from cbam_jax.datasets.manifest import assign_splits


def write_images(root, names, rng):
    """Random images, by name."""
    images = {}
    for name in names:
        images[name] = rng.integers(0, 256, (12, 10, 3), np.uint8)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", images[name][..., ::-1])[1].tobytes())
    return images


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


IMAGENET = ("train/n02/b.JPEG", "train/n02/a.jpg", "train/n01/c.PNG", "val/n03/a.jpg")


def test_folders_for_splits(tmp_path, rng):
    images = write_images(tmp_path, IMAGENET, rng)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "README.txt").write_text("no folder")
    train = pickle.loads(pickle.dumps(open_dataset(f"{tmp_path}/", "train")))
    assert train.id.tolist() == ["train/n01/c.PNG", "train/n02/a.jpg", "train/n02/b.JPEG"]
    # Numbered over all splits, so that a class has one number wherever it appears.
    assert train.label_names == ("n01", "n02", "n03")
    assert train.label.tolist() == [0, 1, 1]
    assert train.is_query.all()
    assert train.is_gallery.all()
    for i, name in enumerate(train.id):
        np.testing.assert_array_equal(train.image(i), images[name])
    for name in ("val", "validation", "valid"):
        validation = open_dataset(str(tmp_path), name)
        assert (validation.id.tolist(), validation.label.tolist()) == (["val/n03/a.jpg"], [2])


def test_a_folder_of_the_name_asked_comes_first(tmp_path, rng):
    write_images(tmp_path, ("val/a/1.png", "validation/b/1.png"), rng)
    assert open_dataset(str(tmp_path), "val").id.tolist() == ["val/a/1.png"]
    assert open_dataset(str(tmp_path), "valid").id.tolist() == ["validation/b/1.png"]


def test_without_folders_for_splits_it_is_split_as_a_manifest(tmp_path, rng, capsys, monkeypatch):
    names = [f"{label}/{i}.png" for label in ("hat", "coat") for i in range(10)]
    write_images(tmp_path / "photos", names, rng)
    monkeypatch.chdir(tmp_path)
    expected = assign_splits({"label": [name.split("/")[0] for name in names], "id": names})
    for split in ("train", "validation", "test"):
        dataset = open_dataset("photos/", split)
        mine = sorted(n for n, s in zip(names, expected, strict=True) if s == split)
        assert dataset.id.tolist() == mine
        assert dataset.label.tolist() == [int(name.startswith("hat")) for name in mine]
    assert "split by hash into {'train': 12, 'validation': 4, 'test': 4}" in capsys.readouterr().err
    assert (
        open_dataset("./photos", "val").id.tolist()
        == open_dataset("photos/", "validation").id.tolist()
    )
    with pytest.raises(InputError, match=r"photos has no split 'dev': .*\['train', 'validation'"):
        open_dataset("photos/", "dev")
    with pytest.raises(InputError, match="unknown dataset 'photos': .*write ./photos"):
        open_dataset("photos", "train")


def test_mistakes_are_told_in_one_line(tmp_path, rng):
    def told(message, split="train", **options):
        with pytest.raises(InputError, match=message) as caught:
            open_dataset(str(tmp_path), split, **options)
        assert "\n" not in str(caught.value)

    told("no images in .*one folder a class")
    (tmp_path / "hat").mkdir()
    told("no images in")
    write_images(tmp_path, ("hat/1.png", "hat/2.png"), rng)
    told("has one class only, 'hat': give at least two")
    write_images(tmp_path, ("coat/1.png",), rng)
    told("label='item_id': .* classes only", label="item_id")
    (tmp_path / "coat" / "2.jpg").write_text("no image")
    told(r"1 of 4 images of .*coat/2\.jpg \(not an image\)")
    write_images(tmp_path, ("train/hat/1.png",), rng)
    told("coat holds images and .*train folders: sort the images")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        open_dataset(f"{tmp_path}/nowhere", "train")


def test_a_folder_that_may_not_be_read_is_told(tmp_path, rng, monkeypatch):
    write_images(tmp_path, ("hat/1.png", "coat/2.png"), rng)
    scandir = os.scandir

    def locked(path):  # Root, as which tests may run, is refused nothing.
        if str(path).endswith("hat"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"hat may not be read \(Permission denied\): make it"):
        open_dataset(str(tmp_path), "train")


def test_unknown_split_and_a_split_without_images(tmp_path, rng):
    write_images(tmp_path, ("train/a/1.png", "train/b/1.png"), rng)
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"has no split 'test': choose one of \['train', 'val', 'all'\]"
    ):
        open_dataset(str(tmp_path), "test")
    with pytest.raises(InputError, match="no images in .*val"):
        open_dataset(str(tmp_path), "val")


def test_bad_images_are_skipped_and_listed_by_split(tmp_path, rng, capsys):
    write_images(tmp_path, IMAGENET, rng)
    (tmp_path / "train" / "n02" / "a.jpg").write_bytes(b"\xff\xd8\xff damaged")
    train = open_dataset(str(tmp_path), "train", on_bad_image="skip")
    assert train.id.tolist() == ["train/n01/c.PNG", "train/n02/b.JPEG"]
    assert train.label.tolist() == [0, 1]
    assert "1 of 3 images" in capsys.readouterr().err
    assert "n02/a.jpg\tcannot be decoded" in (tmp_path / "train.skipped.txt").read_text()
    assert len(open_dataset(str(tmp_path), "val", on_bad_image="skip")) == 1


def test_images_are_known_by_their_content_and_the_rest_is_counted(tmp_path, rng, capsys):
    pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
    gif, avif, jpeg = (io.BytesIO() for _ in range(3))
    for file, kind in ((gif, "GIF"), (avif, "AVIF"), (jpeg, "JPEG")):
        Image.fromarray(pixels).save(file, kind)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    for name, content in {
        "hat/a.gif": gif, "hat/b.avif": avif, "hat/c.jfif": jpeg, "hat/d.JPE": jpeg,
        "hat/e": jpeg, "hat/f.jpg_small": jpeg, "coat/g.jpeg": jpeg, "coat/h.PNG": gif,
    }.items():  # fmt: skip
        write(tmp_path / name, content.getvalue())
    for name in ("hat/x.HEIC", "coat/y.heic", "coat/z.heif"):
        write(tmp_path / name, heic)
    for name in ("hat/notes.txt", "coat/README", "hat/blue/deep.jpg", "stray.png"):
        write(tmp_path / name, b"text")
    write(tmp_path / "hat/.DS_Store", b"hidden")
    decoding._reads_heic.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        found = open_dataset(str(tmp_path), "all").id.tolist()
    decoding._reads_heic.cache_clear()
    assert found == [
        "coat/g.jpeg", "coat/h.PNG", "hat/a.gif", "hat/b.avif", "hat/c.jfif", "hat/d.JPE", "hat/e",
        "hat/f.jpg_small",
    ]  # fmt: skip
    told = capsys.readouterr().err
    heic = "(HEIC, which is read after pip install 'cbam_jax[heic]')"
    folder = "1 inner folder (photos lie directly in the class folders)"
    assert told == (
        f"{tmp_path}: passed over: 2 .heic {heic}, 1 .heif {heic}, 1 .png beside the class "
        f"folders (stray.png), 1 .txt, {folder}, 1 without an ending\n"
    )


def test_class_folders_whose_names_look_the_same_are_one_class(tmp_path, rng):
    names = [unicodedata.normalize(form, "p\u00e9ch\u00e9") for form in ("NFC", "NFD")]
    write_images(tmp_path, (f"{names[0]}/1.png", f"{names[1]}/2.png", "hat/1.png"), rng)
    dataset = open_dataset(str(tmp_path), "all")
    assert dataset.label_names == ("hat", names[0])
    assert sorted(dataset.label.tolist()) == [0, 1, 1]
    assert {dataset.image(i).shape for i in range(3)} == {(12, 10, 3)}


def test_a_folder_of_heic_alone_says_how_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_reads_heic", lambda: False)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    for name in ("hat/1.heic", "hat/2.heic", "coat/1.heic"):
        write(tmp_path / name, heic)
    with pytest.raises(InputError, match=r"no images in .*3 \.heic .*pip install 'cbam_jax\[heic"):
        open_dataset(str(tmp_path), "train")


def messy(root, rng):
    """Ten photos a class: one in two splits, and one damaged alike in three; the names by split."""
    names = [f"{label}/{i}.png" for label in ("hat", "coat") for i in range(10)]
    write_images(root, names, rng)
    splits = assign_splits({"label": [name.split("/")[0] for name in names], "id": names})
    of = {split: [n for n, s in zip(names, splits, strict=True) if s == split] for split in splits}
    for pair, content in (
        ([of["train"][0], of["test"][0]], (root / of["train"][0]).read_bytes()),
        ([of["train"][1], of["validation"][0], of["test"][1]], b"\x89PNG\r\n\x1a\n damaged"),
    ):
        for name in pair:
            (root / name).write_bytes(content)
    return of


def test_copies_across_splits_are_told_with_the_command_that_lists_them(
    tmp_path, rng, capsys, monkeypatch
):
    of = messy(tmp_path / "my photos", rng)
    monkeypatch.chdir(tmp_path)
    open_dataset("./my photos/", "train", on_bad_image="skip")
    told = capsys.readouterr().err
    # What is skipped is no photo that training has seen.
    assert "1 image is in two splits" in told
    typed = told.partition("python -m cbam_jax.datasets ")[2].partition(" lists them")[0]
    assert typed == "verify './my photos/'"
    assert command.main(shlex.split(typed)) == 1
    listed = capsys.readouterr().out
    assert "equal images in two splits: 1\n" in listed
    assert of["test"][0] in listed


def test_training_and_verify_count_the_same_images_that_cannot_be_used(tmp_path, rng, capsys):
    messy(tmp_path, rng)
    for name in (b"caf\xe9.png", b"a\nb.png"):  # Latin-1; a name of two lines.
        write_images(tmp_path, [f"hat/{os.fsdecode(name)}"], rng)
    open_dataset(f"{tmp_path}/", "train", on_bad_image="skip")
    assert "5 of 22 images" in capsys.readouterr().err
    command.main(["verify", f"{tmp_path}/"])
    told = capsys.readouterr().out
    assert "images that cannot be used: 5\n" in told
    assert told.count("its name holds control characters or is not UTF-8") == 2


def test_command_checks_a_folder(tmp_path, rng, capsys):
    write_images(tmp_path, (*IMAGENET, "val/n01/a.png"), rng)
    assert command.main(["prepare", str(tmp_path)]) == 0
    assert "5 images can be used" in capsys.readouterr().out
    (tmp_path / "val" / "n03" / "a.jpg").write_bytes(b"")
    assert command.main(["prepare", str(tmp_path)]) == 2
    assert "1 of 2 images" in capsys.readouterr().err
