"""Models without BatchNorm, with dropout: trained, embedded, and gone on with bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import make_config

from cbam_jax import model_state, steps, training
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.gradcam import attention_gates


class Normalized(nnx.Module):
    """LayerNorm and dropout, no BatchNorm."""

    embedding_dim = 3

    def __init__(self, rngs, rate=0.4):
        self.first = nnx.Linear(12, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(7, 3, rngs=rngs)

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1))))
        return self.last(self.dropout(x))


def squared(embeddings, labels):
    return jnp.mean(jnp.square(embeddings - labels[:, None].astype(jnp.float32))), {}


def batches_of(rng, count, size=8):
    labels = np.arange(size, dtype=np.int32)
    return [
        {"image": rng.integers(0, 256, (size, 2, 2, 3), np.uint8), "label": labels}
        for _ in range(count)
    ]


def trained(model, batches, devices=None, state=None, **options):
    mesh = steps.data_mesh(devices)
    optimizer = steps.create_optimizer("sgd", 0.1, momentum=0.0)
    state = steps.create_train_state(model, optimizer, mesh) if state is None else state
    step = steps.make_train_step(model, optimizer, squared, mesh=mesh, **options)
    losses = []
    for batch in steps.to_devices(batches, mesh):
        state, scalars = step(state, batch)
        losses.append(float(scalars["loss"]))
    return state, losses


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def by_hand(model, batches):
    """The losses of SGD on the module itself, which moves its own random state."""
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    losses = []

    @jax.jit
    def gradient(params, rest, batch):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            value, _ = squared(model(model.preprocess(batch["image"])), batch["label"])
            return value, nnx.state(model, nnx.RngState)

        return jax.value_and_grad(loss, has_aux=True)(params)

    for batch in batches:
        (value, rest), grads = gradient(params, rest, batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        losses.append(float(value))
    return losses


@pytest.mark.slow
def test_dropout_draws_anew_each_step_as_the_module_itself_does(rng):
    batches = batches_of(rng, 3)
    expected = by_hand(Normalized(nnx.Rngs(0)), batches)
    state, losses = trained(Normalized(nnx.Rngs(0)), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert int(state.rngs["dropout"]["rngs"]["count"][...]) == 3
    _, one = trained(Normalized(nnx.Rngs(0)), batches, jax.devices()[:1])
    np.testing.assert_allclose(one, losses, rtol=1e-5)


@pytest.mark.slow
def test_random_state_is_saved_and_goes_on_bit_for_bit(rng, tmp_path):
    batches, model = batches_of(rng, 4), Normalized(nnx.Rngs(0))
    expected, losses = trained(model, batches)
    half, _ = trained(model, batches[:2])
    config, mesh = make_config("none", **{"train.steps": 4}), steps.data_mesh()
    with Checkpoints(tmp_path / "checkpoints", best_metric="map@10") as checkpoints:
        training.save(config, checkpoints, training.Position(half, 2, []))
        checkpoints.wait()
        optimizer = steps.create_optimizer("sgd", 0.1, momentum=0.0)
        fresh = steps.create_train_state(Normalized(nnx.Rngs(5)), optimizer, mesh)
        position = training.restore(config, checkpoints, fresh, mesh)
    actual, rest = trained(model, batches[2:], state=position.state)
    assert rest == losses[2:]
    assert_equal(actual, expected)


@pytest.mark.slow
def test_chunks_draw_one_after_the_other(rng):
    batches, model = batches_of(rng, 1, size=16), Normalized(nnx.Rngs(0))
    state, _ = trained(model, batches, chunk_size=8)
    assert int(state.rngs["dropout"]["rngs"]["count"][...]) == 2
    plain = Normalized(nnx.Rngs(0), rate=0.0)
    whole, loss = trained(plain, batches)
    chunked, same = trained(plain, batches, chunk_size=8)
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        chunked.params,
        whole.params,
    )


@pytest.mark.slow
def test_nothing_is_random_in_an_embedding(rng):
    model, mesh = Normalized(nnx.Rngs(0)), steps.data_mesh()
    _, *arrays, _ = model_state.split(model)
    [batch] = steps.to_devices(batches_of(rng, 1), mesh)
    plain = Normalized(nnx.Rngs(0), rate=0.0)
    expected = plain(plain.preprocess(batch["image"]))
    # Also of a model whose arrays are still to come, as a run's are.
    abstract = nnx.eval_shape(lambda: Normalized(nnx.Rngs(0)))
    for of in (model, abstract):
        actual = steps.make_embed_step(of, mesh)(*arrays, batch)["embedding"]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    merged = model_state.evaluation_view(model_state.merger(abstract)(*arrays))
    np.testing.assert_array_equal(merged(plain.preprocess(batch["image"])), expected)


def test_a_model_without_random_state_keeps_none():
    class Plain(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    optimizer = steps.create_optimizer("sgd", 0.1, momentum=0.0)
    state = steps.create_train_state(Plain(), optimizer, steps.data_mesh())
    assert state.rngs is None
    assert "rngs" not in training.checkpoint_items(state)[1]


def test_arrays_of_another_kind_are_named():
    class Strange(nnx.Module):
        def __init__(self):
            self.inner = nnx.Dict(total=nnx.Intermediate(jnp.zeros(2)))

    with pytest.raises(ValueError, match=r"the model's inner\.total is an nnx\.Intermediate"):
        model_state.split(Strange())


def test_gates_of_a_model_with_dropout_are_none(rng):
    model = Normalized(nnx.Rngs(0))
    assert attention_gates(model, jnp.zeros((2, 2, 2, 3))) == {}
