"""A vision transformer of another library's folder through every command."""

import json
import sys

import numpy as np
import pytest
from test_vit import golden, siglip_folder  # noqa: F401
from tiny_run import CLASSES, write_photos

import cbam_jax
import evaluate
import train
from cbam_jax import command_line, hub
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.commands import main as catalogue


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: its last line, as JSON."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = command_line.run(main)
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


def flags(manifest, folder, **fields):
    fields = {
        "data.name": manifest,
        "data.image_size": 32,
        "data.resize": "squash",
        "data.interpolation": "bicubic",
        "data.classes_per_batch": 2,
        "data.images_per_class": 4,
        "model.name": "vit",
        "model.pretrained": folder,
        "optimizer.warmup_steps": 1,
        "optimizer.frozen_blocks": 1,
        "optimizer.layer_decay": 0.75,
        "train.steps": 3,
        "train.eval_every": 3,
        "eval.batch_size": 8,
        "eval.ks": "(5,10)",
        **fields,
    }
    return ["--config=default", *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # Of ml_collections.
def test_a_folder_of_transformers_goes_through_every_command(
    siglip_folder, tmp_path, run, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)
    manifest = write_photos(tmp_path, splits=("train", "validation", "test"), count=4)
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    run(train.main, *flags(manifest, siglip_folder), f"--workdir={workdir}")
    for path in siglip_folder.iterdir():  # What the run needs of it, it has written down.
        path.unlink()

    found = run(evaluate.main, f"--workdir={workdir}", "--html")
    assert found["metrics"]["num_queries"] == 4 * len(CLASSES)
    page = (workdir / "eval/test/report.html").read_text()
    assert "Where the embedding of an image comes from" in page
    with np.load(workdir / "eval/test/heat.npz") as heat:
        assert heat["heat"].shape[1:] == (32, 32)
        assert heat["heat"].max() > 0.9

    run(hub.main, "export", workdir, exported)
    trained, shared = cbam_jax.load(workdir), cbam_jax.load(exported)
    assert trained.fingerprint == shared.fingerprint
    assert trained.preprocessing == shared.preprocessing
    assert trained.preprocessing.mean == (0.5,) * 3
    assert trained.preprocessing.resize == "squash"
    photos = sorted(tmp_path.glob("test_*"))
    embeddings = trained.embed_files(photos, progress=False).embeddings
    again = shared.embed_files(photos, progress=False).embeddings
    np.testing.assert_allclose(again, embeddings, atol=1e-4)  # In batches of another size.

    shop_file = tmp_path / "shop"
    assert catalogue(["add", *map(str, (shop_file, *photos)), f"--model={exported}"]) == 0
    with Catalogue.open(shop_file, shared) as shop:
        assert shop.find(str(photos[4]), k=3)[0].path == str(photos[4])
