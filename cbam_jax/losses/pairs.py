"""Each row of a batch beside each column, which are the batch's rows and those of a memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cbam_jax.distances import l2_normalize
from cbam_jax.losses.common import Batch, Stats, masked_mean


class Pairs(NamedTuple):
    """What each row is to each column, each [b, m]; m = b, and with a memory of n places b + n.

    ``values`` are similarities or distances. ``positive`` is true where two images have one label,
    ``negative`` where they do not; both are false of an image and itself, of a row or a place that
    does not count.
    """

    values: jax.Array
    positive: jax.Array
    negative: jax.Array

    @property
    def valid(self) -> jax.Array:
        """Rows with a positive and a negative, [b]."""
        return self.positive.any(axis=1) & self.negative.any(axis=1)


def make_pairs(batch: Batch, compare: Callable[[jax.Array, jax.Array], jax.Array]) -> Pairs:
    """Compare a batch's rows with its own and the memory's, through which no gradient flows."""
    rows, labels, kept, memory = batch
    others = ~jnp.eye(len(labels), dtype=bool) & kept[None, :]
    pairs = Pairs(compare(rows, rows), *_positive_and_negative(labels, labels, others, kept))
    if memory is None:
        return pairs
    earlier, earlier_labels, filled = memory
    earlier = jax.lax.stop_gradient(jnp.where(filled[:, None], earlier, 0).astype(jnp.float32))
    masks = _positive_and_negative(labels, earlier_labels, filled[None, :], kept)
    to_memory = compare(rows, earlier), *masks
    return Pairs(*(jnp.concatenate(b, axis=1) for b in zip(pairs, to_memory, strict=True)))


def _positive_and_negative(labels, other_labels, others, kept):
    same, counted = labels[:, None] == other_labels[None, :], others & kept[:, None]
    return same & counted, ~same & counted


def over_positives(
    turn: Callable[..., tuple[jax.Array, ...]], positive: jax.Array, *sums: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the ``sums`` after all turns, each ``turn(this, *sums) -> sums``.

    Turn i takes each row's i-th positive, where ``this`` is true: as many turns as one has
    positives, a few of b.
    """
    rank = jnp.cumsum(positive, axis=1, dtype=jnp.int32)
    turns = jnp.max(jnp.sum(positive, axis=1, dtype=jnp.int32))

    def taken(carry):
        i, *sums = carry
        return i + 1, *turn(positive & (rank == i + 1), *sums)

    start = jnp.zeros((), jnp.int32), *sums
    return jax.lax.while_loop(lambda carry: carry[0] < turns, taken, start)[1:]


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return cosine similarities [n, m] of rows [n, d] and [m, d]; 0 beside a row of zeros."""
    u = l2_normalize(x)
    v = u if x is y else l2_normalize(y)
    return jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)


def pair_stats(pairs: Pairs, batch: Batch, kind: str = "similarity") -> Stats:
    """Return the means over positives and over negatives, and the fraction of valid anchors."""
    return {
        f"{kind}_positive": masked_mean(pairs.values, pairs.positive),
        f"{kind}_negative": masked_mean(pairs.values, pairs.negative),
        "valid_anchors": masked_mean(pairs.valid.astype(jnp.float32), batch.kept),
    }
