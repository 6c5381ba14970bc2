"""The page of an evaluation: whole, escaped, without anything fetched, its numbers the report's."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cbam_jax.metrics import METRIC_DEFINITIONS
from cbam_jax.report import Neighbour, Picture, Query, evaluation_page

NASTY = """<script>alert("x")</script> & 'dress'"""
VOID = {"meta", "img", "!doctype"}


class Page(HTMLParser):
    """Elements with their attributes and text; checks that they are nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append((tag, self.elements[-1]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, element in self.open:
            element["text"] += data

    def find(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def rows(page):
    """The text of the cells of each table row, by the first cell."""
    found, cells = {}, []
    for element in page.elements:
        if element["tag"] == "tr":
            cells = []
        elif element["tag"] in ("th", "td"):
            cells.append(element["text"])
            found[cells[0]] = cells
    return found


@pytest.fixture
def report():
    metrics = {f"{name}@{k}": 0.9 - k / 100 for name in ("map", "recall") for k in (5, 10)}
    metrics |= {"mrr": 0.625, "num_queries": 7.0, "num_left_out": 2.0}
    categories = {
        NASTY: {"map@10": 0.25, "num_queries": 3.0},
        "coat": {"map@10": 0.75, "num_queries": 4.0},
        "alone": {"map@10": None, "num_queries": 1.0},
    }
    return {
        "dataset": f"{NASTY}.csv",
        "split": "test",
        "step": 40,
        "protocol": "leave one out",
        "num_gallery": 8,
        "ks": [5, 10],
        "metrics": metrics,
        "definitions": dict(METRIC_DEFINITIONS),
        "interval": {"metric": "map@10", "of": [0.625, 0.875]},
        "per_category": categories,
    }


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (300, 200, 3), np.uint8)


@pytest.fixture
def text(report, image):
    small = np.full((20, 40, 3), (250, 10, 10), np.uint8)
    found = [
        Neighbour(image, NASTY, f"{NASTY}/1.jpg", 0.125, True),
        Neighbour(small, "coat", "coat/2.jpg", 0.5, False),
    ]
    return evaluation_page(
        report,
        model="resnet18_cbam",
        config={"data": {"name": NASTY}, "seed": 3},
        queries={"Best queries": [Query(image, NASTY, "q.jpg", 0.75, found)], "Worst": []},
        pictures=[
            Picture(cv2.imencode(".png", image[..., ::-1])[1].tobytes(), "A curve", "It falls")
        ],
    )


@pytest.fixture
def page(text):
    return Page(text)


def test_nothing_is_fetched_or_run(text, page):
    assert not page.find("script")
    assert not page.find("link")
    assert "<script>alert" not in text
    sources = [element["src"] for element in page.find("img")]
    assert all(source.startswith("data:image/") for source in sources)
    without = re.sub(r"data:image/[^\"]*", "", text)
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", without)
    [policy] = [e["content"] for e in page.find("meta") if "http-equiv" in e]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_numbers_are_the_reports(page):
    table = rows(page)
    assert table["map"] == ["map", "0.8500", "0.8000", METRIC_DEFINITIONS["map@K"]]
    assert table["mrr"] == ["mrr", "0.6250", "", METRIC_DEFINITIONS["mrr"]]
    assert table["data.name"] == ["data.name", NASTY]
    assert table["seed"] == ["seed", "3"]
    # Not measured, so not there.
    assert "precision" not in table
    said = page.find("body")[0]["text"]
    assert "7 queries, 8 gallery images (leave one out); 2 queries left out" in said
    assert "95 % bootstrap interval of map@10 over queries: 0.6250 to 0.8750" in said
    assert page.find("h1")[0]["text"] == f"resnet18_cbam on {NASTY}.csv, split test"


def test_categories_are_bars_the_best_first(page):
    table = rows(page)
    names = [name for name in table if name in (NASTY, "coat", "alone")]
    assert names == ["coat", NASTY, "alone"]
    assert table[NASTY][1:3] == ["3", "0.2500"]
    assert table["alone"][1:3] == ["1", ""]
    bars = [e["style"] for e in page.find("div") if e.get("class") == "bar"]
    assert bars == ["width:75.0%", "width:25.0%", "width:0.0%"]


def test_queries_show_what_was_found_in_words_too(page, image):
    images = page.find("img")
    assert [element["alt"] for element in images] == [
        f"Query: {NASTY}",
        f"Rank 1: {NASTY}, a hit",
        "Rank 2: coat, no hit",
        "It falls",
    ]
    frames = [e for e in page.find("figure") if e.get("class") != "picture"]
    assert [e["class"] == "hit" for e in frames] == [False, True, False]
    assert [e["title"] for e in frames] == ["q.jpg", f"{NASTY}/1.jpg", "coat/2.jpg"]
    assert "0.125" in frames[1]["text"]
    assert "map@10 of this query: 0.750" in page.find("body")[0]["text"]

    def decode(element):
        encoded = base64.b64decode(element["src"].partition(",")[2])
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)

    # Reduced to 140 pixels of height, never enlarged; red stays red.
    assert decode(images[0]).shape == (140, 93, 3)
    assert decode(images[2]).shape == (20, 40, 3)
    assert np.abs(decode(images[2]).astype(int) - (250, 10, 10)).max() < 12
    # A figure is the file's own bytes.
    np.testing.assert_array_equal(decode(images[3]), image)
