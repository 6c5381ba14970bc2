"""Triplet losses by masks over the full pair or triplet matrix, and cross-entropy.

Static shapes, no index lists.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from cbam_jax.distances import pairwise_distances
from cbam_jax.sharding import as_varying, with_auto_axes

MININGS = ("batch_hard", "semi_hard", "batch_all")
# Of batch_all's second derivative, whose [b, b, b] matrix is never whole in memory: the most
# anchors in a step, and the most entries.
_ANCHORS = 16
_ENTRIES = 2**26


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
    margin = _checked_number(margin, "margin", "a number of at least 0", lambda m: m >= 0)
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

    mine = {"batch_hard": _batch_hard, "semi_hard": _semi_hard, "batch_all": _batch_all}[mining]
    loss, stats = mine(distances, positive, negative, margin)
    # What no triplet was mined of counts as well, once it is not finite.
    loss += _nan_unless_finite(embeddings)
    stats["valid_anchors"] = jnp.mean(valid.astype(jnp.float32))
    stats["embedding_spread"] = _spread(embeddings)
    if memory is not None:
        loss += _nan_unless_finite(jnp.where(memory[2][:, None], memory[0], 0))
        stats["memory_filled"] = jnp.mean(memory[2].astype(jnp.float32))
    return loss, {name: jax.lax.stop_gradient(value) for name, value in stats.items()}


def cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, label_smoothing: float | jax.Array = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of a classifier, in nats.

    With smoothing s and n classes the target is 1 - s + s / n at the label and s / n elsewhere
    (Szegedy et al. 2016; torch's ``CrossEntropyLoss(label_smoothing=s)`` is the same).

    Args:
      logits: ``[b, n]``, any float dtype; computed in float32.
      labels: ``[b]``, integers in [0, n). One outside makes the loss NaN.
      label_smoothing: s, in [0, 1); traced, it is not checked.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``accuracy``, the fraction of the
      batch whose largest logit is the label's.

    Raises:
      ValueError: For a smoothing out of range, or other shapes or dtypes.

    Example:
      >>> loss, stats = cross_entropy_loss(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1]))
      >>> round(float(loss), 3), float(stats["accuracy"])  # log(1 + exp(-2)) + 1 on average
      (1.127, 0.5)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    _check_rows(logits, labels, "logits", "[b, n]")
    label_smoothing = _checked_number(
        label_smoothing, "label_smoothing", "a number in [0, 1)", lambda s: 0 <= s < 1
    )
    return _cross_entropy(logits, labels, label_smoothing)


@jax.jit
def _cross_entropy(logits, labels, label_smoothing):
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    # A negative label would count from the end; what is past the end is NaN.
    place = jnp.where(labels < 0, logits.shape[1], labels.astype(jnp.int32))
    correct = jnp.take_along_axis(log_probability, place[:, None], axis=1)[:, 0]
    per_row = (1 - label_smoothing) * correct + label_smoothing * jnp.mean(log_probability, axis=1)
    right = (jnp.argmax(logits, axis=1) == labels).astype(jnp.float32)
    accuracy = jnp.mean(right + _nan_unless_finite(logits))
    return -jnp.mean(per_row), {"accuracy": jax.lax.stop_gradient(accuracy)}


def deep_cross_entropy_loss(
    logits: Sequence[jax.Array],
    labels: jax.Array,
    label_smoothing: float | jax.Array = 0.0,
    auxiliary_weight: float | jax.Array = 0.3,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a classifier, and a share of that of its auxiliary classifiers.

    The auxiliary losses are added with a weight of 0.3 each, as GoogLeNet was trained (Szegedy et
    al. 2015, section 5); without auxiliary classifiers it is `cross_entropy_loss`.

    Args:
      logits: At least one array ``[b, n]``: the classifier's, then each auxiliary classifier's.
      labels: ``[b]``, integers in [0, n).
      label_smoothing: Of all of them, as in `cross_entropy_loss`.
      auxiliary_weight: What each auxiliary loss is multiplied by, not negative; traced, it is not
        checked.

    Returns:
      The loss, a float32 scalar, and what `cross_entropy_loss` says of the classifier itself.

    Raises:
      ValueError: As `cross_entropy_loss` does, and for a negative weight.

    Example:
      >>> labels, even = jnp.array([0, 1]), jnp.zeros((2, 2))
      >>> loss, _ = deep_cross_entropy_loss([even, even, even], labels)
      >>> round(float(loss), 3)  # 1.6 log 2
      1.109
    """
    auxiliary_weight = _checked_number(
        auxiliary_weight, "auxiliary_weight", "at least 0", lambda weight: weight >= 0
    )
    loss, stats = cross_entropy_loss(logits[0], labels, label_smoothing)
    for other in logits[1:]:
        loss += auxiliary_weight * cross_entropy_loss(other, labels, label_smoothing)[0]
    return loss, stats


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
    _check_rows(earlier, earlier_labels, "the memory's embeddings", "[n, d]")
    if filled.shape != earlier_labels.shape or filled.dtype != bool:
        raise ValueError(
            f"the memory's mask has shape {filled.shape} and dtype {filled.dtype}, expected "
            f"{earlier_labels.shape} and bool"
        )
    distances = pairwise_distances(embeddings, jax.lax.stop_gradient(earlier))
    same = labels[:, None] == earlier_labels[None, :]
    return distances, same & filled[None, :], ~same & filled[None, :]


