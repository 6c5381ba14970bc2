"""Losses that find the positive among all others by a softmax: SupCon and NT-Xent."""

import jax
import jax.numpy as jnp

from cbam_jax.losses.common import (
    Batch,
    Memory,
    Stats,
    batch_of,
    computed,
    log_sum,
    masked_mean,
    positive_number,
)
from cbam_jax.losses.pairs import cosine, make_pairs, pair_stats


def sup_con_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: float | jax.Array = 0.1,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Supervised contrastive loss (Khosla et al. 2020, L_out, eq. 2).

    With cosine similarities s, an anchor costs the mean over its positives p of
    ``log sum_j exp(s_j / temperature) - s_p / temperature``, where j runs over all other images;
    the mean is over the anchors with a positive.

    Its authors' code multiplies by temperature / 0.07. pytorch-metric-learning's ``SupConLoss`` is
    the same, but 0 where the batch has one label only; and it takes the mean over the anchors that
    cost more than 0.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      temperature: Above 0; the paper's best for supervised training is 0.1.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss and stats, as `circle_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, _ = sup_con_loss(embeddings, jnp.array([0, 0, 1]), temperature=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(0.2)) and log(1 + exp(0.36))
      0.8437
    """
    temperature = positive_number(temperature, "temperature")
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_sup_con, batch, temperature=temperature)


def _sup_con(batch: Batch, temperature):
    pairs = make_pairs(batch, cosine)
    logits, positive = pairs.values / temperature, pairs.positive
    count = jnp.maximum(jnp.sum(positive.astype(jnp.float32), axis=1), 1.0)
    to_positives = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / count
    costs = log_sum(logits, positive | pairs.negative) - to_positives
    return masked_mean(costs, positive.any(axis=1)), pair_stats(pairs, batch)


def nt_xent_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: float | jax.Array = 0.1,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Normalised, temperature-scaled cross-entropy (Chen et al. 2020, SimCLR, eq. 1), by labels.

    With cosine similarities s, a pair of an anchor and a positive p costs
    ``log(exp(s_p / temperature) + sum_N exp(s_n / temperature)) - s_p / temperature``, where N are
    the anchor's negatives: other positives are not in the sum, which is what `sup_con_loss` does
    differently. The mean is over the pairs, so that an anchor counts once for each positive.

    With two images a label it is SimCLR's, whose two images are views of one. The same as
    pytorch-metric-learning's ``NTXentLoss``, whose temperature is 0.07 by default.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      temperature: Above 0; SimCLR's for ImageNet is 0.1.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss and stats, as `circle_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, _ = nt_xent_loss(embeddings, jnp.array([0, 0, 1]), temperature=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(0.2)) and log(1 + exp(0.36))
      0.8437
    """
    temperature = positive_number(temperature, "temperature")
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_nt_xent, batch, temperature=temperature)


def _nt_xent(batch: Batch, temperature):
    pairs = make_pairs(batch, cosine)
    logits = pairs.values / temperature
    some = pairs.negative.any(axis=1, keepdims=True)
    others = log_sum(logits, pairs.negative)[:, None]
    costs = jnp.where(some, jax.nn.softplus(others - logits), 0.0)
    return masked_mean(costs, pairs.positive), pair_stats(pairs, batch)
