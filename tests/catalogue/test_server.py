"""What the server answers, and what it refuses."""

import base64
import shutil
import threading
import zlib

import cv2
import numpy as np
import pytest
from fakes import FakeEmbedder, make_shop, write_photo

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.alike import Alike
from cbam_jax.catalogue.store import Store

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'cbam_jax[serve]'")
pytest.importorskip("httpx2", reason="HTTPX is not installed: pip install 'cbam_jax[test]'")
from starlette.testclient import TestClient

from cbam_jax.catalogue import server
from cbam_jax.catalogue.server import asking, explaining, finding, uploads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    make_shop(folder)
    return folder


@pytest.fixture(scope="module")
def photos(folder):
    return sorted((folder / "photos").glob("*/*"))


@pytest.fixture(scope="module")
def client(folder):
    with TestClient(server.create_app(folder / "shop.db", FakeEmbedder())) as client:
        yield client


def pairs(response):
    assert response.status_code == 200, response.text
    return [(n["id"], n["distance"]) for n in response.json()["neighbours"]]


def found(folder, *arguments, **options):
    with Catalogue.open(folder / "shop.db", FakeEmbedder()) as shop:
        return [(n.id, n.distance) for n in shop.find(*arguments, **options)]


def test_a_search_answers_as_the_catalogue_does(client, folder, photos):
    content = photos[3].read_bytes()
    assert pairs(client.post("/search?k=5", content=content)) == found(folder, photos[3], k=5)
    every = client.post("/search?k=5&copies=true", content=content)
    assert pairs(every) == found(folder, photos[3], k=5, copies=True)
    assert pairs(client.post("/search?id=7&k=5")) == found(folder, 7, k=5)
    boxed = client.post("/search?k=3&box=4,4,30,20", content=content)
    assert pairs(boxed) == found(folder, photos[3], k=3, box=[4, 4, 30, 20])
    filtered = client.post("/search?id=7&where=category=dress&where=category!=hat")
    assert pairs(filtered) == found(folder, 7, where=["category=dress", "category!=hat"])
    again = client.post("/search?id=7&k=5&rerank=aqe:k=3")
    assert pairs(again) == found(folder, 7, k=5, rerank="aqe:k=3")
    refused = client.post("/search?id=7&rerank=aqe:k=99")
    assert refused.status_code == 400
    assert "k and k1 up to 50" in refused.json()["error"]
    first = client.post("/search?k=1", content=content).json()["neighbours"][0]
    payload = {"category": "dress"}
    assert first == {"id": 4, "distance": 0.0, "same": True, "copies": [], "copy_of": None,
                     "name": "06.png", "payload": payload}  # fmt: skip


def test_searches_at_once_are_each_answered(client, folder, photos):
    asked = [row % 12 for row in range(40)]
    answers = [None] * len(asked)

    def ask(row):
        content = photos[asked[row]].read_bytes()
        answers[row] = client.post("/search?k=2", content=content)

    threads = [threading.Thread(target=ask, args=[row]) for row in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pairs(answer)[0] for answer in answers] == [(row + 1, 0.0) for row in asked]


