"""What the rooms of a search hand to each other."""

from typing import Any, NamedTuple, Self

import jax
import numpy as np


class Shard(NamedTuple):
    """Rows ``first`` to ``first + len(rows)`` of the gallery, to be searched by ``device``.

    ``squares`` [rows] are their squared norms, float32.
    """

    device: Any
    first: int
    rows: np.ndarray | jax.Array
    squares: np.ndarray


class Lowest(NamedTuple):
    """Of each query, [q, count]: the lowest bounds, whose they are, and the next in their group.

    In the first pass bounds are integers of the same order, `NO_BOUND` where there is none.
    """

    bound: Any
    index: Any
    second: Any


class Labels(NamedTuple):
    """What decides who is ignored, of queries or of items, in NumPy's or JAX's arrays."""

    index: Any  # [m] int32 or None; of an item, -1 for none; of a query: the item that it is.
    group: Any
    category: Any

    def taken(self, rows: slice | np.ndarray) -> Self:
        """The labels of some rows."""
        return self._make(None if a is None else a[rows] for a in self)

    def column(self) -> Self:
        """The labels with an axis behind, [m, 1]."""
        return self._make(None if a is None else a[:, None] for a in self)

    def row(self) -> Self:
        """The labels with an axis before, [1, m]."""
        return self._make(None if a is None else a[None, :] for a in self)


class Queries(NamedTuple):
    """Embeddings [q, d] float32, their squared norms [q] float32, and what each ignores."""

    rows: np.ndarray
    squares: np.ndarray
    labels: Labels

    def taken(self, part: slice | np.ndarray) -> Self:
        """Some of the queries."""
        return self._make((self.rows[part], self.squares[part], self.labels.taken(part)))


def ignores(query: Labels, items: Labels):
    """Which items a query ignores; for NumPy and JAX, of shapes that broadcast."""
    assert items.index is not None
    ignored = items.index < 0
    if query.index is not None:
        ignored = ignored | (items.index == query.index)
    if query.group is not None:
        ignored = ignored | (items.group == query.group)
    if query.category is not None:
        ignored = ignored | (items.category != query.category)
    return ignored
