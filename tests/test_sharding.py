"""The pieces over meshes: Auto and Explicit axes, other names, two axes, and inside shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cbam_jax import model_state, steps
from cbam_jax.attention import CBAM
from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.layers import Conv, DepthwiseConv
from cbam_jax.distances import pairwise_distances
from cbam_jax.losses import cross_entropy_loss, triplet_loss
from cbam_jax.metrics import count_relevant, label_matches, retrieval_metrics
from cbam_jax.search import top_k

MESHES = {
    "explicit": ((8,), ("data",), AxisType.Explicit),
    "other_name": ((8,), ("rows",), AxisType.Explicit),
    "data_model": ((4, 2), ("model", "data"), AxisType.Explicit),
    "auto": ((4, 2), ("model", "data"), AxisType.Auto),
}


@pytest.fixture(params=MESHES)
def mesh(request):
    shape, names, kind = MESHES[request.param]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@pytest.fixture
def embedded(rng):
    labels = np.repeat(np.arange(4, dtype=np.int32), 4)
    return rng.normal(size=(16, 5)).astype(np.float32), labels


def sharded(mesh, *arrays):
    [batch] = steps.to_devices([dict(enumerate(arrays))], mesh)
    return batch.values()


def close(actual, expected, atol=1e-6):
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol)
    jax.tree.map(same, actual, expected)


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device(mesh, embedded):
    kind = next(name for name, (_, names, _) in MESHES.items() if names == mesh.axis_names)
    mining = {"explicit": "batch_all", "other_name": "batch_hard"}.get(kind, "semi_hard")
    loss = lambda e, l: triplet_loss(e, l, mining=mining)  # noqa: E731, E741
    find = jax.jit(jax.value_and_grad(loss, has_aux=True))
    close(find(*sharded(mesh, *embedded)), find(*embedded))


@pytest.mark.slow
def test_a_loss_outside_of_jit_over_an_explicit_mesh(embedded):
    mesh = jax.make_mesh((8,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)  # What JAX makes unless told otherwise.
    actual, _ = triplet_loss(*sharded(mesh, *embedded))
    close(actual, triplet_loss(*embedded)[0])


@pytest.mark.slow
def test_distances_keep_the_rows_where_they_are(mesh, embedded):
    x, _ = embedded
    (rows,) = sharded(mesh, x)
    close(pairwise_distances(rows, jnp.asarray(x[:3])), pairwise_distances(x, x[:3]))
    if mesh.explicit_axes:
        spec = jax.typeof(pairwise_distances(jnp.asarray(x[:3]), rows)).sharding.spec
        assert spec == PartitionSpec(None, steps.batch_spec(mesh)[0])


@pytest.mark.slow
def test_cross_entropy_over_a_mesh(mesh, embedded):
    logits, labels = embedded
    find = jax.jit(jax.value_and_grad(cross_entropy_loss, has_aux=True))
    close(find(*sharded(mesh, logits, labels)), find(logits, labels))


@pytest.mark.slow
def test_a_program_over_a_mesh_evaluates_itself(mesh, embedded):
    @jax.jit
    def evaluate(x, labels):
        _, indices = top_k(x, x, 3, exclude_self=True)
        relevant = count_relevant(labels, labels, query_in_gallery=True)
        apart = count_relevant(labels, labels, True, labels, jnp.arange(len(labels)))
        matches = label_matches(indices, labels, labels)
        return matches, apart, retrieval_metrics(matches, relevant, ks=(1, 3))

    close(evaluate(*sharded(mesh, *embedded)), evaluate(*embedded))


class Layers(nnx.Module):
    """A strided convolution, depthwise one, BatchNorm and CBAM, as backbones have them."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = Conv(3, 8, 3, 2, dtype=jnp.float32, rngs=rngs)
        self.norm = BatchNorm(8, rngs=rngs)
        self.depthwise = DepthwiseConv(8, 3, dtype=jnp.float32, rngs=rngs)
        self.cbam = CBAM(8, 4, rngs=rngs)

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        x = self.cbam(self.depthwise(self.norm(self.conv(x))))
        return jnp.mean(x, axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_layers_in_shard_map_have_the_gradient_of_a_mean_over_shards(rng, check_vma):
    images = rng.normal(size=(8, 9, 9, 3)).astype(np.float32)
    graphdef, params, rest = nnx.split(Layers(), nnx.Param, ...)

    def loss(params, images):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, rest, copy=True)(images)))

    expected = jax.tree.map(
        lambda *grads: np.mean(grads, axis=0),
        *(jax.jit(jax.grad(loss))(params, images[i : i + 4]) for i in (0, 4)),
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def shard(params, images):
        grads = jax.grad(lambda p: jax.lax.pmean(loss(p, images), "data"))(params)
        # Unchecked, JAX leaves the sum over shards to the user.
        return grads if check_vma else jax.lax.psum(grads, "data")

    specs = PartitionSpec(), PartitionSpec("data")
    find = jax.shard_map(
        shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma
    )
    actual = jax.jit(find)(params, images)
    scale = {True: 1.0, False: 0.5}[check_vma]
    close(jax.tree.map(lambda g: g * scale, actual), expected)


# --- steps ---


class Tiny(nnx.Module):
    """A convolution's worth of what steps need: little to compile."""

    def __init__(self):
        self.layer = nnx.Linear(12, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        return self.norm(self.layer(x.reshape(x.shape[0], -1)))


def scanned_and_stepped(model, mesh, batches, loss):
    optimizer = steps.create_optimizer("sgd", 0.05)
    start = functools.partial(
        steps.create_train_state, model, optimizer, mesh, ema=True, memory_shape=(16, 3)
    )
    step = steps.make_train_step(model, optimizer, loss, ema_decay=0.5, mesh=mesh)
    state, losses = start(), []
    for batch in steps.to_devices(batches, mesh):
        state, scalars = step(state, batch)
        losses.append(scalars["loss"])
    spec = PartitionSpec(None, *steps.batch_spec(mesh))
    place = lambda *leaves: jax.device_put(np.stack(leaves), NamedSharding(mesh, spec))  # noqa: E731
    stacked = jax.tree.map(place, *batches)
    last, scalars = jax.jit(lambda s, bs: jax.lax.scan(step, s, bs))(start(), stacked)
    return (state, np.array(losses)), (last, scalars["loss"])


def batches_of(rng, count, size=16):
    label = np.repeat(np.arange(size // 4, dtype=np.int32), 4)
    return [
        {"image": rng.integers(0, 256, (size, 2, 2, 3), np.uint8), "label": label}
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [1, 8])
def test_scan_over_steps_is_one_step_after_the_other(rng, kind, devices):
    mesh = jax.make_mesh((devices,), ("data",), (kind,), devices=jax.devices()[:devices])
    loss = functools.partial(triplet_loss, mining="batch_all", soft=True)
    stepped, scanned = scanned_and_stepped(Tiny(), mesh, batches_of(rng, 4), loss)
    assert int(scanned[0].step) == 4
    close(jax.device_get(scanned), jax.device_get(stepped), atol=1e-5)


def test_a_step_and_an_embed_step_can_be_traced(rng):
    model, mesh = Tiny(), steps.data_mesh()
    optimizer = steps.create_optimizer("sgd", 0.05)
    step = steps.make_train_step(model, optimizer, triplet_loss, mesh=mesh)
    state = steps.create_train_state(model, optimizer, mesh)
    [batch] = batches_of(rng, 1)
    after, scalars = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert scalars["loss"].shape == ()
    embed = steps.make_embed_step(model, mesh)
    _, params, batch_stats, _ = model_state.split(model)
    traced = jax.jit(lambda images: embed(params, batch_stats, {"image": images}))
    assert traced.eval_shape(batch["image"])["embedding"].shape == (16, 3)
    assert "dot_general" in str(jax.make_jaxpr(step)(state, batch))


@pytest.mark.slow
def test_a_mesh_of_ones_own_trains_and_embeds(mesh, rng):
    model, optimizer = Tiny(), steps.create_optimizer("sgd", 0.05)
    batches, finals = batches_of(rng, 2), []
    for over in (mesh, steps.data_mesh(jax.devices()[:1])):
        step = steps.make_train_step(model, optimizer, triplet_loss, mesh=over)
        state = steps.create_train_state(model, optimizer, over)
        for batch in steps.to_devices(batches, over):
            state, _ = step(state, batch)
        embed = steps.make_embed_step(model, over)
        [batch] = steps.to_devices(batches[:1], over)
        finals.append(jax.device_get(embed(state.params, state.batch_stats, batch)["embedding"]))
    close(*finals, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_batch_all_in_shard_map_is_that_of_each_shard(embedded, check_vma, soft):
    x, labels = embedded
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    loss = lambda x, y: triplet_loss(x, y, mining="batch_all", soft=soft)[0]  # noqa: E731
    grad = jax.grad(loss)
    spec = PartitionSpec("data")
    find = jax.shard_map(grad, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    expected = [jax.jit(grad)(x[i : i + 8], labels[i : i + 8]) for i in (0, 8)]
    close(jax.jit(find)(x, labels), np.concatenate(expected))
