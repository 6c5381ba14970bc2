"""The losses as a config names them: fields, refusals, vectors of the classes in a run."""

import inspect
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from cbam_jax import InputError, config_checks, experiment, runs, steps, training
from cbam_jax.configs import default

NAMES = [name for name in experiment.LOSSES if name != "triplet"]


def make_config(name, **fields):
    config = default.get_config()
    config.update_from_flattened_dict({"loss.name": name, "model.normalize": True, **fields})
    return config


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_the_functions(name):
    parameters = inspect.signature(experiment.LOSSES[name]).parameters
    numbers = {
        argument: parameter.default
        for argument, parameter in parameters.items()
        if parameter.default is not parameter.empty and argument not in ("mask", "memory")
    }
    assert experiment.loss_options(make_config(name)) == numbers


def test_every_loss_that_has_a_name_is_one_of_the_wing():
    for name, loss in experiment.LOSSES.items():
        assert loss.__name__ == f"{name}_loss"


MISTAKES = {
    "circle": ("circle_scale", -1.0, "loss.circle_scale=-1.0: give a number above 0"),
    "arcface": ("arcface_margin", 2.0, "loss.arcface_margin=2.0: give an angle in [0, pi / 2]"),
    "sup_con": ("sup_con_temperature", float("nan"), "loss.sup_con_temperature=nan: give a num"),
    "recall_at_k_surrogate": (
        "recall_at_k_surrogate_ks",
        (0, 1),
        "loss.recall_at_k_surrogate_ks=(0, 1): give ks of at least 1",
    ),
    "soft_triple": ("soft_triple_centers", 0, "loss.soft_triple_centers=0: give at least 1"),
    "distance_weighted": (
        "distance_weighted_cutoff",
        2.5,
        "loss.distance_weighted_cutoff=2.5: give a distance in (0, 2)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name):
    field, value, message = MISTAKES[name]
    config = make_config(name, **{f"loss.{field}": value})
    with pytest.raises(InputError) as caught:
        config_checks.check_loss(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_without_a_memory_is_given_none():
    config = make_config("proxy_anchor", **{"loss.memory_size": 64})
    with pytest.raises(InputError, match="loss.memory_size=64: proxy_anchor takes no memory"):
        config_checks.check_large_batch(config, 64, 1)


def test_a_loss_of_directions_asks_for_unit_vectors():
    with pytest.raises(InputError, match="set --config.model.normalize=True"):
        config_checks.check_loss(make_config("circle", **{"model.normalize": False}))
    config_checks.check_loss(make_config("contrastive", **{"model.normalize": False}))


def test_proxies_learn_at_their_own_rate():
    params = {"backbone": {"kernel": jnp.ones(2)}, "proxies": {"vectors": jnp.ones((2, 2))}}
    optimizer = steps.create_optimizer("sgd", 0.5, momentum=0.0, proxy_multiple=10.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["backbone"]["kernel"], -0.5)
    np.testing.assert_allclose(updates["proxies"]["vectors"], -5.0)


@pytest.mark.slow
def test_muon_takes_proxies_for_no_matrix():
    """Adam's first step is the learning rate, whatever the gradient's size."""
    params = {"proxies": {"vectors": jnp.ones((2, 3))}, "kernel": jnp.ones((2, 3))}
    gradients = jax.tree.map(lambda x: x * jnp.array([[1.0, -2.0, 3.0], [1.0, 5.0, -7.0]]), params)
    optimizer = steps.create_optimizer("muon", 0.5)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    vectors = updates["proxies"]["vectors"]
    np.testing.assert_allclose(np.abs(vectors), np.abs(vectors)[0, 0], rtol=1e-4)
    assert np.ptp(np.abs(updates["kernel"])) > 0.01


def test_a_run_is_read_without_its_proxies(tmp_path, monkeypatch):
    tiny_run.patch_tiny_models(monkeypatch)
    config = tiny_run.make_config("photos.csv", **{"loss.name": "proxy_anchor"})
    build = experiment.build_model

    def with_proxies(config):
        model = build(config)
        model.proxies = experiment.build_proxies(config, 3, model.embedding_dim)
        return model

    monkeypatch.setattr(tiny_run, "build_model", with_proxies)
    written = tiny_run.write_run(tmp_path / "run", config)
    assert written.proxies.vectors.shape == (3, 16)
    model, (params, _), _ = runs.restore_model(config, tmp_path / "run", "last", steps.data_mesh())
    assert model.proxies is None
    read = dict(nnx.to_flat_state(params))
    expected = dict(nnx.to_flat_state(nnx.state(written, nnx.Param)))
    assert expected.keys() - read.keys() == {("proxies", "vectors")}
    for path, variable in read.items():
        np.testing.assert_array_equal(variable[...], expected[path][...])


@pytest.mark.slow
def test_a_run_trains_its_proxies_and_resumes(tmp_path, monkeypatch):
    tiny_run.patch_tiny_models(monkeypatch)
    photos = tiny_run.write_photos(tmp_path, splits=("train", "validation"), count=6)
    fields = {
        "loss.name": "soft_triple", "model.normalize": True, "train.eval_every": 2,
        "optimizer.warmup_steps": 0, "optimizer.schedule": "constant", "eval.ks": (5,),
        "data.classes_per_batch": 2, "data.images_per_class": 4,
    }  # fmt: skip
    config = tiny_run.make_config(photos, **fields)
    restored = {}
    for folder, lengths in (("once", (2,)), ("resumed", (1, 2))):
        for config.train.steps in lengths:
            training.train_and_evaluate(config, tmp_path / folder)
        with runs.open_checkpoints(config, tmp_path / folder, read_only=True) as checkpoints:
            restored[folder] = checkpoints.restore("last")
    assert restored["once"].step == 2
    for part in ("model", "optimizer"):
        once, resumed = getattr(restored["once"], part), getattr(restored["resumed"], part)
        assert once.keys() == resumed.keys()
        for array in once:
            np.testing.assert_array_equal(once[array], resumed[array], err_msg=array)
    vectors = restored["once"].model["params.proxies.vectors"]
    start = experiment.build_proxies(config, 3, 16).vectors[...]
    assert vectors.shape == (3, 10, 16)
    assert np.abs(vectors - start).max() > 1e-3


@pytest.mark.slow
def test_the_loss_of_a_config_is_given_the_models_proxies():
    config = make_config("cosface", **{"loss.cosface_margin": 0.2})
    proxies = experiment.build_proxies(config, 3, 4)
    x, labels = np.eye(3, 4, dtype=np.float32), np.array([0, 1, 2])
    loss = experiment.build_loss(config)
    found, _ = loss(x, labels, types.SimpleNamespace(proxies=proxies))
    vectors = np.asarray(proxies.vectors[...], np.float64)
    logits = 64 * (x @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T)
    logits -= 64 * 0.2 * np.eye(3)
    expected = np.mean(np.logaddexp.reduce(logits, axis=1) - np.diag(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- a loss of one's own ---

LOSSES_OF_MINE = """
import jax.numpy as jnp

def alone(embeddings, labels):
    return jnp.mean(embeddings)

def per_image(embeddings, labels):
    return jnp.mean(embeddings, axis=1), {}

def one_argument(embeddings):
    return jnp.mean(embeddings), {}

def branching(embeddings, labels):
    return (1.0 if embeddings[0, 0] > 0 else 0.0), {}

def good(embeddings, labels, step, key, margin=0.2):
    return jnp.mean(embeddings) + margin, {"step": step}
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("alone", "it returns (), expected a scalar and a dict of scalars; end it with: return"),
        ("per_image", "it returns ((8,), {}), expected a scalar"),
        ("one_argument", "raised TypeError: one_argument() takes 1 positional argument but 2"),
        ("branching", "raised TracerBoolConversionError: Attempted boolean conversion of traced"),
        ("absent", "losses_of_mine has no function 'absent'"),
        ("good", ""),
    ],
)
def test_a_wrong_loss_of_ones_own_is_told_in_one_line(function, message, tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text(LOSSES_OF_MINE)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"losses_of_mine:{function}"
    config = make_config(name, **{"data.classes_per_batch": 2, "data.images_per_class": 4})
    experiment.trust_named_parts(config)
    model = types.SimpleNamespace(embedding_dim=16)
    if not message:
        config_checks.check_own_loss(config, model)
        return
    with pytest.raises(InputError) as caught:
        config_checks.check_own_loss(config, model)
    assert f"loss.name={name}" in str(caught.value).replace("'", "", 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_documented_loss_of_ones_own_trains_as_it_stands(tmp_path, monkeypatch, rng):
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(program[program.index("def ") :].splitlines()) <= 20
    (tmp_path / "mylosses.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config("mylosses:lifted_loss")
    experiment.trust_named_parts(config)
    with jax.numpy_dtype_promotion("standard"):  # As JAX comes.
        config_checks.check_own_loss(config, types.SimpleNamespace(embedding_dim=16))
        x, labels = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 0, 1, 1, 2, 0])
        loss = jax.value_and_grad(experiment.build_loss(config), has_aux=True)
        (value, _), gradient = jax.jit(loss)(x, labels)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1).astype(np.float64)
    costs = []
    for i in range(6):
        pull = [d[i, j] for j in range(6) if labels[j] == labels[i] and j != i]
        push = [1 - d[i, j] for j in range(6) if labels[j] != labels[i]]
        if pull:  # The fifth has no positive.
            costs.append(max(0, np.logaddexp.reduce(pull) + np.logaddexp.reduce(push)))
    np.testing.assert_allclose(value, np.mean(costs), rtol=1e-5)
    assert np.all(np.isfinite(gradient))
