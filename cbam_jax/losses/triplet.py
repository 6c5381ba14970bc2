"""Triplet losses by masks over the full pair or triplet matrix: static shapes, no index lists."""

import functools
import math

import jax
import jax.numpy as jnp

from cbam_jax.distances import pairwise_distances
from cbam_jax.losses.batch_all import mine_all
from cbam_jax.losses.common import (
    check_memory,
    check_rows,
    checked_number,
    nan_unless_finite,
    spread,
)
from cbam_jax.losses.triplet_costs import mean_cost
from cbam_jax.sharding import with_auto_axes

MININGS = ("batch_hard", "semi_hard", "batch_all")


def triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float | jax.Array = 0.2,
    mining: str = "batch_hard",
    soft: bool = False,
    memory: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Triplet loss on a batch, with the triplets mined inside the batch and, if given, a memory.

    With Euclidean distances (not squared) d(a,p) to an image of the anchor's label and d(a,n) to
    one of another label, a triplet costs ``relu(margin + d(a,p) - d(a,n))``, or, if ``soft``,
    ``log(1 + exp(d(a,p) - d(a,n)))``, which takes the margin's place. An anchor is valid when the
    batch holds another image of its label and an image of another label. ``mining`` is one of

    * ``"batch_hard"``: each valid anchor's farthest positive and nearest negative; mean over the
      valid anchors (Hermans et al. 2017, eq. 5).
    * ``"semi_hard"``: for each pair of a valid anchor and a positive, the nearest negative that is
      farther than the positive, or the farthest negative where there is none; mean over the
      pairs (Schroff et al. 2015; the second choice is TensorFlow's).
    * ``"batch_all"``: every triplet of the valid anchors; mean over the triplets with a loss above
      0 (pytorch-metric-learning does the same; open-metric-learning divides by all triplets). With
      ``soft`` every triplet has a loss above 0. Memory grows with b^2, time with b^2 times the
      most positives of an anchor, and with a memory of n places with b (b + n) for b^2.

    Without any valid anchor the loss is 0. The gradient is finite everywhere, and 0 through a pair
    at distance 0, so embeddings that are all equal get none. An embedding that is not finite makes
    the loss NaN, whichever triplets were mined.

    With a ``memory`` of earlier batches' embeddings (cross-batch memory, Wang et al. 2020) anchors
    are the batch's, and "the batch" of which positives and negatives are chosen is the batch and
    the memory together. An earlier embedding of the anchor's own image is a positive like any
    other. No gradient flows into the memory. pytorch-metric-learning's ``CrossBatchMemory`` of
    n + b places, which puts the batch in first and then leaves out an anchor's pair with itself,
    gives the same losses; but it detaches the batch's positives and negatives too, whose gradients
    are kept here. The paper adds the batch's own loss and the memory's, each mined by itself.

    Args:
      embeddings: ``[b, d]``, any float dtype; L2-normalised where the margin is meant so.
      labels: ``[b]``, integers.
      margin: In the unit of the distances, not negative. Unused if ``soft``. A number, or a scalar
        that may be traced, such as a schedule's: its sign is then not checked.
      mining: One of the above.
      soft: Whether to use the soft margin.
      memory: Embeddings ``[n, d]``, their labels ``[n]`` and a mask ``[n]``, False where the place
        is empty.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``distance_positive`` and
      ``distance_negative`` (means over the positives and negatives used; 0 without any),
      ``active_fraction`` (triplets with a loss above 0; if ``soft``, with d(a,p) >= d(a,n)),
      ``valid_anchors`` (their fraction of the batch), ``embedding_spread`` (root mean square
      distance to the batch's centroid; 0 once collapsed); with a memory also ``memory_filled``, the
      fraction of its places that are not empty.

    Raises:
      ValueError: For an unknown mining, a negative margin, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[0.0], [1.0], [1.5], [3.5]])
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> loss, stats = triplet_loss(embeddings, labels, margin=0.2)
      >>> round(float(loss), 3)  # (0 + 0.7 + 1.7 + 0) / 4
      0.6
      >>> float(stats["active_fraction"])
      0.5
      >>> memory = jnp.array([[1.1], [9.0]]), jnp.array([1, 0]), jnp.array([True, False])
      >>> loss, stats = triplet_loss(embeddings, labels, margin=0.2, memory=memory)
      >>> round(float(loss), 3)  # (0.1 + 1.1 + 1.7 + 0.1) / 4
      0.75
    """
    margin = checked_number(margin, "margin", "a number of at least 0", lambda m: m >= 0)
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    _check(embeddings, labels, mining)
    arrays = embeddings, labels, memory
    mined = functools.partial(_triplet_loss, margin=None if soft else margin, mining=mining)
    return with_auto_axes(mined, arrays)(*arrays)


# Compiled as one: called outside of jax.jit, each operation would be compiled and run by itself.
@functools.partial(jax.jit, static_argnames="mining")
def _triplet_loss(embeddings, labels, memory, *, margin, mining):
    distances = pairwise_distances(embeddings, embeddings)
    same = labels[:, None] == labels[None, :]
    positive, negative = same & ~jnp.eye(labels.shape[0], dtype=bool), ~same
    if memory is not None:
        to_memory = _pairs_with_memory(embeddings, labels, *memory)
        pairs = zip((distances, positive, negative), to_memory, strict=True)
        distances, positive, negative = (jnp.concatenate(both, axis=1) for both in pairs)
    valid = positive.any(axis=1) & negative.any(axis=1)
    positive, negative = positive & valid[:, None], negative & valid[:, None]

    mine = {"batch_hard": _batch_hard, "semi_hard": _semi_hard, "batch_all": mine_all}[mining]
    loss, stats = mine(distances, positive, negative, margin)
    # What no triplet was mined of counts as well, once it is not finite.
    loss += nan_unless_finite(embeddings)
    stats["valid_anchors"] = jnp.mean(valid.astype(jnp.float32))
    stats["embedding_spread"] = spread(embeddings)
    if memory is not None:
        loss += nan_unless_finite(jnp.where(memory[2][:, None], memory[0], 0))
        stats["memory_filled"] = jnp.mean(memory[2].astype(jnp.float32))
    return loss, {name: jax.lax.stop_gradient(value) for name, value in stats.items()}


def collapse_warning(
    stats: dict[str, jax.Array], margin: float = 0.2, soft: bool = False
) -> str | None:
    """Says in one line that the embeddings have collapsed to a point, and what helps.

    Collapsed embeddings pin the loss at the margin (log 2 = 0.693 if ``soft``), where the gradient
    is next to nothing. Its sign is a spread below a hundredth of the margin (of 1 if ``soft``).

    Args:
      stats: What `triplet_loss` returned.
      margin: The margin it was given.
      soft: The ``soft`` it was given.

    Returns:
      The line, or None where all is well, the spread is NaN, or the batch had no valid anchor.

    Example:
      >>> _, stats = triplet_loss(jnp.ones((4, 8)), jnp.array([0, 0, 1, 1]))
      >>> collapse_warning(stats)[:38]
      'embeddings have collapsed: spread 0.0e'
    """
    spread = float(stats["embedding_spread"])
    pinned = math.log(2.0) if soft else margin
    collapsed = spread < 0.01 * (1.0 if soft else margin)  # Nothing is said of NaN.
    if float(stats["valid_anchors"]) == 0 or not collapsed:
        return None
    return (
        f"embeddings have collapsed: spread {spread:.1e}, the loss is pinned at {pinned:.3f}; "
        "lower the learning rate, start with mining 'batch_all' or 'semi_hard', use the soft "
        "margin, or L2-normalise the embeddings"
    )


def _pairs_with_memory(embeddings, labels, earlier, earlier_labels, filled):
    """Distances to the memory, and which are positives and negatives; each [b, n]."""
    check_memory(earlier, earlier_labels, filled)
    distances = pairwise_distances(embeddings, jax.lax.stop_gradient(earlier))
    same = labels[:, None] == earlier_labels[None, :]
    return distances, same & filled[None, :], ~same & filled[None, :]


def _batch_hard(distances, positive, negative, margin):
    farthest = jnp.max(jnp.where(positive, distances, 0.0), axis=1)
    nearest = jnp.min(jnp.where(negative, distances, jnp.inf), axis=1)
    valid = positive.any(axis=1)
    return mean_cost(farthest, jnp.where(valid, nearest, 0.0), valid, margin)


def _semi_hard(distances, positive, negative, margin):
    ascending = jnp.sort(jnp.where(negative, distances, jnp.inf), axis=1)
    # side="right" skips negatives at the positive's own distance: strictly farther is asked for.
    farther = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))
    rank = farther(jax.lax.stop_gradient(ascending), jax.lax.stop_gradient(distances))
    last = jnp.sum(negative, axis=1, keepdims=True, dtype=rank.dtype) - 1
    mined = jnp.take_along_axis(ascending, jnp.clip(rank, 0, jnp.maximum(last, 0)), axis=1)
    return mean_cost(distances, jnp.where(positive, mined, 0.0), positive, margin)


def _check(embeddings, labels, mining):
    if mining not in MININGS:
        raise ValueError(f"unknown mining {mining!r}; choose one of {', '.join(MININGS)}")
    check_rows(embeddings, labels, "embeddings", "[b, d]")
