"""Losses of pairs, by similarity or distance: multi-similarity, circle, contrastive, N-pair."""

import jax
import jax.numpy as jnp

from cbam_jax.distances import pairwise_distances
from cbam_jax.losses.common import (
    Batch,
    Memory,
    Stats,
    batch_of,
    checked_number,
    computed,
    log_one_plus_sum,
    log_sum,
    margin_number,
    masked_mean,
    positive_number,
)
from cbam_jax.losses.pairs import cosine, make_pairs, pair_stats


def multi_similarity_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    alpha: float | jax.Array = 2.0,
    beta: float | jax.Array = 50.0,
    base: float | jax.Array = 0.5,
    epsilon: float | jax.Array | None = 0.1,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Multi-similarity loss (Wang et al. 2019, eq. 15), on the pairs that its miner keeps.

    With cosine similarities s, positives P and negatives N of an anchor, it costs
    ``log(1 + sum_P exp(-alpha (s - base))) / alpha + log(1 + sum_N exp(beta (s - base))) / beta``;
    the mean is over all anchors, those without a pair costing 0. With ``epsilon`` P and N are what
    `multi_similarity_miner` keeps.

    pytorch-metric-learning's ``MultiSimilarityLoss`` with ``MultiSimilarityMiner(epsilon)`` is the
    same, and without the miner the same as ``epsilon=None``. The authors' code leaves out positives
    of a similarity of 1 - 1e-5 and more; here an anchor's own image alone is left out.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      alpha: Of positives, above 0. Numbers may be scalars that are traced, and are then unchecked.
      beta: Of negatives, above 0. The paper has 50, its authors' code 40.
      base: The similarity that pulls and pushes are weighed against, in [-1, 1].
      epsilon: Of the miner, at least 0; None: every pair counts.
      mask: ``[b]`` bool, False for rows that pad the batch; None: all count.
      memory: Embeddings ``[n, d]`` of earlier batches, labels ``[n]``, and a mask ``[n]``, False
        where a place is empty: more positives and negatives, without a gradient (`triplet_loss`).

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``similarity_positive`` and
      ``similarity_negative`` (means over all pairs), ``valid_anchors`` (fraction with a positive
      and a negative), ``kept_fraction`` (of the pairs, by the miner), ``embedding_spread`` (root
      mean square distance to the centroid); with a memory ``memory_filled``.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, stats = multi_similarity_loss(embeddings, jnp.array([0, 0, 1]))
      >>> round(float(loss), 4)
      0.4527
      >>> round(float(stats["kept_fraction"]), 2)  # the third image has no positive, and keeps none
      0.67
    """
    numbers = {
        "alpha": positive_number(alpha, "alpha"),
        "beta": positive_number(beta, "beta"),
        "base": checked_number(base, "base", "a number in [-1, 1]", lambda x: -1 <= x <= 1),
        "epsilon": None if epsilon is None else margin_number(epsilon, "epsilon"),
    }
    return computed(_multi_similarity, batch_of(embeddings, labels, mask, memory), **numbers)


def _multi_similarity(batch: Batch, alpha, beta, base, epsilon):
    pairs = make_pairs(batch, cosine)
    similarity, positive, negative = pairs
    if epsilon is not None:
        positive, negative = multi_similarity_miner(*pairs, epsilon)
    pull = log_one_plus_sum(-alpha * (similarity - base), positive) / alpha
    push = log_one_plus_sum(beta * (similarity - base), negative) / beta
    kept = (positive | negative).astype(jnp.float32)
    stats = pair_stats(pairs, batch)
    stats["kept_fraction"] = masked_mean(kept, pairs.positive | pairs.negative)
    return masked_mean(pull + push, batch.kept), stats


def multi_similarity_miner(
    similarities: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    epsilon: float | jax.Array = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Return which pairs are informative (Wang et al. 2019, eqs. 10 and 11).

    A negative is kept that is more similar than the anchor's least similar positive, less
    ``epsilon``; a positive that is less similar than its most similar negative, plus ``epsilon``.
    An anchor without a positive or a negative keeps none.

    Args:
      similarities: ``[b, m]`` float, of anchors (rows) to others.
      positive: ``[b, m]`` bool.
      negative: ``[b, m]`` bool.
      epsilon: The slack.

    Returns:
      The positives and the negatives that are kept, each ``[b, m]`` bool.

    Example:
      >>> similarities = jnp.array([[0.9, 0.5, 0.6, 0.2]])
      >>> positive = jnp.array([[True, True, False, False]])
      >>> multi_similarity_miner(similarities, positive, ~positive)[1].tolist()
      [[False, False, True, False]]
    """
    least = jnp.min(jnp.where(positive, similarities, jnp.inf), axis=1, keepdims=True)
    most = jnp.max(jnp.where(negative, similarities, -jnp.inf), axis=1, keepdims=True)
    hard_positive = positive & (similarities - epsilon < most)
    return hard_positive, negative & (similarities + epsilon > least)


