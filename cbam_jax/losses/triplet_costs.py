"""What triplets cost, by their distances: with a margin, or, where that is None, a soft one."""

import jax
import jax.numpy as jnp

from cbam_jax.losses.common import masked_mean


def mean_cost(to_positive, to_negative, mask, margin):
    """The mean cost of triplets where ``mask`` is true, and what is told of them."""
    active = is_active(to_positive, to_negative, margin).astype(jnp.float32)
    stats = {
        "distance_positive": masked_mean(to_positive, mask),
        "distance_negative": masked_mean(to_negative, mask),
        "active_fraction": masked_mean(active, mask),
    }
    return masked_mean(cost(to_positive, to_negative, margin), mask), stats


def cost(to_positive, to_negative, margin):
    """Costs of triplets; ``margin`` None means the soft margin."""
    if margin is None:
        return jax.nn.softplus(to_positive - to_negative)
    return jax.nn.relu(margin + to_positive - to_negative)


def is_active(to_positive, to_negative, margin):
    """Which triplets cost something; of soft ones, which have d(a,p) >= d(a,n)."""
    if margin is None:
        return to_positive >= to_negative
    return margin + to_positive - to_negative > 0


def cost_and_slope(gap, margin):
    """Costs of triplets by the gap d(a,p) - d(a,n), and their derivative."""
    if margin is not None:
        return jax.nn.relu(margin + gap), (margin + gap > 0).astype(jnp.float32)
    decay = jnp.exp(-jnp.abs(gap))
    slope = jnp.where(gap >= 0, 1.0, decay) / (1.0 + decay)
    return jnp.maximum(gap, 0.0) + jnp.log1p(decay), slope