def _batch_hard(distances, positive, negative, margin):
    farthest = jnp.max(jnp.where(positive, distances, 0.0), axis=1)
    nearest = jnp.min(jnp.where(negative, distances, jnp.inf), axis=1)
    valid = positive.any(axis=1)
    return _mean_loss(farthest, jnp.where(valid, nearest, 0.0), valid, margin)


def _semi_hard(distances, positive, negative, margin):
    ascending = jnp.sort(jnp.where(negative, distances, jnp.inf), axis=1)
    # side="right" skips negatives at the positive's own distance: strictly farther is asked for.
    farther = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))
    rank = farther(jax.lax.stop_gradient(ascending), jax.lax.stop_gradient(distances))
    last = jnp.sum(negative, axis=1, keepdims=True, dtype=rank.dtype) - 1
    mined = jnp.take_along_axis(ascending, jnp.clip(rank, 0, jnp.maximum(last, 0)), axis=1)
    return _mean_loss(distances, jnp.where(positive, mined, 0.0), positive, margin)


def _batch_all(distances, positive, negative, margin):
    soft = margin is None
    costs, active = _cost_of_all(soft, distances, 0.0 if soft else margin, positive, negative)
    # In float32: the number of triplets in a batch of 2,048 leaves int32.
    counts = [jnp.sum(mask.astype(jnp.float32), axis=1) for mask in (positive, negative)]
    active, total = jnp.sum(active), jnp.sum(counts[0] * counts[1])
    stats = {
        "distance_positive": _masked_mean(distances, positive),
        "distance_negative": _masked_mean(distances, negative),
        "active_fraction": active / jnp.maximum(total, 1.0),
    }
    # A soft cost is above 0, though it may be too small for float32.
    return jnp.sum(costs) / jnp.maximum(total if soft else active, 1.0), stats


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cost_of_all(soft, distances, margin, positive, negative):
    """The cost of each anchor's triplets, and how many are active, both [b]."""
    costs, _, active = _pass_over_all(soft, distances, margin, positive, negative)
    return costs, active


@_cost_of_all.defjvp
def _cost_of_all_jvp(soft, primals, tangents):
    # One pass gives costs and slopes: a soft cost and its slope share an exponential, and in the
    # backward pass nothing is computed again.
    costs, slopes, active = _pass_over_all(soft, *primals)
    tangent = jnp.sum(slopes * tangents[0], axis=1)
    if not soft:
        tangent += active * tangents[1]
    return (costs, active), (tangent, 0.0 * active)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pass_over_all(soft, distances, margin, positive, negative):
    """Costs [b], their slopes by the distances [b, n], and the number of active triplets [b].

    Turn i takes each anchor's i-th positive: as many turns as one has positives, a few of b.
    """
    rank = jnp.cumsum(positive, axis=1, dtype=jnp.int32)
    turns = jnp.max(jnp.sum(positive, axis=1, dtype=jnp.int32))

    def turn(carry):
        i, costs, slopes, active = carry
        this = positive & (rank == i + 1)
        to = jnp.sum(jnp.where(this, distances, 0.0), axis=1, keepdims=True)
        triplets = negative & this.any(axis=1, keepdims=True)
        cost, slope = _cost_and_slope(to - distances, None if soft else margin)
        slope = jnp.where(triplets, slope, 0.0)
        slopes += jnp.where(this, jnp.sum(slope, axis=1, keepdims=True), 0.0) - slope
        costs += jnp.sum(jnp.where(triplets, cost, 0.0), axis=1)
        counted = triplets & _active(to, distances, None if soft else margin)
        return i + 1, costs, slopes, active + jnp.sum(counted.astype(jnp.float32), axis=1)

    none = jnp.zeros(distances.shape, jnp.float32)
    start = [as_varying(x, distances) for x in (none[:, 0], none, none[:, 0])]
    carry = jnp.zeros((), jnp.int32), *start
    return jax.lax.while_loop(lambda carry: carry[0] < turns, turn, carry)[1:]


