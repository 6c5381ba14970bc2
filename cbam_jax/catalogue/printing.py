"""Answers as text, JSON and CSV."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cbam_jax.catalogue.items import Item, Neighbour
from cbam_jax.command_line import to_json
from cbam_jax.foreign_files import escaped, shown

_COPIES = 3  # Named in a line of text.
Answer = tuple[str, Sequence[Neighbour]]  # What was asked, and what was found.


def answers_text(answers: Sequence[Answer]) -> str:
    """Each query and a line for each photo found: rank, distance, id, path and what is known.

    >>> print(answers_text([("a.jpg", [Neighbour(7, "/b.jpg", {"price": 5}, 0.25)])]))
    a.jpg
       1  0.2500        7  /b.jpg  price=5
    """
    lines = []
    for name, found in answers:
        lines.append(shown(name))
        for rank, n in ranked(found):
            told = "  ".join(filter(None, [shown(n.path), payload_text(n.payload), remark(n)]))
            lines.append(f"{rank or '=':>4}  {n.distance:.4f}  {n.id:7}  {told}")
        if not found:
            lines.append("  nothing found")
    return "\n".join(lines)


def ranked(found: Sequence[Neighbour]) -> list[tuple[int | None, Neighbour]]:
    """Neighbours with their ranks from 1; the query's own photo has none.

    >>> own, other = Neighbour(7, "/b.jpg", {}, 0.0, same=True), Neighbour(8, "/c.jpg", {}, 0.25)
    >>> [rank for rank, _ in ranked([own, other])]
    [None, 1]
    """
    ranks = itertools.count(1)
    return [(None if n.same else next(ranks), n) for n in found]


def remark(n: Neighbour) -> str:
    """That it is the query's own photo or a copy of that, and its copies.

    >>> from cbam_jax.catalogue.items import Copy
    >>> remark(Neighbour(7, "/b.jpg", {}, 0.0, (Copy(8, "/c.jpg"), Copy(9, "/d.jpg")), same=True))
    '(this photo, also as 8, 9)'
    """
    ids = [str(copy.id) for copy in n.copies if copy.id != n.copy_of]
    more = f" and {len(ids) - _COPIES} more" if len(ids) > _COPIES else ""
    also = f"also as {', '.join(ids[:_COPIES])}{more}" if ids else ""
    own = "this photo" if n.copy_of is None else f"a copy of {n.copy_of}"
    told = ", ".join(filter(None, [own if n.same else "", also]))
    return f"({told})" if told else ""


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
                    {"rank": rank, **n._asdict(), "copies": [c._asdict() for c in n.copies]}
                    for rank, n in ranked(found)
                ],
            }
            for name, found in answers
        ]
    )


def answers_csv(answers: Sequence[Answer]) -> str:
    """A row for each photo found; what is known of any of them has columns of its own."""
    rows = [
        ({"query": name, "rank": rank or "=", "id": n.id, "distance": n.distance, "path": n.path,
          "copies": " ".join(str(copy.id) for copy in n.copies)}, n)
        for name, found in answers
        for rank, n in ranked(found)
    ]  # fmt: skip
    header = ["query", "rank", "id", "distance", "path", "copies"]
    return _csv(header, [(row, n.payload) for row, n in rows])


def items_text(items: Iterable[Item]) -> str:
    """A line for each photo: id, path, and what is known or what is wrong.

    >>> print(items_text([Item(3, "/a.jpg", {}, "no such file")]))
          3  /a.jpg  [no such file]
    """
    lines = []
    for number, path, payload, problem in items:
        told = f"[{shown(problem)}]" if problem else payload_text(payload)
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


def on_a_terminal(table: str) -> str:
    r"""A table whose cells may hold what moves a cursor, escaped; its lines stay lines.

    >>> print(on_a_terminal("id,path\n3,/a\x1b[2J.jpg"))
    id,path
    3,/a\x1b[2J.jpg
    """
    return "\n".join(map(escaped, table.split("\n")))


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
