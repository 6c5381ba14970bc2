"""What all losses share: their arguments and the checks of these, means, signs of trouble."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from cbam_jax.sharding import with_auto_axes

Stats = dict[str, jax.Array]
Memory = tuple[jax.Array, jax.Array, jax.Array]


class Batch(NamedTuple):
    """What a loss is of. Rows that are not ``kept`` are 0, and count nowhere.

    ``rows`` [b, d] float32, ``labels`` [b], ``kept`` [b] bool; ``memory`` as `triplet_loss` takes
    it, or None.
    """

    rows: jax.Array
    labels: jax.Array
    kept: jax.Array
    memory: Memory | None = None


def batch_of(
    embeddings: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    memory: Memory | None = None,
) -> Batch:
    """Return the batch that a loss was given.

    Raises:
      ValueError: For embeddings, labels, mask or memory of other shapes or dtypes.
    """
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    check_rows(embeddings, labels, "embeddings", "[b, d]")
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(f"embeddings have dtype {embeddings.dtype}, expected a float dtype")
    kept = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)
    check_mask(kept, labels, "the mask")
    if memory is not None:
        check_memory(*memory)
    return Batch(embeddings, labels, kept, memory)


def computed(
    find: Callable[..., tuple[jax.Array, Stats]], batch: Batch, *others: Any, **numbers: Any
) -> tuple[jax.Array, Stats]:
    """Return a loss and its stats, as ``find(batch, *others, **numbers)`` has them.

    It is compiled as one: outside of ``jax.jit`` each operation would be compiled and run by
    itself. The loss is NaN where a row, or a filled place of the memory, is not finite; the stats
    have no gradient, and say of every loss how far its embeddings are spread.
    """
    arrays = batch, *others
    return with_auto_axes(functools.partial(_computed, find, **numbers), arrays)(*arrays)


@functools.partial(jax.jit, static_argnums=0)
def _computed(find, batch, *others, **numbers):
    rows = jnp.where(batch.kept[:, None], batch.rows.astype(jnp.float32), 0.0)
    batch = batch._replace(rows=rows)
    loss, stats = find(batch, *others, **numbers)
    loss += nan_unless_finite(rows)
    stats["embedding_spread"] = spread(rows, batch.kept)
    if batch.memory is not None:
        earlier, _, filled = batch.memory
        loss += nan_unless_finite(jnp.where(filled[:, None], earlier, 0))
        stats["memory_filled"] = jnp.mean(filled.astype(jnp.float32))
    return loss, jax.tree.map(jax.lax.stop_gradient, stats)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of the values where ``mask`` is true; 0 where it is nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


def log_sum(x: jax.Array, mask: jax.Array, axis: int = 1) -> jax.Array:
    """Return log(sum of exp(x)) over the entries where ``mask`` is true; 0 where it is nowhere.

    No exponential overflows, and no derivative of any order is NaN.
    """
    some = mask.any(axis=axis)
    largest = jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis)
    largest = jax.lax.stop_gradient(jnp.where(some, largest, 0.0))
    total = _sum_of_exponentials(x, mask, largest, axis)
    return largest + jnp.log(jnp.where(some, total, 1.0))


def log_one_plus_sum(x: jax.Array, mask: jax.Array, axis: int = 1) -> jax.Array:
    """Return log(1 + sum of exp(x)) over the entries where ``mask`` is true, as `log_sum` does."""
    largest = jnp.max(jnp.where(mask, x, 0.0), axis=axis, initial=0.0)
    largest = jax.lax.stop_gradient(largest)
    return largest + jnp.log1p(jnp.expm1(-largest) + _sum_of_exponentials(x, mask, largest, axis))


def _sum_of_exponentials(x, mask, largest, axis):
    shifted = jnp.where(mask, x - jnp.expand_dims(largest, axis), 0.0)
    return jnp.sum(jnp.where(mask, jnp.exp(shifted), 0.0), axis=axis)


def nan_unless_finite(x: jax.Array) -> jax.Array:
    """Return 0, or NaN where an entry is NaN or infinite."""
    return jnp.sum(0.0 * jax.lax.stop_gradient(x).astype(jnp.float32))


def spread(embeddings: jax.Array, kept: jax.Array | None = None) -> jax.Array:
    """Return the root mean square distance to the centroid, of the rows that are ``kept``."""
    rows = embeddings.astype(jnp.float32)
    kept = jnp.ones(len(rows), bool) if kept is None else kept
    count = jnp.maximum(jnp.sum(kept.astype(jnp.float32)), 1.0)
    centroid = jnp.sum(jnp.where(kept[:, None], rows, 0.0), axis=0, keepdims=True) / count
    return jnp.sqrt(masked_mean(jnp.sum(jnp.square(rows - centroid), axis=1), kept))


def checked_number(x: Any, name: str, expected: str, holds: Callable[[Any], bool]) -> Any:
    """Return the number, float32 if traced; a tracer has no value, so that none is checked.

    Raises:
      ValueError: It is no scalar, or not as expected.
    """
    if jnp.ndim(x):
        raise ValueError(f"{name} has shape {jnp.shape(x)}, expected {expected}")
    if isinstance(x, Tracer):
        return x.astype(jnp.float32)
    if not holds(x):
        raise ValueError(f"{name} is {x}, expected {expected}")
    return x


def positive_number(x: Any, name: str) -> Any:
    """Return a number above 0, as `checked_number` does."""
    return checked_number(x, name, "a number above 0", lambda x: 0 < x < float("inf"))


def margin_number(x: Any, name: str = "margin") -> Any:
    """Return a number of at least 0, as `checked_number` does."""
    return checked_number(x, name, "a number of at least 0", lambda x: 0 <= x < float("inf"))


def check_rows(rows: jax.Array, labels: jax.Array, name: str, expected: str) -> None:
    """Raise ValueError unless rows are a matrix and there is an integer label for each."""
    shape, label_shape = rows.shape, labels.shape
    if len(shape) != 2 or label_shape != shape[:1] or 0 in shape:
        raise ValueError(
            f"{name} have shape {shape} and labels {label_shape}, expected {expected} and "
            f"{expected[:2]}]"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels have dtype {labels.dtype}, expected integers")


def check_mask(mask: jax.Array, labels: jax.Array, name: str) -> None:
    """Raise ValueError unless there is a bool for each label."""
    if mask.shape != labels.shape or mask.dtype != bool:
        raise ValueError(
            f"{name} has shape {mask.shape} and dtype {mask.dtype}, expected "
            f"{labels.shape} and bool"
        )


def check_memory(earlier: jax.Array, labels: jax.Array, filled: jax.Array) -> None:
    """Raise ValueError unless a memory is embeddings with a label and a bool for each."""
    check_rows(earlier, labels, "the memory's embeddings", "[n, d]")
    check_mask(filled, labels, "the memory's mask")
