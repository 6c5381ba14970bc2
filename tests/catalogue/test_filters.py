"""Conditions on what is known of photos, beside the same in Python."""

import json

import pytest

from cbam_jax import InputError
from cbam_jax.catalogue.filters import selected
from cbam_jax.catalogue.store import Store

PAYLOADS = [
    {"category": "dress", "price": 20},
    {"category": "hat", "price": 9.5, "sold": True},
    {"category": "Dress", "price": "9.5", "sold": None},
    {"category": 'it\'s "new"', "a.b": "x=1", "price": 100},
    {},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    with Store(path, create=True) as store:
        with store.transaction():
            for row, payload in enumerate(PAYLOADS):
                values = [f"/{row}", json.dumps(payload)]
                store.run("INSERT INTO item (path, payload) VALUES (?, ?)", values)
        yield store


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("category=dress", [0]),
        ("category != dress", [1, 2, 3, 4]),
        ("price=9.5", [1, 2]),
        ("price=20.0", [0]),
        ("price<=20", [0, 1]),
        ("price>9.5", [0, 3]),
        (["price>9.5", "price<50"], [0]),
        ("sold=true", [1]),
        ({"sold": True}, [1]),
        ({"price": 9.5, "category": "hat"}, [1]),
        ("a.b=x=1", [3]),
        ('category=it\'s "new"', [3]),
        ("category=' OR 1=1 --", []),
        ("') OR 1=1 --=x", []),
        ("nothing=1", []),
    ],
)
def test_conditions(store, where, rows):
    condition, values = selected(where)
    found = store.rows(f"SELECT id FROM item WHERE {condition} ORDER BY id", values)
    assert [number - 1 for (number,) in found] == rows


@pytest.mark.parametrize("where", ["category", "=x", "", "price<cheap"])
def test_what_is_no_condition_is_told(where):
    with pytest.raises(InputError, match=f"--where={where}"):
        selected(where)
