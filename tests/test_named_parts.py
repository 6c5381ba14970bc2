"""Parts of one's own by name: a backbone with LayerNorm and dropout, trained by its name."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import drawn_model, make_config, patch_tiny_models, write_photos

import cbam_jax
from cbam_jax import (
    InputError,
    config_checks,
    experiment,
    hub,
    named_parts,
    optimizers,
    runs,
    training,
)
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model
from cbam_jax.search import search

TESTS = Path(__file__).parent


class Backbone(nnx.Module):
    """Patches, LayerNorm and dropout, no BatchNorm."""

    num_features = 12

    def __init__(self, *, dtype, rngs):
        options = {"strides": 8, "padding": "VALID", "dtype": dtype, "rngs": rngs}
        self.patches = nnx.Conv(3, 12, (8, 8), **options)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, images):
        return self.dropout(nnx.relu(self.norm(self.patches(images))))


def loss(embeddings, labels, *, step, key):
    """A margin that grows, and noise: what a loss may ask for."""
    noise = 0.01 * jax.random.normal(key, embeddings.shape)
    margin = 0.1 + 0.01 * step.astype(jnp.float32)
    return triplet_loss(embeddings + noise, labels, margin)


def optimizer(learning_rate):
    return optax.sgd(learning_rate)


def schedule(learning_rate, *, warmup_steps, total_steps):
    return lambda count: learning_rate * (1 - count / (warmup_steps + total_steps + 1))


@pytest.fixture
def untrusted(monkeypatch):
    """A process that has trusted nothing yet."""
    monkeypatch.setattr(named_parts, "_trusted", set())


def test_a_strangers_config_imports_nothing(untrusted, monkeypatch):
    build = lambda: create_model("antigravity:fly", rngs=nnx.Rngs(0))  # noqa: E731
    with pytest.raises(InputError, match=r"model\.name='antigravity:fly' would import code"):
        build()
    assert "antigravity" not in sys.modules
    monkeypatch.setenv("CBAM_JAX_TRUST", "other:thing,no_such_module:fly")
    with pytest.raises(
        InputError, match="put PYTHONPATH=FOLDER, where it lies, before the command"
    ):
        create_model("no_such_module:fly", rngs=nnx.Rngs(0))
    named_parts.trust("test_named_parts:nothing")
    with pytest.raises(InputError, match="test_named_parts has no function 'nothing'"):
        create_model("test_named_parts:nothing", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("", None, "':loss' names no module; expected package.module:function"),
        (".near", None, "'.near:loss' names no module"),
        ("unparsed", "def loss(:", "importing unparsed failed: SyntaxError: .*line 1"),
        ("divided", "\n1 / 0", "importing divided failed in .*divided.py, line 2: ZeroDivision"),
        ("renamed", "from math import no", "importing renamed failed in .*line 1: ImportError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_in_a_line(
    tmp_path, monkeypatch, untrusted, module, text, message
):
    if text is not None:
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    named_parts.trust(f"{module}:loss")
    with pytest.raises(InputError, match=message):
        named_parts.load(f"{module}:loss", "loss.name")


class Doubling(nnx.Module):
    """An attention block: twice what it is given, by a parameter."""

    def __init__(self, channels, *, rngs):
        del rngs
        self.scale = nnx.Param(jnp.full((1, 1, 1, channels), 2.0))

    def __call__(self, x):
        return x * self.scale[...]


class Pooling(Doubling):
    def __call__(self, x):
        return jnp.mean(x, (1, 2))


def Plain(channels, *, rngs):
    return lambda x: x


class Wider(Doubling):
    def __call__(self, x):
        return x * jnp.ones((1, 1, 1, 3))


class Backwards(nnx.Module):
    num_features = 12

    def __init__(self, *, dtype, rngs):
        self.layer = nnx.Linear(3, 5, dtype=dtype, rngs=rngs)

    def __call__(self, images):
        return self.layer(images)


class Nameless(Backwards):
    num_features = None


def test_an_attention_block_of_ones_own_stands_in_both_places(untrusted, monkeypatch, rng):
    """Twice 2: ReLU and convolutions without a bias let factors pass."""
    patch_tiny_models(monkeypatch)
    build = lambda **options: create_model("tiny", **options, rngs=nnx.Rngs(0))  # noqa: E731
    with pytest.raises(InputError, match=r"model\.attention='test_named_parts:Doubling' would imp"):
        build(attention="test_named_parts:Doubling")
    config = make_config(
        "p", **{"model.name": "tiny", "model.attention": "test_named_parts:Doubling"}
    )
    experiment.trust_named_parts(config)
    plain = drawn_model(build)
    model = drawn_model(lambda: build(attention="test_named_parts:Doubling"))
    nnx.update(model, nnx.state(plain))
    for place, channels in (("stem_attention", 8), ("last_attention", 16)):
        getattr(model.backbone, place).scale[...] = jnp.full((1, 1, 1, channels), 2.0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    expected = 4 * nnx.view(plain, use_running_average=True).features(images)
    np.testing.assert_allclose(
        nnx.view(model, use_running_average=True).features(images), expected, rtol=1e-5
    )
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention": "Pooling"},
            "attention='test_named_parts:Pooling': it makes (2, 8) of (2, 7",
        ),
        ({"attention": "Wider"}, "called with [2, 7, 5, 8] it raised TypeError: mul got inc"),
        ({"attention": "cbam"}, "attention='cbam' names no module; expected package.module:fun"),
        ({"attention": "Plain"}, "Plain': it makes a function, expected an nnx.Module"),
        ({"attention": "loss"}, "missing a required argument: 'labels'; it is called as loss("),
        ({"attention": "Doubling", "name": "tiny_cbam"}, "tiny_cbam has no place for it; give one"),
        (
            {"attention": "Doubling", "name": "Backbone"},
            "Backbone has no place for it; give one of",
        ),
        (
            {"name": "Backwards"},
            "of images [2, 32, 32, 3] it makes [2, 32, 32, 5], expected [2, h, w, 12]",
        ),
        ({"name": "Nameless"}, "has no num_features: give it the channels of its last map"),
    ],
)
def test_a_wrong_model_or_attention_block_is_told_in_a_line(
    untrusted, monkeypatch, fields, message
):
    patch_tiny_models(monkeypatch)
    own = {
        f"model.{key}": f"test_named_parts:{name}" if name[0].isupper() or name == "loss" else name
        for key, name in fields.items()
    }
    config = make_config("photos.csv", **{"model.name": "tiny", **own})
    experiment.trust_named_parts(config)
    with pytest.raises(InputError) as caught:
        config_checks.check_choices(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_that_takes_other_arguments_is_told_which_are_given(untrusted):
    names = {"Backbone", "optimizer", "schedule", "loss"}
    named_parts.trust(*(f"test_named_parts:{name}" for name in names))
    with pytest.raises(InputError) as caught:
        create_model("test_named_parts:loss", rngs=nnx.Rngs(0))
    assert str(caught.value) == (
        "model.name='test_named_parts:loss': missing a required argument: 'embeddings'; "
        "it is called as loss(dtype=..., rngs=...)"
    )
    with pytest.raises(InputError, match=r"positional.*called as Backbone\(\.\.\., key=\.\.\.\)"):
        named_parts.call("test_named_parts:Backbone", "model.name", 1, key=2)
    make = functools.partial(named_parts.call, "test_named_parts:Backbone", "", dtype=jnp.float32)
    built = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert isinstance(built, Backbone)


@pytest.mark.parametrize(("kind", "expected"), [
    ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
    ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ("step", [0.0, 0.5, 1.0, 0.1, 0.01]),
])  # fmt: skip
def test_schedules(kind, expected):
    rate = optimizers.learning_rate_schedule(1.0, warmup_steps=10, total_steps=70, kind=kind)
    found = [float(rate(step)) for step in (0, 5, 10, 40, 70)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def small_fields(folder):
    photos = write_photos(folder, splits=("train", "validation", "test"), count=6)
    return {
        "data.name": str(photos),
        "data.image_size": 16,
        "model.name": "test_named_parts:Backbone",
        "model.embedding_dim": 8,
        "loss.name": "test_named_parts:loss",
        "optimizer.name": "test_named_parts:optimizer",
        "optimizer.schedule": "test_named_parts:schedule",
        "optimizer.warmup_steps": 0,
        "data.classes_per_batch": 2,
        "data.images_per_class": 4,
        "data.workers": 0,
        "train.steps": 4,
        "train.log_every": 1,
        "train.eval_every": 4,
        "train.checkpoint_every": 1,
        "eval.ks": (2,),
        "eval.batch_size": 8,
    }


def run_script(script, *arguments):
    """Run a script in a process of its own, to which this file is a module on its path."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_backbone_of_ones_own_trains_resumes_is_exported_and_searched(
    untrusted, monkeypatch, tmp_path
):
    fields = small_fields(tmp_path)
    whole = training.train_and_evaluate(
        make_config(fields["data.name"], **fields), tmp_path / "whole"
    )
    assert whole["finished"]

    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["--config=default", *flags, f"--workdir={tmp_path / 'killed'}"]
    done = run_script(TESTS / "train_driver.py", json.dumps({"kill": 2}), *command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_script(TESTS.parent / "train.py", *command)
    assert done.returncode == 0, done.stderr
    assert "steps 1 to 4" in done.stdout  # Not from the start.
    states = []
    for name in ("whole", "killed"):
        saved = runs.read_config(tmp_path / name)
        assert saved.model.name == "test_named_parts:Backbone"
        with runs.open_checkpoints(saved, tmp_path / name, read_only=True) as checkpoints:
            read = checkpoints.restore("last")
        assert any("rngs" in array for array in read.optimizer)
        states.append({**read.model, **read.optimizer})
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])

    # In a process of its own nothing is trusted; then it is, once.
    monkeypatch.setattr(named_parts, "_trusted", set())
    with pytest.raises(InputError, match="CBAM_JAX_TRUST=test_named_parts:Backbone"):
        cbam_jax.load(tmp_path / "killed")
    monkeypatch.setenv("CBAM_JAX_TRUST", "test_named_parts:Backbone")
    report = runs.evaluate(tmp_path / "killed", split="test", figures=False, html=False)
    assert 0 <= report["metrics"]["map@2"] <= 1
    hub.export(tmp_path / "killed", tmp_path / "exported")
    document = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert document["model"]["name"] == "test_named_parts:Backbone"
    embedder = cbam_jax.load(tmp_path / "exported")
    files = sorted(tmp_path.glob("test_*"))
    embeddings = embedder.embed_files(files, progress=False).embeddings
    _, indices = search(embeddings, embeddings, k=1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(len(files)))
