"""Losses with vectors of the classes, which are trained: proxies, and several centres a class."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cbam_jax.distances import l2_normalize
from cbam_jax.losses.common import (
    Batch,
    Stats,
    batch_of,
    checked_number,
    computed,
    log_one_plus_sum,
    margin_number,
    masked_mean,
    positive_number,
)
from cbam_jax.losses.pairs import cosine


class Proxies(nnx.Module):
    """One vector of each class, or several: what the losses with ``proxies`` are given.

    They start in random directions and of a length near 1. Only their directions count; of the
    length hangs how far one step of the optimizer turns them. The losses' authors each start from
    another, which depends on the number of classes.

    Args:
      num_classes: n.
      dim: d, of the embeddings.
      per_class: k, of `soft_triple_loss`; None: one vector each, without an axis of its own.
      rngs: For the directions.

    Attributes:
      vectors: A parameter, ``[n, d]`` or ``[n, k, d]`` float32.

    Example:
      >>> Proxies(5, 8, rngs=nnx.Rngs(0)).vectors.shape
      (5, 8)
    """

    def __init__(self, num_classes: int, dim: int, *, per_class: int | None = None, rngs: nnx.Rngs):
        shape = (num_classes, *(() if per_class is None else (per_class,)), dim)
        self.vectors = nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(dim))


def proxy_anchor_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float | jax.Array = 0.1,
    scale: float | jax.Array = 32.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Proxy-Anchor loss (Kim et al. 2020, eq. 4): each class's proxy beside all of the batch.

    With cosine similarities s to a proxy, of the batch's images X+ of its class and the others X-,
    it is the mean of ``log(1 + sum_X+ exp(-scale (s - margin)))`` over the proxies that have images
    in the batch, plus the mean of ``log(1 + sum_X- exp(scale (s + margin)))`` over all proxies. As
    the authors' code and pytorch-metric-learning's ``ProxyAnchorLoss``.

    Args:
      embeddings: ``[b, d]``, any float dtype and length: they are L2-normalised, in float32.
      labels: ``[b]``, integers in [0, n). One outside makes the loss NaN.
      proxies: ``[n, d]``, of any length; `Proxies` has them.
      margin: At least 0. Numbers may be scalars that are traced, and are then unchecked.
      scale: Above 0.
      mask: ``[b]`` bool, False for rows that pad the batch; None: all count.

    Returns:
      The loss, a float32 scalar, and a dict of float32 scalars: ``accuracy`` (fraction of the batch
      whose most similar proxy is its label's), ``embedding_spread`` (root mean square distance to
      the centroid).

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> loss, stats = proxy_anchor_loss(embeddings, jnp.array([0, 1]), jnp.eye(2), scale=1.0)
      >>> round(float(loss), 4), float(stats["accuracy"])
      (1.296, 1.0)
    """
    numbers = {"margin": margin_number(margin), "scale": positive_number(scale, "scale")}
    return computed(_proxy_anchor, *_checked(embeddings, labels, proxies, mask), **numbers)


def _proxy_anchor(batch: Batch, proxies, margin, scale):
    similarity = cosine(batch.rows, proxies)
    own = _own(batch, proxies)
    is_own, is_other = own & batch.kept[:, None], ~own & batch.kept[:, None]
    pull = log_one_plus_sum(-scale * (similarity - margin), is_own, axis=0)
    push = log_one_plus_sum(scale * (similarity + margin), is_other, axis=0)
    loss = masked_mean(pull, is_own.any(axis=0)) + jnp.mean(push)
    return loss + _nan_outside(batch, proxies), _accuracy(similarity, batch)


