"""Cross-entropy of a classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cbam_jax.losses.common import check_rows, checked_number, nan_unless_finite


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
    check_rows(logits, labels, "logits", "[b, n]")
    label_smoothing = checked_number(
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
    accuracy = jnp.mean(right + nan_unless_finite(logits))
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
    auxiliary_weight = checked_number(
        auxiliary_weight, "auxiliary_weight", "at least 0", lambda weight: weight >= 0
    )
    loss, stats = cross_entropy_loss(logits[0], labels, label_smoothing)
    for other in logits[1:]:
        loss += auxiliary_weight * cross_entropy_loss(other, labels, label_smoothing)[0]
    return loss, stats
