"""Gradient caching and the cross-batch memory, against the whole batch and against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeded import seeded_model
from test_steps import batch_of, flat, run, squared, tiny

from cbam_jax import steps, training
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.configs import default
from cbam_jax.losses import recall_at_k_surrogate_loss, smooth_ap_loss, triplet_loss

# One step by it is the gradient itself.
DESCENT = steps.create_optimizer("sgd", 1.0, momentum=0.0)
SOFT = functools.partial(triplet_loss, mining="batch_hard", soft=True)


def assert_same(actual, expected, atol=1e-5):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, atol=atol, rtol=1e-5, err_msg=name)


def with_statistics(rng):
    """The tiny model, its running statistics far from those of the batches."""
    model = tiny()
    model.norm.mean[...] = jnp.asarray(rng.normal(size=5), jnp.float32)
    model.norm.var[...] = jnp.asarray(rng.uniform(1, 2, size=5), jnp.float32)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 4096])
def test_chunks_on_eight_devices_give_the_gradient_of_the_whole_batch_on_one(rng, size):
    model, batch = with_statistics(rng), batch_of(rng, size)
    step = functools.partial(run, model, DESCENT, loss=SOFT, batches=[batch])
    options = {"freeze_batch_norm": True, "ema": True, "ema_decay": 0.5}
    one = steps.data_mesh(jax.devices()[:1])
    expected, losses = step(mesh=one, **options)
    actual, chunked = step(mesh=steps.data_mesh(), chunk_size=size // 4, **options)
    np.testing.assert_allclose(chunked, losses, rtol=1e-6)
    # Sums over thousands of images, in another order.
    assert_same(actual, expected, atol=1e-4 if size > 64 else 1e-5)
    for name, array in flat(nnx.state(model, nnx.Param)).items():
        moved = np.abs(flat(actual.params)[name] - array).max()
        assert moved > 1e-3 or name == "projection.bias"  # It changes no distance.


@pytest.mark.slow
@pytest.mark.parametrize("loss", [recall_at_k_surrogate_loss, smooth_ap_loss])
def test_rankings_are_of_the_whole_batch_and_not_of_a_chunk(rng, loss):
    """Ranks are counted among all images; wide steps, so that all of them have a slope."""
    model, batch = with_statistics(rng), batch_of(rng, 32)
    batch["label"] = rng.integers(0, 5, 32).astype(np.int32)
    step = functools.partial(run, model, DESCENT, batches=[batch], freeze_batch_norm=True)
    loss = functools.partial(loss, temperature=0.2)
    expected, losses = step(mesh=steps.data_mesh(jax.devices()[:1]), loss=loss)
    actual, chunked = step(mesh=steps.data_mesh(), loss=loss, chunk_size=8)
    np.testing.assert_allclose(chunked, losses, rtol=1e-6)
    assert_same(actual, expected, atol=1e-6)
    for name, array in flat(nnx.state(model, nnx.Param)).items():
        assert np.abs(flat(actual.params)[name] - array).max() > 5e-5, name


@pytest.mark.slow
def test_gradients_of_a_resnet_over_4096_images(rng):
    model, batch = seeded_model("resnet10_cbam"), batch_of(rng, 4096, side=16)
    step = functools.partial(run, model, DESCENT, batches=[batch], freeze_batch_norm=True)
    expected, losses = step(steps.data_mesh(), loss=SOFT)
    actual, chunked = step(steps.data_mesh(), loss=SOFT, chunk_size=256)
    np.testing.assert_allclose(chunked, losses, rtol=1e-5)
    scale = max(np.max(np.abs(array)) for array in flat(expected.params).values())
    assert_same(actual.params, expected.params, atol=1e-5 * scale)


def two_outputs(model, images):
    """As a classifier with an auxiliary head has them."""
    embeddings = model(images)
    return embeddings, -embeddings


@pytest.mark.slow
def test_batch_norm_normalises_chunks_and_updates_its_statistics_in_order(rng):
    model, batch = with_statistics(rng), batch_of(rng, 32)
    summed = lambda outputs, labels: squared(outputs[0] - 2 * outputs[1], labels)  # noqa: E731
    actual, losses = run(
        model, DESCENT, steps.data_mesh(), [batch], loss=summed, forward=two_outputs, chunk_size=8
    )
    reference = tiny()
    nnx.update(reference, nnx.state(model))

    def loss(reference):
        images = reference.preprocess(jnp.asarray(batch["image"]))
        chunks = [reference(images[first::4]) for first in range(4)]
        outputs = jnp.stack(chunks, axis=1).reshape(32, -1)
        return summed((outputs, -outputs), batch["label"])[0]

    expected, gradient = nnx.value_and_grad(loss)(reference)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    moved = jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param), gradient)
    assert_same(actual.params, moved, atol=1e-4)  # Sums before BatchNorm, whose gradient is 0.
    assert_same(actual.batch_stats, nnx.state(reference, nnx.BatchStat))


class Wide(nnx.Module):
    """Many activations, few parameters."""

    def __init__(self):
        self.up = nnx.Linear(12, 512, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(512, 3, rngs=nnx.Rngs(1))
        self.unused = nnx.BatchNorm(3, rngs=nnx.Rngs(2))

    def preprocess(self, images):
        return images.astype(jnp.float32).reshape(len(images), -1)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.slow
def test_memory_follows_the_chunk_and_not_the_batch():
    model, mesh = Wide(), steps.data_mesh(jax.devices()[:1])
    state = steps.create_train_state(model, DESCENT, mesh)

    def temporary(size, chunk_size):
        step = steps.make_train_step(model, DESCENT, squared, chunk_size=chunk_size)
        image = jax.ShapeDtypeStruct((size, 2, 2, 3), jnp.uint8)
        batch = {"image": image, "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    activations = 512 * 4  # Bytes an image.
    once = temporary(1024, 64)
    assert temporary(1024, None) - once > (1024 - 2 * 64) * activations
    assert temporary(2048, 64) - once < 1024 * activations / 10
    assert temporary(1024, 128) - once > 64 * activations * 0.9


def test_chunks_that_do_not_divide_the_batch(rng):
    with pytest.raises(ValueError, match="chunk_size 12 does not divide a batch of 32"):
        run(tiny(), DESCENT, steps.data_mesh(), [batch_of(rng, 32)], chunk_size=12)


# --- cross-batch memory ---

GENTLE = steps.create_optimizer("sgd", 0.1)


@functools.cache
def memory_run():
    """A model, a step with a memory of 12 places that opens after one step, and its mesh."""
    model, mesh = tiny(), steps.data_mesh()
    options = {"freeze_batch_norm": True, "chunk_size": 8, "memory_start_step": 1, "mesh": mesh}
    return model, steps.make_train_step(model, GENTLE, SOFT, **options), mesh


def fresh(memory_size=12):
    model, _, mesh = memory_run()
    return steps.create_train_state(model, GENTLE, mesh, memory_shape=(memory_size, 3))


@pytest.mark.slow
def test_a_batch_enters_the_memory_after_its_loss(rng):
    model, train_step, mesh = memory_run()
    graphdef, _, batch_stats = nnx.split(
        nnx.view(model, use_running_average=True), nnx.Param, nnx.BatchStat
    )
    rows, labels = np.zeros((0, 3), np.float32), np.zeros(0, np.int32)
    state = fresh()
    for number in range(4):
        batch = batch_of(rng, 8)
        reference = nnx.merge(graphdef, jax.device_get(state.params), batch_stats)
        embeddings = reference(reference.preprocess(jnp.asarray(batch["image"])))
        empty = 12 - len(rows)
        memory = np.pad(rows, ((empty, 0), (0, 0))), np.pad(labels, (empty, 0))
        filled = np.arange(12) >= empty
        expected, _ = SOFT(embeddings, batch["label"], memory=(*memory, filled))
        [sharded] = steps.to_devices([batch], mesh)
        state, scalars = train_step(state, sharded)
        np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(scalars["memory_filled"], len(rows) / 12, rtol=1e-6)
        if number >= 1:
            rows = np.concatenate([rows, embeddings])[-12:]
            labels = np.concatenate([labels, batch["label"]])[-12:]
        assert np.sum(state.memory.filled) == len(rows)
        kept = np.asarray(state.memory.filled)
        np.testing.assert_allclose(np.asarray(state.memory.embeddings)[kept], rows, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(state.memory.labels)[kept], labels)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_restored_memory_goes_on_bit_for_bit(rng, tmp_path):
    _, train_step, mesh = memory_run()
    config, batches = default.get_config(), [batch_of(rng, 8) for _ in range(5)]
    state = fresh()
    with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
        for step, batch in enumerate(steps.to_devices(batches, mesh), 1):
            state, scalars = train_step(state, batch)
            if step == 3:
                training.save(config, checkpoints, training.Position(state, step, []))
        checkpoints.wait()
        restored, step, _ = training.restore(config, checkpoints, fresh(), mesh)
        assert step == 3
        assert np.all(restored.memory.filled)
        for batch in steps.to_devices(batches[3:], mesh):
            restored, again = train_step(restored, batch)
    assert again == scalars
    assert_same(restored, state, atol=0)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_without_a_memory_a_checkpoint_holds_what_it_always_held():
    _, optimizer = training.checkpoint_items(fresh(memory_size=0))
    assert optimizer.keys() == {"step", "opt_state"}
