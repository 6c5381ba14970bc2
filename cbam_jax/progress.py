"""What is told while something takes long: how far it is, and a few of many findings."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

_LOG_SECONDS = 10
T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    description: str,
    *,
    total: int,
    unit: str = " images",
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yields the elements of ``iterable`` and shows on stderr how far it is.

    A log gets a line every ten seconds and one at the end, instead of a bar that overwrites itself.

    Args:
        iterable: what is worked on; an element counts as done when the next one is asked for.
        description: what is being done.
        total: units in all.
        unit: what is counted, with a space before it.
        size: how many units an element is; of a batch ``len``.
    """
    if sys.stderr.isatty():
        with tqdm(desc=description, total=total, unit=unit, leave=False) as bar:
            for element in iterable:
                yield element
                bar.update(size(element))
        return
    done, started = 0, time.monotonic()
    told = started
    for element in iterable:
        yield element
        done, now = done + size(element), time.monotonic()
        if done == total or now - told > _LOG_SECONDS:
            told = now
            line = f"{description}: {_how_far(done, total, unit, now - started)}"
            print(line, file=sys.stderr, flush=True)


def _how_far(done: int, total: int, unit: str, seconds: float) -> str:
    """How many are done, how fast, and for how long it goes on.

    >>> _how_far(30, 120, " photos", 60)
    '30 of 120 photos, 0.5/s, 180 s left'
    """
    rate = done / max(seconds, 1e-9)
    left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
    return f"{done} of {total}{unit}, {rate:.1f}/s{left}"


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
