"""What becomes of small gradients where several devices' are added up, against float64.

In bfloat16 a device's share of a gradient is rounded to 8 bits. XLA's CPU backend adds shares up in
float32; on a GPU they are added up in bfloat16, as they travel, which is done here by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cbam_jax import steps

DEVICES = 8
# At most so much of a number is lost when it is rounded to 8 bits.
ROUNDING = 2.0**-8


class Powers(nnx.Module):
    """Numbers n of the image, weighted, as 2^-n: a weight's gradient is the sum of these."""

    def __init__(self, smallest):
        self.weights = nnx.Param(jnp.zeros((32, 1), jnp.float32))
        self.scale = 2.0**-smallest

    def preprocess(self, images):
        return (self.scale * 2.0 ** -images.astype(jnp.float32)).astype(jnp.bfloat16)

    def __call__(self, x):
        return x @ self.weights[...].astype(jnp.bfloat16)


def total(outputs, labels):
    return jnp.sum(outputs.astype(jnp.float32)), {}


def exponents(rng):
    """A device's in a row: shares of like and of unlike size, and one large among small ones."""
    rows = rng.integers(0, 12, (DEVICES, 32))
    rows[:, :8] = rng.integers(0, 2, (DEVICES, 8))
    rows[:, 8] = [0] + [8] * (DEVICES - 1)
    return rows


def gradient_of_a_step(rows, smallest, devices):
    mesh, model = steps.data_mesh(jax.devices()[:devices]), Powers(smallest)
    optimizer = optax.sgd(1.0)
    state = steps.create_train_state(model, optimizer, mesh)
    step = steps.make_train_step(model, optimizer, total, mesh=mesh)
    batch = {"image": rows.astype(np.uint8), "label": np.zeros(len(rows), np.int32)}
    state, _ = step(state, *steps.to_devices([batch], mesh))
    (weights,) = jax.tree.leaves(jax.device_get(state.params))
    return -weights[:, 0].astype(np.float64)


def sum_in_bfloat16(shares):
    """One after the other, as a ring adds up what it hands on."""
    return functools.reduce(np.add, shares.astype(jnp.bfloat16)).astype(np.float64)


@pytest.mark.parametrize("smallest", [0, 100])
def test_a_step_adds_small_gradients_of_devices_to_large_ones(rng, smallest):
    """To one rounding, also where all are tiny: bfloat16 has float32's exponents."""
    rows = exponents(rng)
    exact = 2.0**-smallest * np.sum(2.0**-rows, axis=0)
    for devices in (1, DEVICES):
        found = gradient_of_a_step(rows, smallest, devices)
        np.testing.assert_allclose(found, exact, rtol=ROUNDING)


def test_added_up_in_bfloat16_no_more_is_lost_than_a_rounding_a_device(rng):
    """Which a large share among small ones comes near to; random ones are off by far less."""
    shares = 2.0 ** -exponents(rng)
    exact = shares.sum(0)
    error = np.abs(sum_in_bfloat16(shares) / exact - 1)
    bound = (DEVICES - 1) * ROUNDING
    assert error[8] == pytest.approx(bound, rel=0.03)  # All seven small shares: 2.7 %.
    assert error.max() <= bound
    normal = rng.normal(size=(DEVICES, 10_000))
    off = sum_in_bfloat16(normal) - normal.sum(0)
    assert np.linalg.norm(off) < 1.25 * ROUNDING * np.linalg.norm(normal.sum(0))
    # What each device's own rounding does, with a sum that is exact.
    own = normal.astype(jnp.bfloat16).astype(np.float64).sum(0) - normal.sum(0)
    assert np.linalg.norm(off) > 1.5 * np.linalg.norm(own)
