import json
import sys
import types
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden.make_backbones import FOLDER, seeded_images
from seeded import jitted
from tiny_run import patch_tiny_models

from cbam_jax import InputError, hub
from cbam_jax.hub import from_pretrained, save_pretrained
from cbam_jax.models import create_model
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import load_pretrained

CONFIG = {"name": "tiny_cbam", "embedding_dim": 5, "attention_init": "identity"}
CONFIG |= {"reduction": 4, "kernel_size": 3, "original": True}
PREPROCESSING = {"image_size": 64, "crop_fraction": 0.875}


def drawn_array(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose every tensor differs from its start, and its folder."""
    folder = tmp_path_factory.mktemp("model")
    model = nnx.eval_shape(lambda: create_model(**CONFIG, rngs=nnx.Rngs(0)))
    flat = {".".join(map(str, k)): v.shape for k, v in nnx.to_flat_state(nnx.state(model))}
    load_pretrained(model, {name: drawn_array(name, shape) for name, shape in flat.items()})
    metrics = {"map@5": 0.81234567, "queries": 372}
    save_pretrained(
        model,
        folder,
        config=CONFIG,
        preprocessing=PREPROCESSING,
        metrics=metrics,
        description="Trained on photos of clothes.",
    )
    return model, folder


def edited(saved, tmp_path, edit):
    folder = tmp_path / "edited"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((saved[1] / file).read_bytes())
    document = json.loads((folder / "config.json").read_text())
    document.pop("checksum")  # As those do who change a config on purpose.
    edit(document)
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_round_trip(saved):
    model, folder = saved
    loaded, document = from_pretrained(folder)
    images = jnp.asarray(seeded_images(64, 64, batch=2))
    # Identity start has gates of 2 sigmoid: another attention_init would differ.
    expected = jitted(nnx.view(model, use_running_average=True), images)
    ours = jitted(nnx.view(loaded, use_running_average=True), images)
    np.testing.assert_array_equal(ours, expected)
    assert document["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert document["preprocessing"]["crop_fraction"] == 0.875
    assert document["metrics"]["map@5"] == 0.81234567


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_published_weights_come_with_what_their_pixels_are(backbone, monkeypatch):
    monkeypatch.setattr(hub, "load_pretrained", lambda model, source: None)
    model, document = hub.from_published(backbone)
    fields = document["preprocessing"]
    read = Preprocessing.from_dict(fields, mean=tuple(model.mean), std=tuple(model.std))
    assert (read.image_size, read.short_side) == (224, 256)
    assert read.mean[0] == {"resnet18": 0.485, "efficientnet_lite0": 127 / 255}[backbone]


def test_the_card_says_what_it_is(saved):
    card = (saved[1] / "README.md").read_text()
    for text in ("# tiny_cbam", "Trained on photos", "| map@5 | 0.8123 |", "[b, 64, 64, 3]"):
        assert text in card


def test_damaged_bytes_of_the_weights_are_noticed(saved, tmp_path, rng):
    whole = (saved[1] / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    place = start + 4 * rng.integers((len(whole) - start) // 4)
    folder = edited(saved, tmp_path, lambda d: None)
    (folder / "model.safetensors").write_bytes(
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]  # A number's least bit.
    )
    with pytest.raises(InputError, match=r"model.safetensors is damaged, .*: 1 tensors are not"):
        from_pretrained(folder)


def test_what_is_not_finite_is_not_saved(saved, tmp_path):
    model, _ = saved
    bias = model.projection.bias
    kept = bias[...]
    bias.set_value(kept.at[1].set(jnp.nan))
    with pytest.raises(InputError, match=r"projection.bias is not finite"):
        save_pretrained(model, tmp_path / "x", config=CONFIG, preprocessing=PREPROCESSING)
    bias.set_value(kept)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_folder_of_format_1_loads(tmp_path):
    """Names, shapes, config and embeddings as they were when the format was made."""
    frozen = json.loads((FOLDER / "saved_model_1.json").read_text())
    arrays = {name: drawn_array(name, shape) for name, shape in frozen["tensors"].items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(frozen["config"]))
    model, document = from_pretrained(tmp_path)
    assert document["preprocessing"]["image_size"] == 64
    images = jnp.asarray(seeded_images(64, 64, batch=2))
    embeddings = jitted(nnx.view(model, use_running_average=True), images)
    np.testing.assert_allclose(embeddings, frozen["embeddings"], atol=1e-4)


def test_a_config_of_another_model_is_refused(saved, tmp_path):
    model, _ = saved
    config = CONFIG | {"embedding_dim": 6}
    with pytest.raises(InputError, match="builds another model: 2 tensors differ.*projection.bias"):
        save_pretrained(model, tmp_path / "x", config=config, preprocessing=PREPROCESSING)
    with pytest.raises(InputError, match="no model can be built from.*unknown model 'resnet'"):
        save_pretrained(
            model, tmp_path / "x", config={"name": "resnet"}, preprocessing=PREPROCESSING
        )
    with pytest.raises(InputError, match="image_size"):
        save_pretrained(model, tmp_path / "x", config=CONFIG, preprocessing={})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=2), "has format 2, written by cbam_jax .*upgrade"),
        (lambda d: d.pop("model"), "config.json is damaged"),
        (lambda d: d["model"].update(depth=3), "no model can be built.*depth"),
        (lambda d: d["model"].update(name="resnet34_cbam"), "does not fit the model"),
        (lambda d: d["model"].update(name="tiny"), "reduction=4: tiny has no attention that takes"),
        (lambda d: d["model"].update(pooling="gem"), "1 tensors .* not in .*pool.power"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(saved, tmp_path, edit, message):
    with pytest.raises(InputError, match=message):
        from_pretrained(edited(saved, tmp_path, edit))


def test_missing_and_damaged_files(saved, tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged"):
        from_pretrained(tmp_path)
    folder = edited(saved, tmp_path, lambda d: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights at .*model.safetensors"):
        from_pretrained(folder)


def test_hub_id(saved, monkeypatch):
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, sorted(allow_patterns)))
        if name == "someone/else":
            raise OSError("no network\nat all")
        return str(saved[1])

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    model, _ = from_pretrained("someone/model", revision="v1")
    (asked,) = calls
    assert asked[:2] == ("someone/model", "v1")
    assert {"README.md", "config.json", "model.safetensors"} < set(asked[2])
    assert model.embedding_dim == 5
    with pytest.raises(InputError, match=r"cannot fetch someone/else .*\(OSError: no network\)"):
        from_pretrained("someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'cbam_jax\[hub\]'"):
        from_pretrained("someone/model")
    with pytest.raises(InputError, match="no folder ./nowhere, and no id of the hub"):
        from_pretrained("./nowhere")


def test_code_is_told_to_be_none_of_a_config(saved, tmp_path):
    config = CONFIG | {"pooling": jnp.max}
    with pytest.raises(InputError, match=r"config\['pooling'\] is .*, which JSON has no form for"):
        save_pretrained(saved[0], tmp_path, config=config, preprocessing=PREPROCESSING)
