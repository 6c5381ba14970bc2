"""``--where`` in Milvus's language, with the meaning that it has in a catalogue's file.

Milvus Lite and the server differ in what they make of a name that is not there, and of true and 1.
So a row has what is known of its photo twice more, as texts and as numbers, and ``!=`` asks whether
the name is there.
"""

import json
from collections.abc import Mapping
from typing import Any

from cbam_jax.catalogue.filters import Where, conditions, number_of, text_of


def texts_and_numbers(payload: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """What is known of a photo as conditions compare it.

    >>> texts_and_numbers({"category": "hat", "price": 12.5, "new": True})
    ({'category': 'hat', 'new': 'true'}, {'price': 12.5})
    """
    numbers = {name: value for name, value in payload.items() if type(value) in (int, float)}
    texts = {name: text_of(value) for name, value in payload.items() if name not in numbers}
    return texts, numbers


def expression(where: Where) -> str:
    """The filter of a search: no row but photos, and of them those for which all holds.

    Raises:
        InputError: a condition that is none.

    >>> expression("price<50")
    'id > 0 and number["price"] < 50'
    """
    return " and ".join(["id > 0", *(_one(*condition) for condition in conditions(where))])


def named(name: str) -> str:
    """The filter of photos that have a value of this name."""
    return f"id > 0 and ((exists {_field('text', name)}) or (exists {_field('number', name)}))"


def numeric(name: str) -> str:
    """The filter of photos that have a number of this name."""
    return f"id > 0 and (exists {_field('number', name)})"


def _one(name: str, sign: str, value: Any) -> str:
    number = number_of(name, sign, value)
    equal = [(_field("text", name), json.dumps(text_of(value), ensure_ascii=False))]
    if number is not None:
        equal.append((_field("number", name), json.dumps(number)))
    if sign == "=":
        return f"({' or '.join(f'{f} == {v}' for f, v in equal)})"
    if sign == "!=":
        return f"({' and '.join(f'((not exists {f}) or {f} != {v})' for f, v in equal)})"
    return f"{_field('number', name)} {sign} {json.dumps(number)}"


def _field(kind: str, name: str) -> str:
    return f"{kind}[{json.dumps(name, ensure_ascii=False)}]"
