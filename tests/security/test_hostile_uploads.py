"""What is sent to the server in the place of a photo."""

import pytest
from beside import beside
from cost import cheap  # noqa: F401, all is measured
from test_hostile_datasets import DAMAGED, IMAGES, JPEG, LARGE, png

NO_PHOTO, SHRINK, DECODED = "this is no photo", "pixels: shrink it first", "cannot be decoded"
# Of what is no image at all, an upload is told by its first bytes.
NO_IMAGES = {"text named .jpg", "zeros", "an HTML page", "an SVG"}


def ends_in(name, words):
    if name in NO_IMAGES:
        return NO_PHOTO
    return {LARGE: SHRINK, DAMAGED: DECODED}[words]


# What is sent, and a part of the line that is answered.
UPLOADS = {
    "nothing": (b"", "no photo: send one"),
    "a pickle": (b"\x80\x04\x95cposix\nsystem\n", NO_PHOTO),
    "a path": (b"/etc/passwd", NO_PHOTO),
    "an address": (b"http://169.254.169.254/latest/meta-data", NO_PHOTO),
    "a list of an archive": (b"PK\x03\x04" + bytes(99), NO_PHOTO),
    "text that clears the screen": (b"\x1b[2J", NO_PHOTO),
    "33 MB": (JPEG + bytes(33 << 20), "a photo has at most 32 MB"),
    "a PNG of more pixels than are sent": (png(9_000, 9_000), SHRINK),
    **{
        name: (content, ends_in(name, words))
        for name, (content, words) in IMAGES.items()
        if content
    },
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    pytest.importorskip("fastapi", reason="not installed: pip install 'cbam_jax[serve]'")
    pytest.importorskip("httpx2", reason="not installed: pip install 'cbam_jax[test]'")
    from starlette.testclient import TestClient

    from cbam_jax.catalogue import server

    fakes = beside("catalogue/fakes.py")
    folder = tmp_path_factory.mktemp("shop")
    fakes.make_shop(folder)
    with TestClient(server.create_app(folder / "shop.db", fakes.FakeEmbedder())) as client:
        yield client


@pytest.mark.parametrize("what", UPLOADS)
def test_an_upload_is_refused_in_one_line(what, client):
    content, message = UPLOADS[what]
    answer = client.post("/search?k=2", content=content)
    assert answer.status_code in (400, 413)
    assert list(answer.json()) == ["error"]
    line = answer.json()["error"]
    assert message in line
    assert line.isprintable()
    assert len(line) < 200
    assert client.get("/health").json()["photos"] == 12


def test_the_next_photo_is_answered(client):
    answer = client.post("/search?k=2", content=JPEG)
    assert len(answer.json()["neighbours"]) == 2
