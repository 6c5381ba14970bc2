import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import distances
from cbam_jax.distances import l2_normalize, pairwise_distances


def reference(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in y] for a in x])


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 5, 3), (33, 18, 130), (16, 50, 2048)])
def test_pairwise_matches_float64(rng, n, m, d):
    x = rng.normal(1.0, 2.0, (n, d)).astype(np.float32)
    y = rng.normal(-0.5, 1.0, (m, d)).astype(np.float32)
    np.testing.assert_allclose(pairwise_distances(x, y), reference(x, y), rtol=2e-6)
    np.testing.assert_allclose(
        pairwise_distances(x, y, squared=True), reference(x, y) ** 2, rtol=4e-6
    )


def test_near_duplicates_keep_their_digits(rng):
    x = (rng.normal(size=(20, 64)) + 100.0).astype(np.float32)
    y = x + rng.normal(0.0, 1e-3, x.shape).astype(np.float32)
    np.testing.assert_allclose(pairwise_distances(x, y), reference(x, y), rtol=5e-6)


def test_equal_rows_have_distance_zero(rng):
    x = rng.normal(3.0, 1.0, (19, 77)).astype(np.float32)
    y = x[[5, 2, 2, 18]]
    distances = np.asarray(pairwise_distances(x, y))
    assert distances[[5, 2, 2, 18], range(4)].tolist() == [0.0] * 4
    assert np.count_nonzero(distances == 0) == 4
    assert not np.diag(pairwise_distances(jnp.asarray(x), jnp.asarray(x))).any()


@pytest.mark.parametrize("squared", [False, True])
def test_gradient_matches_float64(rng, squared):
    x, y = rng.normal(size=(9, 6)), rng.normal(size=(5, 6))
    weights = rng.normal(size=(9, 5))
    x, y, weights = (a.astype(np.float32) for a in (x, y, weights))
    x[3] = y[2] + np.float32(1e-4)

    def total(x, y):
        return jnp.sum(weights * pairwise_distances(x, y, squared=squared))

    grad_x, grad_y = jax.grad(total, argnums=(0, 1))(x, y)
    difference = (x[:, None] - y[None]).astype(np.float64)
    unit = 2 * difference
    if not squared:
        unit = difference / np.linalg.norm(difference, axis=-1, keepdims=True)
    pulls = weights[:, :, None] * unit
    # Row 3 and y's row 2 nearly coincide: their unit vector is a difference of rounded numbers.
    tolerance = np.full((9, 1), 1e-5)
    tolerance[3] = 1e-2
    assert np.all(np.abs(grad_x - pulls.sum(1)) <= tolerance * 5)
    assert np.all(np.abs(grad_y + pulls.sum(0)) <= np.where(np.arange(5) == 2, 5e-2, 5e-5)[:, None])


def test_gradient_at_zero_is_zero():
    x = jnp.full((4, 8), 0.3)
    gradient = jax.grad(lambda x: jnp.sum(pairwise_distances(x, x)))(x)
    assert not np.any(np.asarray(gradient))
    gradient = jax.grad(lambda x: jnp.sum(pairwise_distances(x, x + 0.0)))(x)
    assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_never_nan(scale):
    x = jnp.asarray([[0.0, 0.0], [1.0, -1.0], [1.0, -1.0]]) * scale
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(pairwise_distances(x, x)))(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(value, 4 * np.sqrt(2) * scale, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_float_dtype_computes_in_float32(rng, dtype):
    x = jnp.asarray(rng.normal(size=(6, 40)), dtype)
    distances = jax.jit(pairwise_distances)(x, x)
    assert distances.dtype == jnp.float32
    np.testing.assert_allclose(distances, reference(x.astype(jnp.float32), x), rtol=2e-6, atol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and y \(2, 4\)"):
        pairwise_distances(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        pairwise_distances(jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="int32"):
        pairwise_distances(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3)))


def test_l2_normalize_matches_float64(rng):
    x = rng.normal(size=(5, 4, 33)).astype(np.float32)
    expected = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(x), expected, rtol=1e-6)


def test_l2_normalize_extremes():
    x = jnp.array([[3e20, 4e20], [3e-11, 4e-11], [3e-30, 4e-30], [0.0, 0.0]])
    # The third is shorter than eps, and divided by eps: 5e-30 / 1e-12.
    expected = [[0.6, 0.8], [0.6, 0.8], [3e-18, 4e-18], [0.0, 0.0]]
    np.testing.assert_allclose(l2_normalize(x), expected, rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(l2_normalize(x)))(x)))


def test_l2_normalize_gradient_is_tangent(rng):
    x, w = rng.normal(size=(2, 7)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(w * l2_normalize(x)))(x)
    length = np.linalg.norm(x.astype(np.float64))
    unit = x / length
    np.testing.assert_allclose(gradient, (w - unit * np.dot(unit, w)) / length, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_its_own_distances_alone(rng, value):
    x = rng.normal(size=(5, 3)).astype(np.float32)
    broken = x.copy()
    broken[2, 1] = value
    clean = [0, 1, 3, 4]
    actual = np.asarray(pairwise_distances(broken, broken))
    same = jnp.asarray(broken)
    for both in (actual, np.asarray(pairwise_distances(same, same))):
        assert not np.isfinite(both[2]).any()
        assert not np.isfinite(both[:, 2]).any()
        np.testing.assert_allclose(
            both[np.ix_(clean, clean)],
            np.linalg.norm(x[clean, None] - x[None, clean], axis=-1),
            rtol=1e-5,
            atol=1e-6,
        )
    unit = np.asarray(l2_normalize(same))
    assert np.isnan(unit[2]).all()
    np.testing.assert_allclose(np.linalg.norm(unit[clean], axis=1), 1, rtol=1e-6)


def test_a_batch_of_batches_is_refined_by_a_loop_and_not_by_both_sides_of_a_branch(rng):
    x = rng.normal(size=(3, 40, 4)).astype(np.float32)
    x[1, 30] = x[1, 2] + 1e-4  # One of three has rows to refine.
    find = jax.vmap(lambda x: pairwise_distances(x, x))
    assert "cond[" not in str(jax.make_jaxpr(find)(x))
    exact = x.astype(np.float64)
    expected = np.linalg.norm(exact[:, :, None] - exact[:, None], axis=-1)
    np.testing.assert_allclose(jax.jit(find)(x), expected, rtol=1e-5, atol=1e-9)


def test_an_accelerator_takes_few_differences_themselves(rng, monkeypatch):
    """No product, whose digits would cancel, and no loop that depends on what it gave."""
    x = rng.normal(1e3, 1e-3, (5, 7)).astype(np.float32)
    y = np.concatenate([x[1:3], rng.normal(1e3, 1.0, (2, 7)).astype(np.float32)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    find = lambda x, y: distances._distances.__wrapped__(False, True, x, y)  # noqa: E731
    program = str(jax.make_jaxpr(find)(x, y))
    assert "dot_general" not in program
    assert "while" not in program
    exact = np.square(x[:, None].astype(np.float64) - y[None].astype(np.float64)).sum(-1)
    found = jax.jit(find)(x, y)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert found[1, 0] == found[2, 1] == 0
    monkeypatch.setattr(distances, "_FEW_DIFFERENCES", x.shape[0] * y.size - 1)
    assert "dot_general" in str(jax.make_jaxpr(lambda x, y: find(x, y))(x, y))
