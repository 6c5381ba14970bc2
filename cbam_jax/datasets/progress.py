"""What is told while a dataset is read: how far it is, and a few of many findings."""

import functools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

_LOG_SECONDS = 10
T = TypeVar("T")


def progress(
    iterable: Iterable[T], description: str, *, total: int, unit: str = " images"
) -> Iterator[T]:
    """Yields the elements of ``iterable`` and shows on stderr how far it is.

    A log gets a line every ten seconds and one at the end, instead of a bar that overwrites itself.
    """
    if sys.stderr.isatty():
        yield from tqdm(iterable, description, total=total, unit=unit, leave=False)
        return
    last = time.monotonic()
    for done, element in enumerate(iterable, 1):
        yield element
        if done == total or time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            print(f"{description}: {done} of {total}{unit}", file=sys.stderr, flush=True)


@functools.cache
def tell(line: str) -> None:
    """Says a line on stderr, once: training opens a dataset for each of its splits."""
    print(line, file=sys.stderr)


def few(lines: Sequence[str]) -> str:
    """The first three of many lines, in one.

    >>> few(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    'a.jpg; b.jpg; c.jpg; ...'
    """
    return "; ".join(lines[:3]) + ("; ..." if len(lines) > 3 else "")