def circle_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float | jax.Array = 0.4,
    scale: float | jax.Array = 80.0,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Circle loss (Sun et al. 2020, eq. 6), with the pairs of each anchor.

    With cosine similarities s, positives P and negatives N of an anchor, it costs
    ``log(1 + sum_N exp(scale a_n (s_n - margin)) sum_P exp(-scale a_p (s_p - 1 + margin)))``, where
    ``a_n = relu(s_n + margin)`` and ``a_p = relu(1 + margin - s_p)`` are weights, through which no
    gradient flows; the mean is over the anchors with a positive and a negative.

    pytorch-metric-learning's ``CircleLoss`` takes the mean over the anchors that cost more than 0:
    the same unless a cost is too small for its dtype. So second derivatives are those of the
    weighted form, its weights held fixed.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers.
      margin: In [0, 1]; the paper has 0.4 for fine-grained retrieval and 0.25 for faces.
      scale: Above 0; the paper has 80 for fine-grained retrieval and 256 for faces.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss and stats, as `multi_similarity_loss` does, but ``kept_fraction``.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> loss, _ = circle_loss(embeddings, jnp.array([0, 0, 1]), scale=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(0.48)) and log(1 + exp(0.7616))
      1.0532
    """
    margin = checked_number(margin, "margin", "a number in [0, 1]", lambda m: 0 <= m <= 1)
    scale = positive_number(scale, "scale")
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_circle, batch, margin=margin, scale=scale)


def _circle(batch: Batch, margin, scale):
    pairs = make_pairs(batch, cosine)
    similarity = pairs.values
    fixed = jax.lax.stop_gradient(similarity)
    pull = -scale * jax.nn.relu(1 + margin - fixed) * (similarity - 1 + margin)
    push = scale * jax.nn.relu(fixed + margin) * (similarity - margin)
    total = log_sum(pull, pairs.positive) + log_sum(push, pairs.negative)
    return masked_mean(jax.nn.softplus(total), pairs.valid), pair_stats(pairs, batch)


def contrastive_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, Stats]:
    """Contrastive loss (Hadsell et al. 2006, eq. 4), on all pairs of a batch.

    With Euclidean distances d a positive pair costs ``d^2 / 2`` and a negative one
    ``relu(margin - d)^2 / 2``. The loss is the mean over the positive pairs plus the mean over the
    negative pairs that are nearer than the margin: all other negatives, which soon are nearly all
    of them, would drown these. The paper adds up; its pairs are few and given.

    pytorch-metric-learning's ``ContrastiveLoss`` costs ``d`` and ``relu(margin - d)``, without
    squares, of embeddings that it L2-normalises; its means are over the pairs that cost something.

    Args:
      embeddings: ``[b, d]``, any float dtype; L2-normalised where the margin is meant so.
      labels: ``[b]``, integers.
      margin: In the unit of the distances, above 0.
      mask: As in `multi_similarity_loss`.
      memory: As in `multi_similarity_loss`.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``distance_positive`` and
      ``distance_negative`` (means), ``active_fraction`` (of the negatives, nearer than the margin),
      ``valid_anchors``, ``embedding_spread``; with a memory ``memory_filled``.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> loss, _ = contrastive_loss(jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1]))
      >>> float(loss)  # 1 / 2 + 0.5^2 / 2
      0.625
    """
    batch = batch_of(embeddings, labels, mask, memory)
    return computed(_contrastive, batch, margin=positive_number(margin, "margin"))


def _contrastive(batch: Batch, margin):
    pairs = make_pairs(batch, pairwise_distances)
    distances = pairs.values
    near = pairs.negative & (distances < margin)
    pull = masked_mean(jnp.square(distances) / 2, pairs.positive)
    push = masked_mean(jnp.square(jax.nn.relu(margin - distances)) / 2, near)
    stats = pair_stats(pairs, batch, "distance")
    stats["active_fraction"] = masked_mean(near.astype(jnp.float32), pairs.negative)
    return pull + push, stats


def n_pair_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    l2: float | jax.Array = 0.002,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Multi-class N-pair loss (Sohn 2016, eq. 8), on the first two images of each label.

    A label's first image is its anchor f, its second the positive f+ (a label with one has
    neither, further ones are not used: make batches of two images a label). An anchor costs
    ``log sum_j exp(f . f+_j) - f . f+``, where j runs over all labels; the mean is over the
    anchors. To it comes ``l2 / 4`` times the mean of ``|f|^2 + |f+|^2``, as the paper asks for
    without a number, and TensorFlow's ``npairs_loss`` has it.

    Products are of the embeddings as they are: the paper's are not normalised, and unit vectors
    leave the loss near log of the number of labels. pytorch-metric-learning's ``NPairsLoss``
    L2-normalises by default, has no ``l2``, and picks the two images of a label at random.

    Args:
      embeddings: ``[b, d]``, any float dtype; computed in float32.
      labels: ``[b]``, integers.
      l2: Weight of the squared lengths, at least 0.
      mask: As in `multi_similarity_loss`.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``accuracy`` (fraction of anchors
      with the largest product at their own positive), ``valid_anchors`` (fraction of the batch),
      ``embedding_spread``.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
      >>> loss, _ = n_pair_loss(embeddings, jnp.array([0, 0, 1, 1]), l2=0.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(-2)) and log(1 + exp(-3))
      0.0878
    """
    l2 = margin_number(l2, "l2")
    return computed(_n_pair, batch_of(embeddings, labels, mask), l2=l2)


def _n_pair(batch: Batch, l2):
    rows, labels, kept, _ = batch
    same = (labels[:, None] == labels[None, :]) & kept[:, None] & kept[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)
    is_positive = kept & (earlier == 1)
    own = same & is_positive[None, :]
    anchor = kept & (earlier == 0) & own.any(axis=1)
    products = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    to_own = jnp.sum(jnp.where(own, products, 0.0), axis=1)
    positives = jnp.broadcast_to(is_positive[None, :], same.shape)
    costs = log_sum(products, positives) - to_own
    lengths = masked_mean(jnp.sum(jnp.square(rows), axis=1), anchor | is_positive)
    best = jnp.max(jnp.where(positives, products, -jnp.inf), axis=1)
    stats = {
        "accuracy": masked_mean((to_own >= best).astype(jnp.float32), anchor),
        "valid_anchors": masked_mean(anchor.astype(jnp.float32), kept),
    }
    return masked_mean(costs, anchor) + l2 / 2 * lengths, stats
