"""``--where category=dress``: which photos may be found, by what is known of them."""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.store import Store
from cbam_jax.foreign_files import shown, shown_names

_CONDITION = re.compile(r"(.+?)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_MOST_VALUES = 10_000  # That are compared with one that is not there.
_EQUAL = ("=", "!=")
_KNOWN = "FROM item, json_each(payload)"
_NUMERIC = "type IN ('integer', 'real')"
Where = str | Mapping[str, Any] | Iterable[str] | None


class Photos(NamedTuple):
    """What `check` asks of a catalogue's photos, whoever keeps them.

    Attributes:
        some: whether any photo passes.
        named: whether any has a value of this name.
        numeric: whether any has a number of this name.
        names: all names, or many.
        values: of a name, as texts, or many.
    """

    some: Callable[[Where], bool]
    named: Callable[[str], bool]
    numeric: Callable[[str], bool]
    names: Callable[[], Iterable[str]]
    values: Callable[[str], Iterable[str]]


def check(photos: Photos, where: Where) -> None:
    """Raise an InputError for a name or a value that no photo has: a typing error finds nothing.

    A value, or any number to compare with one, is looked for where nothing passes, and wherever
    ``!=`` would pass all. Of what passes, that is asked and nothing else: a server's answer takes
    its time.
    """
    asked = conditions(where)
    passing = bool(asked) and photos.some(where)
    doubtful = [
        (name, sign, value)
        for name, sign, value in asked
        if (sign == "!=" or not passing) and not (sign in _EQUAL and photos.some({name: value}))
    ]
    for name, _, _ in doubtful:
        if not photos.named(name):
            told = _instead(name, photos.names())
            raise InputError(f"--where: no photo has {shown(name)!r}; {told}")
    for name, sign, value in doubtful:
        if sign in _EQUAL or not photos.numeric(name):
            text = text_of(value)
            told = _instead(text if sign in _EQUAL else "", photos.values(name))
            what = "that" if sign in _EQUAL else "a number of that name"
            raise InputError(
                f"--where={shown(name)}{sign}{shown(text)}: no photo has {what}; {told}"
            )


def photos_of(store: Store) -> Photos:
    """The photos of a catalogue's file."""

    def some(where: Where) -> bool:
        condition, values = selected(where)
        return bool(store.rows(f"SELECT 1 FROM item WHERE {condition} LIMIT 1", values))

    def named(name: str) -> bool:
        return bool(store.rows(f"SELECT 1 {_KNOWN} WHERE key = ? LIMIT 1", [name]))

    def numeric(name: str) -> bool:
        return bool(store.rows(f"SELECT 1 {_KNOWN} WHERE key = ? AND {_NUMERIC} LIMIT 1", [name]))

    def names() -> list[str]:
        sql = f"SELECT DISTINCT key {_KNOWN} WHERE typeof(key) = 'text' ORDER BY key"
        return [name for (name,) in store.rows(sql)]  # Of a payload that is no object it is none.

    def values(name: str) -> list[str]:
        sql = f"SELECT DISTINCT value, type {_KNOWN} WHERE key = ? ORDER BY 1 LIMIT {_MOST_VALUES}"
        return [_text(*row) for row in store.rows(sql, [name]) if row[0] is not None]

    return Photos(some, named, numeric, names, values)


def _text(value: Any, type_: str) -> str:
    """A value as it is compared, of how SQLite tells it: lists as text, true as 1."""
    if type_ in ("array", "object"):
        return text_of(json.loads(value))
    return text_of({"true": True, "false": False}.get(type_, value))


def _instead(text: str, those: Iterable[str]) -> str:
    """The nearest of what there is, or the first ten."""
    there = {known.lower(): known for known in sorted(set(those))}
    near = difflib.get_close_matches(text.lower(), there, n=3)
    if near:
        return f"did you mean {shown_names([there[name] for name in near])}?"
    return f"there are {shown_names(there.values()) if there else 'none'}"


def categories(store: Store, most: int) -> list[str]:
    """Values of ``category`` that photos have, in order, at most so many of them."""
    rows = store.rows(
        "SELECT DISTINCT json_extract(payload, '$.category') FROM item "
        "WHERE embedding IS NOT NULL ORDER BY 1 LIMIT ?",
        [most],
    )
    return [str(value) for (value,) in rows if value is not None]


def conditions(where: Where) -> list[tuple[str, str, Any]]:
    """The name, the sign and the value of each condition; raises as `selected`."""
    if where is None:
        return []
    if isinstance(where, Mapping):
        return [_checked(name, "=", value) for name, value in where.items()]
    texts = [where] if isinstance(where, str) else where
    if not isinstance(texts, Iterable):
        raise InputError(f"where={where!r} is no condition: give 'NAME=VALUE' or {{NAME: VALUE}}")
    return [_checked(*_parsed(text)) for text in texts]


def _checked(name: Any, sign: str, value: Any) -> tuple[str, str, Any]:
    """A condition whose parts are what JSON and SQLite know."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        (name + text_of(value)).encode()
    except (TypeError, ValueError):  # A UnicodeEncodeError is one.
        raise InputError(
            f"--where={shown(name)}{sign}{shown(value)}: give text that is UTF-8, or a number"
        ) from None
    return name, sign, value


def selected(where: Where) -> tuple[str, list[Any]]:
    """A condition of SQL on the table of photos, with its values.

    Args:
        where: ``"price<50"``, several of them, which all must hold, or a mapping of names to the
            values that they must have. ``=`` and ``!=`` compare texts and numbers; ``<``, ``<=``,
            ``>`` and ``>=`` numbers. ``!=`` also holds where nothing is known. None: all photos.

    Raises:
        InputError: a condition that is none.

    Example:
        >>> selected(None)
        ('1', [])
        >>> selected("price<50")[1]
        ['price', 50]
    """
    parts = [_sql(*condition) for condition in conditions(where)]
    return " AND ".join(["1", *(sql for sql, _ in parts)]), [v for _, some in parts for v in some]


def _parsed(text: str) -> tuple[str, str, Any]:
    # Spaces are no part of the pattern: it would try each way to share out a thousand of them.
    match = _CONDITION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"--where={shown(text)}: give NAME=VALUE, or NAME with !=, <, <=, > or >=")
    return match[1].strip(), match[2], match[3].strip()


def _sql(name: str, sign: str, value: Any) -> tuple[str, list[Any]]:
    number = number_of(name, sign, value)
    if sign in _EQUAL:
        # 12 and 12.0 are one number; true and false are what JSON calls them.
        holds = "CAST(value AS TEXT) = ?" + (" OR value = ?" if number is not None else "")
        values = [text_of(value), *([number] if number is not None else [])]
        if text_of(value) in ("true", "false"):
            holds += " OR type = ?"
            values.append(text_of(value))
        found = f"EXISTS (SELECT 1 FROM json_each(item.payload) WHERE key = ? AND ({holds}))"
        return (f"NOT {found}" if sign == "!=" else found), [name, *values]
    return (
        "EXISTS (SELECT 1 FROM json_each(item.payload) WHERE key = ? "
        f"AND {_NUMERIC} AND value {sign} ?)",
        [name, number],
    )


def text_of(value: Any) -> str:
    """A value as ``=`` and ``!=`` compare it with texts; a list as SQLite writes it.

    >>> text_of("hat"), text_of(2.5), text_of(["S", "M"])
    ('hat', '2.5', '["S","M"]')
    """
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def number_of(name: str, sign: str, value: Any) -> int | float | None:
    """A value as conditions compare it with numbers, None where it is none.

    Raises:
        InputError: it is none, and the sign compares numbers alone.
    """
    number = _number(value)
    if number is None and sign not in _EQUAL:
        told = shown(text_of(value))
        raise InputError(f"--where={shown(name)}{sign}{told}: {sign} compares numbers, it is none")
    return number


def _number(value: Any) -> int | float | None:
    try:
        number = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    # What SQLite holds as a number: neither booleans nor NaN.
    held = type(number) is float and math.isfinite(number)
    return number if held or (type(number) is int and abs(number) < 2**63) else None
