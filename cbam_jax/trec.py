"""Runs and relevance judgements as the files of trec_eval, and back.

trec_eval sorts by score, not by the rank column, and breaks ties by the document's name: equal
distances would come back in another order. So the score written is K less the rank, which has no
ties; true distances are in ``neighbours.csv``. Names are percent-encoded where they hold what would
part a line, since in these files blanks part the fields.
"""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from cbam_jax import InputError
from cbam_jax.foreign_files import MOST_TABLE, open_regular, shown
from cbam_jax.whole_files import written_whole

_TAG = "cbam_jax"


def write_run(
    path: str | os.PathLike, queries: Sequence[str], items: Sequence[str], indices: np.ndarray
) -> None:
    """Write what was found: ``query Q0 item rank score tag``, nearest first, whole or not at all.

    Args:
      path: Of the file.
      queries: [q], the name of each query.
      items: [n], names of the gallery.
      indices: [q, k] integers into the gallery, nearest first, -1 where a row ends.

    Raises:
      ValueError: For two queries or two items of one name, which the files could not tell apart, or
        for an empty name.
    """
    queries, items = _names(queries, "queries"), _names(items, "items")
    k = indices.shape[1]
    _write(
        path,
        (
            f"{query} Q0 {items[index]} {rank} {k - rank + 1} {_TAG}\n"
            for query, row in zip(queries, indices.tolist(), strict=True)
            for rank, index in enumerate(row, 1)
            if index >= 0
        ),
    )


def write_qrels(
    path: str | os.PathLike,
    queries: Sequence[str],
    items: Sequence[str],
    grades: Iterator[np.ndarray],
) -> None:
    """Write what is relevant: ``query 0 item grade``, those above 0 alone, whole or not at all.

    Args:
      path: Of the file.
      queries: [q] names.
      items: [n] names.
      grades: [n] integers, or bool, of each query in turn; ignored items, the query itself, are 0.

    Raises:
      ValueError: As `write_run` does, or for grades of another shape or dtype.
    """
    queries, items = _names(queries, "queries"), _names(items, "items")

    def checked(query: str, row: np.ndarray) -> np.ndarray:
        if row.shape != (len(items),) or row.dtype.kind not in "iub":
            raise ValueError(
                f"the grades of query {query!r} have shape {row.shape} and dtype {row.dtype}, "
                f"expected ({len(items)},) and integers"
            )
        return row

    _write(
        path,
        (
            f"{query} 0 {items[index]} {int(row[index])}\n"
            for query, row in zip(queries, grades, strict=True)
            for index in np.flatnonzero(checked(query, row) > 0).tolist()
        ),
    )


def read_run(path: str | os.PathLike) -> dict[str, list[tuple[str, float]]]:
    """Read a run: query -> (item, score), best first.

    Equal scores, which other programs write, keep the order of the rank column; trec_eval would
    sort them by name, the last first.

    Raises:
      InputError: For a line that is none of a run, a score or rank that is not finite, or an item
        that a query found twice.
    """
    found: dict[str, list[tuple[float, float, str]]] = {}
    for where, (query, _, item, rank, score, _) in _lines(path, 6, "query Q0 item rank score tag"):
        found.setdefault(query, []).append((-_number(score, where), _number(rank, where), item))
    for query, rows in found.items():
        if len({item for *_, item in rows}) < len(rows):
            raise InputError(f"{shown(path)}: query {query!r} has an item twice")
    return {
        query: [(item, -score) for score, _, item in sorted(rows, key=lambda row: row[:2])]
        for query, rows in found.items()
    }


def read_qrels(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Read judgements: query -> item -> grade.

    Raises:
      InputError: For a line that is none of judgements, a grade that is no whole number, or an item
        that a query has two grades of.
    """
    grades: dict[str, dict[str, int]] = {}
    for where, (query, _, item, grade) in _lines(path, 4, "query 0 item grade"):
        number = _number(grade, where)
        if not number.is_integer():
            raise InputError(f"{where}: grade {grade[:80]!r} is no whole number")
        if grades.setdefault(query, {}).setdefault(item, int(number)) != number:
            raise InputError(f"{where}: item {item!r} of query {query!r} has another grade above")
    return grades


def _names(names: Sequence[str], what: str) -> list[str]:
    """Names without blanks; others as they are, save for the sign of encoding itself."""
    encoded = [
        re.sub(r"[\s%\x00-\x20]", lambda m: quote(m[0], safe=""), str(name)) for name in names
    ]
    if "" in encoded:
        raise ValueError(f"one of the {what} has no name, which a file of trec_eval cannot hold")
    if len(set(encoded)) < len(encoded):
        raise ValueError(f"two {what} have one name, which a file of trec_eval cannot tell apart")
    return encoded


def _write(path: str | os.PathLike, lines: Iterator[str]) -> None:
    with (
        written_whole(path) as partial,
        open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file,
    ):
        file.writelines(lines)


def _lines(path: str | os.PathLike, count: int, form: str) -> Iterator[tuple[str, list[Any]]]:
    """Where a line stands, and its fields, names decoded."""
    # utf-8-sig: some editors on Windows begin a file with a mark, which is no part of a name.
    opened = open_regular(path, MOST_TABLE)
    with io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            # Other blanks than these can be a part of names that others wrote.
            fields = re.split(r"[ \t\r\n]+", line.strip(" \t\r\n"))
            if fields == [""]:
                continue
            where = f"{shown(path)}:{number}"
            if len(fields) != count:
                raise InputError(f"{where} is not '{form}': {line.strip()[:80]!r}")
            yield where, [unquote(field) for field in fields]


def _number(text: str, where: str) -> float:
    """A finite number: NaN has no place in an order."""
    try:
        number = float(text)
    except ValueError as error:
        raise InputError(f"{where}: {text[:80]!r} is no number") from error
    if not math.isfinite(number):
        raise InputError(f"{where}: {text[:80]!r} is not finite")
    return number
