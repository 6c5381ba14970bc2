"""Catalogues that someone damaged, or made to do harm: SQLite files with other contents."""

import os
import sqlite3

import numpy as np
import pytest

from cbam_jax import InputError
from cbam_jax.catalogue import gallery
from cbam_jax.catalogue.store import Store


@pytest.fixture
def shop(tmp_path):
    path = tmp_path / "shop.db"
    with Store(path, create=True) as store, store.transaction():
        store.tell(dimension=3)
        for number in range(4):
            embedding = np.arange(3, dtype=np.float32) + number
            store.run(
                "INSERT INTO item (path, embedding) VALUES (?, ?)",
                [f"/{number}.jpg", embedding.tobytes()],
            )
    return path


def run(path, *statements):
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def read(path):
    with Store(path) as store:
        return gallery.open_gallery(store)


# Statements that someone ran on a catalogue, and a part of the line that refuses it.
CHANGED = {
    "embeddings cut off": ("UPDATE item SET embedding = x'0000' WHERE id = 2", "is damaged"),
    "embeddings of text": ("UPDATE item SET embedding = 'abcdefghijkl' WHERE id = 2", "is damaged"),
    "embeddings of 10**12 numbers": (
        "UPDATE about SET value = 1000000000000 WHERE key = 'dimension'",
        "is damaged",
    ),
    "embeddings of -1 numbers": (
        "UPDATE about SET value = -1 WHERE key = 'dimension'",
        "is damaged",
    ),
    "embeddings of 'x' numbers": (
        "UPDATE about SET value = 'x' WHERE key = 'dimension'",
        "is damaged",
    ),
    "a table lost": ("DROP TABLE item", "no such table"),
    "a catalogue of a version to come": ("PRAGMA user_version = 9", "is of version 9"),
    "another program's database": ("PRAGMA application_id = 7", "is no catalogue"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_catalogue_is_told(what, shop):
    statement, message = CHANGED[what]
    run(shop, statement)
    with pytest.raises(InputError, match=message) as caught:
        read(shop)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")])
@pytest.mark.parametrize("create", [True, False])
def test_what_stands_in_a_catalogues_place(make, create, tmp_path):
    make(tmp_path / "shop.db")
    with pytest.raises(InputError, match="is no file"):
        Store(tmp_path / "shop.db", create=create)


def test_a_schema_calls_no_function_with_effects(shop):
    """A stranger's triggers and views run within one's own statements."""
    with Store(shop) as store:
        assert store.rows("PRAGMA trusted_schema") == [(0,)]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.write_bytes(b"[" * 9_000)])
def test_what_stands_in_the_place_of_kept_embeddings(make, shop):
    expected = np.arange(3) + np.arange(4)[:, None]
    make(gallery.cache_path(shop))
    np.testing.assert_array_equal(read(shop).embeddings, expected)


def test_random_damages_end_in_a_gallery_or_a_line(shop, rng):
    read(shop)
    whole = shop.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 20):
            data[place] = rng.integers(256)
        for name in ("shop.db-wal", "shop.db-shm", "shop.db-embeddings"):
            shop.with_name(name).unlink(missing_ok=True)
        shop.write_bytes(data)
        try:
            found = read(shop)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017, most of the damages end here
        else:
            assert found.embeddings.shape[1:] in ((3,), (0,))
