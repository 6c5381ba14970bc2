"""A photo of a catalogue, as it is listed and as it is found."""

from typing import Any, NamedTuple


class Item(NamedTuple):
    """A photo of a catalogue; ``problem`` says why it has no embedding, None where it has one."""

    id: int
    path: str
    payload: dict[str, Any]
    problem: str | None


class Copy(NamedTuple):
    """A photo with the same content as another."""

    id: int
    path: str


class Neighbour(NamedTuple):
    """A photo that was found, and its Euclidean distance.

    Attributes:
        copies: the other photos with the same content.
        same: whether its file is that of the query: it is this photo, or a copy.
        copy_of: the id that was asked for, where this is another photo with its file.
    """

    id: int
    path: str
    payload: dict[str, Any]
    distance: float
    copies: tuple[Copy, ...] = ()
    same: bool = False
    copy_of: int | None = None
