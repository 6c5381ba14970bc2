"""Copies of a catalogue in Milvus: a few lines that answer like it, Lite, and a real server."""

import importlib.util
import os
import re
import uuid

import numpy as np
import pytest
from fakes import FakeEmbedder, write_photos

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue, commands
from cbam_jax.catalogue.milvus import address, is_address, searching, syncing
from cbam_jax.catalogue.milvus.collection import Collection
from cbam_jax.catalogue.milvus.conditions import expression
from cbam_jax.catalogue.milvus.searching import neighbours, settled

# Where a port is taken, the server's package tries the next one and leaves its socket open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
WHERES = [
    None, "category=hat", "category!=hat", "price<3", "price!=2.5",
    ["category=dress", "price>1"], "size=9", "size!=9", 'odd "name"\\=it\'s "x"\\',
    "new=true",
]  # fmt: skip


class Embedder(FakeEmbedder):
    def __init__(self, dimension=8):
        super().__init__()
        self.dimension = dimension


def payload(i):
    """What is known of a photo: texts, numbers, one or the other, booleans, nothing."""
    known = {"category": ("hat", "dress", "bag")[i % 3], "price": i % 9 / 2}
    if i % 4 == 0:
        known["size"] = 9 if i % 8 else "nine"
    if i % 5 == 0:
        known |= {'odd "name"\\': 'it\'s "x"\\', "new": i % 2 == 0}
    return known if i % 7 else {}


