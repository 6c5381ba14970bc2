"""Triplet loss whose negatives are drawn so that all distances are drawn alike."""

import jax
import jax.numpy as jnp

from cbam_jax.distances import l2_normalize, pairwise_distances
from cbam_jax.losses.common import (
    Batch,
    Memory,
    Stats,
    batch_of,
    checked_number,
    computed,
    margin_number,
    masked_mean,
)
from cbam_jax.losses.pairs import make_pairs
from cbam_jax.losses.triplet_costs import mean_cost


def distance_weighted_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    margin: float | jax.Array = 0.2,
    cutoff: float | jax.Array = 0.5,
    farthest: float | jax.Array = 1.4,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Triplet loss with distance-weighted sampling (Wu et al. 2017, section 4.1).

    Of unit vectors in d dimensions two are at a distance r with a density q(r) proportional to
    ``r^(d-2) (1 - r^2 / 4)^((d-3) / 2)``: nearly all near sqrt(2). For each pair of an anchor and a
    positive one negative is drawn with a probability proportional to ``1 / q(max(r, cutoff))``,
    among the negatives nearer than ``farthest``, or, where there is none, alike among all. The
    triplet costs ``relu(margin + d(a,p) - d(a,n))``, and the mean is over the pairs of the anchors
    with a positive and a negative.

    The paper draws for its margin loss, which has a trained boundary. pytorch-metric-learning's
    ``DistanceWeightedMiner`` draws alike, but that a row's weights may all be too small for its
    dtype: here they are taken for each row by itself. Its ``TripletMarginLoss`` then takes the mean
    over the triplets that cost something.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      key: Of `jax.random`; a step gives each batch another.
      margin: In the unit of the distances, of which none is above 2; at least 0.
      cutoff: The distance below which all are drawn alike, in (0, 2).
      farthest: The distance from which on no negative is drawn, in (0, 2].
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars, as `triplet_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> labels, key = jnp.array([0, 0, 1]), jax.random.key(0)
      >>> loss, _ = distance_weighted_loss(embeddings, labels, key)
      >>> round(float(loss), 4)  # one negative: the mean of 0.2 + 0.8944 - 0.6325 and - 0.2828
      0.6368
    """
    numbers = {
        "margin": margin_number(margin),
        "cutoff": checked_number(cutoff, "cutoff", "a distance in (0, 2)", lambda x: 0 < x < 2),
        "farthest": checked_number(
            farthest, "farthest", "a distance in (0, 2]", lambda x: 0 < x <= 2
        ),
    }
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_distance_weighted, batch, key, **numbers)


def _distance_weighted(batch: Batch, key, margin, cutoff, farthest):
    pairs = make_pairs(batch, _unit_distances)
    valid = pairs.valid
    positive, negative = pairs.positive & valid[:, None], pairs.negative & valid[:, None]
    fixed = jax.lax.stop_gradient(pairs.values)
    weights = sampling_weights(fixed, negative, batch.rows.shape[1], cutoff, farthest)
    to_drawn = jnp.take_along_axis(pairs.values, drawn(key, weights), axis=1)
    loss, stats = mean_cost(pairs.values, to_drawn, positive, margin)
    stats["valid_anchors"] = masked_mean(valid.astype(jnp.float32), batch.kept)
    return loss, stats


def _unit_distances(x, y):
    u = l2_normalize(x)
    return pairwise_distances(u, u if x is y else l2_normalize(y))


def sampling_weights(distances, negative, dim, cutoff, farthest):
    """What each negative is drawn in proportion to, [b, m]; the largest of a row is 1."""
    r = jnp.clip(distances, cutoff, 1.999)  # At 2 the density is 0.
    log_density = (dim - 2) * jnp.log(r) + (dim - 3) / 2 * jnp.log1p(-jnp.square(r) / 4)
    near = negative & (distances < farthest)
    some = near.any(axis=1, keepdims=True)
    logits = jnp.where(some, jnp.where(near, -log_density, -jnp.inf), 0.0)
    logits -= jnp.max(logits, axis=1, keepdims=True)
    return jnp.where(jnp.where(some, near, negative), jnp.exp(logits), 0.0)


def drawn(key, weights):
    """An index for each entry of a row, each in proportion to the row's weights, [b, m]."""
    sums = jnp.cumsum(weights, axis=1)
    uniform = jax.random.uniform(key, weights.shape) * sums[:, -1:]
    # side="right" skips what has no weight.
    find = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    return jnp.minimum(find(sums, uniform), last[:, None].astype(jnp.int32))
