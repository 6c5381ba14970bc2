"""Shards of embeddings that someone damaged, or made to do harm: their hashes may be right."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue

ROWS = [{"path": f"/{i}.jpg", "hash": f"{i}" * 64, "payload": {"price": i}} for i in range(3)]
NUMBERS = np.arange(12, dtype=np.float32).reshape(3, 4)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder, embeddings=None, rows=None, about=None, name="00000-of-00001"):
    """A shard whose files are as it says, but for what is given."""
    folder.mkdir(exist_ok=True)
    embeddings, rows = embeddings or npy(NUMBERS), lines(*ROWS) if rows is None else rows
    known = {
        "shard": 0, "shards": 1, "count": 3, "listed": "a" * 64, "fingerprint": "f" * 64,
        "model": None, "dimension": 4, "embeddings": hashlib.sha256(embeddings).hexdigest(),
        "rows": hashlib.sha256(rows).hexdigest(),
    }  # fmt: skip
    (folder / f"{name}.npy").write_bytes(embeddings)
    (folder / f"{name}.jsonl").write_bytes(rows)
    known = json.dumps(known | about) if isinstance(about, dict) else about or json.dumps(known)
    (folder / f"{name}.json").write_text(known)


def add(folder):
    with Catalogue.open(folder / "shop.db") as shop:
        shop.add_shards(folder / "out", progress=False)
        return [shop.item(number) for number in (1, 2, 3)], shop.gallery.embeddings


def changed(**values):
    return lines(ROWS[0], ROWS[1] | values, ROWS[2])


# What is given in place of a shard's files, and a part of the line that refuses it.
SHARDS = {
    "a shard of other numbers": ({"embeddings": npy(NUMBERS + 1)[:-1]}, "no rows of photos"),
    "a shard of 5 numbers": ({"embeddings": npy(NUMBERS.repeat(2, 1))}, "no rows of photos"),
    "a shard of float64": ({"embeddings": npy(NUMBERS.astype(float))}, "no rows of photos"),
    "a shard of objects": ({"embeddings": npy(np.array([{}, {}, {}]))}, "no rows of photos"),
    "a shard of one axis": ({"embeddings": npy(NUMBERS[:, 0])}, "no rows of photos"),
    "a shard of 10**30": ({"embeddings": npy(NUMBERS * 1e30)}, "no rows of photos"),
    "a shard of NaN": ({"embeddings": npy(NUMBERS * np.nan)}, "no rows of photos"),
    "a shard that is an archive": ({"embeddings": b"PK\3\4"}, "no rows of photos"),
    "a shard of more numbers than rows": ({"rows": lines(*ROWS[:2])}, "no rows of photos"),
    "a shard of more rows than numbers": ({"rows": lines(*ROWS, ROWS[0])}, "no rows of photos"),
    "a shard's row that is no JSON": ({"rows": b"{}\n{\n{}\n"}, "no rows of photos"),
    "a shard's row that is a list": ({"rows": b"[]\n[]\n[]\n"}, "no rows of photos"),
    "a shard's row nested deep": ({"rows": b"[" * 100_000 + b"\n"}, "no rows of photos"),
    "a shard's payload nested 900 deep": (
        {"rows": b'{"path": "/0.jpg", "payload": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}\n"},
        "no rows of photos",
    ),
    "a shard's row without a path": ({"rows": b"{}\n{}\n{}\n"}, "no rows of photos"),
    "a shard's row that is no UTF-8": ({"rows": b'{"path": "\xff"}\n' * 3}, "no rows of photos"),
    "a shard's path that is a number": ({"rows": changed(path=5)}, "no rows of photos"),
    "a shard's path with half a letter": ({"rows": changed(path="/\ud800")}, "no rows of photos"),
    "a shard's payload that is a list": ({"rows": changed(payload=[1])}, "no rows of photos"),
    "a shard's box of nothing": ({"rows": changed(box="5,5,5,9")}, "no rows of photos"),
    "a shard's hash of 5 bytes": ({"rows": changed(hash="0011223344")}, "no rows of photos"),
    "a shard's field to come": ({"rows": changed(colour="red")}, "no rows of photos"),
    "a shard's hash that is none": ({"rows": changed(hash="xyz")}, "no rows of photos"),
    "a shard's hash that is a number": ({"rows": changed(hash=7)}, "no rows of photos"),
    "a shard's box that is a list": ({"rows": changed(box=[1, 2])}, "no rows of photos"),
    "a shard's size of 2**70": ({"rows": changed(size=2**70)}, "no rows of photos"),
    "a shard's size of text": ({"rows": changed(size="x")}, "no rows of photos"),
    "a shard's look of a dict": ({"rows": changed(look={})}, "no rows of photos"),
    "a shard's problem that is a list": ({"rows": changed(problem=[1])}, "no rows of photos"),
    "a shard's count of others": ({"about": {"count": 9}}, "no rows of photos"),
    "a shard's -1 numbers": ({"about": {"dimension": -1}}, "is damaged"),
    "a shard's model of a list": ({"about": {"model": [1]}}, "is damaged"),
    "a shard of another shard": ({"about": {"shard": 5}}, "is damaged"),
    "a shard that says nothing": ({"about": "null"}, "is damaged"),
    "a shard that says it deep": ({"about": "[" * 100_000}, "is damaged"),
    "a shard with a field to come": ({"about": {"colour": 1}}, "is damaged"),
    "a shard of 999,999,999": ({"name": "00000-of-999999999"}, "more than 100000"),
}


def test_a_whole_shard_is_taken(tmp_path):
    write(tmp_path / "out")
    items, embeddings = add(tmp_path)
    assert [item.path for item in items] == ["/0.jpg", "/1.jpg", "/2.jpg"]
    np.testing.assert_array_equal(embeddings, NUMBERS)


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_is_refused_in_one_line(what, tmp_path):
    given, message = SHARDS[what]
    write(tmp_path / "out", **given)
    with pytest.raises(InputError, match=message) as caught:
        add(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("ending", [".json", ".npy", ".jsonl"])
def test_a_pipe_in_a_shards_place(ending, tmp_path):
    write(tmp_path / "out")
    path = tmp_path / "out" / f"00000-of-00001{ending}"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="damaged|cannot be read"):
        add(tmp_path)
