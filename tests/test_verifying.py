"""What ``verify`` finds in a folder, a manifest and a prepared dataset."""

import cv2
import numpy as np
import pytest

from cbam_jax.datasets import __main__ as command
from cbam_jax.datasets import clothing_dataset_small as clothing
from cbam_jax.datasets.looks import look_of


def scene(rng, side=96):
    """A random picture with large and small shapes, none like another."""
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    image = cv2.resize(coarse, (side, side + 9), interpolation=cv2.INTER_CUBIC)
    for _ in range(4):
        corner = rng.integers(0, side, (2, 2))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        cv2.rectangle(image, corner[0].tolist(), corner[1].tolist(), color, -1)
    return image


def jpeg(image, quality=95):
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@pytest.fixture
def photos(tmp_path, rng):
    """Thirteen photos in two classes and splits: two twice, one of two labels, two near copies."""
    scenes = [scene(rng) for _ in range(8)]
    smaller = cv2.resize(scenes[1], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    files = {
        "train/hat/0.jpg": jpeg(scenes[0]),
        "train/hat/1.jpg": jpeg(scenes[1]),
        "train/hat/2.jpg": jpeg(scenes[2]),
        "train/coat/3.jpg": jpeg(scenes[3]),
        "train/coat/2 again.jpg": jpeg(scenes[2]),
        "train/coat/4.jpg": jpeg(scenes[4]),
        "test/hat/0 too.jpg": jpeg(scenes[0]),
        "test/hat/1 small.png": cv2.imencode(".png", smaller)[1].tobytes(),
        "train/hat/5.jpg": jpeg(scenes[5]),
        "train/hat/5 again.jpg": jpeg(scenes[5]),
        "test/coat/4 squeezed.jpg": jpeg(scenes[4], 30),
        "test/coat/6.jpg": jpeg(scenes[6]),
        "test/coat/7.jpg": jpeg(scenes[7])[:-300],
    }
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


FOUND = """the same photo under two classes: 1
  train/coat/2 again.jpg (train) = train/hat/2.jpg (train): coat and hat
images that cannot be used: 1
  test/coat/7.jpg (test): cannot be decoded
equal images in two splits: 1
  test/hat/0 too.jpg (test) = train/hat/0.jpg (train)
equal images in one split: 1
  train/hat/5 again.jpg (train) = train/hat/5.jpg (train)
near copies in two splits: 2
  test/coat/4 squeezed.jpg (test) ~ train/coat/4.jpg (train)
  test/hat/1 small.png (test) ~ train/hat/1.jpg (train)
"""


@pytest.mark.parametrize("as_manifest", [False, True])
def test_verify_finds_what_is_there_twice(photos, capsys, as_manifest):
    if as_manifest:
        names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*"))
        lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
        (photos / "photos.csv").write_text("\n".join(["path,label,split", *lines]))
    name = f"{photos}/photos.csv" if as_manifest else str(photos)
    assert command.main(["verify", name]) == 1
    told = capsys.readouterr().out
    first, _, rest = told.partition("\n")
    assert first == f"{name}: 13 images in the splits test, train"
    assert rest == FOUND


def test_a_trimmed_copy_is_near_and_other_colours_are_another_photo(tmp_path, rng, capsys):
    scenes = [scene(rng, 200) for _ in range(6)]
    trimmed = [image[3:-2, 2:-4] for image in scenes]
    grey = [cv2.cvtColor(cv2.cvtColor(s, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR) for s in scenes]
    looks = [[look_of(jpeg(image)) for image in images] for images in (scenes, trimmed, grey)]
    bits = [((a ^ b) & (1 << 64) - 1).bit_count() for a, b in zip(*looks[:2], strict=True)]
    near = [i for i, count in enumerate(bits) if 0 < count <= 8]
    assert near, bits  # Some bits differ, and yet it is found.
    for split, images in (("train", scenes), ("test", trimmed), ("other", grey)):
        for i in near:
            path = tmp_path / split / ("hat", "coat")[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(images[i]))
    (tmp_path / "photos.csv").write_text(
        "path,label,split\n"
        + "".join(f"{p.relative_to(tmp_path)},x,{p.parts[-3]}\n" for p in tmp_path.rglob("*.jpg"))
    )
    command.main(["verify", f"{tmp_path}/photos.csv", "--all"])
    told = capsys.readouterr().out
    assert f"near copies in two splits: {len(near)}\n" in told
    assert "other" not in told.partition("near copies")[2]


def test_verify_of_what_is_right_and_of_splits_by_hash(tmp_path, rng, capsys):
    for label in ("hat", "coat"):
        (tmp_path / label).mkdir()
        for i in range(8):
            (tmp_path / label / f"{i}.jpg").write_bytes(jpeg(scene(rng)))
    assert command.main(["verify", f"{tmp_path}/"]) == 0
    told = capsys.readouterr().out
    assert "16 images in the splits test, train, validation" in told
    assert told.count(": none") == 5


def test_verify_names_ten_of_a_kind_or_all(tmp_path, rng, capsys):
    for split in ("train", "test"):
        for i in range(14):
            name = tmp_path / split / ("hat", "coat")[i % 2] / f"{i}.jpg"
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(jpeg(np.full((16, 16, 3), 9 * i, np.uint8)))
    assert command.main(["verify", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "equal images in two splits: 14\n" in told
    assert "  and 4 more: --all shows them" in told
    command.main(["verify", str(tmp_path), "--all"])
    assert capsys.readouterr().out.count(" = ") == 14


def test_verify_of_a_prepared_dataset(tmp_path, rng, capsys, monkeypatch):
    images = {"train": 4, "validation": 2, "test": 2}
    tree = tmp_path / "manual" / "clothing-dataset-small-main"
    same = jpeg(scene(rng))
    for split, count in images.items():
        for i in range(count):
            path = tree / split / clothing.CLASSES[i % 2] / f"{split}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(same if i == 1 else jpeg(scene(rng)))
    monkeypatch.setattr(clothing, "NUM_IMAGES", images)
    flags = (f"--data_dir={tmp_path}/tfds", f"--manual_dir={tmp_path}/manual")
    assert command.main(["verify", "clothing_dataset_small", *flags]) == 1
    told = capsys.readouterr().out
    assert "8 images in the splits test, train, validation" in told
    assert "equal images in two splits: 1\n  train/" in told


def test_verify_of_deepfashion_needs_the_copy(capsys):
    assert command.main(["verify", "deepfashion_inshop"]) == 2
    assert "needs --manual_dir=FOLDER" in capsys.readouterr().err
