"""Embeddings as weighted means of themselves and their nearest gallery items."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.search import search

_ROWS = 1024


def expand_queries(
    queries: ArrayLike, gallery: ArrayLike, k: int = 10, alpha: float = 3.0, **ignored: Any
) -> np.ndarray:
    """Alpha query expansion: each query and its k nearest gallery items, weighted by similarity.

    normalised(x + sum_i max(cos(x, y_i), 0)^alpha y_i) over the k nearest items y_i by cosine, all
    of unit length (Radenovic, Tolias and Chum 2019; alpha 0 is average query expansion, Chum et
    al. 2007). A similarity below 0 counts as 0, where others raise it to a power as it is. Search
    with the result as with any queries, by the cosine or the Euclidean distance. A query is
    expanded by the gallery alone, whatever other queries there are.

    Args:
      queries: ``[q, d]`` float, of any lengths; the result depends on their directions.
      gallery: ``[n, d]`` float, likewise.
      k: From 1 to n; fewer are taken where a query ignores more.
      alpha: Not negative.
      **ignored: ``exclude_self``, ``query_group``, ``gallery_group`` of `cbam_jax.search.search`:
        what a query must not find, it must not be expanded by either.

    Returns:
      ``[q, d]`` float32, of unit length (zero where the query is).

    Raises:
      ValueError: As `search` does, or for a negative alpha.

    Example:
      >>> gallery = np.float32([[1, 0], [0, 1], [0.6, 0.8]])
      >>> expand_queries(np.float32([[2, 0]]), gallery, k=2, alpha=1).round(4)
      array([[0.9799, 0.1993]], dtype=float32)
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}, expected 0 or more")
    x, y = unit_rows(queries), unit_rows(gallery)
    _, index = search(x, y, k, metric="cosine", **ignored)
    expanded = np.empty_like(x)
    for i in range(0, len(x), _ROWS):  # A block of rows at a time, since it gathers.
        part = slice(i, i + _ROWS)
        near = y[index[part]] * (index[part] >= 0)[..., None]
        expanded[part] = expand_by_neighbours(x[part], near, alpha)
    return expanded


def expand_by_neighbours(
    queries: ArrayLike, neighbours: ArrayLike, alpha: float = 3.0
) -> np.ndarray:
    """As `expand_queries`, where the neighbours of each query are known.

    Args:
      queries: ``[q, d]`` float, of any lengths; the result depends on their directions.
      neighbours: ``[q, k, d]``, likewise; a zero counts as none. Their order does not matter.
      alpha: Not negative.

    Returns:
      ``[q, d]`` float32, of unit length (zero where the query and its neighbours are).

    Raises:
      ValueError: For a negative alpha.

    Example:
      >>> expand_by_neighbours(np.float32([[2, 0]]), np.float32([[[1, 0], [0.6, 0.8]]]), 1).round(4)
      array([[0.9799, 0.1993]], dtype=float32)
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}, expected 0 or more")
    x, near = unit_rows(queries), np.asarray(neighbours, np.float32)
    y = unit_rows(near.reshape(-1, x.shape[1])).reshape(near.shape).astype(np.float64)
    weight = np.maximum(np.einsum("qd,qkd->qk", x, y), 0) ** alpha
    return unit_rows(x + np.einsum("qk,qkd->qd", weight, y))


def augment_gallery(gallery: ArrayLike, k: int = 10, alpha: float = 3.0) -> np.ndarray:
    """Alpha database augmentation: each gallery item as `expand_queries` among the other ones.

    Turcot and Lowe 2009, weighted as by Radenovic, Tolias and Chum 2019. No query is looked at,
    unless it is in the gallery itself: a photo that has drawn its neighbours towards itself, and is
    then searched among them, finds them more easily than a new photo would.

    Args:
      gallery: ``[n, d]`` float, n at least 2.
      k: From 1 to n - 1.
      alpha: Not negative.

    Returns:
      ``[n, d]`` float32, of unit length.

    Raises:
      ValueError: As `expand_queries` does.
    """
    return expand_queries(gallery, gallery, k, alpha, exclude_self=True)


def unit_rows(x: ArrayLike) -> np.ndarray:
    """Rows of unit length, ``[n, d]`` float32; a zero row stays.

    >>> unit_rows([[3.0, 4.0], [0.0, 0.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = np.asarray(x, np.float32)
    length = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))[:, None]
    return (x / np.where(length > 0, length, 1)).astype(np.float32)