def make_catalogue(path, count, dimension, seed=0):
    """Embeddings of which a tenth are copies of others, and sixty of one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimension)).astype(np.float32) * 3
    x[rng.integers(0, count, count // 10)] = x[rng.integers(0, count, count // 10)]
    x[count // 2 : count // 2 + 60] = x[5]
    with Catalogue.open(path, Embedder(dimension)) as shop:
        shop.add_embeddings([f"p{i}" for i in range(count)], x, [payload(i) for i in range(count)])
    return x


def compare(path, uri, embeddings, wheres=WHERES, ks=(1, 10, 70)):
    """Assert that a catalogue and its copy find the same, with the same distances and ties."""
    rng = np.random.default_rng(1)
    dimension = embeddings.shape[1]
    queries = [embeddings[5], embeddings[3] + np.float32(1e-3), rng.normal(size=dimension)]
    queries = [[query.astype(np.float32)] for query in queries]
    embedder = Embedder(dimension)
    with Catalogue.open(path, embedder) as shop, Catalogue.open(uri, embedder) as copy:
        assert len(copy) == len(shop)
        cases = [(queries, where, 10) for where in wheres]
        for asked, where, k in [*cases, *(([[6], [18, 4], *queries], None, k) for k in ks)]:
            expected = shop.find_all(asked, k, where=where)
            assert copy.find_all(asked, k, where=where) == expected, (where, k)
            assert all(expected)
        steps = "aqe:k=3,k_reciprocal:k1=4:k2=2"
        expected = shop.find_all([[6], *queries], 10, rerank=steps)
        assert copy.find_all([[6], *queries], 10, rerank=steps) == expected


class FakeCollection:
    """Rows that are searched in float32, equal distances in the worst order."""

    def __init__(self, embeddings):
        self.embeddings, self.asked = embeddings, []

    def search(self, queries, limit, filter_, fields, index):
        self.asked.append((len(queries), limit))
        for query in queries:
            distances = np.sum((self.embeddings - query) ** 2, axis=1, dtype=np.float32)
            order = np.lexsort((-np.arange(len(distances)), distances))[:limit]
            yield [{"id": int(i) + 1, "embedding": self.embeddings[i].tolist()} for i in order]


def test_ties_are_settled_however_many_there_are():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)).astype(np.float32)
    x[100:400] = x[7]
    queries = x[[7, 8]]
    for k in (1, 5, 301, 302, 499, 600):
        collection = FakeCollection(x)
        found = neighbours(collection, queries, k, "", "flat")
        for query, (distances, ids, rows) in zip(queries, found, strict=True):
            exact = np.sqrt(np.sum((x.astype(np.float64) - query) ** 2, axis=1)).astype(np.float32)
            order = np.argsort(exact, kind="stable")[:k]
            assert ids.tolist() == (order + 1).tolist()
            np.testing.assert_array_equal(distances, exact[order])
            assert [row["id"] for row in rows] == ids.tolist()
    collection = FakeCollection(x)
    neighbours(collection, queries, 1, "", "flat")
    assert collection.asked == [(2, 17), (1, 68), (1, 272), (1, 1088)]
    assert len(neighbours(FakeCollection(x[:100]), queries, 3, "", "flat")[1][1]) == 3


def test_more_ties_than_an_answer_holds_are_told(monkeypatch):
    monkeypatch.setattr(searching, "MOST", 100)
    collection = FakeCollection(np.ones((200, 1), np.float32))
    query = np.ones((1, 1), np.float32)
    refused("too many for Milvus to order", neighbours, collection, query, 3, "", "flat")
    assert len(neighbours(collection, query, 3, "", "hnsw")[0][1]) == 3
    refused(
        "k=101, with .*: Milvus finds 100 at most", neighbours, collection, query, 101, "", "flat"
    )


def test_what_rounding_may_have_left_out_is_not_settled():
    query = np.full(100, 100, np.float32)
    near = 1 + 1e-3  # Of a norm of 1,000, squares in float32 are wrong by far more.
    assert not settled(query, np.array([1, near]), 1)
    assert settled(query, np.array([1, 6.0]), 1)
    assert settled(np.zeros(100), np.array([1, near]), 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("milvus://localhost:1953/shop", ("http://localhost:1953", "shop")),
        ("milvus://10.0.0.1/shop", ("http://10.0.0.1:19530", "shop")),
        ("milvus+tls://milvus.example.com:443/a_b", ("https://milvus.example.com:443", "a_b")),
        ("milvus:/data/copy.db", ("/data/copy.db", "photos")),
    ],
)
def test_addresses(text, expected):
    assert address(text)[1:3] == expected


@pytest.mark.parametrize(
    "text",
    ["milvus://localhost", "milvus://localhost:19530/", "milvus://h:1/a-b", "milvus:copy.txt",
     "milvus://h:1/a/b", "milvus://u:p@h:1/a", "postgres://h/a", "http://h:19530/a"],
)  # fmt: skip
def test_what_is_no_address_is_told(text):
    refused("give", address, text)
    refused("milvus://HOST:PORT/COLLECTION", Catalogue.open, text)


@pytest.mark.parametrize("command", [["find", "3"], ["add", "x.jpg"]])
def test_a_wrong_scheme_is_told_whatever_is_asked(command):
    name, *rest = command
    refused("postgres://h/a is no catalogue: give", commands.main, [name, "postgres://h/a", *rest])


def test_paths_are_no_addresses(tmp_path):
    assert not any(map(is_address, ("shop.db", "a:b", "C:\\shop.db", tmp_path, "milvus.db")))


def test_a_copy_is_not_changed_but_by_sync():
    for command in (["add", "x.jpg"], ["remove", "3"], ["verify"], ["rebuild", "--model=m"]):
        name, *rest = command
        refused(
            "is a copy, for find, list and serve alone", commands.main, [name, "milvus:a.db", *rest]
        )


@pytest.mark.parametrize("flag", ["--problems", "--duplicates=near", "--duplicates=exact"])
def test_what_a_copy_does_not_hold_is_asked_of_the_file(flag):
    said = refused(
        "holds the photos that can be found", commands.main, ["list", "milvus:a.db", flag]
    )
    assert f"`cbam-jax catalogue list CATALOGUE {flag}`" in said


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("other.db", "other.db is no folder of shards; did you mean milvus:other.db?"),
        ("10.0.0.1:19530/shop", "; did you mean milvus://10.0.0.1:19530/shop?"),
        ("parts/7", "parts/7 is no folder of shards: name one, or a copy, milvus://HOST"),
    ],
)
@pytest.mark.parametrize("index", [[], ["--index=hnsw"]])
def test_a_copy_without_its_scheme_is_asked_for(tmp_path, monkeypatch, other, told, index):
    monkeypatch.chdir(tmp_path)
    refused(re.escape(told), commands.main, ["sync", "shop.db", other, *index])
    if other.endswith(".db"):  # Milvus Lite makes a folder.
        os.mkdir(other)
        refused(re.escape(told), commands.main, ["sync", "shop.db", other, *index])
        told = "other.db is a folder, no catalogue's file; did you mean milvus:other.db?"
        refused(re.escape(told), commands.main, ["find", other, "3"])


@pytest.mark.parametrize("command", [["find", "3"], ["list"]])
def test_a_copy_that_is_not_there_is_not_made(tmp_path, command):
    name, *rest = command
    copy = f"milvus:{tmp_path}/fresh.db"
    refused(f"{copy} is not there: make it with", commands.main, [name, copy, *rest])
    assert not any(tmp_path.iterdir())


def test_conditions_that_are_none_are_refused():
    refused("--where=price<cheap: < compares numbers", expression, "price<cheap")
    refused("--where=price: give NAME=VALUE", expression, ["price"])


@pytest.mark.skipif(
    importlib.util.find_spec("pymilvus") is not None, reason="pymilvus is installed"
)
def test_what_is_missing_is_told(tmp_path):
    make_catalogue(tmp_path / "shop.db", 70, 8)
    sync = ["sync", f"{tmp_path}/shop.db", "milvus://localhost:1/shop"]
    refused("needs pymilvus: pip install 'cbam_jax", commands.main, sync)
    refused("needs pymilvus", commands.main, ["find", "milvus://localhost:1/shop", "3"])


def refused(match, function, *arguments, **options):
    with pytest.raises(InputError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server: that of MILVUS_URI, or one that is started from its PyPI package."""
    if "MILVUS_URI" in os.environ:
        yield os.environ["MILVUS_URI"]
        return
    milvus = pytest.importorskip("milvus", reason="no server: pip install milvus==2.3.5")
    running = milvus.MilvusServer()
    running.set_base_dir(str(tmp_path_factory.mktemp("milvus")))
    running.start()
    yield f"milvus://127.0.0.1:{running.listen_port}"
    running.stop()


