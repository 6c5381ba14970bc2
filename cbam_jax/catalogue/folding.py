"""Of what is nearest the answer to a query: copies folded, the query's own photos told apart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbam_jax.catalogue.items import Copy, Neighbour

# What an embedding depends on: the hash of its photo's file, None where it is not known, and a box.
Content = tuple[bytes | None, str]


class Row(NamedTuple):
    """What a catalogue says of a photo that was found; its payload as it is stored."""

    path: str
    payload: Any
    content: Content


class Own(NamedTuple):
    """What of the catalogue a query is itself: ids, hashes of its files.

    ``asked`` are the ids to which the answer is to be like, by the hashes of their files.
    """

    ids: Collection[int]
    hashes: Collection[bytes]
    asked: Mapping[bytes | None, int]


class Known(NamedTuple):
    """Of photos that were found their rows, by id; of their contents all that may be found."""

    rows: dict[int, Row]
    copies: Mapping[Content, Sequence[Copy]]
    payload: Callable[[int, Any], dict[str, Any]]

    def neighbour(self, number: int, distance: float, own: Own) -> Neighbour:
        """One that is told."""
        path, payload, content = self.rows[number]
        same = [] if content[0] is None else self.copies.get(content, [])
        left_out = {number, *own.ids} - set(own.asked.values())
        others = tuple(one for one in same if one.id not in left_out)
        payload, told = self.payload(number, payload), content[0] in own.hashes
        copy_of = own.asked.get(content[0])
        return Neighbour(number, path, payload, distance, others, told, copy_of)


def folded(
    distances: np.ndarray,
    numbers: np.ndarray,
    known: Known,
    own: Own,
    *,
    k: int,
    max_distance: float | None,
    copies: bool,
) -> tuple[list[Neighbour], bool]:
    """The neighbours among what is nearest, and whether those are all that are asked for.

    A photo without a row was removed meanwhile.
    """
    found: list[Neighbour] = []
    seen, counted = set(), 0
    for distance, number in zip(distances.tolist(), numbers.tolist(), strict=True):
        if max_distance is not None and distance > max_distance:
            return found, True
        if number in own.ids or number not in known.rows:
            continue
        content = known.rows[number].content
        if content[0] is not None and content in seen and not copies:
            continue
        seen.add(content)
        found.append(known.neighbour(number, distance, own))
        counted += not found[-1].same
        if counted == k:
            return found, True
    return found, False


def nearest_folded(
    nearest: Callable[[np.ndarray, int], list[tuple[np.ndarray, np.ndarray]]],
    known: Callable[[Sequence[np.ndarray]], Known],
    own: Sequence[Own],
    beside: int,
    queries: np.ndarray,
    k: int,
    *,
    max_distance: float | None = None,
    copies: bool = False,
) -> list[list[Neighbour]]:
    """The neighbours of each query; more are asked for where copies have taken the places.

    Args:
        nearest: of queries and a number, of each query so many distances and ids, nearest first.
        known: of ids, what is known of them.
        own: of each query.
        beside: photos that a query may be itself, at most: they are found beside the k.
        queries: [q, d] float32.
        k: as in `Catalogue.find`, like the rest.
    """
    answers: dict[int, list[Neighbour]] = {}
    most, left = k + beside, list(range(len(own)))
    while left:
        pairs = nearest(queries[left], most)
        rows, again = known([numbers for _, numbers in pairs]), []
        for query, pair in zip(left, pairs, strict=True):
            answers[query], whole = folded(
                *pair, rows, own[query], k=k, max_distance=max_distance, copies=copies
            )
            if not whole and len(pair[0]) == most:
                again.append(query)
        most, left = 2 * most, again
    return [answers[query] for query in range(len(own))]