def test_items_and_their_photos_without_paths_and_exif(client, folder, photos, tmp_path):
    assert client.get("/health").json() == {"status": "ok", "photos": 12}
    assert client.get("/categories").json() == {"categories": ["dress", "hat"]}
    item = client.get("/items/7").json()
    assert item == {
        "id": 7,
        "name": photos[6].name,
        "payload": {"category": "hat"},
        "problem": None,
    }
    image = cv2.imencode(".jpg", np.full((300, 200, 3), 90, np.uint8))[1].tobytes()
    exif = b"\xff\xe1\x00\x16Exif\0\0MM\0*\0\0\0\x08\0\0\0\0SECRET"[: 2 + 0x16 + 2]
    before = photos[11].read_bytes()
    photos[11].write_bytes(image[:2] + exif + image[2:])
    answer = client.get("/items/12/photo?size=100")
    photos[11].write_bytes(before)
    assert answer.headers["content-type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(answer.content, np.uint8), 1).shape == (100, 67, 3)
    assert b"Exif" not in answer.content


def test_new_stock_is_found_at_once(client, folder):
    new = write_photo(folder / "new.png", 99)
    with Catalogue.open(folder / "shop.db", FakeEmbedder()) as shop:
        shop.add(new, progress=False)
        assert pairs(client.post("/search?k=1", content=new.read_bytes()))[0] == (13, 0.0)
        copy = shutil.copy(new, folder / "copy.png")
        shop.add(copy, progress=False)
        first = client.post("/search?k=1", content=new.read_bytes()).json()["neighbours"][0]
        assert first["copies"] == [{"id": 14, "name": "copy.png"}]
        shop.remove([14])
        shop.remove([13])
    assert len(pairs(client.post("/search?k=50", content=new.read_bytes()))) == 12


@pytest.fixture
def alike(monkeypatch):
    """What a model would say of a pair: bright on the left, nothing where both are one photo."""

    def pair_heat(embedder, query, result):
        heat = np.zeros((64, 48), np.float32)
        if query.content != result.content:
            heat[:, :24] = 1
        pictures = [np.full((64, 48, 3), shade, np.uint8) for shade in (60, 200)]
        return Alike(*pictures, heat, heat)

    monkeypatch.setattr("cbam_jax.catalogue.catalogue.pair_heat", pair_heat)


def test_why_two_are_alike_is_two_pictures(client, photos, alike):
    for answer in (
        client.post("/items/5/why?query=3"),
        client.post("/items/5/why", content=photos[2].read_bytes()),
    ):
        assert answer.status_code == 200
        found = answer.json()
        assert found.keys() == {"query", "result", "empty"}
        assert not found["empty"]
        images = [
            cv2.imdecode(np.frombuffer(base64.b64decode(found[n]), np.uint8), 1).astype(int)
            for n in ("query", "result")
        ]
        for image in images:  # Blue, green, red.
            assert image[30, 10, 2] > image[30, 10, 0]
            assert image[30, 40, 0] > image[30, 40, 2]
        assert (images[1] - images[0]).mean() > 50
    assert client.post("/items/3/why?query=3").json()["empty"]


@pytest.mark.parametrize(
    ("address", "content", "status", "message"),
    [
        ("/items/99/why?query=3", None, 400, "no photo 99"),
        ("/items/3/why?query=99", None, 400, "no photo 99"),
        ("/items/3/why", b"<html>", 400, "this is no photo"),
        ("/items/3/why", None, 400, "or give query=ID of one"),
        ("/items/3/why?query=1&box=1", None, 400, "box=1: give x1,y1,x2,y2"),
        ("/items/3/why?query=99999999999999999999", None, 422, "query query"),
        ("/items/..%2f3/why?query=1", None, 404, "not found"),
    ],
)
def test_what_cannot_be_explained_is_one_line(client, alike, address, content, status, message):
    answer = client.post(address, content=content)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert message in answer.json()["error"]
    assert "shop.db" not in answer.json()["error"]


def test_a_pair_whose_file_is_gone_is_told_without_its_path(client, photos, alike):
    content = photos[4].read_bytes()
    photos[4].unlink()
    try:
        answer = client.post("/items/5/why?query=1")
        assert answer.json() == {"error": "photo 5: its file cannot be read"}
    finally:
        photos[4].write_bytes(content)


def huge_png(side):
    """The header of an image of so many pixels a side, and little behind it."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)

    header = side.to_bytes(4) + side.to_bytes(4) + b"\x08\x02\0\0\0"
    content = zlib.compress(b"\0" * 3000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content)


@pytest.mark.parametrize(
    ("address", "content", "status", "message"),
    [
        ("/search?k=2", None, 400, "no photo: send one, curl --data-binary @FILE, or give id=ID"),
        ("/search", b"<html><script>alert(1)</script>", 400, "this is no photo"),
        ("/search", b"\x80\x04\x95cposix\nsystem\n", 400, "this is no photo"),
        ("/search", huge_png(40_000), 400, "40000 x 40000 pixels: shrink it"),
        ("/search", huge_png(40), 400, "cannot be decoded"),
        ("/search", b"\xff\xd8\xff\xe0" + b"x" * 99, 400, "cannot be decoded"),
        ("/search?box=1,1", b"\xff\xd8\xff\xe0", 400, "box=1,1: give x1,y1,x2,y2"),
        ("/search?id=99", None, 400, "no photo 99"),
        ("/search?id=0", None, 422, "query id"),
        ("/search?id=1;drop table item", None, 422, "query id"),
        ("/search?id=1&k=100000", None, 422, "query k"),
        ("/search?id=1&where=hat", None, 400, "where=hat: give NAME=VALUE"),
        ("/search?id=1&where=price<'x' OR 1=1", None, 400, "compares numbers"),
    ],
)
def test_what_cannot_be_searched_is_one_line(client, address, content, status, message):
    answer = client.post(address, content=content)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]
    assert "/" not in answer.json()["error"].replace("x1,y1,x2,y2", "")
    assert client.get("/health").json()["photos"] == 12


def test_a_form_is_told_how_a_photo_is_sent(client, photos, alike):
    for address in ("/search?k=1", "/items/3/why"):
        answer = client.post(address, files={"file": photos[3].read_bytes()})
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            "this is a form: send the photo itself: curl --data-binary @FILE"
        )


@pytest.mark.parametrize(
    ("method", "address", "use"),
    [
        ("GET", "/items/1/why", "POST /items/1/why?query=ID"),
        ("GET", "/search", "POST /search?id=ID"),
        ("POST", "/items/1", "GET /items/1"),
    ],
)
def test_another_method_is_told_which_to_use(client, method, address, use):
    answer = client.request(method, address)
    assert answer.status_code == 405
    assert answer.json() == {"error": f"method not allowed: use {use}"}
    assert answer.headers["allow"] == use.split()[0]


@pytest.mark.parametrize(
    "address",
    ["/items/../../etc/passwd", "/items/%2e%2e%2fshop.db", "/items/-1", "/items/99", "/shop.db",
     "/items/1e3", "/items/99999999999999999999", "/items/99/photo", "/items/1/photo?size=99999",
     "/page.html/../app.py", "/docs", "/search"],
)  # fmt: skip
def test_nothing_else_is_served(client, address):
    answer = client.get(address)
    assert answer.status_code in (404, 405, 422)
    assert list(answer.json()) == ["error"]


def test_a_photo_whose_file_is_gone_is_not_found(client, photos):
    content = photos[0].read_bytes()
    photos[0].unlink()
    try:
        assert client.get("/items/1/photo").status_code == 404
        photos[0].write_bytes(b"no picture")
        assert client.get("/items/1/photo").json() == {
            "error": "the photo's file cannot be decoded"
        }
    finally:
        photos[0].write_bytes(content)


def test_bodies_have_a_limit_also_where_they_do_not_say_their_size(client, monkeypatch):
    monkeypatch.setattr(uploads, "LARGEST", 3 << 20)
    for content in (b"x" * (4 << 20), (b"x" * (1 << 20) for _ in range(9))):
        answer = client.post("/search", content=content)
        assert (answer.status_code, answer.json()) == (413, {"error": "a photo has at most 3 MB"})


def test_every_answer_forbids_what_the_page_does_not_need(client):
    for address in ("/", "/page.js", "/items/1", "/nothing"):
        headers = client.get(address).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    assert "http" not in page.replace("<!doctype html>", "")
    assert "style=" not in page
    assert client.get("/openapi.json").json()["paths"].keys() == {
        "/search", "/health", "/categories", "/items/{id}", "/items/{id}/photo", "/items/{id}/why",
    }  # fmt: skip


def test_a_name_that_only_leads_here_is_refused(folder):
    app = server.create_app(folder / "shop.db", FakeEmbedder(), hosts={"localhost", "[::1]"})
    with TestClient(app) as client:
        for host, status in (("localhost:8000", 200), ("[::1]:8000", 200), ("evil.example", 421)):
            assert client.get("/health", headers={"host": host}).status_code == status


def test_when_too_many_wait_they_are_told(folder, photos, monkeypatch):
    monkeypatch.setattr(finding, "_WAITING", 1)
    begun, go = threading.Event(), threading.Event()

    class Waits(FakeEmbedder):
        def embed_file(self, path, *, box=None):
            begun.set()
            go.wait(30)
            return super().embed_file(path, box=box)

    finder = finding.Finder(folder / "shop.db", Waits())
    search = finding.Search(photos[0].read_bytes(), None, 1, (), None)
    first = finder.find(search)
    begun.wait(30)
    second = finder.find(search)
    with pytest.raises(asking.Busy):
        finder.find(search)
    go.set()
    assert first.result(30)[0].id == second.result(30)[0].id == 1
    finder.close()


def test_when_too_many_ask_why_they_are_told(folder, monkeypatch):
    monkeypatch.setattr(explaining, "_WAITING", 1)
    begun, go = threading.Event(), threading.Event()

    def slow(embedder, query, result):
        begun.set()
        go.wait(30)
        return Alike(*np.zeros((2, 4, 4, 3), np.uint8), *np.zeros((2, 4, 4), np.float32))

    monkeypatch.setattr("cbam_jax.catalogue.catalogue.pair_heat", slow)
    explainer = explaining.Explainer(folder / "shop.db", FakeEmbedder())
    first = explainer.explain(explaining.Pair(1, None, 2))
    begun.wait(30)
    second = explainer.explain(explaining.Pair(1, None, 99))
    with pytest.raises(asking.Busy):
        explainer.explain(explaining.Pair(1, None, 3))
    go.set()
    assert first.result(30)["empty"]
    with pytest.raises(InputError, match="no photo 99"):
        second.result(30)
    explainer.close()


def test_an_embedder_that_fails_is_told_and_the_next_is_answered(folder, photos):
    class Fails(FakeEmbedder):
        def embed_file(self, path, *, box=None):
            if self.embedded == 0:
                self.embedded = 1
                raise RuntimeError("the device is gone, /secret/path")
            return super().embed_file(path, box=box)

    app = server.create_app(folder / "shop.db", Fails())
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/search", content=photos[0].read_bytes())
        assert (answer.status_code, answer.json()) == (
            500, {"error": "a mistake of the server's: see its log"},
        )  # fmt: skip
        assert len(pairs(client.post("/search", content=photos[0].read_bytes()))) == 12


def test_a_port_that_is_taken_and_another_models_catalogue_are_told(folder):
    with server.bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
            server.bound("127.0.0.1", port)
    with pytest.raises(InputError, match="cannot listen on nowhere.invalid"):
        server.bound("nowhere.invalid", 0)
    with pytest.raises(InputError, match="another model"):
        server.create_app(folder / "shop.db", FakeEmbedder("0" * 64))


PAYLOADS = {
    "half a letter": ('{"category": "\\ud800"}', {"category": "\ud800"}),
    "half a name": ('{"\\udc00": 1}', {"\udc00": 1}),
    "no number": ('{"price": NaN}', {"price": None}),
    "a number beyond all": ('{"price": 1e999}', {"price": None}),
    "a zero byte": ('{"category": "a\\u0000b"}', {"category": "a\0b"}),
    "a number of 4,000 digits": ('{"price": %s}' % ("9" * 4_000), {"price": int("9" * 4_000)}),
}


@pytest.mark.parametrize("what", PAYLOADS)
def test_every_answer_is_json_whatever_a_payload_holds(what, client, folder):
    text, payload = PAYLOADS[what]

    def keep(text):
        with Store(folder / "shop.db") as store, store.transaction():
            store.run("UPDATE item SET payload = ? WHERE id = 4", [text])

    keep(text)
    try:
        assert client.get("/items/4").json()["payload"] == payload
        neighbours = client.post("/search?id=3&k=12").json()["neighbours"]
        assert [n["payload"] for n in neighbours if n["id"] == 4] == [payload]
        for address in ("/categories", "/health"):
            assert client.get(address).status_code in (200, 400)
        for asked in ("category=coat", "price=7", "%ff%fe=1", "a=%ED%A0%80"):
            answer = client.post(f"/search?id=3&where={asked}")
            assert answer.status_code == 400
            assert answer.json()["error"].isprintable()
    finally:
        keep('{"category": "dress"}')
