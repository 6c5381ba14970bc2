"""Exact nearest neighbours by Euclidean distance, streamed over blocks of queries and gallery."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.distances import pairwise_distances


def search(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    exclude_self: bool | ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
    query_block: int = 1024,
    gallery_block: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery items of each query.

    Args:
      queries: ``[q, d]``, floats.
      gallery: ``[n, d]``, floats.
      k: At most n.
      exclude_self: True where query i is gallery item i and is to be ignored; or ``[q]`` integers,
        the gallery index of each query, -1 for none.
      query_group: ``[q]`` integers; gallery items with the query's group are ignored.
      gallery_group: ``[n]`` integers, given with ``query_group``.
      query_block: Queries at a time.
      gallery_block: Gallery items at a time.

    Returns:
      Distances ``[q, k]`` float32, ascending, and indices ``[q, k]`` int32. Ties are broken by the
      gallery index. Where fewer than k items are left the row ends in distance inf, index -1.

    Raises:
      ValueError: For k out of range, NaN or infinite embeddings, or other shapes or dtypes.

    Example:
      >>> gallery = np.array([[0.0], [2.0], [3.0]], np.float32)
      >>> distances, indices = search(gallery, gallery, k=2, exclude_self=True)
      >>> indices.tolist(), distances.tolist()
      ([[1, 2], [2, 0], [1, 0]], [[2.0, 3.0], [1.0, 2.0], [1.0, 3.0]])
    """
    queries, gallery = _matrix(queries, "queries"), _matrix(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, the gallery {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}, but the gallery has {len(gallery)} items")
    own = _own_indices(exclude_self, len(queries), len(gallery))
    if (query_group is None) != (gallery_group is None):
        raise ValueError("query_group and gallery_group are given together or not at all")
    if query_group is None or gallery_group is None:
        # Groups that never meet.
        query_group = np.zeros(len(queries), np.int32)
        gallery_group = np.ones(len(gallery), np.int32)
    query_group = _integers(query_group, len(queries), "query_group")
    gallery_group = _integers(gallery_group, len(gallery), "gallery_group")

    distances = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int32)
    for i in range(0, len(queries), query_block):
        rows = slice(i, i + query_block)
        block = queries[rows]
        best = (
            jnp.full((len(block), k), jnp.inf, jnp.float32),
            jnp.full((len(block), k), -1, jnp.int32),
        )
        for j in range(0, len(gallery), gallery_block):
            items = slice(j, j + gallery_block)
            best = _merge(
                best, block, gallery[items], jnp.int32(j),
                own[rows], query_group[rows], gallery_group[items], k=k,
            )  # fmt: skip
        distances[rows], indices[rows] = best
    return distances, indices


@functools.partial(jax.jit, static_argnames="k")
def _merge(best, queries, gallery, offset, own, query_group, gallery_group, k):
    found, positions = best
    distances = pairwise_distances(queries, gallery)
    index = offset + jnp.arange(gallery.shape[0], dtype=jnp.int32)
    ignored = (index[None, :] == own[:, None]) | (query_group[:, None] == gallery_group[None, :])
    distances = jnp.concatenate([found, jnp.where(ignored, jnp.inf, distances)], axis=1)
    index = jnp.broadcast_to(index[None, :], ignored.shape)
    index = jnp.concatenate([positions, jnp.where(ignored, -1, index)], axis=1)
    # Earlier columns hold lower gallery indices, and top_k prefers earlier columns among equals.
    negated, columns = jax.lax.top_k(-distances, k)
    return -negated, jnp.take_along_axis(index, columns, axis=1)


def _matrix(x: ArrayLike, name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} have shape {x.shape}, expected [count, width], not empty")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} have dtype {x.dtype}, expected floating point")
    x = x.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(wrong):
        raise ValueError(f"{name} have NaN or infinity in {len(wrong)} rows, first in {wrong[0]}")
    return x


def _integers(x: ArrayLike, count: int, name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.shape != (count,) or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name} has shape {x.shape} and dtype {x.dtype}, expected [{count}] ints")
    return x.astype(np.int32)


def _own_indices(exclude_self: bool | ArrayLike, q: int, n: int) -> np.ndarray:
    if np.ndim(exclude_self):
        return _integers(exclude_self, q, "exclude_self")
    if exclude_self and q != n:
        raise ValueError(
            f"exclude_self is True, but there are {q} queries and {n} gallery items: pass the "
            "gallery index of each query instead"
        )
    return np.arange(q, dtype=np.int32) if exclude_self else np.full(q, -1, np.int32)
