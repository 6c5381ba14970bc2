"""The configs under configs/: each builds what it says, and stops early where it can't begin."""

import importlib
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from flax import nnx

from cbam_jax import InputError, config_checks, experiment, training
from cbam_jax.configs import default
from cbam_jax.pretrained import IMAGENET, load_pretrained

NAMES = sorted(path.stem for path in Path(default.__file__).parent.glob("[a-z]*.py"))
ROWS = ("resnet50", "resnet50_se", "resnet50_cbam", "vgg16_cbam", "googlenet_cbam")


def read(name):
    return importlib.import_module(f"cbam_jax.configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_passes_the_checks_and_edits_known_fields(name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = read(name)
    config_checks.check_config(config)
    assert fields(config) == fields(default.get_config())


def fields(config):
    return {f"{section}.{name}" for section, values in config.items() if section != "seed"
            for name in values}  # fmt: skip


def test_the_papers_rows_differ_by_their_model_alone():
    base = read("resnet50").to_dict()
    for name in ROWS:
        row = read(name).to_dict()
        assert row["model"]["name"] == name
        row["model"]["name"] = "resnet50"
        assert row == base


@pytest.mark.parametrize("name", ROWS)
def test_without_network_a_row_says_where_to_put_the_file(name, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CBAM_JAX_MIRROR", "http://127.0.0.1:1")  # Nobody listens there.
    monkeypatch.setenv("CBAM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        config_checks, "check_choices", lambda config: None
    )  # It builds the model's shape.
    monkeypatch.setattr(experiment, "build_model", None)
    config = read(name)
    config.data.name = f"{photos}/"
    with pytest.raises(InputError) as caught:
        training.train_and_evaluate(config, tmp_path / "run")
    file = IMAGENET["imagenet"][name.partition("_")[0]].file
    assert f"cannot download http://127.0.0.1:1/{file}" in str(caught.value)
    assert f"put it at {tmp_path / 'cache' / file}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_its_package_photos_says_how_to_install_it(photos, tmp_path, monkeypatch):
    files = IMAGENET["imagenet"]
    absent = files["efficientnet_lite0"]._replace(package="absent_from_here")
    monkeypatch.setitem(files, "efficientnet_lite0", absent)
    monkeypatch.setattr(config_checks, "check_choices", lambda config: None)
    monkeypatch.setattr(experiment, "build_model", None)
    config = read("photos")
    config.data.name = f"{photos}/"
    with pytest.raises(InputError, match=r"pip install 'cbam_jax\[lite\]'") as caught:
        training.train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight classes of three images, for train and for validation."""
    folder = tmp_path_factory.mktemp("photos")
    encoded = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    for i in range(48):
        path = folder / ("train", "validation")[i % 2] / f"class_{i // 6}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return folder


@pytest.mark.slow
def test_a_classifier_starts_fresh_beside_pretrained_weights():
    model = nnx.eval_shape(lambda: experiment.build_model(read("imagenet_cbam")))
    arrays = nnx.eval_shape(lambda: experiment.build_model(read("resnet50")))
    state = nnx.to_flat_state(nnx.state(arrays))
    source = {".".join(map(str, path)): np.zeros(leaf.shape, np.float32) for path, leaf in state}
    report = load_pretrained(model, source | {"fc.weight": np.zeros((5, 2048), np.float32)})
    assert {name for name in report.fresh if name.startswith("class")} == {
        "class_head.bias",
        "class_head.weight",
    }
    assert report.unused == ("fc.weight",)
