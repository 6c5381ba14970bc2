"""What `search` and `top_k` are given, checked before they begin; of tracers the shapes alone."""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

METRICS = ("euclidean", "squared_euclidean", "cosine", "inner_product")
FIRST_PASSES = ("bfloat16", "float32")


def matrix(x: ArrayLike, name: str) -> np.ndarray | jax.Array:
    """The embeddings as an array, [count, width]; raises where they are not."""
    x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} have shape {x.shape}, expected [count, width], not empty")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} have dtype {x.dtype}, expected floating point")
    return x


def check(
    queries: np.ndarray | jax.Array,
    gallery: tuple[int, ...],
    items: int,
    k: int,
    metric: str,
) -> None:
    """Raises a ValueError for what does not fit together or is not known; of ``items`` in all."""
    if queries.shape[1] != gallery[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, the gallery {gallery[1]}")
    if not isinstance(k, Integral) or not 1 <= k <= items:
        raise ValueError(
            f"k is {k}, but the gallery has {items} items; k is a whole number from 1 to that"
        )
    if items >= 2**31:
        raise ValueError(f"the gallery has {items} items, indices are int32")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")


def check_search(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    metric: str = "euclidean",
    *,
    exclude_self: bool | ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array, Any, tuple[Any, Any]]:
    """What `search` and its kin are given, checked: queries, gallery, own indices, groups.

    Returns:
      Embeddings ``[q, d]`` and ``[n, d]`` as they came; ``[q]`` int32 and a pair of ``[q]`` and
      ``[n]`` int32, each None where no item is ignored for it.

    Raises:
      ValueError: As `search` does.
    """
    queries, gallery = matrix(queries, "queries"), matrix(gallery, "gallery")
    q, n = len(queries), len(gallery)
    check(queries, gallery.shape, n, k, metric)
    group = label_pair(query_group, gallery_group, q, n, "group")
    return queries, gallery, own_indices(exclude_self, q, n), group


def check_passes(
    first_pass: str | None, query_block: int | None, gallery_block: int | None
) -> None:
    """Raises a ValueError for a pass that is not known, or blocks of nothing."""
    if first_pass is not None and first_pass not in FIRST_PASSES:
        raise ValueError(f"unknown first_pass {first_pass!r}; choose {' or '.join(FIRST_PASSES)}")
    if min(query_block or 1, gallery_block or 1) < 1:
        raise ValueError(f"blocks are {query_block} and {gallery_block}, expected at least 1")


def own_indices(exclude_self: bool | ArrayLike, q: int, n: int) -> np.ndarray | None:
    """The gallery index of each query, [q] int32, or None where none is ignored."""
    if np.ndim(exclude_self):
        return _integers(exclude_self, q, "exclude_self")
    if exclude_self and q != n:
        raise ValueError(
            f"exclude_self is True, but there are {q} queries and {n} gallery items: pass the "
            "gallery index of each query instead"
        )
    return np.arange(q, dtype=np.int32) if exclude_self else None


def label_pair(
    query: ArrayLike | None, gallery: ArrayLike | None, q: int, n: int, name: str
) -> tuple[Any, Any]:
    """Labels of queries [q] and gallery [n], int32, or None of both."""
    if query is None and gallery is None:
        return None, None
    if query is None or gallery is None:
        raise ValueError(f"query_{name} and gallery_{name} are given together or not at all")
    remedy = (
        f"; number both together: np.unique(np.concatenate([query_{name}, gallery_{name}]), "
        "return_inverse=True)[1]"
    )
    own = _integers(query, q, f"query_{name}", remedy)
    return own, _integers(gallery, n, f"gallery_{name}", remedy)


def _integers(x: Any, count: int, name: str, remedy: str = "") -> Any:
    traced = isinstance(x, Tracer)
    x = x if traced else np.asarray(x)
    if x.shape != (count,) or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {x.shape} and dtype {x.dtype}, expected [{count}] ints{remedy}"
        )
    if not traced and x.size and not -(2**31) <= x.min() <= x.max() < 2**31:
        raise ValueError(f"{name} has values from {x.min()} to {x.max()}, expected int32{remedy}")
    return x.astype(np.int32)
