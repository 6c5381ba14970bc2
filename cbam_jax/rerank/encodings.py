"""k-reciprocal encodings: of each image a sparse row of weights, its soft set of neighbours.

`joint_encodings` makes them from the exact lists of nearest images alone; a matrix of all pairs is
never made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

from cbam_jax.search import search

_ROWS = 256  # Images at a time whose neighbours' neighbours are compared.
_PAIRS = 8192  # Pairs of embeddings at a time.
_FURTHEST = 1024  # Images at a time in products.


class Encodings(NamedTuple):
    """Embeddings [m, d] of all images, encodings [m, m], the furthest squared distances [m]."""

    points: np.ndarray
    rows: sparse.csr_array
    furthest: np.ndarray


def nearest_lists(points: np.ndarray, k1: int) -> np.ndarray:
    """Of each image itself and the k1 nearest of all, ties by index, [m, min(k1 + 1, m)]."""
    return search(points, points, min(k1 + 1, len(points)))[1]


def joint_encodings(points: np.ndarray, lists: np.ndarray, k1: int, k2: int) -> Encodings:
    """The encodings of all images, queries and gallery alike, in O(m k1) memory.

    An image's set is its k1-reciprocal neighbours, widened by the sets of half the size of those
    that share most of theirs; weights are e^-d, of sum 1, d the squared distance over the image's
    largest; last each row becomes the mean of those of the k2 nearest images, itself included.
    ``lists`` are those of `nearest_lists`.
    """
    m = len(points)
    furthest = _furthest(points)
    parts = [_expanded(lists, part, k1) for part in _parts(m)]
    row, column = (np.concatenate(side) for side in zip(*parts, strict=True))
    weight = np.exp(-scaled_distances(points, furthest, row, column))
    rows = sparse.csr_array((weight, (row, column)), shape=(m, m))
    sums = np.asarray(rows.sum(axis=1)).reshape(-1)
    rows.data /= np.repeat(sums, np.diff(rows.indptr))
    return Encodings(points, _mean_rows(rows, lists[:, :k2]), furthest)


def scaled_distances(
    points: np.ndarray, furthest: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """Squared distances of pairs over the largest of the first one, [p] float64."""
    squares = np.empty(len(row))
    for i in range(0, len(row), _PAIRS):
        part = slice(i, i + _PAIRS)
        difference = points[row[part]].astype(np.float64) - points[column[part]]
        squares[part] = np.einsum("pd,pd->p", difference, difference)
    return squares / furthest[row]


def _parts(m: int) -> Iterator[slice]:
    return (slice(i, min(i + _ROWS, m)) for i in range(0, m, _ROWS))


def _furthest(points: np.ndarray) -> np.ndarray:
    """The largest squared distance of each image to any, [m]; 1 where all are the same."""
    squares = np.einsum("md,md->m", points, points)
    index = np.empty(len(points), np.int64)
    for i in range(0, len(points), _FURTHEST):
        # That of the furthest by float32 products, whose distance is then computed exactly.
        index[i : i + _FURTHEST] = np.argmax(
            squares - 2 * (points[i : i + _FURTHEST] @ points.T), axis=1
        )
    everyone, ones = np.arange(len(points)), np.ones(len(points))
    largest = scaled_distances(points, ones, everyone, index)
    return np.where(largest > 0, largest, 1)


def _expanded(lists: np.ndarray, part: slice, k1: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (image, member of its widened set) of some images, each once."""
    near = lists[part]
    own = np.arange(part.start, part.start + len(near))
    reciprocal = _reciprocal(lists, own)
    # Python rounds a half to the even number, as the authors' code does.
    half = lists[:, : round(k1 / 2) + 1]
    others = half[near]
    theirs = _reciprocal(half, near.reshape(-1)).reshape(others.shape)
    # A place of an image's list that is not reciprocal equals nothing.
    members = np.where(reciprocal, near, -1)
    shared = (others[..., None] == members[:, None, None, :]).any(axis=-1) & theirs
    wide = shared.sum(axis=-1) > 2 / 3 * theirs.sum(axis=-1)
    added = theirs & (wide & reciprocal)[..., None]
    row = np.concatenate([own[np.nonzero(reciprocal)[0]], own[np.nonzero(added)[0]]])
    column = np.concatenate([near[reciprocal], others[added]])
    pair = np.unique(row * len(lists) + column)
    return pair // len(lists), pair % len(lists)


def _reciprocal(lists: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Whether the images of each one's list have it in theirs, bool [images, k]."""
    return (lists[lists[images]] == images[:, None, None]).any(axis=-1)


def _mean_rows(rows: sparse.csr_array, lists: np.ndarray) -> sparse.csr_array:
    """The mean of the rows in each list, [m, m]."""
    m, k = lists.shape
    choice = np.full(lists.size, 1 / k), lists.reshape(-1), np.arange(0, m * k + 1, k)
    return sparse.csr_array(sparse.csr_array(choice, shape=(m, m)) @ rows)
