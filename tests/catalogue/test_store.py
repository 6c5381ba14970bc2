"""One file that is whole whatever happens, and one line for what SQLite refuses."""

import sqlite3

import pytest

from cbam_jax import InputError
from cbam_jax.catalogue import store as room
from cbam_jax.catalogue.store import Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shop.db"


def put(store, *paths):
    for path in paths:
        store.run("INSERT INTO item (path) VALUES (?)", [path])


def paths(path):
    with Store(path) as store:
        return [row[0] for row in store.rows("SELECT path FROM item ORDER BY id")]


def test_a_transaction_is_whole_or_nothing(path):
    with Store(path, create=True) as store:
        with store.transaction():
            put(store, "/a", "/b")
        with pytest.raises(InputError, match="UNIQUE"), store.transaction():
            put(store, "/c", "/a")
        with pytest.raises(InputError, match="no such table"), store.transaction():
            put(store, "/d"), store.run("DELETE FROM elsewhere")
        assert store.about("revision") == 1
    assert paths(path) == ["/a", "/b"]
    assert [file.name for file in path.parent.iterdir()] == ["shop.db"]


def test_an_id_is_never_used_again(path):
    with Store(path, create=True) as store, store.transaction():
        put(store, "/a", "/b")
        store.run("DELETE FROM item WHERE path = '/b'")
        put(store, "/c")
        assert store.rows("SELECT id FROM item") == [(1,), (3,)]


def test_among_any_number_of_values(path, monkeypatch):
    monkeypatch.setattr(room, "_AMONG", 3)
    with Store(path, create=True) as store:
        with store.transaction():
            put(store, *"abcdefghi")
        for wanted in ([], [2], [9, 1, 4], [1, 3, 5, 7, 8, 9, 12]):
            rows = store.among("SELECT id FROM item WHERE path != ? AND id", wanted, ["e"])
            assert sorted(rows) == [(i,) for i in sorted(wanted) if i not in (5, 12)]


def test_readers_go_on_while_one_writes_and_a_second_writer_is_told(path, monkeypatch):
    monkeypatch.setattr(room, "_WAIT", 0)
    with Store(path, create=True) as writer, writer.transaction():
        put(writer, "/a")
        with Store(path) as other:
            assert other.rows("SELECT * FROM item") == []
            told = pytest.raises(InputError, match="another process has been writing")
            with told, other.transaction():
                put(other, "/b")
    assert paths(path) == ["/a"]


def test_a_snapshot_is_of_one_moment(path):
    with Store(path, create=True) as store, Store(path) as other, store.snapshot():
        assert store.about("revision") == 0
        with other.transaction():
            put(other, "/a")
        assert store.about("revision") == 0
        assert store.rows("SELECT * FROM item") == []


def test_a_full_disk_loses_nothing_and_is_told(path):
    with Store(path, create=True) as store:
        with store.transaction():
            put(store, "/a")
        # SQLite says of a limit of pages what it says of a disk.
        pages = store.rows("PRAGMA page_count")[0][0]
        store.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(InputError, match="no space is left .* kept"), store.transaction():
            put(store, *(f"/{i}" * 300 for i in range(99)))
    assert paths(path) == ["/a"]


def test_what_is_no_catalogue_is_told_and_left_alone(tmp_path):
    text = tmp_path / "list.txt"
    text.write_text("no database, but as long as the header of one " * 9)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = other.read_bytes()
    for create in (False, True):
        with pytest.raises(InputError, match="damaged or no catalogue"):
            Store(text, create=create)
        with pytest.raises(InputError, match="is no catalogue"):
            Store(other, create=create)
        with pytest.raises(InputError, match=r"is no file|cannot open"):
            Store(tmp_path, create=create)
    assert other.read_bytes() == before
    with pytest.raises(InputError, match="is not there: make one with `cbam-jax catalogue add"):
        Store(tmp_path / "none.db")
    with pytest.raises(InputError, match="needs a folder that is there"):
        Store(tmp_path / "nowhere" / "shop.db", create=True)


def test_a_damaged_database_is_told(path):
    with Store(path, create=True) as store, store.transaction():
        put(store, *(f"/{i}" * 100 for i in range(500)))
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 9] = b"\xff" * 4096 * 6
    path.write_bytes(content)
    with Store(path) as store, pytest.raises(InputError, match="damaged"):
        store.rows("SELECT * FROM item ORDER BY id")


def test_a_newer_version_is_told(path):
    with Store(path, create=True) as store:
        store.rows("PRAGMA user_version = 9")
    with pytest.raises(InputError, match="of version 9"):
        Store(path)


def test_where_nothing_may_be_written_it_is_read(path, monkeypatch):
    with Store(path, create=True) as store, store.transaction():
        put(store, "/a")
    monkeypatch.setattr(room.os, "access", lambda *_: False)
    assert paths(path) == ["/a"]
    told = pytest.raises(InputError, match="may only be read")
    with Store(path) as store, told, store.transaction():
        put(store, "/b")
    assert [file.name for file in path.parent.iterdir()] == ["shop.db"]
