"""Which retrieved items are hits, and how many there were to find: by labels alone.

NumPy arrays, or traced ones inside `jax.jit`. `cbam_jax.metrics` makes metrics of what is found
here, and hands `label_matches` and `count_relevant` on.
"""

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def label_matches(indices: ArrayLike, query_labels: ArrayLike, gallery_labels: ArrayLike) -> Any:
    """Which retrieved items have the query's label.

    Args:
      indices: ``[q, k]`` integers into the gallery, -1 where a row has no item left.
      query_labels: ``[q]``, integers or strings (traced: integers).
      gallery_labels: ``[n]``, likewise.

    Returns:
      ``[q, k]`` bool, False at index -1.

    Raises:
      ValueError: For indices and labels of other shapes, labels that could never be equal (numbers
        on one side, text on the other), or that equal nothing (NaN, None).

    Example:
      >>> label_matches([[0, 2, -1]], [7], [7, 8, 8]).tolist()
      [[True, False, False]]
    """
    found, own = np.shape(indices), np.shape(query_labels)
    if len(found) != 2 or own != found[:1]:
        raise ValueError(
            f"indices have shape {found} and query_labels {own}, expected [q, k] and [q]"
        )
    if traced(indices, query_labels, gallery_labels):
        return over_any_mesh(_matches, (indices, query_labels, gallery_labels), by_rows=True)
    own, labels = _comparable("labels", query_labels, gallery_labels)
    return _matches(np.asarray(indices), own, labels)


def _matches(items: Any, own: Any, labels: Any) -> Any:
    return (labels[items] == own[:, None]) & (items >= 0)


def count_relevant(
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    query_in_gallery: ArrayLike = False,
    query_group: ArrayLike | None = None,
    gallery_group: ArrayLike | None = None,
) -> Any:
    """How many gallery items have each query's label, not counting the ignored ones.

    The counterpart of what `search` and `top_k` of `cbam_jax.search` ignore: the query itself, or
    its whole group.

    Args:
      query_labels: ``[q]``, integers or strings (traced: integers).
      gallery_labels: ``[n]``, likewise.
      query_in_gallery: ``[q]`` bool or one bool, whether the query itself is in the gallery and
        ignored; unused with groups, since a query is of its own group.
      query_group: ``[q]``, or None.
      gallery_group: ``[n]``, or None; items with the query's group are ignored.

    Returns:
      ``[q]`` int64, R of the metrics (int32 of traced arrays).

    Raises:
      ValueError: As `label_matches` does, also of groups, and for one side's groups alone.

    Example:
      >>> count_relevant([7, 8], [7, 8, 8], query_in_gallery=True).tolist()
      [0, 1]
    """
    if (query_group is None) != (gallery_group is None):
        raise ValueError("query_group and gallery_group belong together: give both or neither")
    given = query_labels, gallery_labels, query_in_gallery, query_group, gallery_group
    if traced(*given):
        return over_any_mesh(_traced_count, given, by_rows=True)
    query_labels, gallery_labels = _comparable("labels", query_labels, gallery_labels)
    counts = _count(query_labels[:, None], gallery_labels[:, None])
    if query_group is None or gallery_group is None:
        return counts - np.asarray(query_in_gallery, np.int64)
    # Labels and groups as integers, so that pairs of them can be counted as rows of a matrix.
    label = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)[1]
    groups = np.concatenate(_comparable("group", query_group, gallery_group))
    pair = np.stack([label, np.unique(groups, return_inverse=True)[1]], axis=1)
    return counts - _count(pair[: len(query_labels)], pair[len(query_labels) :])


def _comparable(what: str, query: ArrayLike, gallery: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both sides as arrays of numbers or of text; ValueError where none could match."""
    own, labels = plain_labels(f"query_{what}", query), plain_labels(f"gallery_{what}", gallery)
    kinds = [{"U": "text", "S": "bytes"}.get(a.dtype.kind, "numbers") for a in (own, labels)]
    if kinds[0] != kinds[1] and own.size and labels.size:
        raise ValueError(
            f"query_{what} are {own.dtype} and gallery_{what} {labels.dtype}, which are never "
            f"equal: give both as {kinds[0]} or both as {kinds[1]}"
        )
    return own, labels


def plain_labels(name: str, values: ArrayLike) -> np.ndarray:
    """An array ``[n]`` of numbers or text; of objects, as pandas has them, what they hold."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} have shape {array.shape}, expected one dimension")
    if array.dtype.kind in "OT":
        kind = str if len(array) and isinstance(array[0], str) else (int, np.integer)
        odd = [value for value in array.tolist() if not isinstance(value, kind)]
        if odd:
            raise ValueError(f"{name} hold {odd[0]!r}: give integers alone, or text alone")
        array = np.array(array.tolist())
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name} hold NaN, which equals nothing: leave those rows out")
    return array


def _count(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """How often each row of ``queries`` occurs in ``gallery``."""
    rows = np.concatenate([queries, gallery])
    _, inverse = np.unique(rows, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return np.bincount(inverse[len(queries) :], minlength=len(rows))[inverse[: len(queries)]]


def _traced_count(
    query_labels: Any,
    gallery_labels: Any,
    query_in_gallery: Any,
    query_group: Any,
    gallery_group: Any,
) -> Any:
    """`count_relevant` of traced arrays."""
    import jax.numpy as jnp

    counts = _count_rows([query_labels], [gallery_labels])
    if query_group is None or gallery_group is None:
        return counts - jnp.asarray(query_in_gallery).astype(np.int32)
    return counts - _count_rows([query_labels, query_group], [gallery_labels, gallery_group])


def _count_rows(queries: Sequence[Any], gallery: Sequence[Any]) -> Any:
    """How often each row, given by columns, is in the gallery: equal rows are runs once sorted."""
    import jax.numpy as jnp

    q = len(queries[0])
    pairs = zip(queries, gallery, strict=True)
    rows = [jnp.concatenate([jnp.asarray(a) for a in pair]) for pair in pairs]
    order = jnp.lexsort(rows)
    ascending = [column[order] for column in rows]
    new = functools.reduce(operator.or_, [column[1:] != column[:-1] for column in ascending])
    run = jnp.concatenate([jnp.zeros(1, np.int32), jnp.cumsum(new, dtype=np.int32)])
    counts = jnp.zeros(len(order), np.int32).at[run].add((order >= q).astype(np.int32))
    return jnp.zeros(len(order), np.int32).at[order].set(counts[run])[:q]


def traced(*arrays: Any) -> Any:
    """jax.numpy where an array is traced, else None. Without jax none is, and it is not loaded."""
    jax = sys.modules.get("jax")
    if jax is None or not any(isinstance(a, jax.core.Tracer) for a in arrays):
        return None
    return jax.numpy


def over_any_mesh(function: Any, arrays: Any, *, by_rows: bool = False) -> Any:
    """Call a function of arrays of which some are traced, over mesh axes of whatever type.

    Args:
      function: Of ``arrays``.
      arrays: A sequence of pytrees.
      by_rows: True: over axes of type Explicit the results are split by rows, as the first array
        is; False: they are whole on every device.
    """
    import jax
    import jax.numpy as jnp

    from cbam_jax.sharding import rows_spec, with_auto_axes

    arrays = jax.tree.map(jnp.asarray, tuple(arrays))
    return with_auto_axes(function, arrays, rows_spec(arrays[0]) if by_rows else None)(*arrays)
