"""Exact neighbours from a collection: Milvus chooses candidates, distances and ties are ours.

Milvus measures in float32 and orders equal distances as it likes. So more rows than are wanted are
asked for, with their embeddings, and measured as a catalogue's file measures them: in float64,
rounded to float32, ties by id. They are enough when what Milvus left out must be farther than the
last one wanted, by more than its rounding can be wrong; else more are asked for.
"""

from typing import Any

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.milvus.collection import MOST, PHOTO, Collection

_MORE = 16  # Rows asked for beyond those that are wanted.

Found = tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]


def neighbours(
    collection: Collection, queries: np.ndarray, k: int, filter_: str, index: str
) -> list[Found]:
    """The k nearest photos of each query.

    Args:
        collection: that is searched.
        queries: [q, d] float32.
        k: at least 1.
        filter_: of the photos that may be found: see `conditions`.
        index: that of the collection. Of ``flat`` the answer is exact.

    Returns:
        Of each their distances, float32, their ids, int64, and their rows: fewer where there are
        fewer.

    Raises:
        InputError: more of them than Milvus gives in one answer.
    """
    if k > MOST:
        raise InputError(
            f"k={k}, with the query's own photos: Milvus finds {MOST} at most; give a smaller k, "
            "or search the catalogue's file instead"
        )
    limit = min(k + _MORE, MOST)
    found: dict[int, Found] = {}
    while left := [place for place in range(len(queries)) if place not in found]:
        answers = collection.search(queries[left], limit, filter_, PHOTO, index)
        for place, rows in zip(left, answers, strict=True):
            distances, order = measured(queries[place], rows)
            if index != "flat" or len(rows) < limit or settled(queries[place], distances, k):
                nearest = [rows[i] for i in order[:k]]
                ids = np.array([row["id"] for row in nearest], np.int64)
                found[place] = distances[:k], ids, nearest
            elif limit == MOST:
                raise InputError(
                    f"more than {MOST - k} photos are about as far as the last of k={k}, too many "
                    "for Milvus to order: give a smaller k, or search the catalogue's file instead"
                )
        limit = min(4 * limit, MOST)
    return [found[place] for place in range(len(queries))]


def measured(query: np.ndarray, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The distances of rows, nearest first, and which row each is of; ties by id.

    >>> rows = [{"id": 7, "embedding": [0.0, 1.0]}, {"id": 3, "embedding": [1.0, 0.0]}]
    >>> measured(np.zeros(2, np.float32), rows)
    (array([1., 1.], dtype=float32), array([1, 0]))
    """
    embeddings = np.array([row["embedding"] for row in rows], np.float32).reshape(-1, len(query))
    difference = embeddings.astype(np.float64) - query
    distances = np.sqrt(np.sum(difference**2, axis=1)).astype(np.float32)
    order = np.lexsort((np.array([row["id"] for row in rows], np.int64), distances))
    return distances[order], order


def settled(query: np.ndarray, distances: np.ndarray, k: int) -> bool:
    """Whether no row that Milvus left out can belong to the k nearest.

    A sum of d products of float32, in whatever order, is wrong by d 2^-24 of the sum of their
    magnitudes at most. So what is left out is farther than the farthest row, but for that, twice.

    Args:
        query: [d].
        distances: of the rows, ascending: more than k of them.
        k: wanted.

    >>> settled(np.zeros(2), np.array([1.0, 1.0, 1.0]), 2)
    False
    >>> settled(np.zeros(2), np.array([1.0, 1.0, 1.1]), 2)
    True
    """
    if len(distances) <= k:
        return False
    last, farthest = float(distances[k - 1]), float(distances[-1])
    norm = float(np.linalg.norm(query.astype(np.float64)))
    # What is as near as the last one has a norm of at most the query's and its distance.
    wrong = (len(query) + 16) * 2.0**-24 * (norm**2 + (norm + farthest) ** 2)
    return farthest**2 - 2 * wrong > last**2 * (1 + 2.0**-20)
