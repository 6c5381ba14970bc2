"""Losses of whole rankings: recall at k and average precision, with soft steps for hard ones.

For each positive p of an anchor its rank is 1 plus the number of images that are more similar to
the anchor; a step of the difference of similarities counts each, and the losses make it a sigmoid.
That takes [b, b] for each positive of each anchor: never more of it is in memory than one positive
of each anchor.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cbam_jax.losses.common import (
    Batch,
    Memory,
    Stats,
    batch_of,
    computed,
    masked_mean,
    positive_number,
)
from cbam_jax.losses.pairs import cosine, make_pairs, over_positives, pair_stats
from cbam_jax.sharding import as_varying

# Gain of one positive: of its similarity to the anchor, the anchor's to all [m], which of these are
# positives and negatives [m], and numbers.
Gain = Callable[..., jax.Array]


def recall_at_k_surrogate_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    temperature: float | jax.Array = 0.01,
    rank_temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Recall@k surrogate (Patel et al. 2022, eqs. 5 and 6): 1 less the mean recall over the ks.

    With cosine similarities s of an anchor and the sigmoid S, a positive p has the soft rank
    ``r_p = 1 + sum over all other images z of S((s_z - s_p) / temperature)``, and the anchor with P
    positives the recall ``sum_p S((k - r_p) / rank_temperature) / min(k, P)``; the mean is over the
    ks and the anchors with a positive. Even a perfect ranking costs something: S(0) is a half.

    The authors' code counts the anchor itself among the images z, so that every rank is one more,
    and limits the sum to k, which with a rank_temperature of 1 it never reaches.

    Made for batches of thousands, by ``chunk_size`` of `cbam_jax.steps.make_train_step`; time grows
    with b^2 times the most positives of an anchor, memory with b^2.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      ks: At least one k, each at least 1.
      temperature: Of similarities, above 0.
      rank_temperature: Of ranks, above 0.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss and stats, as `circle_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, _ = recall_at_k_surrogate_loss(embeddings, jnp.array([0, 0, 1]), ks=(1,))
      >>> round(float(loss), 4)  # the positive is the second of two: 1 - S(1 - 2)
      0.7311
    """
    ks = tuple(ks)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {ks}, expected ks of at least 1")
    numbers = {
        "temperature": positive_number(temperature, "temperature"),
        "rank_temperature": positive_number(rank_temperature, "rank_temperature"),
    }
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_recall_at_k, batch, jnp.asarray(ks, jnp.float32), **numbers)


def _recall_at_k(batch: Batch, ks, temperature, rank_temperature):
    return _mean_gain(_recall_of, batch, (ks, temperature, rank_temperature))


def _recall_of(to_positive, row, positive, negative, numbers):
    ks, temperature, rank_temperature = numbers
    # The positive itself is among these, at a half.
    before = jax.nn.sigmoid((row - to_positive) / temperature)
    rank = 0.5 + jnp.sum(jnp.where(positive | negative, before, 0.0))
    found = jax.nn.sigmoid((ks - rank) / rank_temperature)
    return jnp.mean(found / jnp.minimum(ks, _count(positive)))


def smooth_ap_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: float | jax.Array = 0.01,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Smooth-AP (Brown et al. 2020, eq. 7): 1 less the mean average precision.

    With cosine similarities s of an anchor and the sigmoid S, a positive p has the soft rank ``1 +
    sum of S((s_z - s_p) / temperature)`` over all other images z, and another over the other
    positives alone. The anchor's average precision is the mean of the second over the first; the
    mean is over the anchors with a positive.

    The authors' code counts the anchor itself as the first of its positives, which raises every
    precision.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      temperature: Of similarities, above 0.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss and stats, as `circle_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, _ = smooth_ap_loss(embeddings, jnp.array([0, 0, 1]))
      >>> round(float(loss), 4)  # the positive is the second of two
      0.5
    """
    temperature = positive_number(temperature, "temperature")
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_smooth_ap, batch, temperature=temperature)


def _smooth_ap(batch: Batch, temperature):
    return _mean_gain(_precision_of, batch, (temperature,))


def _precision_of(to_positive, row, positive, negative, numbers):
    before = jax.nn.sigmoid((row - to_positive) / numbers[0])
    among_positives = 0.5 + jnp.sum(jnp.where(positive, before, 0.0))
    rank = among_positives + jnp.sum(jnp.where(negative, before, 0.0))
    return among_positives / rank / _count(positive)


def _count(positive):
    """How many positives; 1 without any, whose gain counts nowhere, lest it be infinite."""
    return jnp.maximum(jnp.sum(positive.astype(jnp.float32)), 1.0)


def _mean_gain(gain: Gain, batch: Batch, numbers):
    """1 less the mean, over anchors with a positive, of the sum of their positives' gains."""
    pairs = make_pairs(batch, cosine)
    gains = _sum_over_positives(gain, *pairs, numbers)
    some = pairs.positive.any(axis=1)
    loss = masked_mean(1 - gains, some)
    return loss, pair_stats(pairs, batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_over_positives(gain, similarity, positive, negative, numbers):
    """The sum of each anchor's positives' gains, [b]. Numbers have no derivative."""
    return _gains_and_slopes(gain, similarity, positive, negative, numbers)[0]


@_sum_over_positives.defjvp
def _sum_over_positives_jvp(gain, primals, tangents):
    gains, slopes = _gains_and_slopes(gain, *primals)
    return gains, jnp.sum(slopes * tangents[0], axis=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gains_and_slopes(gain, similarity, positive, negative, numbers):
    """With them their slopes by the similarities, [b, m]."""

    def turn(this, gains, slopes):
        gained, slope = _of_one(gain, this, similarity, positive, negative, numbers)
        return gains + gained, slopes + slope

    none = jnp.zeros(similarity.shape, jnp.float32)
    start = [as_varying(x, similarity) for x in (none[:, 0], none)]
    return over_positives(turn, positive, *start)


def _of_one(gain, this, similarity, positive, negative, numbers):
    """Of the one positive of each anchor that ``this`` is true of, the gain and its slopes."""

    def of_anchor(row, this, positive, negative):
        def gained(row):
            return gain(jnp.sum(jnp.where(this, row, 0.0)), row, positive, negative, numbers)

        value, slope = jax.value_and_grad(gained)(row)
        some = this.any()
        return jnp.where(some, value, 0.0), jnp.where(some, slope, 0.0)

    return jax.vmap(of_anchor)(similarity, this, positive, negative)


@_gains_and_slopes.defjvp
def _gains_and_slopes_jvp(gain, primals, tangents):
    # For second derivatives, which need a loop whose turns are known: over all columns, one by one.
    similarity, positive, negative, numbers = primals

    def slopes_of(similarity):
        @jax.checkpoint
        def turn(slopes, column):
            this = positive & (jnp.arange(positive.shape[1]) == column)[None, :]
            return slopes + _of_one(gain, this, similarity, positive, negative, numbers)[1], None

        start = as_varying(jnp.zeros(similarity.shape, jnp.float32), similarity)
        return jax.lax.scan(turn, start, jnp.arange(positive.shape[1]))[0]

    gains, slopes = _gains_and_slopes(gain, *primals)
    curved = jax.jvp(slopes_of, (similarity,), tangents[:1])[1]
    return (gains, slopes), (jnp.sum(slopes * tangents[0], axis=1), curved)
