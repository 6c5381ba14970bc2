"""A training state that the devices share: what each holds, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from benchmarks import state_memory
from cbam_jax import sharding, steps
from cbam_jax.benchmark.compiled import program_memory
from cbam_jax.checkpoint import flatten, unflatten


class Wide(nnx.Module):
    """Two kernels that are worth sharing, of 12 x 1024 and 1024 x 16, among small arrays."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(12, 1024, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.second = nnx.Linear(1024, 16, rngs=rngs)

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        return self.norm(self.second(nnx.relu(self.first(x.reshape(x.shape[0], -1)))))


def spread(embeddings, labels):
    """A loss of the whole batch: each class's rows against the mean row of all."""
    apart = embeddings - jnp.mean(embeddings, axis=0, keepdims=True)
    wanted = jnp.sin(jnp.arange(16.0)[None] * (labels[:, None] + 1).astype(jnp.float32))
    return jnp.mean(jnp.square(apart - wanted)), {}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(11)
    label = np.repeat(np.arange(4, dtype=np.int32), 4)
    drawn = (rng.integers(0, 256, (16, 2, 2, 3), np.uint8) for _ in range(3))
    return [{"image": images, "label": label} for images in drawn]


OPTIMIZER = steps.create_optimizer("sgd", 0.05, momentum=0.9, weight_decay=0.1)


def start(mesh, shard_state):
    options = {"ema": True, "shard_state": shard_state}
    return steps.create_train_state(Wide(), OPTIMIZER, mesh, **options)


def make_step(mesh, shard_state, **options):
    options |= {"ema_decay": 0.5, "mesh": mesh, "shard_state": shard_state}
    return steps.make_train_step(Wide(), OPTIMIZER, spread, **options)


def trained(mesh, shard_state, batches, **options):
    state, losses = start(mesh, shard_state), []
    step = make_step(mesh, shard_state, **options)
    for batch in steps.to_devices(batches, mesh):
        state, scalars = step(state, batch)
        losses.append([float(scalars["loss"]), float(scalars["gradient_norm"])])
    return state, np.array(losses), step


def same(actual, expected):
    for name, array in flatten(expected).items():
        np.testing.assert_allclose(flatten(actual)[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def held(tree):
    """The shapes of what the first device holds of each array."""
    return [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def whole(batches):
    """The state and the losses after three steps of a run that shares nothing."""
    state, losses, _ = trained(steps.data_mesh(), False, batches)
    return state, losses


@pytest.mark.slow
def test_a_shared_state_takes_the_steps_of_a_whole_one(batches, whole):
    mesh, (expected, losses) = steps.data_mesh(), whole
    actual, shared_losses, step = trained(mesh, True, batches)
    np.testing.assert_allclose(shared_losses, losses, rtol=1e-5)
    assert len(np.unique(losses)) == losses.size  # Each step has a loss and a norm of its own.
    same(actual, expected)
    # Compiled once: a step places what it gives as it was placed before.
    assert step._jitted._cache_size() == 1
    for tree in (actual.params, actual.ema, actual.opt_state, start(mesh, True).opt_state):
        assert sorted(shape for shape in held(tree) if len(shape) == 2) == [(12, 128), (128, 16)]
    assert set(held(actual.batch_stats)) == {(16,)}

    embed = steps.make_embed_step(Wide(), mesh)
    found = [embed(s.params, s.batch_stats, batches[0])["embedding"] for s in (actual, expected)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert found[0].is_fully_replicated


@pytest.mark.slow
def test_a_shared_state_goes_on_with_another_number_of_devices(batches, whole):
    state, _, _ = trained(steps.data_mesh(), True, batches[:2])
    saved = flatten(state)
    for devices, shard_state in ((2, True), (1, False)):
        mesh = steps.data_mesh(jax.devices()[:devices])
        restored = unflatten(start(mesh, shard_state), saved)
        placed = steps.state_shardings(restored, mesh, shard_state=shard_state)
        step = make_step(mesh, shard_state)
        [batch] = steps.to_devices(batches[2:], mesh)
        last, scalars = step(steps.place(restored, placed), batch)
        same(last, whole[0])
        assert float(scalars["loss"]) == pytest.approx(whole[1][2][0], rel=1e-5)


@pytest.mark.slow
def test_the_compiled_step_takes_its_share_of_the_state(batches):
    mesh = steps.data_mesh()
    [batch] = steps.to_devices(batches[:1], mesh)
    arguments = []
    for shard_state in (False, True):
        state = start(mesh, shard_state)
        memory = program_memory(make_step(mesh, shard_state).lower(state, batch).compile())
        assert memory["donated"] == sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
        )
        arguments.append(memory["arguments"])
    # Parameters, momentum and average of two kernels, seven eighths of each elsewhere.
    assert arguments[0] - arguments[1] == 3 * 4 * (12 + 16) * 1024 * 7 // 8


@pytest.mark.slow
@pytest.mark.parametrize("shard_state", [False, True])
def test_what_a_device_holds_is_counted_without_arrays(shard_state):
    mesh = steps.data_mesh()
    state = steps.create_train_state(Wide(), OPTIMIZER, mesh, shard_state=shard_state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    described = state_memory.abstract_state(Wide(), OPTIMIZER, mesh, shard_state)
    assert state_memory.bytes_held(described) == held


@pytest.mark.slow
def test_chunks_and_steps_in_a_scan_share_too(batches):
    mesh = steps.data_mesh()
    expected, _, _ = trained(mesh, False, batches, chunk_size=8)
    same(trained(mesh, True, batches, chunk_size=8)[0], expected)
    expected, _, _ = trained(mesh, True, batches)
    step = make_step(mesh, True)
    scanned = jax.jit(lambda s, bs: jax.lax.scan(step, s, bs))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    last, _ = scanned(start(mesh, True), stacked)
    same(last, expected)


def test_what_can_be_shared():
    mesh = steps.data_mesh()
    specs = {
        (64, 1024): (None, "data"), (1024, 64): ("data",), (1001, 64): (None, "data"),
        (9, 9999): (), (64, 64): (), (9, 8192): (None, "data"),
    }  # fmt: skip
    for shape, spec in specs.items():
        assert tuple(sharding.shared_spec(shape, mesh)) == spec
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for refused in (None, explicit):
        with pytest.raises(ValueError, match="shard_state=True needs a mesh whose axes are of"):
            make_step(refused, True)
    with pytest.raises(ValueError, match="shard_state=True needs a mesh"):
        start(explicit, True)
