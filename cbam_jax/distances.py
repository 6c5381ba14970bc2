"""Distances between embeddings, in float32, safe to differentiate.

Every distance here is Euclidean, and smaller is nearer, as in the paper.
"""

import functools

import jax
import jax.numpy as jnp

from cbam_jax.sharding import rows_spec, with_auto_axes

# Below this share of |x|^2 + |y|^2, cancellation eats the leading digits of the product form
# |x|^2 + |y|^2 - 2 xy (relative rounding about 1e-6), so such pairs are computed from x - y.
_NEAR = 2.0**-8
_REFINED_ROWS = 16
# Differences, [n, m, d], up to which an accelerator takes all of them: 0.4 GFLOP, where a loop that
# depends on the data has it wait for the host, and on a mesh for other devices in each turn.
_FEW_DIFFERENCES = 2**27


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Scales vectors to unit Euclidean length, along the last axis.

    A vector shorter than ``eps`` is divided by ``eps`` instead (``torch.nn.functional.normalize``
    does the same), so that zero stays zero, with a finite gradient. A vector with a NaN or an
    infinity becomes NaN, all of it.

    Args:
      x: ``[..., d]``, any float dtype.
      eps: The smallest length that is divided by.

    Returns:
      ``[..., d]`` float32.

    Raises:
      ValueError: If ``x`` is not a float array with at least one axis.

    Example:
      >>> l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = _float32(x, "x")
    if x.ndim < 1:
        raise ValueError(f"l2_normalize: x has shape {x.shape}, expected [..., d]")
    return _normalize(x, eps) if x.shape[-1] else x


# Compiled as one: called outside of jax.jit, each operation would be compiled and run by itself.
@jax.jit
def _normalize(x: jax.Array, eps: float) -> jax.Array:
    # The largest magnitude is divided out first: squares of 1e20 or 1e-30 leave float32's range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    scale = jnp.where(largest > 0, largest, 1.0)
    squared = jnp.sum(jnp.square(x / scale), axis=-1, keepdims=True)
    zero = squared <= 0  # Not the opposite of squared > 0: NaN stays NaN.
    length = scale * jnp.sqrt(jnp.where(zero, 1.0, squared))
    return x / jnp.where(zero, eps, jnp.maximum(length, eps))


def pairwise_distances(x: jax.Array, y: jax.Array, squared: bool = False) -> jax.Array:
    """Euclidean distances between all rows of ``x`` and all rows of ``y``.

    Computed in float32 at the highest matrix precision, whatever the inputs' dtype. Both are first
    moved by the mean of ``y``, which changes no distance and shortens the norms, and pairs that are
    near each other for their norms are computed from their difference. Rows that are equal have
    distance exactly 0. The gradient at distance 0 is 0 (the subgradient of least norm). The result
    is never NaN for finite input whose squared distances fit float32; distances to a row with a NaN
    are NaN, those to a row with an infinity are not finite, and the other rows' are as without it.

    Args:
      x: ``[n, d]``, any float dtype.
      y: ``[m, d]``, any float dtype.
      squared: Whether to return squared distances, which need no root.

    Returns:
      ``[n, m]`` float32, in the unit of the embeddings (or its square).

    Raises:
      ValueError: If an argument is not a float matrix, or the widths differ.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
      >>> pairwise_distances(x, x).tolist()
      [[0.0, 5.0], [5.0, 0.0]]
      >>> pairwise_distances(x, x, squared=True).tolist()
      [[0.0, 25.0], [25.0, 0.0]]
    """
    same = x is y
    x, y = _float32(x, "x"), _float32(y, "y")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"pairwise_distances: x has shape {x.shape} and y {y.shape}, expected [n, d] and [m, d]"
        )
    if 0 in (*x.shape, *y.shape):
        return jnp.zeros((x.shape[0], y.shape[0]), jnp.float32)
    find = functools.partial(_distances, same, squared)
    return with_auto_axes(find, (x, y), rows_spec(x, y))(x, y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _distances(same: bool, squared: bool, x: jax.Array, y: jax.Array) -> jax.Array:
    # Of what is finite: one row that is not would make all distances NaN.
    center = jnp.mean(jnp.where(jnp.isfinite(y), y, 0.0), axis=0, keepdims=True)
    squares = _squared_distances(same, x, y, jax.lax.stop_gradient(center))
    if squared:
        return squares
    # Double where: the root's gradient at 0 is infinite, and infinity times 0 is NaN. Not by
    # squares > 0, which a NaN is not either.
    zero = squares <= 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _squared_distances(same: bool, x: jax.Array, y: jax.Array, center: jax.Array) -> jax.Array:
    few = x.shape[0] * y.size <= _FEW_DIFFERENCES
    if few and jax.default_backend() != "cpu":
        return jnp.sum(jnp.square(x[:, None, :] - y[None, :, :]), axis=-1)
    u, v = x - center, y - center
    norms = _norms(u)[:, None] + _norms(v)[None, :]
    squares = norms - 2.0 * _product(u, v)
    near = squares < _NEAR * norms
    if same:
        # The diagonal is known: it must not send every batch down the slower path.
        diagonal = jnp.eye(x.shape[0], dtype=bool)
        # 0 times the norm: where that is not finite, neither is the distance.
        squares, near = jnp.where(diagonal, 0.0 * norms, squares), near & ~diagonal
    return _refine(x, y, squares, near)


@_squared_distances.defjvp
def _squared_distances_jvp(same, primals, tangents):
    # The derivative of |x - y|^2 is 2 (x - y)(dx - dy): products only, no [n, m, d] array.
    x, y, center = primals
    dx, dy, _ = tangents
    u, v = x - center, y - center
    own = jnp.sum(u * dx, axis=1)[:, None] + jnp.sum(v * dy, axis=1)[None, :]
    tangent = 2.0 * (own - _product(u, dy) - _product(dx, v))
    return _squared_distances(same, x, y, center), tangent


def _refine(x: jax.Array, y: jax.Array, squares: jax.Array, near: jax.Array) -> jax.Array:
    """Replaces the ``near`` entries by sums over (x - y)^2, blocks of rows without any skipped.

    By a loop over the blocks that have some, and not by a branch for each: ``vmap`` makes of a
    branch both of its sides.
    """
    count = -(-x.shape[0] // _REFINED_ROWS)
    padding = ((0, count * _REFINED_ROWS - x.shape[0]), (0, 0))
    rows, refined, masks = (
        jnp.pad(a, padding).reshape(count, _REFINED_ROWS, a.shape[1]) for a in (x, squares, near)
    )
    has_near = masks.any(axis=(1, 2))
    order, total = jnp.argsort(~has_near), jnp.sum(has_near, dtype=jnp.int32)

    def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, refined = carry
        block = order[i]
        direct = jax.lax.map(lambda row: _norms(row[None, :] - y), rows[block])
        return i + 1, refined.at[block].set(jnp.where(masks[block], direct, refined[block]))

    start = jnp.zeros((), jnp.int32), refined
    _, refined = jax.lax.while_loop(lambda carry: carry[0] < total, turn, start)
    return refined.reshape(-1, y.shape[0])[: x.shape[0]]


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def _float32(x: jax.Array, name: str) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}, expected floating point embeddings")
    return x.astype(jnp.float32)