@_pass_over_all.defjvp
def _pass_over_all_jvp(soft, primals, tangents):
    # For second derivatives, which need a loop whose turns are known: over the anchors.
    costs, slopes, active = _pass_over_all(soft, *primals)
    distances, margin, positive, negative = primals

    @jax.checkpoint
    def of_anchor(row):
        to, is_positive, is_negative, margin = row
        gaps = to[:, None] - to[None, :]
        slope = _cost_and_slope(gaps, None if soft else margin)[1]
        slope = jnp.where(is_positive[:, None] & is_negative[None, :], slope, 0.0)
        return jnp.sum(slope, axis=1) - jnp.sum(slope, axis=0)

    def plain(distances, margin):
        margins = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), distances.shape[:1])
        rows = (distances, positive, negative, margins)
        size = max(1, min(_ANCHORS, _ENTRIES // distances.shape[1] ** 2))
        return jax.lax.map(of_anchor, rows, batch_size=size)

    curved = jax.jvp(plain, (distances, jnp.asarray(margin, jnp.float32)), tangents[:2])[1]
    tangent = jnp.sum(slopes * tangents[0], axis=1)
    if not soft:
        tangent += active * tangents[1]
    return (costs, slopes, active), (tangent, curved, 0.0 * active)


def _cost_and_slope(gap, margin):
    """Costs of triplets by the gap d(a,p) - d(a,n), and their derivative."""
    if margin is not None:
        cost = jax.nn.relu(margin + gap)
        return cost, (margin + gap > 0).astype(jnp.float32)
    decay = jnp.exp(-jnp.abs(gap))
    slope = jnp.where(gap >= 0, 1.0, decay) / (1.0 + decay)
    return jnp.maximum(gap, 0.0) + jnp.log1p(decay), slope


def _mean_loss(to_positive, to_negative, mask, margin):
    active = _active(to_positive, to_negative, margin).astype(jnp.float32)
    stats = {
        "distance_positive": _masked_mean(to_positive, mask),
        "distance_negative": _masked_mean(to_negative, mask),
        "active_fraction": _masked_mean(active, mask),
    }
    return _masked_mean(_cost(to_positive, to_negative, margin), mask), stats


def _cost(to_positive, to_negative, margin):
    """Costs of triplets; ``margin`` None means the soft margin."""
    if margin is None:
        return jax.nn.softplus(to_positive - to_negative)
    return jax.nn.relu(margin + to_positive - to_negative)


def _active(to_positive, to_negative, margin):
    if margin is None:
        return to_positive >= to_negative
    return margin + to_positive - to_negative > 0


def _masked_mean(values, mask):
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


def _nan_unless_finite(x):
    """0, or NaN where an entry is NaN or infinite."""
    return jnp.sum(0.0 * jax.lax.stop_gradient(x).astype(jnp.float32))


def _spread(embeddings):
    embeddings = embeddings.astype(jnp.float32)
    centered = embeddings - jnp.mean(embeddings, axis=0, keepdims=True)
    return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(centered), axis=1)))


def _check(embeddings, labels, mining):
    if mining not in MININGS:
        raise ValueError(f"unknown mining {mining!r}; choose one of {', '.join(MININGS)}")
    _check_rows(embeddings, labels, "embeddings", "[b, d]")


def _checked_number(x, name, expected, holds):
    """The number, float32 if traced; raises where it is not as expected. A tracer has no value."""
    if jnp.ndim(x):
        raise ValueError(f"{name} has shape {jnp.shape(x)}, expected {expected}")
    if isinstance(x, Tracer):
        return x.astype(jnp.float32)
    if not holds(x):
        raise ValueError(f"{name} is {x}, expected {expected}")
    return x


def _check_rows(rows, labels, name, expected):
    shape, label_shape = rows.shape, labels.shape
    if len(shape) != 2 or label_shape != shape[:1] or 0 in shape:
        raise ValueError(
            f"{name} have shape {shape} and labels {label_shape}, expected {expected} and "
            f"{expected[:2]}]"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels have dtype {labels.dtype}, expected integers")
