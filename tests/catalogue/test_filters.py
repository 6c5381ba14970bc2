"""Conditions on what is known of photos, beside the same in Python."""

import json
import time

import numpy as np
import pytest

from cbam_jax import InputError
from cbam_jax.catalogue.filters import check, conditions, photos_of, selected
from cbam_jax.catalogue.store import Store

PAYLOADS = [
    {"category": "dress", "price": 20, "sizes": ["S", "é"]},
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
        ({"sizes": ["S", "é"]}, [0]),
        ('sizes=["S","é"]', []),
        ('sizes=["S","\\u00e9"]', [0]),
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


@pytest.mark.parametrize("where", ["category", "=x", "", "price<cheap", "price<" + "9" * 400])
def test_what_is_no_condition_is_told(where):
    with pytest.raises(InputError, match=f"--where={where[:100]}"):
        selected(where)


@pytest.mark.parametrize(
    "where",
    [3, [3], b"price=3", ["price=3", None], {1: 2}, {"price": {2}}, "price=\udcff", "\udcff=1",
     {"price": object()}],
)  # fmt: skip
def test_a_condition_of_another_type_is_told_in_a_line(where):
    with pytest.raises(InputError, match="give ") as caught:
        selected(where)
    assert str(caught.value).isprintable()


def test_numbers_of_numpy_are_numbers(store):
    for value in (np.int64(20), np.float32(20), 20.0):
        condition, values = selected({"price": value})
        assert store.rows(f"SELECT id FROM item WHERE {condition}", values) == [(1,)]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("category=hta", r"--where=category=hta: no photo has that; did you mean \['hat'\]\?"),
        ("category!=DRES", r"category!=DRES: no photo has that; did you mean \['[dD]ress'\]\?"),
        ("category=sock", r"no photo has that; there are \['dress', 'hat', .*new"),
        ({"price": 21}, r"--where=price=21: no photo has that; there are \['100', '20', '9.5'\]"),
        (["price<50", "categry=hat"], r"no photo has 'categry'; did you mean \['category'\]\?"),
        ("zzz=1", r"no photo has 'zzz'; there are \['a.b', 'category', 'price', 'sizes', 'sold'\]"),
        (
            "category<5",
            r"category<5: no photo has a number of that name; there are \['dress', 'hat'",
        ),
        (["category>=5", "price>1"], "category>=5: no photo has a number of that name"),
        ("sold=maybe", r"sold=maybe: no photo has that; there are \['true'\]"),
        ({"sizes": ["S"]}, r'sizes=\["S"\]: no photo has that; there are .*"S","'),
        ("category=' OR 1=1 --", "no photo has that; there are"),
    ],
)
def test_a_name_or_a_value_that_no_photo_has_is_told_with_the_nearest(store, where, message):
    with pytest.raises(InputError, match=message):
        check(photos_of(store), where)


@pytest.mark.parametrize(
    "where", [None, [], "category=hat", "price>999", "price>-1e308",
              ["category=hat", "category=dress"], "category!=hat", {"sold": True}],
)  # fmt: skip
def test_what_photos_have_passes_though_none_has_all_of_it(store, where):
    check(photos_of(store), where)


def test_a_long_condition_is_told_at_once():
    start = time.process_time()
    for text in (" " * 60_000, "a" + " " * 60_000, "a" + " " * 60_000 + "!" * 60_000):
        with pytest.raises(InputError, match="give NAME=VALUE"):
            conditions(text)
    assert conditions("a" + " " * 60_000 + "=" + " " * 60_000 + "b") == [("a", "=", "b")]
    assert time.process_time() - start < 1
