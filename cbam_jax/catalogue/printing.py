"""Answers as text, JSON and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cbam_jax.catalogue.catalogue import Item, Neighbour
from cbam_jax.command_line import to_json
from cbam_jax.foreign_files import shown

Answer = tuple[str, Sequence[Neighbour]]  # What was asked, and what was found.


def answers_text(answers: Sequence[Answer]) -> str:
    """Each query and a line for each photo found: rank, distance, id, path and what is known.

    >>> print(answers_text([("a.jpg", [Neighbour(7, "/b.jpg", {"price": 5}, 0.25)])]))
    a.jpg
       1  0.2500        7  /b.jpg  price=5
    """
    lines = []
    for name, found in answers:
        lines.append(name)
        for rank, (number, path, payload, distance) in enumerate(found, 1):
            told = f"{shown(path)}  {payload_text(payload)}".rstrip()
            lines.append(f"{rank:4}  {distance:.4f}  {number:7}  {told}")
        if not found:
            lines.append("  nothing found")
    return "\n".join(lines)


def answers_json(answers: Sequence[Answer]) -> str:
    """A list of queries, each with its ``neighbours``, nearest first.

    >>> answers_json([("a.jpg", [])])
    '[{"query": "a.jpg", "neighbours": []}]'
    """
    return to_json(
        [
            {
                "query": name,
                "neighbours": [
                    {"rank": rank, **neighbour._asdict()} for rank, neighbour in enumerate(found, 1)
                ],
            }
            for name, found in answers
        ]
    )


def answers_csv(answers: Sequence[Answer]) -> str:
    """A row for each photo found; what is known of any of them has columns of its own."""
    rows = [
        ({"query": name, "rank": rank, "id": n.id, "distance": n.distance, "path": n.path}, n)
        for name, found in answers
        for rank, n in enumerate(found, 1)
    ]
    header = ["query", "rank", "id", "distance", "path"]
    return _csv(header, [(row, n.payload) for row, n in rows])


def items_text(items: Iterable[Item]) -> str:
    """A line for each photo: id, path, and what is known or what is wrong.

    >>> print(items_text([Item(3, "/a.jpg", {}, "no such file")]))
          3  /a.jpg  [no such file]
    """
    lines = []
    for number, path, payload, problem in items:
        told = f"[{problem}]" if problem else payload_text(payload)
        lines.append(f"{number:7}  {shown(path)}  {told}".rstrip())
    return "\n".join(lines)


def items_json(items: Iterable[Item]) -> str:
    """A list of photos."""
    return to_json([item._asdict() for item in items])


def items_csv(items: Iterable[Item]) -> str:
    """A row for each photo; what is known of any of them has columns of its own."""
    rows = [
        ({"id": item.id, "path": item.path, "problem": item.problem or ""}, item.payload)
        for item in items
    ]
    return _csv(["id", "path", "problem"], rows)


def groups_text(groups: Sequence[Sequence[Item]]) -> str:
    """Groups of photos, an empty line between two."""
    return "\n\n".join(map(items_text, groups)) or "no duplicates"


def groups_json(groups: Sequence[Sequence[Item]]) -> str:
    """A list of lists of photos."""
    return to_json([[item._asdict() for item in group] for group in groups])


def groups_csv(groups: Sequence[Sequence[Item]]) -> str:
    """A row for each photo, with the number of its group."""
    rows = [
        ({"group": number, "id": item.id, "path": item.path}, item.payload)
        for number, group in enumerate(groups, 1)
        for item in group
    ]
    return _csv(["group", "id", "path"], rows)


def payload_text(payload: Mapping[str, Any]) -> str:
    """What is known of a photo, in one line.

    >>> payload_text({"category": "dress", "price": 12.5})
    'category=dress price=12.5'
    """
    return " ".join(shown(f"{name}={value}") for name, value in payload.items())


def _csv(header: list[str], rows: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]) -> str:
    names = list(dict.fromkeys(name for _, payload in rows for name in payload))
    # A name that is taken, such as a payload's own id, is told apart.
    columns = {name: f"payload_{name}" if name in header else name for name in names}
    file = io.StringIO()
    writer = csv.DictWriter(file, [*header, *columns.values()], restval="", lineterminator="\n")
    writer.writeheader()
    for row, payload in rows:
        writer.writerow(row | {columns[name]: value for name, value in payload.items()})
    return file.getvalue().rstrip("\n")