def proxy_nca_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    temperature: float | jax.Array = 1 / 9,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Proxy-NCA++ loss (Teh et al. 2020, eq. 7): which class's proxy an image is nearest to.

    With squared Euclidean distances d^2 of unit vectors, an image costs the cross-entropy of its
    class under a softmax of ``-d^2 / temperature`` over all proxies; the mean is over the batch.

    The Proxy-NCA before it (Movshovitz-Attias et al. 2017) leaves the image's own proxy out of the
    softmax's sum, and has a temperature of 1. pytorch-metric-learning's ``ProxyNCALoss`` is this
    one with ``softmax_scale`` 1 / temperature, 1 by default, and leaves out an image whose
    probability is too small for its dtype.

    Args:
      embeddings: As in `proxy_anchor_loss`.
      labels: As in `proxy_anchor_loss`.
      proxies: As in `proxy_anchor_loss`.
      temperature: Above 0; the paper's is 1 / 9.
      mask: As in `proxy_anchor_loss`.

    Returns:
      The loss and stats, as `proxy_anchor_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> loss, _ = proxy_nca_loss(embeddings, jnp.array([0, 1]), jnp.eye(2), temperature=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(-2)) and log(1 + exp(-0.4))
      0.32
    """
    temperature = positive_number(temperature, "temperature")
    arguments = _checked(embeddings, labels, proxies, mask)
    return computed(_proxy_nca, *arguments, temperature=temperature)


def _proxy_nca(batch: Batch, proxies, temperature):
    similarity = cosine(batch.rows, proxies)
    # Of unit vectors d^2 = 2 - 2 s, and what all logits share cancels.
    return _classified(2 * similarity / temperature, similarity, batch, proxies)


def cosface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float | jax.Array = 0.35,
    scale: float | jax.Array = 64.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """CosFace loss (Wang et al. 2018, eq. 4): cross-entropy with a margin of the cosine.

    With cosine similarities s to the proxies, the logits are ``scale s``, and of the image's own
    class ``scale (s - margin)``; the mean is over the batch. As pytorch-metric-learning's
    ``CosFaceLoss``.

    Args:
      embeddings: As in `proxy_anchor_loss`.
      labels: As in `proxy_anchor_loss`.
      proxies: As in `proxy_anchor_loss`.
      margin: At least 0.
      scale: Above 0.
      mask: As in `proxy_anchor_loss`.

    Returns:
      The loss and stats, as `proxy_anchor_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> loss, _ = cosface_loss(embeddings, jnp.array([0, 1]), jnp.eye(2), scale=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(-0.65)) and log(1 + exp(0.15))
      0.5955
    """
    numbers = {"margin": margin_number(margin), "scale": positive_number(scale, "scale")}
    return computed(_cosface, *_checked(embeddings, labels, proxies, mask), **numbers)


def _cosface(batch: Batch, proxies, margin, scale):
    similarity = cosine(batch.rows, proxies)
    logits = scale * (similarity - jnp.where(_own(batch, proxies), margin, 0.0))
    return _classified(logits, similarity, batch, proxies)


def arcface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float | jax.Array = 0.5,
    scale: float | jax.Array = 64.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """ArcFace loss (Deng et al. 2019, eq. 3): cross-entropy with a margin of the angle.

    With angles t to the proxies, the logits are ``scale cos(t)``, and of the image's own class
    ``scale cos(t + margin)``; where t + margin is beyond a half turn, ``scale (cos(t) - margin
    sin(margin))``, so that the logit goes on falling. The mean is over the batch. As
    pytorch-metric-learning's ``ArcFaceLoss``, whose margin is in degrees, and whose gradient at an
    angle of 0 is not finite; here it is.

    Args:
      embeddings: As in `proxy_anchor_loss`.
      labels: As in `proxy_anchor_loss`.
      proxies: As in `proxy_anchor_loss`.
      margin: In radians, in [0, pi / 2].
      scale: Above 0.
      mask: As in `proxy_anchor_loss`.

    Returns:
      The loss and stats, as `proxy_anchor_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> loss, _ = arcface_loss(embeddings, jnp.array([0, 1]), jnp.eye(2), scale=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(-0.8776)) and log(1 + exp(0.1857))
      0.569
    """
    margin = checked_number(
        margin, "margin", "an angle in [0, pi / 2]", lambda m: 0 <= m <= math.pi / 2
    )
    numbers = {"margin": margin, "scale": positive_number(scale, "scale")}
    return computed(_arcface, *_checked(embeddings, labels, proxies, mask), **numbers)


def _arcface(batch: Batch, proxies, margin, scale):
    similarity = cosine(batch.rows, proxies)
    turned = similarity * jnp.cos(margin) - _sine(similarity) * jnp.sin(margin)
    beyond = similarity - margin * jnp.sin(margin)
    turned = jnp.where(similarity > -jnp.cos(margin), turned, beyond)
    logits = scale * jnp.where(_own(batch, proxies), turned, similarity)
    return _classified(logits, similarity, batch, proxies)


def _sine(cosine_of):
    """The sine of an angle in [0, pi], by its cosine; linear near 0, where the root's slope is not
    finite.
    """
    squared, near = 1 - jnp.square(cosine_of), 1e-6
    root = jnp.sqrt(jnp.where(squared > near, squared, 1.0))
    return jnp.where(squared > near, root, jnp.maximum(squared, 0.0) / math.sqrt(near))


def soft_triple_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float | jax.Array = 0.01,
    scale: float | jax.Array = 20.0,
    gamma: float | jax.Array = 0.1,
    tau: float | jax.Array = 0.2,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """SoftTriple loss (Qian et al. 2019, eqs. 7 to 9): cross-entropy of several centres a class.

    With cosine similarities s to a class's k centres, the image's to the class is their mean by the
    weights ``softmax(s / gamma)``. The logits are ``scale`` times it, less the ``margin`` for the
    image's own class; the mean is over the batch. To it comes ``tau`` times a class's mean of
    ``sqrt(2 + 1e-5 - 2 w . w')`` over pairs of its centres, halved, which draws centres together
    that are not needed. As the authors' code.

    pytorch-metric-learning's ``SoftTripleLoss`` has no such regulariser: it is that of ``tau=0``.

    Args:
      embeddings: As in `proxy_anchor_loss`.
      labels: As in `proxy_anchor_loss`.
      proxies: ``[n, k, d]``; `Proxies` with ``per_class=k`` has them. The paper's k is 10.
      margin: At least 0.
      scale: Above 0.
      gamma: Above 0.
      tau: At least 0.
      mask: As in `proxy_anchor_loss`.

    Returns:
      The loss and stats, as `proxy_anchor_loss` does.

    Raises:
      ValueError: For a number out of range, or other shapes or dtypes.

    Example:
      >>> embeddings, centers = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.eye(2)[:, None, :]
      >>> loss, _ = soft_triple_loss(embeddings, jnp.array([0, 1]), centers, scale=1.0)
      >>> round(float(loss), 4)  # the mean of log(1 + exp(-0.99)) and log(1 + exp(-0.19))
      0.4593
    """
    numbers = {
        "margin": margin_number(margin),
        "scale": positive_number(scale, "scale"),
        "gamma": positive_number(gamma, "gamma"),
        "tau": margin_number(tau, "tau"),
    }
    arguments = _checked(embeddings, labels, proxies, mask, axes=3)
    return computed(_soft_triple, *arguments, **numbers)


def _soft_triple(batch: Batch, proxies, margin, scale, gamma, tau):
    n, k, d = proxies.shape
    to_centers = cosine(batch.rows, proxies.reshape(n * k, d)).reshape(-1, n, k)
    weights = jax.nn.softmax(to_centers / gamma, axis=2)
    similarity = jnp.sum(weights * to_centers, axis=2)
    logits = scale * (similarity - jnp.where(_own(batch, proxies), margin, 0.0))
    loss, stats = _classified(logits, similarity, batch, proxies)
    return loss + tau * _spread_of_centers(proxies), stats


def _spread_of_centers(proxies):
    n, k, _ = proxies.shape
    unit = l2_normalize(proxies)
    products = jnp.einsum("nkd,njd->nkj", unit, unit, precision=jax.lax.Precision.HIGHEST)
    once = jnp.triu(jnp.ones((k, k), bool), 1)[None]
    distances = jnp.sqrt(jnp.where(once, jnp.maximum(2 + 1e-5 - 2 * products, 1e-6), 1.0))
    return jnp.sum(jnp.where(once, distances, 0.0)) / max(n * k * (k - 1), 1)


def _checked(
    embeddings: Any, labels: Any, proxies: Any, mask: Any, axes: int = 2
) -> tuple[Batch, jax.Array]:
    batch, proxies = batch_of(embeddings, labels, mask), jnp.asarray(proxies)
    width = batch.rows.shape[1]
    if proxies.ndim != axes or proxies.shape[-1] != width or 0 in proxies.shape:
        expected = {2: f"[n, {width}]", 3: f"[n, k, {width}]"}[axes]
        raise ValueError(f"proxies have shape {proxies.shape}, expected {expected}")
    return batch, proxies.astype(jnp.float32)


def _own(batch: Batch, proxies):
    """Which class is whose, [b, n]."""
    return batch.labels[:, None] == jnp.arange(len(proxies), dtype=batch.labels.dtype)[None, :]


def _nan_outside(batch: Batch, proxies):
    """0, or NaN where a label is no class."""
    outside = (batch.labels < 0) | (batch.labels >= len(proxies))
    return jnp.where((outside & batch.kept).any(), jnp.nan, 0.0)


def _classified(logits, similarity, batch: Batch, proxies):
    """Mean cross-entropy of logits, each [b, n]."""
    own = jnp.sum(jnp.where(_own(batch, proxies), logits, 0.0), axis=1)
    costs = jax.nn.logsumexp(logits, axis=1) - own
    loss = masked_mean(costs, batch.kept) + _nan_outside(batch, proxies)
    return loss, _accuracy(similarity, batch)


def _accuracy(similarity, batch: Batch) -> Stats:
    right = jnp.argmax(similarity, axis=1).astype(batch.labels.dtype) == batch.labels
    return {"accuracy": masked_mean(right.astype(jnp.float32), batch.kept)}