of_lite = pytest.mark.parametrize("copy", ["lite"], indirect=True)  # A server takes longer.


@pytest.fixture(params=["lite", "server"])
def copy(request, tmp_path):
    """Where a copy may be made."""
    pytest.importorskip("pymilvus", reason="pip install 'cbam_jax[milvus]'")
    if request.param == "lite":
        pytest.importorskip("milvus_lite", reason="pip install 'cbam_jax[milvus]'")
        return f"milvus:{tmp_path}/copy.db"
    return f"{request.getfixturevalue('server')}/test_{uuid.uuid4().hex}"


@pytest.fixture
def shop(tmp_path):
    make_catalogue(tmp_path / "shop.db", 200, 8)
    return tmp_path / "shop.db"


def sync(path, copy, index=None):
    with Catalogue.open(path, Embedder()) as catalogue:
        return catalogue.sync(copy, index, progress=False)


def test_a_copy_finds_what_the_file_finds_and_follows_it(shop, copy, monkeypatch):
    assert sync(shop, copy)[:4] == (200, 0, 0, 200)
    with Catalogue.open(shop, Embedder()) as catalogue:
        embeddings = np.array(catalogue.gallery.embeddings)
    # Each answer of a server waits, so that it is asked less.
    compare(shop, copy, embeddings, WHERES if copy.endswith(".db") else WHERES[2:9:3])
    assert sync(shop, copy)[:4] == (0, 0, 0, 200)
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    with Catalogue.open(shop, Embedder()) as catalogue:
        catalogue.add_embeddings(["p4", "new", "other"], x, [{"category": "bag"}] * 3)
        catalogue.remove([3, 104])
    monkeypatch.setattr(syncing, "_BYTES", 1)  # A photo at a time.
    put, left = Collection.put, [2]

    def ended(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return put(*arguments, **options)

    monkeypatch.setattr(Collection, "put", ended)
    with pytest.raises(KeyboardInterrupt):
        sync(shop, copy)
    monkeypatch.setattr(Collection, "put", put)
    assert sync(shop, copy)[:4] == (1, 0, 0, 200)
    with Catalogue.open(shop, Embedder()) as catalogue, Catalogue.open(copy, Embedder()) as other:
        assert list(other.items()) == list(catalogue.items())
        assert list(other.items("category=hat")) == list(catalogue.items("category=hat"))
        assert other.find(x[0], k=5) == catalogue.find(x[0], k=5)


@of_lite
def test_only_its_own_catalogue_and_model(shop, copy, tmp_path):
    refused("is not there: make it with", Catalogue.open, copy)
    sync(shop, copy)
    make_catalogue(tmp_path / "other.db", 70, 8)
    refused("holds the photos of another catalogue: name", sync, tmp_path / "other.db", copy)
    refused("has the index flat, not hnsw: name another", sync, shop, copy, "hnsw")
    refused("embeddings of another model", Catalogue.open, copy, FakeEmbedder("e" * 64))
    with Catalogue.open(copy, Embedder()) as other:
        assert other.find(3, where=["category=hat", "category=dress"]) == []
        refused("no photo 999 with an embedding", other.find, 999)
        refused("is a copy that is found in and listed", other.remove, [3])
        refused("is a copy that is found in", other.add, [tmp_path])
    with Catalogue.open(shop, Embedder()) as file:
        file.remove([item.id for item in file.items()])
    sync(shop, copy)
    with Catalogue.open(copy, Embedder()) as other:
        refused(
            f"can be found: add some with `cbam-jax catalogue sync CATALOGUE {copy}", other.find, 3
        )


@of_lite
def test_what_no_photo_has_is_told_as_of_the_file(shop, copy):
    sync(shop, copy)
    wheres = [
        "category=hut", "category!=zebra", "categry=hat", "categry<3", "size=10", "new=maybe",
        ["category=hut", "colour=red"], ["price<0", "category=bags"], {"price": 77},
        "category<3",
    ]  # fmt: skip
    with Catalogue.open(shop, Embedder()) as file, Catalogue.open(copy, Embedder()) as other:
        for where in wheres:
            told = refused("no photo has", file.find, 3, 5, where=where)
            assert refused("no photo has", other.find, 3, 5, where=where) == told
            refused("no photo has", lambda where=where: list(other.items(where)))
        for where in ("price<0", "category!=hat", ["category=hat", "size=9", "price<0"]):
            assert other.find(3, 5, where=where) == file.find(3, 5, where=where)


def test_another_index_is_measured_and_said(shop, copy, capsys):
    index = "ivf" if copy.endswith(".db") else "hnsw"
    assert commands.main(["sync", str(shop), copy, f"--index={index}"]) == 0
    recall = re.search(rf"200 can be found; {index}, recall@10 (.*) of exact", out(capsys))
    assert 0.5 < float(recall[1]) <= 1
    commands.main(["find", copy, "6", "-k", "3", "--json"])
    assert f"is searched by {index}, and not all" in capsys.readouterr().err


def out(capsys):
    return capsys.readouterr().out


@of_lite
def test_why_is_asked_of_the_photos_and_parts_that_the_file_names(copy, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    table = tmp_path / "parts.csv"
    table.write_text(f"path,x1,y1,x2,y2\n{photos[1]},5,6,30,31\n{photos[4]},,,,\n")
    monkeypatch.setattr("cbam_jax.catalogue.catalogue.pair_heat", lambda _, *pair: pair)
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as shop:
        shop.add(table, progress=False)
        shop.sync(copy, progress=False)
        with Catalogue.open(copy, FakeEmbedder()) as other:
            assert other.why(1, 2) == shop.why(1, 2)
            assert other.why(2, 1)[1].box == [5, 6, 30, 31]
            asked = (photos[7].read_bytes(), 1, [4, 4, 30, 20])
            assert other.why(*asked) == shop.why(*asked)
            refused("no photo 9", other.why, 1, 9)


@of_lite
def test_it_is_served(copy, tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'cbam_jax[serve]'")
    testclient = pytest.importorskip("starlette.testclient")
    from cbam_jax.catalogue import server

    photos = write_photos(tmp_path / "photos")
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as shop:
        shop.add([tmp_path / "photos"], progress=False)
        shop.sync(copy, progress=False)
    answers = []
    for path in (tmp_path / "shop.db", copy):
        with testclient.TestClient(server.create_app(path, FakeEmbedder())) as client:
            content = photos[3].read_bytes()
            found = client.post("/search?k=5&where=category=hat", content=content).json()
            asked = [client.get(f"/{name}") for name in ("health", "categories", "items/3")]
            picture = client.get("/items/3/photo")
            assert picture.status_code == 200
            answers.append((found, [answer.json() for answer in asked], picture.content))
            assert client.get("/items/99").status_code == 404
    assert answers[0][0]["neighbours"]
    assert answers[0] == answers[1]


def test_copies_are_one(copy, tmp_path):
    photos = write_photos(tmp_path / "photos")
    for i in (3, 4, 9):
        photos[i].write_bytes(photos[2].read_bytes())
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as shop:
        shop.add([tmp_path / "photos"], progress=False)
        shop.sync(copy, progress=False)
        with Catalogue.open(copy, FakeEmbedder()) as other:
            cases = [
                (str(query), options)
                for query in (photos[2], photos[5])
                for options in ({}, {"copies": True}, {"where": "category=hat"})
            ]
            assert len(shop.find(cases[0][0], k=4)[0].copies) == 3
            # Each answer of a server waits.
            for query, options in [*cases, (3, {})] if copy.endswith(".db") else cases[:1]:
                expected = shop.find(query, k=4, **options)
                assert other.find(query, k=4, **options) == expected


@of_lite
def test_commands(shop, copy, capsys):
    assert commands.main(["sync", str(shop), copy]) == 0
    assert out(capsys) == "200 new, 0 changed, 0 removed; 200 can be found; flat, exact\n"
    answers = []
    for name in (str(shop), copy):
        commands.main(["find", name, "6", "-k", "3", "--where=price<4", "--json"])
        commands.main(["list", name, "--where=category=hat", "--csv"])
        answers.append(out(capsys))
    assert answers[0] == answers[1]


def test_who_does_not_answer_is_told(shop, tmp_path):
    pytest.importorskip("pymilvus", reason="pip install 'cbam_jax[milvus]'")
    address = "milvus://127.0.0.1:1/shop"
    refused("no Milvus answers at http://127.0.0.1:1: start it", Catalogue.open, address)
    refused("no Milvus answers at http://127.0.0.1:1: start it", sync, shop, address)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "shop.db"
    return path, make_catalogue(path, 20_000, 256)


@pytest.mark.slow
def test_twenty_thousand(copy, request):
    path, embeddings = request.getfixturevalue("large")
    sync(path, copy)
    compare(path, copy, embeddings, [None], (100,))
