"""Every triplet of a batch at once, in memory of [b, b], with derivatives of its own."""

import functools

import jax
import jax.numpy as jnp

from cbam_jax.losses.common import masked_mean
from cbam_jax.losses.pairs import over_positives
from cbam_jax.losses.triplet_costs import cost_and_slope, is_active
from cbam_jax.sharding import as_varying

# Of batch_all's second derivative, whose [b, b, b] matrix is never whole in memory: the most
# anchors in a step, and the most entries.
_ANCHORS = 16
_ENTRIES = 2**26


def mine_all(distances, positive, negative, margin):
    """The mean cost of all triplets, unless soft of the active ones, and what is told of them."""
    soft = margin is None
    costs, active = _cost_of_all(soft, distances, 0.0 if soft else margin, positive, negative)
    # In float32: the number of triplets in a batch of 2,048 leaves int32.
    counts = [jnp.sum(mask.astype(jnp.float32), axis=1) for mask in (positive, negative)]
    active, total = jnp.sum(active), jnp.sum(counts[0] * counts[1])
    stats = {
        "distance_positive": masked_mean(distances, positive),
        "distance_negative": masked_mean(distances, negative),
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
    """Costs [b], their slopes by the distances [b, n], and the number of active triplets [b]."""

    def turn(this, costs, slopes, active):
        to = jnp.sum(jnp.where(this, distances, 0.0), axis=1, keepdims=True)
        triplets = negative & this.any(axis=1, keepdims=True)
        cost, slope = cost_and_slope(to - distances, None if soft else margin)
        slope = jnp.where(triplets, slope, 0.0)
        slopes += jnp.where(this, jnp.sum(slope, axis=1, keepdims=True), 0.0) - slope
        costs += jnp.sum(jnp.where(triplets, cost, 0.0), axis=1)
        counted = triplets & is_active(to, distances, None if soft else margin)
        return costs, slopes, active + jnp.sum(counted.astype(jnp.float32), axis=1)

    none = jnp.zeros(distances.shape, jnp.float32)
    start = [as_varying(x, distances) for x in (none[:, 0], none, none[:, 0])]
    return over_positives(turn, positive, *start)


@_pass_over_all.defjvp
def _pass_over_all_jvp(soft, primals, tangents):
    # For second derivatives, which need a loop whose turns are known: over the anchors.
    costs, slopes, active = _pass_over_all(soft, *primals)
    distances, margin, positive, negative = primals

    @jax.checkpoint
    def of_anchor(row):
        to, is_positive, is_negative, margin = row
        gaps = to[:, None] - to[None, :]
        slope = cost_and_slope(gaps, None if soft else margin)[1]
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
