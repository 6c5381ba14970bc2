"""Catalogues that someone damaged, or made to do harm: SQLite files with other contents."""

import itertools
import json
import os
import re
import sqlite3
import struct

import numpy as np
import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue, commands, doctor, embedders, gallery
from cbam_jax.catalogue.milvus import address
from cbam_jax.catalogue.sources import Photo
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
    "a catalogue with a view": ("CREATE VIEW other AS SELECT * FROM item", "holds more than"),
    "a catalogue with a trigger": (
        "CREATE TRIGGER other AFTER UPDATE ON about BEGIN DELETE FROM item; END",
        "holds more than",
    ),
    "a catalogue with a table": ('CREATE TABLE "\x1b[2J" (id)', "holds more than"),
    "a catalogue with an index of its own": (
        "CREATE INDEX other ON item (payload || path)",
        "holds more than",
    ),
    "a catalogue with a computed column": (
        "ALTER TABLE item ADD COLUMN other AS (zeroblob(900000000))",
        "holds more than",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_catalogue_is_told(what, shop):
    statement, message = CHANGED[what]
    run(shop, statement)
    with pytest.raises(InputError, match=message) as caught:
        read(shop)
    assert str(caught.value).isprintable()


SUMLESS = (
    *(f"DROP TRIGGER {table}_{when}"
      for table in ("checksum", "text_checksum") for when in ("added", "changed", "removed")),
    "DROP TABLE checksum", "DROP TABLE text_checksum",
)  # fmt: skip
COUNTED = "WITH RECURSIVE c (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM c)"


def test_a_view_without_an_end_in_the_place_of_the_photos(shop):
    columns = "id, '/a.jpg' AS path, NULL AS problem, zeroblob(12) AS embedding"
    run(shop, *SUMLESS, "DROP TABLE item", f"CREATE VIEW item AS {COUNTED} SELECT {columns} FROM c")
    with pytest.raises(InputError, match=r"holds more than .*\(CREATE VIEW item"):
        read(shop)


def loop_pages(path, depth=9, times=200):
    """Make the table of photos a tree of which each page names the next one many times."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = DELETE")
    (root,), (size,) = (
        connection.execute(sql).fetchone()
        for sql in ("SELECT rootpage FROM sqlite_master WHERE name = 'item'", "PRAGMA page_size")
    )
    connection.close()
    data = bytearray(path.read_bytes())
    leaf, behind = data[(root - 1) * size : root * size], len(data) // size
    pages = [root, *range(behind + 1, behind + 1 + depth)]
    data += bytes(size * depth)
    for page, below in itertools.pairwise(pages):
        cells = range(size - 6 * times, size, 6)
        head = struct.pack(">BHHHBI", 5, 0, times, cells[0], 0, below)
        head += b"".join(struct.pack(">H", place) for place in cells)
        made = head.ljust(cells[0], b"\0") + struct.pack(">IBB", below, 0x81, 0) * times
        data[(page - 1) * size : page * size] = made
    data[(pages[-1] - 1) * size : pages[-1] * size] = leaf
    struct.pack_into(">I", data, 28, len(data) // size)
    path.write_bytes(data)


def test_photos_without_an_end_of_pages_that_name_each_other(shop):
    loop_pages(shop)
    with Catalogue.open(shop) as catalogue:
        for reading in (
            lambda: list(catalogue.items()),
            lambda: len(catalogue),
            lambda: catalogue.categories(10),
            lambda: catalogue.find(np.zeros(3, np.float32)),
        ):
            with pytest.raises(InputError, match="is damaged .*(comes behind|rows than bytes)"):
                reading()


def test_what_a_schemas_list_calls_by_another_name_is_told(shop):
    run(
        shop,
        "CREATE VIEW other AS SELECT 1",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET name = 'rebuilt', tbl_name = 'rebuilt' WHERE type = 'view'",
    )
    with pytest.raises(InputError, match="holds more than|is damaged"):
        read(shop)


def test_what_sqlite_itself_keeps_is_no_more_than_a_catalogue(shop):
    run(shop, "ANALYZE")
    assert len(read(shop)) == 4


# A column of a photo, and what stands there that is never written.
TYPES = {
    "a path of bytes": ("path", b"/1.jpg"),
    "a hash of text": ("hash", "c0ffee"),
    "a size of text": ("size", "large"),
    "a time of text": ("modified", "today"),
    "a box of bytes": ("box", b"1,2,3,4"),
    "a payload of bytes": ("payload", b"{}"),
    "a look of text": ("look", "fine"),
    "a problem of bytes": ("problem", b"none"),
}


@pytest.mark.parametrize("what", TYPES)
@pytest.mark.parametrize("sums", [True, False])
def test_what_is_known_of_another_type_is_told(what, sums, shop):
    column, value = TYPES[what]
    with Store(shop) as store, store.transaction():
        store.run(f"UPDATE item SET {column} = ? WHERE id = 2", [value])
    run(shop, *(() if sums else SUMLESS))
    with Catalogue.open(shop) as catalogue:
        assert "photo 2: what is known of it is not as it was written" in catalogue.verify(0)
        for reading in (lambda: list(catalogue.items()), lambda: catalogue.find(1)):
            with pytest.raises(InputError, match="photo 2 is not as it was written: forget it by"):
                reading()


@pytest.mark.parametrize("payload", ["5", "[1]", "null"])
def test_a_name_that_is_looked_for_where_a_payload_is_no_object(payload, shop):
    with Store(shop) as store, store.transaction():
        store.run("UPDATE item SET payload = ? WHERE id = 2", [payload])
    with Catalogue.open(shop) as catalogue, pytest.raises(InputError, match="no photo has 'hat'"):
        list(catalogue.items("hat=x"))


# What is kept of a photo, which another program wrote.
PAYLOADS = {
    "a payload nested 50,000 deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "a number of 5,000 digits in a payload": '{"a": ' + "9" * 5_000 + "}",
    "a payload of pairs": '[["category", "hat"]]',
    "a payload that is text": '"hat"',
    "a payload that is empty": "",
    "a payload as JSON5 has it": "{category: 'hat',}",
}


@pytest.mark.parametrize("what", PAYLOADS)
def test_what_is_kept_of_a_photo_is_no_json(what, shop):
    with Store(shop) as store, store.transaction():
        store.run("UPDATE item SET payload = ? WHERE id = 2", [PAYLOADS[what]])
    with Catalogue.open(shop) as catalogue, pytest.raises(InputError, match="photo 2 is no JSON"):
        list(catalogue.items())
    with pytest.raises(InputError, match="/2.jpg is no JSON .*forget the photo"):
        Photo("/2.jpg", {"price": 5}).merged(PAYLOADS[what])


@pytest.mark.parametrize("payload", [{"a": "\ud800"}, {"\udc00": 1}, {"a": [["\udc00\ud800"]]}])
def test_half_a_letter_is_not_kept(payload):
    with pytest.raises(InputError, match="payload of /a.jpg holds half a letter"):
        Photo("/a.jpg", payload).merged("{}")
    assert json.loads(Photo("/a.jpg", {"a": "\U0001f457"}).merged("{}")) == {"a": "\U0001f457"}


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
def test_sqlite_writes_to_no_file_elsewhere_by_a_link(ending, make, shop, tmp_path):
    (tmp_path / "mine").write_text("mine")
    beside = shop.with_name(shop.name + ending)
    beside.unlink(missing_ok=True)
    getattr(beside, make)(tmp_path / "mine")
    (tmp_path / "link.db").symlink_to(shop)
    for path in (shop, tmp_path / "link.db"):
        with pytest.raises(InputError, match=f"shop.db{ending} is a link"):
            read(path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_row_beyond_all_size_is_not_read(shop, monkeypatch):
    monkeypatch.setattr("cbam_jax.catalogue.store._LONGEST", 1_000_000)
    run(shop, *SUMLESS, "UPDATE item SET embedding = zeroblob(2000000) WHERE id = 2")
    with pytest.raises(InputError, match="too big"):
        read(shop)


def test_a_payload_nested_900_deep_is_told(shop):
    payload = f'{{"a": {"[" * 900}{"]" * 900}}}'
    with Store(shop) as store, store.transaction():
        store.run("UPDATE item SET payload = ? WHERE id = 2", [payload])
    with Catalogue.open(shop) as catalogue, pytest.raises(InputError, match="photo 2 is no JSON"):
        list(catalogue.items())


def test_a_strangers_words_move_no_cursor(shop, capsys, monkeypatch):
    with Store(shop) as store, store.transaction():
        store.run("UPDATE item SET problem = ?, embedding = NULL WHERE id = 2", ["\x1b[2J\nhat"])
        store.tell(fingerprint=5, model="\x1b[2J\nhat")
    for command in ("list", "doctor"):
        monkeypatch.setattr("sys.argv", ["cbam-jax catalogue", command, str(shop)])
        commands.main()
        told = capsys.readouterr().out
        assert told.count("\\x1b[2J\\nhat") == 1
        assert "\x1b" not in told


def test_a_model_that_is_a_number_is_told(shop):
    with Store(shop) as store, store.transaction():
        store.tell(fingerprint=5, model=5)
    with Store(shop) as store:
        with pytest.raises(InputError, match="embeddings of another model \\(5, this"):
            embedders.check_fingerprint(store, "f" * 64)
        assert any("5" in line for line in doctor._catalogue(store, None))


ADDRESSES = {
    "an address of another scheme": "file:///etc/passwd",
    "an address of a web page": "http://localhost:19530/shop",
    "an address without a host": "milvus:///shop",
    "an address without a collection": "milvus://localhost:19530/",
    "an address of two paths": "milvus://localhost/shop/../other",
    "an address with a password": "milvus://me:secret@localhost/shop",
    "an address of a port of text": "milvus://localhost:x/shop",
    "an address of a port of 7 digits": "milvus://localhost:1953000/shop",
    "an address with a space": "milvus://local host/shop",
    "an address with a line's end": "milvus://localhost/shop\n",
    "an address that clears the screen": "milvus://\x1b[2J/shop",
    "an address with a question": "milvus://localhost/shop?token=x",
    "an address whose name begins with a digit": "milvus://localhost/1shop",
    "an address of 100,000 letters": "milvus://localhost/" + "s" * 100_000,
    "a file that is no .db": "milvus:/etc/passwd",
}


@pytest.mark.parametrize("what", ADDRESSES)
def test_an_address_that_is_none(what):
    with pytest.raises(InputError, match="names no collection|is no catalogue") as caught:
        address(ADDRESSES[what])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


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


def flipped(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def embedding_places(path):
    """Where the bytes of the second photo's embedding lie in a database."""
    whole = path.read_bytes()
    start = whole.index((np.arange(3, dtype=np.float32) + 1).tobytes())
    return range(start, start + 12)


def test_each_flipped_bit_of_an_embedding_is_told(shop):
    for place in embedding_places(shop):
        for bit in (1, 128):
            flipped(shop, place, bit)
            with pytest.raises(InputError, match="embedding of photo 2 is n"):
                read(shop)
            flipped(shop, place, bit)
    np.testing.assert_array_equal(read(shop).embeddings[1], [1, 2, 3])


def test_each_changed_byte_of_kept_embeddings_makes_them_anew(shop, rng):
    expected = read(shop)
    kept = gallery.cache_path(shop)
    whole = kept.read_bytes()
    starts = 0, 4096, 8192, 12288, 16384  # Header, ids, squared norms, sums, embeddings.
    last = starts[-1] + expected.embeddings.nbytes - 1  # What follows is padding.
    places = [start + i for start in starts for i in range(12)] + [last]
    for place in places:
        flipped(kept, place, 1 << rng.integers(8))
        found = read(shop)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        np.testing.assert_array_equal(found.squares, expected.squares)
        assert kept.read_bytes() == whole


PAYLOAD = b'{"price": 471}'


@pytest.fixture
def priced(shop):
    with Store(shop) as store, store.transaction():
        store.run(
            "UPDATE item SET payload = ?, hash = x'c0ffee17' WHERE id = 2", [PAYLOAD.decode()]
        )
    return shop


def told(path):
    """What is said of all photos, listed and found."""
    with Catalogue.open(path) as catalogue:
        return [*catalogue.items(), *catalogue.find(np.float32([1, 2, 3]), copies=True)]


def test_a_flipped_bit_of_each_byte_of_a_text_is_told(priced):
    expected, whole = told(priced), priced.read_bytes()
    starts = {PAYLOAD: 1, b"/1.jpg": 2, bytes.fromhex("c0ffee17"): 2}  # Twice: in an index, too.
    for text, times in starts.items():
        places = [m.start() for m in re.finditer(re.escape(text), whole)]
        assert len(places) == times
        refused = []
        for place in (start + i for start in places for i in range(len(text))):
            flipped(priced, place, 1 << place % 8)
            try:
                assert told(priced) == expected
            except InputError as error:
                refused.append(str(error))
            flipped(priced, place, 1 << place % 8)
        assert len(refused) >= len(text)
        known = "photo 2 is not as it was written: forget it by `cbam-jax catalogue remove"
        assert all(known in line or "is damaged" in line for line in refused)
        assert any(known in line for line in refused)
    assert told(priced) == expected


def test_a_row_that_is_not_as_it_was_written_is_named_and_can_be_removed(priced):
    flipped(priced, priced.read_bytes().index(PAYLOAD) + 3)
    with Catalogue.open(priced) as catalogue:
        assert "photo 2: what is known of it is not as it was written" in catalogue.verify(0)
        for read in (lambda: catalogue.item(2), lambda: catalogue.find(1), lambda: told(priced)):
            with pytest.raises(InputError, match="photo 2 is not as it was"):
                read()
        assert catalogue.item(3).path == "/2.jpg"
        catalogue.remove([2])
        assert catalogue.verify(0) == []
        assert [item.id for item in catalogue.items()] == [1, 3, 4]


def test_a_catalogue_without_sums_of_texts_is_told_and_given_them(priced):
    run(priced, *SUMLESS)
    with Catalogue.open(priced) as catalogue:
        assert len(told(priced)) == 8
        told_of_sums, gone = catalogue.verify(0)
        assert told_of_sums.startswith("4 photos have no checksum of what is known of them")
        catalogue.add([], progress=False)
        assert catalogue.verify(0) == [gone] == ["photo 2: no such file: /1.jpg"]
        assert [whole for _, whole in catalogue.store.wholes()] == [True] * 4


def test_a_catalogue_from_before_there_were_sums_is_read_and_given_them(shop):
    run(shop, *SUMLESS)
    assert len(read(shop)) == 4
    with Store(shop) as store:
        with store.transaction():
            store.run("UPDATE item SET embedding = NULL, problem = 'gone' WHERE id = 3")
        sums = {number: known for number, _, known in store.embeddings()}
    assert sums.keys() == {1, 2, 4}
    assert all(type(known) is int for known in sums.values())
    flipped(shop, embedding_places(shop)[0])
    with pytest.raises(InputError, match="embedding of photo 2 is not as it was"):
        read(shop)


def test_what_another_program_writes_has_no_sum_until_this_one_writes(shop):
    run(
        shop,
        "UPDATE item SET embedding = zeroblob(12) WHERE id = 2",
        "DELETE FROM item WHERE id = 3",
    )
    with Store(shop) as store:
        assert [known is None for _, _, known in store.embeddings()] == [False, True, False]
        assert len(read(shop)) == 3
        with store.transaction():
            store.run("INSERT INTO item (path) VALUES ('/new.jpg')")
        assert [number for number, _, known in store.embeddings() if known is None] == []
    assert len(read(shop)) == 3


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


def test_a_path_of_100_000_letters_is_missing(shop, monkeypatch, capsys):
    with Store(shop) as store, store.transaction():
        store.run("UPDATE item SET path = ? WHERE id = 2", ["/" + "x" * 100_000])
    monkeypatch.setattr("sys.argv", ["cbam-jax catalogue", "remove", str(shop), "--missing"])
    commands.main()
    assert capsys.readouterr().out == "4 removed; 0 can be found\n"


EMBEDDINGS = {
    "an embedding that is a pipe": os.mkfifo,
    "an embedding that is a folder": os.mkdir,
    "an embedding that is a device": lambda path: path.symlink_to("/dev/zero"),
    "an embedding that is empty": lambda path: path.touch(),
    "an embedding that is an archive": lambda path: path.write_bytes(b"PK\3\4" + bytes(90)),
    "an embedding that is a pickle": lambda path: path.write_bytes(b"\x80\4N."),
    "an embedding of 10**12 numbers": lambda path: path.write_bytes(npy("(1000000000000,)")),
    "an embedding of 10**30 numbers": lambda path: path.write_bytes(npy("(1" + "0" * 30 + ",)")),
    "an embedding of 10**9 rows of nothing": lambda path: path.write_bytes(npy("(1000000000,0)")),
    "an embedding whose header never ends": lambda path: path.write_bytes(npy("((((((((")),
    "an embedding whose header is text": lambda path: path.write_bytes(npy("'''")),
    "an embedding of objects": lambda path: path.write_bytes(npy("(1,)", "|O")),
}


def npy(shape, dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("what", EMBEDDINGS)
def test_an_embedding_that_is_none(what, shop, tmp_path, monkeypatch):
    EMBEDDINGS[what](tmp_path / "x.npy")
    arguments = ["find", str(shop), f"--embedding={tmp_path / 'x.npy'}"]
    monkeypatch.setattr("sys.argv", ["cbam-jax catalogue", *arguments])
    with pytest.raises(InputError, match="--embedding=.*x.npy: (cannot be read|give)") as caught:
        commands.main()
    assert str(caught.value).isprintable()
