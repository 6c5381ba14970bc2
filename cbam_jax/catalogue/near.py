"""Photos that are nearly the same: by how they look, then by their embeddings.

Two photos are near-duplicates where at most 8 of the 64 bits of their perceptual hashes differ, and
the cosine of their embeddings is at least 0.98: copies at another size or quality, not two photos
of one garment.
"""

from collections.abc import Iterator

import numpy as np

from cbam_jax.catalogue.store import Store
from cbam_jax.datasets.looks import differing_bits

BITS = 8
COSINE = 0.98


class Lookout:
    """The photos of a catalogue, to be asked whether one is nearly the same as any of them."""

    def __init__(self, store: Store):
        self._store = store
        rows = store.rows(
            "SELECT id, look FROM item WHERE embedding IS NOT NULL AND look IS NOT NULL ORDER BY id"
        )
        self._ids = [number for number, _ in rows]
        self._looks = np.array([look for _, look in rows], np.int64)

    def like(self, number: int | None, look: int | None, embedding: bytes) -> str | None:
        """Say of which photo this is nearly the same, None where of none but itself."""
        if look is None:
            return None
        for row in np.flatnonzero(differing_bits(look, self._looks) <= BITS):
            other = self._ids[row]
            if other == number:
                continue
            found = self._store.rows("SELECT path, embedding FROM item WHERE id = ?", [other])
            if found and found[0][1] and cosine(embedding, found[0][1]) >= COSINE:
                return f"nearly the same as {other}, {found[0][0]}"
        return None

    def note(self, number: int, look: int | None, embedding: bytes) -> None:
        """Take a photo up that was just written."""
        if look is not None:
            self._ids.append(number)
            self._looks = np.append(self._looks, np.int64(look))


def cosine(one: bytes, other: bytes) -> float:
    """The cosine of two embeddings, float32 as they are kept.

    >>> cosine(np.float32([1, 0]).tobytes(), np.float32([3, 4]).tobytes())
    0.6
    """
    x, y = (np.frombuffer(part, np.float32).astype(np.float64) for part in (one, other))
    lengths = np.sqrt(np.dot(x, x) * np.dot(y, y))
    return float(round(np.dot(x, y) / lengths, 6)) if lengths else 0.0


def duplicates(store: Store, *, near: bool = True) -> Iterator[list[int]]:
    """Groups of ids of one content, and with ``near`` also of those nearly the same; by id."""
    rows = store.rows(
        "SELECT id, hash, look FROM item WHERE embedding IS NOT NULL AND hash IS NOT NULL "
        "ORDER BY id"
    )
    group = {number: number for number, _, _ in rows}

    def first(number: int) -> int:
        while group[number] != number:
            number = group[number] = group[group[number]]
        return number

    for one, other in _pairs(store, rows, near):
        low, high = sorted((first(one), first(other)))
        group[high] = low
    members: dict[int, list[int]] = {}
    for number in group:
        members.setdefault(first(number), []).append(number)
    yield from (numbers for numbers in members.values() if len(numbers) > 1)


def _pairs(store: Store, rows: list[tuple], near: bool) -> Iterator[tuple[int, int]]:
    first_of: dict[bytes, int] = {}
    for number, content, _ in rows:
        if first_of.setdefault(content, number) != number:
            yield first_of[content], number
    seen = [row for row in rows if row[2] is not None and first_of[row[1]] == row[0]]
    looks = np.array([look for _, _, look in seen], np.int64)
    for place, (number, _, look) in enumerate(seen if near else []):
        for before in np.flatnonzero(differing_bits(look, looks[:place]) <= BITS):
            other = seen[before][0]
            pair = store.rows("SELECT embedding FROM item WHERE id IN (?, ?)", [number, other])
            if cosine(pair[0][0], pair[1][0]) >= COSINE:
                yield other, number
