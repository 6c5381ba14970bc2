"""Values and gradients of the losses by name, against loops in float64."""

import functools

import jax
import loss_references as reference
import numpy as np
import pytest
from loss_references import central_differences

from cbam_jax import losses

LABELS = np.array([3, 0, 3, 1, 0, 3, 1, 7, 0])  # 7 has no positive.
PAIRS = ("multi_similarity", "circle", "contrastive", "n_pair", "sup_con", "nt_xent")


@functools.cache
def results():
    """Of each loss ((loss, stats), gradient), by one program: half of what they compile to is one.

    With them what they are of.
    """
    x = np.random.default_rng(2022).normal(size=(len(LABELS), 4)).astype(np.float32)

    def find(x, labels):
        return {
            name: jax.value_and_grad(getattr(losses, f"{name}_loss"), has_aux=True)(x, labels)
            for name in PAIRS
        }

    return x, jax.device_get(jax.jit(find)(x, LABELS))


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_match_float64(name):
    x, found = results()
    (value, stats), gradient = found[name]
    exact = x.astype(np.float64)
    fixed = {"fixed": exact} if name == "circle" else {}  # Its weights have no gradient.

    def expected(x):
        return getattr(reference, name)(x, LABELS, **fixed)

    np.testing.assert_allclose(value, expected(exact), rtol=1e-5)
    np.testing.assert_allclose(gradient, central_differences(expected, exact), atol=1e-5, rtol=1e-4)
    assert np.abs(gradient).max() > 0.01
    spread = np.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, axis=1)))
    np.testing.assert_allclose(stats["embedding_spread"], spread, rtol=1e-5)
