"""Every loss on batches that losses have trouble with; masks, memories, meshes, derivatives."""

import functools

import jax
import jax.numpy as jnp
import loss_references as reference
import numpy as np
import pytest
from jax.sharding import AxisType
from loss_cases import CASES, NAMES, SIZE, case, loss_of, proxies_of, takes
from loss_references import central_differences

from cbam_jax import steps

pytestmark = pytest.mark.slow
EXACT = [name for name in NAMES if name != "distance_weighted"]  # Not by chance.
WITH_MEMORY = [name for name in EXACT if takes(name, "memory")]


def call(name, arrays, labels, mask=None, memory=None):
    options = {"mask": mask} | ({} if memory is None else {"memory": memory})
    if takes(name, "key"):
        options["key"] = jax.random.key(0)
    return loss_of(name)(**arrays, labels=labels, **options)


def arrays_of(name, x):
    proxies = proxies_of(name)
    return {"embeddings": x} | ({} if proxies is None else {"proxies": proxies})


@functools.cache
def compiled(name):
    """(arrays, labels, mask) -> ((loss, stats), gradients)."""
    return jax.jit(jax.value_and_grad(functools.partial(call, name), has_aux=True))


def everything(size=SIZE):
    return np.ones(size, bool)


def expected_of(name, labels, x, proxies):
    others = () if proxies is None else (proxies,)
    return getattr(reference, name)(x, labels, *others)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", EXACT)
def test_hard_batches_match_float64(name, kind):
    x, labels = case(kind)
    (value, stats), gradients = compiled(name)(arrays_of(name, x), labels, everything())
    proxies = proxies_of(name)
    exact = None if proxies is None else proxies.astype(np.float64)
    expected = expected_of(name, labels, x.astype(np.float64), exact)
    # In the contrastive and N-pair losses lengths count: 1e8, squared by float32.
    np.testing.assert_allclose(value, expected, rtol=3e-5, atol=3e-5)
    assert all(np.isfinite(stat) for stat in stats.values())
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("kind", CASES)
def test_drawn_triplets_are_finite(kind):
    x, labels = case(kind)
    (value, stats), gradients = compiled("distance_weighted")(
        {"embeddings": x}, labels, everything()
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradients["embeddings"]))
    assert all(np.isfinite(stat) for stat in stats.values())


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_count_nowhere(name):
    """Whatever stands in them: the loss of the others alone, and no gradient."""
    x, labels = case("singletons")
    mask = np.arange(SIZE) % 4 != 1
    filled = x.copy()
    filled[~mask] = np.nan
    (value, stats), gradients = compiled(name)(arrays_of(name, filled), labels, mask)
    assert not np.any(np.asarray(gradients["embeddings"])[~mask])
    if name == "distance_weighted":  # Other negatives are drawn.
        assert np.isfinite(value)
        return
    (alone, alone_stats), expected = jax.jit(
        jax.value_and_grad(functools.partial(call, name), has_aux=True)
    )(arrays_of(name, x[mask]), labels[mask])
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    np.testing.assert_allclose(gradients["embeddings"][mask], expected["embeddings"], atol=1e-5)
    for stat, of_these in alone_stats.items():
        np.testing.assert_allclose(stats[stat], of_these, rtol=1e-4, err_msg=stat)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_makes_the_loss_nan(name):
    x, labels = case("all different")
    x[7, 2] = np.inf
    (value, _), _ = compiled(name)(arrays_of(name, x), labels, everything())
    assert np.isnan(value)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_memory_is_more_positives_and_negatives(name, rng):
    x, labels = case("singletons")
    earlier = rng.normal(size=(7, x.shape[1])).astype(np.float32)
    earlier_labels, filled = np.array([7, 0, 4, 3, 2, 9, 1]), np.array([1, 1, 0, 1, 1, 1, 0], bool)
    earlier[~filled] = np.nan

    def loss(rows, earlier):
        memory = earlier, earlier_labels, filled
        return call(name, {"embeddings": rows}, labels, memory=memory)

    find = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, stats), (gradient, of_memory) = find(x, earlier)
    both = np.concatenate([labels, earlier_labels[filled]])
    kept = earlier[filled].astype(np.float64)
    exact = x.astype(np.float64)
    fixed = {"fixed": exact} if name == "circle" else {}

    def expected(rows):
        return getattr(reference, name)(rows, both, memory=kept, **fixed)

    np.testing.assert_allclose(value, expected(exact), rtol=3e-5)
    slopes = central_differences(expected, exact)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=1e-4 * np.abs(slopes).max())
    assert not np.any(np.asarray(of_memory))
    np.testing.assert_allclose(stats["memory_filled"], 5 / 7, rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_give_what_one_does(name, kind):
    x, labels = case("singletons")
    arrays = arrays_of(name, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    [batch] = steps.to_devices([{"x": x, "labels": labels}], mesh)
    assert jax.typeof(batch["x"]).sharding.mesh.explicit_axes == mesh.explicit_axes
    one = compiled(name)(arrays, labels, everything())
    many = compiled(name)(arrays | {"embeddings": batch["x"]}, batch["labels"], everything())
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_finite_and_right(name, rng):
    direction = rng.normal(size=case("pairs")[0].shape).astype(np.float32)

    def curved(arrays, labels):
        """The Hessian times the direction, forward over reverse."""

        def slope(x):
            return jax.grad(lambda x: call(name, arrays | {"embeddings": x}, labels)[0])(x)

        return jax.jvp(slope, (arrays["embeddings"],), (direction,))[1]

    find = jax.jit(curved)
    for kind in ("duplicates", "large", "one class", "all different"):
        x, labels = case(kind)
        assert np.all(np.isfinite(find(arrays_of(name, x), labels))), kind
    x, labels = case("singletons")
    actual, step = find(arrays_of(name, x), labels), 1e-3
    gradients = [
        compiled(name)(arrays_of(name, x + sign * step * direction), labels, everything())[1]
        for sign in (1, -1)
    ]
    if name in ("multi_similarity", "circle", "recall_at_k_surrogate", "smooth_ap"):
        return  # Pairs come and go, weights are held, or steps of 0.01 are steeper than ours.
    up, down = (gradient["embeddings"] for gradient in gradients)
    expected = (up - down) / (2 * step)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("name", ["recall_at_k_surrogate", "smooth_ap"])
def test_second_derivatives_of_wide_steps(name, rng):
    x, labels = case("singletons")
    direction = rng.normal(size=x.shape).astype(np.float32)
    slope = jax.grad(lambda x: loss_of(name)(x, labels, temperature=0.5)[0])
    forward = jax.jit(lambda x: jax.jvp(slope, (x,), (direction,))[1])
    backward = jax.jit(jax.grad(lambda x: jnp.sum(slope(x) * direction)))
    first = jax.jit(slope)
    expected = (first(x + 1e-2 * direction) - first(x - 1e-2 * direction)) / 2e-2
    scale = np.abs(expected).max()
    np.testing.assert_allclose(forward(x), expected, atol=0.01 * scale)
    np.testing.assert_allclose(backward(x), forward(x), atol=1e-4 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name):
    x, labels = case("singletons")
    rounded = jnp.asarray(x, jnp.bfloat16)
    value, _ = call(name, arrays_of(name, rounded), labels)
    (expected, _), _ = compiled(name)(
        arrays_of(name, rounded.astype(jnp.float32)), labels, everything()
    )
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
