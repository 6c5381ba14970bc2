"""Why two photos are alike: which part of which photo is measured, and what is shown."""

import types

import cv2
import numpy as np
import pytest
from fakes import FakeEmbedder, make_shop, write_photo

from cbam_jax import InputError, gradcam
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.alike import Photo, overlaid, pair_heat
from cbam_jax.data import cut_file
from cbam_jax.preprocessing import Preprocessing

CUT = Preprocessing(8, resize="squash")


@pytest.fixture
def embedder(monkeypatch):
    """A model whose heat is how much redder a photo is than the other, on the whole."""

    def pair_maps(model, queries, results):
        red = [x[..., 0] / 255 - np.mean(y[..., 0]) / 255 for x, y in
               ((queries, results), (results, queries))]  # fmt: skip
        return [types.SimpleNamespace(heat=np.clip(r, 0, 1).astype(np.float32)) for r in red]

    monkeypatch.setattr(gradcam, "pair_maps", pair_maps)
    fake = FakeEmbedder()
    fake.model = types.SimpleNamespace(
        preprocess=lambda images: images.astype(np.float32), features=None
    )
    fake.preprocessing = CUT
    return fake


def expected(content, box, other, other_box):
    image, beside = (cut_file(c, CUT, box=b) for c, b in ((content, box), (other, other_box)))
    heat = np.clip(image[..., 0] / 255 - beside[..., 0].mean() / 255, 0, 1).astype(np.float32)
    return cv2.resize(heat, (448, 448), interpolation=cv2.INTER_LINEAR)


def test_each_photo_has_the_heat_of_its_own_box(embedder, tmp_path):
    files = [write_photo(tmp_path / f"{i}.png", i).read_bytes() for i in (1, 2)]
    boxes = [[2, 3, 30, 40], None]
    found = pair_heat(embedder, *map(Photo, files, boxes))
    for heat, one, two in ((found.query_heat, 0, 1), (found.result_heat, 1, 0)):
        wanted = expected(files[one], boxes[one], files[two], boxes[two])
        np.testing.assert_allclose(heat, wanted, atol=1e-6)
    assert found.query.shape == found.result.shape == (448, 448, 3)
    larger = Preprocessing(448, resize="squash")
    np.testing.assert_array_equal(found.query, cut_file(files[0], larger, box=boxes[0]))
    assert not found.empty


def test_heat_is_laid_over_in_colour_and_none_is_pale():
    image = np.full((2, 2, 3), 100, np.uint8)
    heat = np.float32([[0, 0], [0, 1]])
    shown = overlaid(image, heat)
    assert (shown[0, 0].argmax(), shown[1, 1].argmax()) == (2, 0)
    assert (overlaid(image, 0 * heat) == 178).all()


def test_a_catalogue_says_why_by_file_bytes_and_id(embedder, tmp_path):
    make_shop(tmp_path)
    photos = sorted((tmp_path / "photos").glob("*/*"))
    table = tmp_path / "more.csv"
    table.write_text(f"path,x1,y1,x2,y2\n{write_photo(tmp_path / 'z.png', 50)},5,6,30,31\n")
    with Catalogue.open(tmp_path / "shop.db", embedder) as shop:
        shop.add(table, progress=False)
        by_id = shop.why(3, 13)
        content = [photos[2].read_bytes(), (tmp_path / "z.png").read_bytes()]
        boxes = [None, [5, 6, 30, 31]]
        wanted = [expected(content[i], boxes[i], content[1 - i], boxes[1 - i]) for i in (0, 1)]
        np.testing.assert_allclose([by_id.query_heat, by_id.result_heat], wanted, atol=1e-6)
        for query in (photos[2], content[0]):
            np.testing.assert_array_equal(shop.why(query, 13).query_heat, by_id.query_heat)
        boxed = shop.why(content[0], 13, box=[1, 2, 9, 12])
        assert not np.array_equal(boxed.query_heat, by_id.query_heat)
        photos[2].unlink()
        for query, result, message in (
            (3, 13, "photo 3: its file cannot be read"),
            (13, 3, "photo 3: its file cannot be read"),
            (13, 99, "no photo 99"),
            (b"no photo", 13, "cannot be decoded"),
        ):
            with pytest.raises(InputError, match=message):
                shop.why(query, result)
