"""Programs give what their models give, wherever they run, whoever loads them and however late."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden.make_program import ARGUMENTS
from tiny_run import drawn_model, make_config, patch_tiny_models, write_photos, write_run

import cbam_jax
from cbam_jax import InputError, export, export_command, models
from cbam_jax.backbones import vit_published
from cbam_jax.backbones.layers import Conv, DepthwiseConv
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.alike import Photo, pair_heat
from cbam_jax.embedder import Embedder
from cbam_jax.export import contract, lowering, onnx
from cbam_jax.preprocessing import Preprocessing

pytest.importorskip("flatbuffers", reason="programs are written and read by it")

GOLDEN = Path(__file__).parent.parent / "golden" / "program_1"
RNG = np.random.default_rng(3)
SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 64, "mlp_width": 48}
SMALL |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "activation": "gelu", "epsilon": 1e-6}
# What is published, but for its size; DINOv2's position embedding is stretched.
SIGLIP = {"activation": "gelu_tanh", "pool": "map"}
CLIP = {**vit_published.CLIP, "activation": "quick_gelu", "projection": 24}
DINOV2 = {"registers": 4, "layer_scale": True, "image_size": 32, "patch_size": 8}
DINOV2 |= {"interpolation": "bicubic_antialias"}
DINOV3 = {**vit_published.DINOV3, "activation": "silu", "gated": True}
FAMILIES = {
    "resnet10_cbam": {"embedding_dim": 16},
    "resnet10_se": {},
    "vgg16_cbam": {},
    "googlenet_cbam": {"num_classes": 3},
    "efficientnet_lite0_cbam": {},
    "SigLIP": {"name": "vit", "transformer": SMALL | SIGLIP},
    "CLIP": {"name": "vit", "transformer": SMALL | CLIP},
    "DINOv2": {"name": "vit", "transformer": SMALL | DINOV2},
    "DINOv3": {"name": "vit", "transformer": SMALL | DINOV3},
}


@pytest.fixture
def _tiny(monkeypatch):
    patch_tiny_models(monkeypatch)


def tiny():
    return drawn_model(lambda: models.create_model(**ARGUMENTS, rngs=nnx.Rngs(0)))


def pixels(count, size):
    return RNG.integers(0, 256, (count, size, size, 3), np.uint8)


def test_a_folder_of_the_first_format_gives_what_it_gave():
    program = export.load(GOLDEN)
    assert program.check() < 1e-5
    assert program.contract["license"] == "CC0-1.0"
    assert program(pixels(0, 32)).shape == (0, program.dimension) == (0, 16)


EMBEDDINGS = np.ones((3, 16), np.float32)


@pytest.mark.parametrize(
    ("images", "embeddings", "message"),
    [
        (pixels(0, 32), EMBEDDINGS[:0], "images of shape"),
        (pixels(3, 30), EMBEDDINGS, "images of shape"),
        (pixels(3, 32), EMBEDDINGS.astype("U4"), "embeddings <U4"),
        (pixels(3, 32), 0 * EMBEDDINGS, "all 0, or not finite"),
        (pixels(3, 32), np.inf * EMBEDDINGS, "all 0, or not finite"),
    ],
)
def test_a_check_that_cannot_be_made_is_told(images, embeddings, message, tmp_path):
    folder = tmp_path / "program"
    shutil.copytree(GOLDEN, folder)
    np.savez(folder / "check.npz", images=images, embeddings=embeddings)
    document = json.loads((folder / "contract.json").read_text())
    document["files"]["check.npz"] = contract.described(folder / "check.npz")
    document["checksum"] = contract.checksum(document)
    (folder / "contract.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"check.npz is damaged .*{message}.*: export it again"):
        export.load(folder).check()


@pytest.mark.usefixtures("_tiny")
def test_a_program_embeds_photos_as_its_model_does(tmp_path):
    write_photos(tmp_path)
    files = [*sorted(tmp_path.glob("*.jpg")), tmp_path / "missing.jpg"]
    loaded = cbam_jax.load(GOLDEN, batch_size=8)
    model = Embedder(tiny(), Preprocessing(32), arguments=ARGUMENTS, batch_size=8)
    expected = model.embed_files(files, progress=False)
    actual = loaded.embed_files(files, progress=False)
    np.testing.assert_allclose(actual.embeddings, expected.embeddings, rtol=0, atol=1e-6)
    assert [path for path, _ in actual.failed] == [str(files[-1])]
    assert loaded.fingerprint == model.fingerprint
    photo = Photo(files[0].read_bytes())
    with pytest.raises(InputError, match="a program has no maps to look at: give the model"):
        pair_heat(loaded, photo, photo)


class Layers(nnx.Module):
    """Those of other forms on a CPU: sums of products, and a product where few pixels are left."""

    def __init__(self):
        options = {"dtype": np.float32, "rngs": nnx.Rngs(0)}
        self.depthwise = DepthwiseConv(3, 3, **options)
        self.conv = Conv(3, 4, 3, 8, **options)

    def preprocess(self, images):
        return images.astype(np.float32)

    def __call__(self, x):
        return self.conv(self.depthwise(x)).mean((1, 2))


def test_each_platform_has_its_own_form(monkeypatch):
    embed, weights = lowering.split(Layers())

    def lowered(platform):
        text = lowering.lower(embed, weights, 16, platform).mlir_module()
        # Without the lines of the source, which are those of the call.
        return re.sub(r" loc\(.*?\)|^#loc.*\n", "", text, flags=re.M)

    found = {platform: lowered(platform) for platform in ("cpu", "cuda", "tpu", "cpu")}
    counts = {platform: text.count("stablehlo.convolution") for platform, text in found.items()}
    assert counts == {"cpu": 0, "cuda": 2, "tpu": 2}
    # No layer asks for the backend in another way: on a GPU the program would be the same.
    monkeypatch.setattr(lowering, "compiled_for", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lowered("cuda") == found["cuda"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "multiplied by 255"),
        (np.zeros((2, 3, 32, 32), np.uint8), "move the channels last"),
        (np.zeros((2, 32, 40, 3), np.uint8), "32 x 40 pixels, expected 32 x 32: cut them"),
    ],
)
def test_other_images_are_told(images, message):
    with pytest.raises(ValueError, match=message):
        export.load(GOLDEN)(images)


@pytest.mark.usefixtures("_tiny")
def test_what_would_be_lost_or_cannot_be_is_told_before(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text("{}")
    cases = {
        "config.json: give another folder": {"folder": tmp_path},
        "--to=torch: give one of stablehlo, onnx": {"to": "torch"},
        "--platforms=cpu,ipu: give some of cpu, cuda": {"platforms": ("cpu", "ipu")},
        "--platforms=: give some of cpu": {"platforms": ()},
        "--to=onnx of a model in bfloat16: .*; give --dtype=float32": {
            "to": "onnx",
            "arguments": {**ARGUMENTS, "dtype": "bfloat16"},
        },
    }
    for message, changed in cases.items():
        given = {"folder": tmp_path / "new", "preprocessing": Preprocessing(32)}
        given |= {"arguments": ARGUMENTS} | changed
        with pytest.raises(InputError, match=message):
            export.save(tiny(), given.pop("folder"), **given)
    assert list(tmp_path.iterdir()) == [config]


def test_a_folder_that_cannot_be_is_told_before(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below" / "it"):
        with pytest.raises(InputError, match="file is no folder.*: choose another folder"):
            export.check(folder, "stablehlo", ["cpu"])
    monkeypatch.setattr(os, "access", lambda *_: False)  # As root may write everywhere.
    with pytest.raises(InputError, match="may not be written to.*: choose another folder"):
        export.check(tmp_path / "new", "stablehlo", ["cpu"])
    assert os.listdir(tmp_path) == ["file"]


class Counting(Layers):
    def __call__(self, x):
        return super().__call__(x) * np.float32(int(x.shape[0]))


class Sorting(Layers):
    def __call__(self, x):
        return jax.lax.approx_max_k(super().__call__(x), 2, recall_target=0.5)[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counting, "is no program for tpu and any number of images .*: let it take a batch"),
        (Sorting, "calls ApproxTopK on tpu, and a program computes alone: leave that call out"),
    ],
)
def test_a_model_that_is_no_program_is_told(model, message, tmp_path):
    options = {"preprocessing": Preprocessing(16), "arguments": {}, "platforms": ["tpu"]}
    with pytest.raises(InputError, match=message):
        export.save(model(), tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("_tiny")
def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "program"
    shutil.copytree(GOLDEN, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lowering, "split", lambda _: (lambda *_: np.ones((3, 16)), {}))
    monkeypatch.setattr(lowering, "lower", full)
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        export.save(tiny(), folder, preprocessing=Preprocessing(32), arguments=ARGUMENTS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["cbam-jax export", *map(str, words)])
    export_command.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--platforms=cpu",), "--platforms is of programs: give --to=stablehlo"),
        (("--to=onnx", "--platforms=cpu"), "--platforms=cpu: ONNX has none; leave it out"),
        (("--to=onnx", "--dtype=bfloat16"), "--to=onnx of a model in bfloat16: .*=float32"),
        (("--to=stablehlo", "--platforms="), "--platforms=: give some of cpu, cuda"),
        (("--to=stablehlo", "--platforms=cpu, ipu"), "--platforms=cpu,ipu: give some of"),
        (("--to=stablehlo", "--platforms=ipu"), "--platforms=ipu: give some of"),
        (("--to=stablehlo", "--checkpoint=worst"), "--checkpoint=worst: give best"),
        (("--to=stablehlo",), "is a program already: give the model it is of"),
    ],
)
def test_flags_that_do_not_fit_are_told(words, message, tmp_path, monkeypatch, capsys):
    source = GOLDEN if len(words) == 1 else tmp_path
    with pytest.raises(InputError, match=message):
        command(monkeypatch, capsys, source, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_name_and_weights_of_no_run_are_told(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="is no run, and weights are exported of runs alone"):
        command(monkeypatch, capsys, tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, tmp_path, "", "--to=stablehlo")
    assert "argument folder: '': give a folder, . for this one" in capsys.readouterr().err


def test_what_onnx_needs_is_told_before(tmp_path, monkeypatch, capsys):
    found = {"jax2onnx", "onnx", "onnx_ir"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    with pytest.raises(InputError, match="--to=onnx needs equinox, dm_pix, and .*: pip install"):
        command(monkeypatch, capsys, tmp_path / "run", tmp_path / "out", "--to=onnx")


def test_what_onnx_cannot_hold_is_told(tmp_path, monkeypatch):
    def to_onnx(*_, **__):
        raise NotImplementedError("no plugin for erf_inv")

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    with pytest.raises(InputError, match="cannot write this model .*erf_inv.*: give --to=stab"):
        onnx.write(tmp_path / "model.onnx", lambda weights, images: images, {}, 32)
    large = {"kernel": np.broadcast_to(np.float32(0), (1 << 29,))}
    with pytest.raises(InputError, match="of 2.1 GB of weights: a file holds 2 GiB; give"):
        onnx.write(tmp_path / "model.onnx", lambda weights, images: images, large, 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("_tiny")
def test_a_run_is_exported_by_command_and_found_with(tmp_path, monkeypatch, capsys):
    manifest = write_photos(tmp_path)
    write_run(tmp_path / "run", make_config(manifest))
    words = (tmp_path / "run", tmp_path / "program", "--to=stablehlo", "--license=mine")
    told = command(monkeypatch, capsys, *words)
    assert told["license"] == "mine"
    run, program = (cbam_jax.load(tmp_path / name) for name in ("run", "program"))
    files = sorted(tmp_path.glob("*.jpg"))
    expected = run.embed_files(files, progress=False).embeddings
    actual = program.embed_files(files, progress=False).embeddings
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert program.fingerprint == run.fingerprint
    with Catalogue.open(tmp_path / "shop.db", program) as catalogue:
        catalogue.add(files)
    # Of the same weights: the run searches what the program embedded.
    with Catalogue.open(tmp_path / "shop.db", run) as catalogue:
        assert catalogue.find(files[0], k=1)[0].path == str(files[0])
    half = command(
        monkeypatch, capsys, *words[:1], tmp_path / "half", *words[2:], "--dtype=bfloat16"
    )
    assert half["bytes"]["weights.safetensors"] == told["bytes"]["weights.safetensors"]
    loaded = export.load(tmp_path / "half", check=True)
    images = pixels(4, 32)
    difference = np.abs(loaded(images) - export.load(tmp_path / "program")(images)).max()
    assert 1e-5 < difference < 0.05
    assert cbam_jax.load(tmp_path / "half").fingerprint != run.fingerprint


ALONE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] in (["cbam_jax", "models"], ["cbam_jax", "backbones"], ["flax"]):
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import numpy as np
from cbam_jax import export

program = export.load(sys.argv[1], check=True)
images = np.load(sys.argv[2])
np.savez(sys.argv[3], *[program(images[:b]) for b in (1, 3, 17)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_in_a_process_without_the_models_code(family, tmp_path):
    arguments = {"name": family, **FAMILIES[family]}
    model = drawn_model(lambda: models.create_model(**arguments, rngs=nnx.Rngs(0)))
    export.save(
        model,
        tmp_path / "program",
        preprocessing=Preprocessing(64, mean=model.mean, std=model.std),
        arguments=arguments,
        platforms=("cpu",),
    )
    images = pixels(17, 64)
    np.save(tmp_path / "images.npy", images)
    names = [tmp_path / name for name in ("program", "images.npy", "found.npz")]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, names)], check=True, timeout=300)
    model = nnx.view(model, use_running_average=True, raise_if_not_found=False)
    graph, state = nnx.split(model)
    embed = jax.jit(lambda state, x: (m := nnx.merge(graph, state))(m.preprocess(x)))
    with np.load(tmp_path / "found.npz") as found:
        # In evaluation an image's embedding does not depend on the batch.
        expected = np.asarray(embed(state, images))
        assert np.ptp(expected, axis=0).max() > 0.01
        for name, batch in zip(found.files, (1, 3, 17), strict=True):
            np.testing.assert_allclose(found[name], expected[:batch], rtol=0, atol=1e-5)
