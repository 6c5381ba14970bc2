"""Photos to embeddings by ``cbam_jax.load``, whatever they come from and come with."""

import json
import os
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeded import jitted
from tiny_run import drawn_model, make_config, patch_tiny_models, write_photos, write_run

import cbam_jax
from cbam_jax import InputError, data, experiment, gradcam, hub, runs
from cbam_jax.datasets import decode_image, open_dataset
from cbam_jax.hub import from_pretrained, save_pretrained
from cbam_jax.models import create_model
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import IMAGENET, Published


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), splits=("train", "test"), count=11)


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    """A run's workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    write_run(workdir, make_config(manifest))
    return workdir


@pytest.fixture(scope="module")
def embedder(run):
    return cbam_jax.load(run)


@pytest.fixture(scope="module")
def files(manifest):
    """Paths of the 33 photos of the test split, in its order."""
    dataset = open_dataset(str(manifest), "test")
    return [str(manifest.parent / name) for name in dataset.id]


def pixels(file):
    return decode_image(Path(file).read_bytes())


def test_a_file_has_the_bits_that_evaluate_writes(run, embedder, files):
    runs.evaluate(run, "test")
    saved = np.load(run / "eval" / "test" / "embeddings.npz")
    found = embedder.embed_files(files, progress=False)
    assert found.failed == []
    assert found.readable.all()
    np.testing.assert_array_equal(found.embeddings, saved["embedding"])
    uploads = [Path(file).read_bytes() for file in files]
    of_bytes = embedder.embed_files(uploads, progress=False).embeddings
    np.testing.assert_array_equal(of_bytes, found.embeddings)
    alone = embedder.embed_files(files[4:5], progress=False).embeddings
    np.testing.assert_array_equal(alone[0], saved["embedding"][4])
    # Photos are of less than twice the model's size, so that decoding loses nothing.
    images = [pixels(file) for file in files]
    np.testing.assert_array_equal(embedder.embed_images(images), saved["embedding"])


def test_alone_first_last_and_among_many_are_equal_and_two_programs_do_it(run, manifest, files):
    embedder = cbam_jax.load(run, devices=jax.devices()[:2])
    dataset = open_dataset(str(manifest), "test")
    many = (files * 2)[:64]
    expected = embedder.embed_files(many, progress=False).embeddings
    for place in (0, 6, 32):
        seven = [files[place], *files[1:6], files[place]]
        few = embedder.embed_files(seven, progress=False).embeddings
        of_arrays = embedder.embed_images([pixels(file) for file in seven])
        alone = embedder.embed_images([dataset.image(place)])
        for row in (few[0], few[-1], of_arrays[0], of_arrays[-1], alone[0]):
            np.testing.assert_allclose(row, expected[place], atol=1e-6, rtol=1e-6)
    assert embedder._embed_step._jitted._cache_size() == 2


def test_embeddings_are_those_of_the_model_in_evaluation_mode(run, embedder, files):
    config = runs.read_config(run)
    fresh = nnx.eval_shape(lambda: experiment.build_model(config))
    assert embedder.dimension == 16
    images = np.stack([
        data.cut_pixels(pixels(file), Preprocessing(32)) for file in files[:3]
    ])  # fmt: skip
    # Independent of the embedder: arrays of the checkpoint by name, in a model built anew.
    with runs._checkpoints(run) as checkpoints:
        arrays = checkpoints.restore("last", optimizer=False).model
    for kind, variables in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        for path, variable in nnx.to_flat_state(nnx.state(fresh, variables)):
            variable.set_value(arrays[f"{kind}.{'.'.join(map(str, path))}"])
    fresh.eval()
    expected = jitted(fresh, fresh.preprocess(images))
    actual = embedder.embed_files(files[:3], progress=False).embeddings
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=2e-5)
    actual = jitted(embedder.model, embedder.model.preprocess(images[1:2]))
    np.testing.assert_allclose(actual[0], expected[1], atol=2e-6, rtol=2e-5)


def test_files_that_cannot_be_read_are_rows_with_a_reason(embedder, files, tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    half = tmp_path / "half.png"
    half.write_bytes(Path(files[0]).read_bytes()[:300])
    os.mkfifo(tmp_path / "pipe.jpg")
    bad = ["note.jpg", "empty.png", "half.png", "pipe.jpg", "absent.jpg", ""]
    paths = [files[0], *(str(tmp_path / name) for name in bad), b"GIF89a", files[1]]
    found = embedder.embed_files(paths, progress=False)
    expected = embedder.embed_files(files[:2], progress=False).embeddings
    assert found.readable.tolist() == [True, *[False] * 7, True]
    np.testing.assert_array_equal(found.embeddings[[0, -1]], expected)
    assert [path for path, _ in found.failed] == [*paths[1:-2], "image 7"]
    reasons = [reason for _, reason in found.failed]
    assert all("cannot be decoded" in reason for reason in (*reasons[:3], reasons[6]))
    assert reasons[3:6] == ["not a file", "no such file", "not a file"]


def test_a_strip_costs_what_its_centre_costs(embedder, tmp_path, rng):
    strip = rng.integers(0, 255, (3, 60_000, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "strip.png"), strip[..., ::-1])
    found = embedder.embed_files([tmp_path / "strip.png"], progress=False)
    centre = strip[:, 30_000 - 24 : 30_000 + 24]
    expected = embedder.embed_images([centre, centre])[0]
    np.testing.assert_array_equal(found.embeddings[0], expected)


def test_no_files_and_a_home(embedder, files, tmp_path, monkeypatch):
    assert embedder.embed_files([]).embeddings.shape == (0, 16)
    assert embedder.embed_images([]).shape == (0, 16)
    monkeypatch.setenv("HOME", os.path.dirname(files[0]))
    found = embedder.embed_files([f"~/{os.path.basename(files[0])}"], progress=False)
    assert found.readable.all()


def test_boxes_are_cut_as_a_datasets(embedder, files, rng):
    boxes = rng.uniform(2, 12, (5, 4)) + np.array([0, 0, 20, 18])
    found = embedder.embed_files(files[:5], boxes=boxes, progress=False)
    cut = []
    for file, (x1, y1, x2, y2) in zip(files[:5], boxes, strict=True):
        image = pixels(file)
        cut.append(image[int(y1) : -int(-y2 // 1), int(x1) : -int(-x2 // 1)])
    np.testing.assert_array_equal(found.embeddings, embedder.embed_images(cut))
    empty = embedder.embed_files(files[:1], boxes=[[5, 5, 5, 9]], progress=False)
    assert "holds no pixel" in empty.failed[0][1]
    with pytest.raises(InputError, match=r"boxes have shape \(4,\), expected \(1, 4\)"):
        embedder.embed_files(files[:1], boxes=[5, 5, 5, 9])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9, 3), np.float32), "image 1 is float32 .* pixels from 0 to 255 as uint8"),
        (np.zeros((3, 8, 9), np.uint8), "move the channels last"),
        (np.zeros((8, 9), np.uint8), "repeat grey to three channels"),
        (np.zeros((8, 9, 4), np.uint8), "lay transparency over a background first"),
        (np.zeros((1, 8, 9, 3), np.uint8), "list of single images"),
        ("photo.jpg", "give a NumPy array"),
        (np.zeros((0, 9, 3), np.uint8), "it has no pixels"),
    ],
)
def test_what_is_no_image_is_told(image, message, embedder):
    with pytest.raises(InputError, match=message) as caught:
        embedder.embed_images([np.zeros((8, 9, 3), np.uint8), image])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("paths", ["coat.jpg", Path("coat.jpg"), b"coat"])
def test_one_path_where_a_list_belongs(paths, embedder):
    with pytest.raises(
        InputError, match=r"one path, .*coat.*, where a list belongs: give \[path\]"
    ):
        embedder.embed_files(paths)
    with pytest.raises(InputError, match=r"one image where a list belongs: give \[image\]"):
        embedder.embed_images(np.zeros((8, 9, 3), np.uint8))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 9, 3), np.float32), "pixels from 0 to 255 as uint8"),
        (np.zeros((2, 3, 8, 9), np.uint8), "move the channels last"),
        (np.zeros((8, 9, 3), np.uint8), "add the batch axis"),
        (np.zeros((2, 8, 9, 4), np.uint8), "batch of RGB images"),
    ],
)
def test_preprocess_tells_what_is_meant(images, message, embedder):
    with pytest.raises(ValueError, match=message):
        embedder.model.preprocess(images)
    with pytest.raises(ValueError, match=message):
        jax.jit(embedder.model.preprocess)(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 9, 3), np.uint8), "scale pixels first"),
        (np.zeros((2, 3, 8, 9), np.float32), "move the channels last"),
        (np.zeros((8, 9, 3), np.float32), "add the batch axis"),
        (np.full((1, 8, 9, 3), 200, np.float32), "these are pixels up to 255; give model.preproc"),
        (np.zeros((9, 3), np.float32), "give an array of images"),
        (np.zeros((0, 8, 9, 3), np.float32), "give an array of images"),
        (np.zeros((2, 3, 8, 9), np.uint8), "move the channels last"),
        ([[1.0]], "give an array of images"),
    ],
)
def test_heat_maps_tell_what_is_meant(images, message, embedder):
    with pytest.raises(ValueError, match=message):
        gradcam.grad_cam(embedder.model, images)
    with pytest.raises(ValueError, match=message):
        gradcam.attention_gates(embedder.model, images)
    fine = np.zeros((2, 8, 9, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        gradcam.pair_maps(embedder.model, fine, images)


# --- runs, folders, fingerprints ---


def test_a_run_exported_is_the_same_model(run, embedder, files, tmp_path):
    runs.evaluate(run, "test")
    hub.export(run, tmp_path / "model")
    exported = cbam_jax.load(tmp_path / "model", batch_size=8)
    expected = embedder.embed_files(files, progress=False).embeddings
    actual = exported.embed_files(files, progress=False).embeddings
    np.testing.assert_array_equal(actual, expected)
    assert exported.fingerprint == embedder.fingerprint
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())["metrics"]
    document = json.loads((tmp_path / "model" / "config.json").read_text())
    assert document["metrics"]["map@10"] == metrics["map@10"]
    assert document["metrics"]["split"] == "test"
    assert document["model"]["dtype"] == "float32"
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| map@10 | {metrics['map@10']:.4g} |" in card
    assert "- `map@K`: " in card
    assert str(run) not in card


def test_a_run_is_never_exported_over(run, tmp_path):
    before = (run / "config.json").read_bytes()
    with pytest.raises(
        InputError, match="is the workdir of a run, which would be lost: give another"
    ):
        hub.export(run, run)
    assert (run / "config.json").read_bytes() == before
    assert not (run / "model.safetensors").exists()


def test_an_exported_model_is_no_run(run, tmp_path):
    hub.export(run, tmp_path / "model")
    with pytest.raises(InputError, match="is an exported model, not a run"):
        runs.evaluate(tmp_path / "model")
    with pytest.raises(InputError, match="checkpoint='last': .*model is no run"):
        cbam_jax.load(tmp_path / "model", "last")
    with pytest.raises(InputError, match="config.json is a file: give its folder"):
        cbam_jax.load(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match="batch_size=0: give at least 1 image"):
        cbam_jax.load(tmp_path / "model", batch_size=0)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights at .*model.safetensors"):
        cbam_jax.load(tmp_path / "model")


def test_without_an_evaluation_the_card_has_what_training_measured(run, tmp_path):
    config = runs.read_config(run)
    other = tmp_path / "run"
    write_run(other, config)
    (other / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 1.0}\n{"step": 3, "validation/map@10": 0.25}\n'
    )
    assert hub.measured_metrics(config, other, 3)["map@10"] == 0.25
    assert hub.measured_metrics(config, other, 4) == {}


@pytest.mark.slow
def test_a_runs_folder_is_a_pretrained_model_in_evaluation_mode(run, embedder, rng):
    model, document = from_pretrained(run)
    assert document["preprocessing"]["image_size"] == 32
    images = model.preprocess(rng.integers(0, 255, (4, 32, 32, 3), np.uint8))
    together = np.asarray(jitted(model, images))
    np.testing.assert_allclose(jitted(model, images[2:3])[0], together[2], atol=1e-6, rtol=1e-5)
    expected = jitted(embedder.model, images)
    np.testing.assert_allclose(expected, together, atol=1e-6, rtol=1e-5)
    model, _ = from_pretrained(run, training=True)
    assert np.abs(jitted(model, images[2:3])[0] - jitted(model, images)[2]).max() > 1e-4


def changed(embedder, tmp_path, *, preprocessing=None, **arguments):
    """The fingerprint of the same weights in another folder."""
    config = embedder.arguments | arguments
    fields = embedder.preprocessing.to_dict() | (preprocessing or {})
    save_pretrained(embedder.model, tmp_path, config=config, preprocessing=fields)
    return cbam_jax.load(tmp_path).fingerprint


def test_the_fingerprint_changes_when_the_embeddings_may(run, embedder, tmp_path):
    fingerprint = embedder.fingerprint
    assert cbam_jax.load(run, batch_size=3, devices=jax.devices()[:1]).fingerprint == fingerprint
    assert changed(embedder, tmp_path / "same") == fingerprint
    assert not {"reduction", "kernel_size", "original"} & embedder._description()["model"].keys()
    others = [
        changed(embedder, tmp_path / "a", normalize=True),
        changed(embedder, tmp_path / "b", attention_init="identity"),
        changed(embedder, tmp_path / "c", dtype="bfloat16"),
        changed(embedder, tmp_path / "d", preprocessing={"image_size": 40}),
        changed(embedder, tmp_path / "e", preprocessing={"crop_fraction": 1.0}),
        changed(embedder, tmp_path / "f", preprocessing={"resize": "letterbox"}),
        changed(embedder, tmp_path / "g", preprocessing={"interpolation": "bicubic"}),
    ]
    model, _ = from_pretrained(run)
    model.projection.bias[...] = model.projection.bias[...].at[3].add(1e-6)
    others.append(cbam_jax.Embedder(
        model, embedder.preprocessing, arguments=embedder.arguments
    ).fingerprint)  # fmt: skip
    assert len({fingerprint, *others}) == 9


def test_a_classifiers_head_is_no_part_of_the_fingerprint(run):
    plain = {"name": "tiny_cbam", "embedding_dim": 4}
    found = []
    for arguments in (plain, plain | {"num_classes": 3}):
        model = nnx.eval_shape(lambda: create_model(**arguments, rngs=nnx.Rngs(0)))  # noqa: B023
        for _, variable in nnx.to_flat_state(nnx.state(model)):
            variable.set_value(jnp.full(variable.shape, 0.5, jnp.float32))
        options = {"arguments": arguments, "batch_size": 8}
        found.append(cbam_jax.Embedder(model, Preprocessing(32), **options).fingerprint)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("source", "checkpoint", "message"),
    [
        ("absent", "best", "no folder .*absent"),
        ("", "best", "neither the workdir of a run nor a folder of save_pretrained"),
        ("run", 7, r"no checkpoint 7 in .* it has steps 3; choose one, best or"),
        ("run", "newest", "no checkpoint 'newest'"),
    ],
)
def test_what_cannot_be_loaded_is_told(source, checkpoint, message, run, tmp_path):
    path = run if source == "run" else tmp_path / source
    with pytest.raises(InputError, match=message) as caught:
        cbam_jax.load(path, checkpoint)
    assert "\n" not in str(caught.value)


def test_a_published_model_is_loaded_by_its_name(monkeypatch):
    weights = drawn_model(lambda: create_model("tiny", rngs=nnx.Rngs(0)))
    arrays = {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(weights))
    }
    load = hub.load_pretrained
    monkeypatch.setattr(hub, "load_pretrained", lambda model, source: load(model, arrays))
    monkeypatch.setitem(IMAGENET["imagenet"], "tiny", Published("tiny.pth", 50.5, None, 248))
    embedder = cbam_jax.load("tiny")
    assert embedder.preprocessing.short_side == 248
    assert embedder.preprocessing.mean == embedder.model.mean
    for path, variable in nnx.to_flat_state(nnx.state(embedder.model)):
        name = ".".join(map(str, path))
        np.testing.assert_array_equal(np.asarray(variable[...]), arrays[name], err_msg=name)
    with pytest.raises(InputError, match="checkpoint='last'"):
        cbam_jax.load("tiny", checkpoint="last")


def test_one_file_at_once_is_as_in_a_batch_but_for_rounding(embedder, files):
    many = embedder.embed_files(files[:3], progress=False).embeddings
    boxes = [[3, 4, 30, 33]] * 3
    cut = embedder.embed_files(files[:3], boxes=boxes, progress=False).embeddings
    for row in (0, 1):
        np.testing.assert_allclose(embedder.embed_file(files[row]), many[row], atol=1e-6)
        content = Path(files[row]).read_bytes()
        np.testing.assert_allclose(embedder.embed_file(content, box=boxes[0]), cut[row], atol=1e-6)
    for wrong, message in (("nowhere.jpg", "no such file"), (b"no image", "cannot be decoded")):
        with pytest.raises(InputError, match=message):
            embedder.embed_file(wrong)
