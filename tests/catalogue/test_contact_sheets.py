"""What was found, on one page and in one picture."""

import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from fakes import write_photos

from cbam_jax.catalogue import Neighbour
from cbam_jax.catalogue.contact_sheets import Shown, page, sheet, thumbnail


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    files = [str(path) for path in write_photos(tmp_path_factory.mktemp("photos"), count=5)]
    payload = {"category": 'a "good" <hat>', "price": 5}
    found = [Neighbour(i, file, payload, i / 8) for i, file in enumerate(files)]
    gone = Neighbour(9, "/nowhere/x.jpg", {}, 2.0)
    return [
        Shown("<new>.jpg", files[:1], [*found, gone]),
        Shown("3", files[2:4], found[:1]),
        Shown("5", [], []),
    ]


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_its_photos_and_needs_nothing_else(answers):
    read = Reader(page(answers))
    assert read.tags.count("img") == 1 + 5 + 2 + 1
    assert read.tags.count("section") == 3
    assert "script" not in read.tags
    sources = [value for name, value in read.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert not re.search(r"https?://", page(answers))
    assert "2, distance 0.1250" in read.text
    assert "/" not in "".join(value for name, value in read.attributes if name == "title")
    assert 'category=a "good" <hat>' in read.text
    assert "the photo cannot be read" in read.text
    assert "Nothing was found." in read.text


def test_the_picture_has_a_row_a_query(answers):
    picture = sheet(answers)
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * (240 + 12 + 44) + 12, 7 * 252 + 12, 3)
    first = thumbnail(answers[0].found[2].path)
    top, left = 12 + (240 - first.shape[0]) // 2, 12 + 3 * 252 + (240 - first.shape[1]) // 2
    there = picture[top : top + first.shape[0], left : left + first.shape[1]]
    np.testing.assert_array_equal(there, first)


def test_a_thumbnail_is_small_keeps_its_shape_and_shows_the_box(tmp_path, rng):
    image = cv2.blur(rng.integers(0, 255, (900, 600, 3), np.uint8), (31, 31))
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, image)
    assert thumbnail(path).shape == (240, 160, 3)
    part = thumbnail(path, [100, 50, 200, 250])
    expected = cv2.cvtColor(image[50:250, 100:200], cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(part, expected)
    assert thumbnail(path, [700, 50, 800, 250]) is None
