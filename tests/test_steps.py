"""The steps against slow references: other device counts, and the optimizers in float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from seeded import seeded_model

from cbam_jax import steps
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model


class Tiny(nnx.Module):
    """A backbone, attention (new), a norm with statistics, and a projection (new)."""

    def __init__(self, rngs):
        self.backbone = nnx.Linear(12, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.attention = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.projection = nnx.Linear(5, 3, rngs=rngs)

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        x = self.norm(self.backbone(x.reshape(x.shape[0], -1)))
        return self.projection(nnx.relu(x) + self.attention(x))


def tiny():
    return Tiny(nnx.Rngs(0))


def batch_of(rng, size, side=2):
    image = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    return {"image": image, "label": np.repeat(np.arange(size // 4), 4).astype(np.int32)}


def squared(embeddings, labels):
    """A smooth loss, so that gradients of parts add up to the gradient of the whole."""
    target = labels[:, None].astype(jnp.float32)
    loss = jnp.mean(jnp.sum(jnp.square(embeddings - target), axis=1))
    return loss, {"largest": jnp.max(embeddings)}


def run(model, optimizer, mesh, batches, *, loss=squared, ema=False, averaged=False, **options):
    """Steps over host batches: the last state on the host, and the losses."""
    kept = {"ema": ema, "ema_batch_stats": averaged}
    state = steps.create_train_state(model, optimizer, mesh, **kept)
    train_step = steps.make_train_step(model, optimizer, loss, **options)
    losses = []
    for batch in steps.to_devices(batches, mesh):
        state, scalars = train_step(state, batch)
        losses.append(scalars["loss"])
    return jax.device_get(state), np.array(losses)


def flat(tree):
    """Arrays by dotted names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path).removesuffix(".value"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
def test_one_device_and_eight_give_the_same(rng):
    model = seeded_model("resnet18_cbam")
    optimizer = steps.create_optimizer("sgd", 0.02, weight_decay=1e-3)
    batches = [batch_of(rng, 16, side=32) for _ in range(3)]
    # The soft loss is smooth: a hinge would turn the last bit of a distance into another gradient.
    loss = functools.partial(triplet_loss, mining="batch_all", soft=True)
    assert len(jax.devices()) == 8
    (one, losses_one), (eight, losses_eight) = (
        run(model, optimizer, steps.data_mesh(devices), batches, loss=loss)
        for devices in (jax.devices()[:1], jax.devices())
    )
    assert np.isfinite(losses_one).all()
    np.testing.assert_allclose(losses_eight, losses_one, atol=1e-5)
    before = flat(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    # Of sums that are added in another order the last bits differ, 6e-8 after the first step; each
    # further step makes that up to a hundred times as much.
    for part, tolerance in (("params", 2e-4), ("batch_stats", 1e-3)):
        expected, actual = flat(getattr(one, part)), flat(getattr(eight, part))
        assert expected.keys() == actual.keys()
        for name, array in expected.items():
            difference = np.max(np.abs(actual[name] - array))
            assert difference < tolerance * max(1, np.max(np.abs(array))), name
        moved = max(np.max(np.abs(array - before[name])) for name, array in expected.items())
        assert moved > 10 * tolerance


# --- optimizers against torch's definitions, in float64 ---

SHAPES = {"kernel": (3, 4), "bias": (4,), "projection": (4, 2)}


def schedule_by_hand(peak, warmup, total, step):
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def clipped(grads, largest):
    norm = math.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    factor = min(1.0, largest / norm) if largest else 1.0
    return {name: grad * factor for name, grad in grads.items()}


def torch_sgd(param, grad, memory, rate, decay, momentum, t):
    grad = grad + decay * param
    memory["buffer"] = grad if t == 1 else momentum * memory["buffer"] + grad
    return param - rate * memory["buffer"]


def torch_adamw(param, grad, memory, rate, decay, _, t):
    param = param - rate * decay * param
    memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * grad
    memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * grad**2
    mean, square = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return param - rate * mean / (np.sqrt(square) + 1e-8)


@pytest.mark.parametrize("clip_norm", [None, 1.5])
@pytest.mark.parametrize(("name", "update"), [("sgd", torch_sgd), ("adamw", torch_adamw)])
def test_optimizer_is_torchs(rng, name, update, clip_norm):
    peak, warmup, total, decay, momentum, multiple = 0.3, 2, 7, 0.2, 0.7, 5.0
    schedule = steps.learning_rate_schedule(peak, warmup_steps=warmup, total_steps=total)
    optimizer = steps.create_optimizer(
        name,
        schedule,
        weight_decay=decay,
        momentum=momentum,
        new_layer_multiple=multiple,
        clip_norm=clip_norm,
    )
    expected = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in expected.items()}
    state, memories = optimizer.init(params), {name: {} for name in SHAPES}
    apply = jax.jit(optimizer.update)
    for t in range(1, 7):
        grads = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        single = {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}
        updates, state = apply(single, state, params)
        params = optax.apply_updates(params, updates)
        for key, grad in clipped(grads, clip_norm).items():
            rate = schedule_by_hand(peak, warmup, total, t - 1)
            rate *= multiple if key.startswith("projection") else 1.0
            decays = decay if expected[key].ndim > 1 else 0.0
            expected[key] = update(expected[key], grad, memories[key], rate, decays, momentum, t)
            # Adam's 1 - 0.999^t keeps four digits in float32, and the updates are of size 1.
            atol = 1e-4 if name == "adamw" else 2e-6
            np.testing.assert_allclose(params[key], expected[key], rtol=2e-5, atol=atol)


def newton_schulz(matrix):
    """Muon's iteration, in float64: a matrix whose singular values are all near 1."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = matrix / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if x.shape == matrix.shape else x.T


@pytest.mark.slow
def test_muon_takes_a_kernel_as_the_matrix_of_its_outputs(rng):
    shapes = {"kernel": (2, 1, 2, 5), "bias": (4,)}
    grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = steps.create_optimizer("muon", 0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    matrix = newton_schulz(np.float64(grads["kernel"]).reshape(4, 5)).reshape(2, 1, 2, 5)
    ratio = np.asarray(updates["kernel"]) / matrix
    np.testing.assert_allclose(ratio, -0.1 * np.sqrt(5 / 4), rtol=1e-3)
    first = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # Of Adam that looks ahead.
    np.testing.assert_allclose(updates["bias"], -0.1 * first * np.sign(grads["bias"]), rtol=1e-5)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'lamb': choose one of sgd, adamw"):
        steps.create_optimizer("lamb", 0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"pool"}),
        ({"is_new": ("head", "cbam")}, {"head", "cbam"}),
        ({"is_new": "cbam"}, {"cbam"}),
        ({"is_new": lambda path: path[-1] == "scale"}, {"cbam"}),
    ],
)
def test_new_layers_are_those_of_whole_names_or_of_a_function(options, expected):
    kernels = ("pool", "spooler", "self_attention_backbone", "head")
    params = {name: {"kernel": jnp.ones(2)} for name in kernels} | {"cbam": {"scale": jnp.ones(2)}}
    optimizer = steps.create_optimizer("sgd", 1.0, momentum=0.0, new_layer_multiple=3.0, **options)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found = {name for name, part in updates.items() if jax.tree.leaves(part)[0][0] == -3.0}
    assert found == expected


@pytest.mark.slow
def test_new_layers_of_a_real_model_are_attention_projection_and_pooling():
    build = lambda: create_model(  # noqa: E731
        "resnet10_cbam", embedding_dim=8, pooling="gem", rngs=nnx.Rngs(0)
    )
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)
    optimizer = steps.create_optimizer("sgd", 1.0, momentum=0.0, new_layer_multiple=3.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    faster = {name for name, update in flat(updates).items() if np.all(update == -3.0)}
    slower = {name for name, update in flat(updates).items() if np.all(update == -1.0)}
    assert faster | slower == flat(params).keys()
    new = ("attention", "projection.", "pool.")
    assert faster == {name for name in flat(params) if any(part in name for part in new)}
    assert {"projection.kernel", "projection.bias", "pool.power"} <= faster
    assert {"backbone.conv1.kernel", "backbone.bn1.scale"} <= slower


def test_two_micro_batches_make_one_update_with_the_mean_gradient(rng):
    model, mesh = tiny(), steps.data_mesh()
    first, second = batch_of(rng, 8), batch_of(rng, 8)
    frozen = {"freeze_batch_norm": True}  # Statistics of halves are not those of the whole.
    options = {"weight_decay": 0.1, "momentum": 0.9}
    whole = {name: np.concatenate([first[name], second[name]]) for name in first}
    once = steps.create_optimizer("sgd", 0.1, **options)
    expected, _ = run(model, once, mesh, [whole, whole], **frozen)
    twice = steps.create_optimizer("sgd", 0.1, accumulate_steps=2, **options)
    half, _ = run(model, twice, mesh, [first], **frozen)
    actual, _ = run(model, twice, mesh, [first, second] * 2, **frozen)
    untouched = flat(nnx.state(model, nnx.Param))
    for name, array in flat(half.params).items():
        np.testing.assert_array_equal(array, untouched[name])
    for name, array in flat(expected.params).items():
        np.testing.assert_allclose(flat(actual.params)[name], array, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(array, untouched[name])


# --- what a step changes, and what it leaves ---


@pytest.mark.slow
def test_scalars_are_loss_gradient_norm_and_the_losss_own(rng):
    model, mesh = tiny(), steps.data_mesh()
    optimizer = steps.create_optimizer("sgd", 0.1)
    batch = batch_of(rng, 8)
    train_step = steps.make_train_step(model, optimizer, squared)
    [sharded] = steps.to_devices([batch], mesh)
    _, scalars = train_step(steps.create_train_state(model, optimizer, mesh), sharded)

    def loss(model):
        return squared(model(model.preprocess(jnp.asarray(batch["image"]))), batch["label"])

    (expected, own), grads = nnx.value_and_grad(loss, has_aux=True)(tiny())
    norm = math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(grads)))
    assert scalars.keys() == {"loss", "gradient_norm", "largest"}
    for name, value in {"loss": expected, "gradient_norm": norm, **own}.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-5)


def test_a_norm_is_of_arrays_of_any_rank(rng):
    shapes = (), (3,), (2, 5), (3, 2, 4, 5)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    expected = math.sqrt(sum(np.sum(np.square(a.astype(np.float64))) for a in arrays))
    assert float(steps._norm(jax.tree.map(jnp.asarray, arrays))) == pytest.approx(expected)


@pytest.mark.slow
def test_moving_average_of_the_parameters_and_statistics(rng):
    model, mesh, decay = tiny(), steps.data_mesh(), 0.75
    optimizer = steps.create_optimizer("sgd", 0.1)
    batches = [batch_of(rng, 8) for _ in range(3)]
    averages = [
        {name: np.float64(a) for name, a in flat(nnx.state(model, kind)).items()}
        for kind in (nnx.Param, nnx.BatchStat)
    ]
    options = {"ema": True, "averaged": True, "ema_decay": decay}
    for count in (1, 2, 3):
        state, _ = run(model, optimizer, mesh, batches[:count], **options)
        for average, tree in zip(averages, (state.params, state.batch_stats), strict=True):
            for name, array in flat(tree).items():
                average[name] = decay * average[name] + (1 - decay) * array
    for average, tree in zip(averages, (state.ema, state.ema_batch_stats), strict=True):
        assert flat(tree).keys() == average.keys()
        for name, array in flat(tree).items():
            np.testing.assert_allclose(array, average[name], rtol=1e-5, atol=1e-6)
    assert steps.evaluation_arrays(state) == (state.ema, state.ema_batch_stats)
    plain = state._replace(ema=None, ema_batch_stats=None)
    assert steps.evaluation_arrays(plain) == (state.params, state.batch_stats)
    with pytest.raises(ValueError, match="ema_batch_stats=True .* give ema=True too"):
        steps.create_train_state(model, optimizer, mesh, ema_batch_stats=True)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(rng):
    model, mesh = tiny(), steps.data_mesh()
    model.norm.mean[...] = jnp.asarray(rng.normal(size=5), jnp.float32)
    model.norm.var[...] = jnp.asarray(rng.uniform(1, 2, size=5), jnp.float32)
    before = flat(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    optimizer, batch = steps.create_optimizer("sgd", 0.1), batch_of(rng, 8)
    for frozen in (True, False):
        state, losses = run(model, optimizer, mesh, [batch], freeze_batch_norm=frozen)
        for name, array in flat(state.batch_stats).items():
            assert np.array_equal(array, before[name]) == frozen
        for name, array in flat(state.params).items():
            assert not np.array_equal(array, before[name])
        reference = nnx.view(model, use_running_average=frozen)
        images = reference.preprocess(jnp.asarray(batch["image"]))
        expected, _ = squared(nnx.clone(reference)(images), batch["label"])
        np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


def test_the_state_holds_all_arrays_and_the_model_is_not_written_to(rng):
    model, mesh = tiny(), steps.data_mesh()
    before = flat(nnx.state(model))
    optimizer = steps.create_optimizer("adamw", 0.1)
    state, _ = run(model, optimizer, mesh, [batch_of(rng, 8)] * 2)
    assert int(state.step) == 2
    assert flat(state.params).keys() | flat(state.batch_stats).keys() == before.keys()
    for name, array in flat(nnx.state(model)).items():
        np.testing.assert_array_equal(array, before[name])


# --- embedding ---


def evaluation_batches(images, size):
    """Padded batches in shuffled order of rows; padding points at row 0 with garbage."""
    rows = np.random.default_rng(5).permutation(len(images))
    for start in range(0, len(rows), size):
        index = rows[start : start + size]
        padding = size - len(index)
        garbage = np.full((padding, *images.shape[1:]), 255, np.uint8)
        yield {
            "image": np.concatenate([images[index], garbage]),
            "index": np.concatenate([index, np.zeros(padding, np.int64)]).astype(np.int32),
            "mask": np.arange(size) < len(index),
        }


@pytest.fixture
def embedder(rng):
    """embed(batches, size), the images, and their embeddings by the plain model."""
    model, mesh = tiny(), steps.data_mesh()
    model.norm.mean[...] = jnp.asarray(rng.normal(size=5), jnp.float32)
    images = rng.integers(0, 256, (21, 2, 2, 3), np.uint8)
    reference = nnx.view(model, use_running_average=True)
    expected = np.asarray(reference(reference.preprocess(jnp.asarray(images))))
    state = steps.replicate(nnx.split(model, nnx.Param, nnx.BatchStat)[1:], mesh)
    step = steps.make_embed_step(model, mesh)

    def embed(batches, size=21):
        return steps.embed_batches(step, *state, batches, mesh, size)

    return embed, images, expected


def test_every_image_is_embedded_once_and_padding_ignored(embedder):
    embed, images, expected = embedder
    for size in (8, 16, 24):
        actual = embed(evaluation_batches(images, size))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_missing_and_repeated_images_are_counted(embedder):
    embed, images, _ = embedder
    batches = list(evaluation_batches(images, 8))
    with pytest.raises(ValueError, match="8 of 21 images were not embedded exactly once"):
        embed(batches[1:])
    with pytest.raises(ValueError, match="8 of 21 images"):
        embed([*batches, batches[0]])
    with pytest.raises(ValueError, match="1 of 22 images"):
        embed(batches, size=22)
    with pytest.raises(ValueError, match="21 of 21 images"):
        embed([])


# --- what must fit together; asked of shapes alone, so that nothing is compiled ---


def traced_scalars(loss, *, ema=False, chunks_of=8, **options):
    model, mesh, optimizer = tiny(), steps.data_mesh(), steps.create_optimizer("sgd", 0.1)
    state = steps.create_train_state(model, optimizer, mesh, ema=ema)
    step = steps.make_train_step(model, optimizer, loss, **options)
    return jax.eval_shape(step, state, batch_of(np.random.default_rng(0), chunks_of))[1]


def test_an_average_is_in_the_state_and_the_step_or_in_neither():
    with pytest.raises(ValueError, match=r"ema_decay is 0\.9 and the state has no moving average"):
        traced_scalars(squared, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay is 0\.0 and the state has a moving average"):
        traced_scalars(squared, ema=True)
    traced_scalars(squared, ema=True, ema_decay=0.9)


def test_a_scalar_of_the_loss_does_not_hide_the_steps_own():
    with pytest.raises(ValueError, match="loss_fn returns a scalar 'loss'"):
        traced_scalars(lambda e, l: (squared(e, l)[0], {"loss": 42.0}))  # noqa: E741


def test_chunks_refuse_an_output_that_has_no_row_for_each_image():
    def forward(model, images):
        return {"embeddings": model(images), "proxies": model.projection.kernel[:4]}

    loss = lambda outputs, labels: squared(outputs["embeddings"], labels)  # noqa: E731
    with pytest.raises(ValueError, match=r"forward's output\['proxies'\] has shape \(4, 3\)"):
        traced_scalars(loss, forward=forward, chunk_size=4)
    traced_scalars(loss, forward=forward)


def test_what_a_model_and_a_batch_lack_is_told(rng):
    model, optimizer = tiny(), steps.create_optimizer("sgd", 0.1)
    mesh, batch = steps.data_mesh(jax.devices()[:1]), batch_of(rng, 4)
    state = steps.create_train_state(model, optimizer, mesh)
    step = steps.make_train_step(model, optimizer, squared)
    with pytest.raises(ValueError, match="the batch has no 'label' but .*'image'.*: give a dict"):
        step(state, {"image": batch["image"]})
    with pytest.raises(ValueError, match="the batch has no 'image' but"):
        steps.make_embed_step(model, mesh)(state.params, state.batch_stats, {})
    plain = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for make in (
        lambda: steps.make_train_step(plain, optimizer, squared),
        lambda: steps.make_embed_step(plain, mesh),
    ):
        with pytest.raises(ValueError, match="Linear has no method preprocess"):
            make()


def test_a_loss_gets_what_it_has_an_argument_for(rng):
    seen = {}

    def loss(embeddings, labels, batch, *, step, key, model, weight=2.0):
        seen.update(batch=batch, step=step, key=key, weight=weight)
        proxies = model.projection.kernel[...]
        return squared(embeddings, labels)[0] + jnp.sum(proxies), {}

    scalars = traced_scalars(loss)
    assert scalars.keys() == {"loss", "gradient_norm"}
    assert seen["batch"].keys() == {"image", "label"}
    assert seen["step"].dtype == jnp.int32
    assert jnp.issubdtype(seen["key"].dtype, jax.dtypes.prng_key)
    assert seen["weight"] == 2.0


def _plateau(learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau())


@pytest.mark.parametrize(
    "optimizer",
    [
        _plateau(0.1),
        steps.create_optimizer(_plateau, 0.1),
        steps.create_optimizer(_plateau, 0.1, accumulate_steps=2),
    ],
    ids=["optax's", "a function's", "accumulated"],
)
def test_an_optimizer_that_asks_for_the_loss_gets_it(rng, optimizer):
    model, mesh = tiny(), steps.data_mesh()
    state = steps.create_train_state(model, optimizer, mesh)
    step = steps.make_train_step(model, optimizer, squared, mesh=mesh)
    with jax.numpy_dtype_promotion("standard"):  # Optax's own counters.
        after, _ = jax.eval_shape(step, state, batch_of(rng, 8))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_memory_is_of_embeddings_alone(rng):
    model, mesh = tiny(), steps.data_mesh()
    optimizer = steps.create_optimizer("sgd", 0.1)
    state = steps.create_train_state(model, optimizer, mesh, memory_shape=(16, 3))
    loss = lambda pair, labels, memory: squared(pair[0], labels)  # noqa: E731
    twice = lambda model, images: (model(images),) * 2  # noqa: E731
    step = steps.make_train_step(model, optimizer, loss, forward=twice, mesh=mesh)
    with pytest.raises(ValueError, match=r"embeddings \(8, 3\), and forward gives \(\(8, 3\), "):
        jax.eval_shape(step, state, batch_of(rng, 8))
