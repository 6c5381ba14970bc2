"""The page of an evaluation: whole, escaped, without anything fetched, its numbers the report's."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cbam_jax.focus import DEFINITIONS
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
    metrics |= {"precision@5": 0.71, "precision@10": 0.615}
    metrics |= {"mrr": 0.625, "num_queries": 7.0, "num_left_out": 2.0}
    categories = {
        NASTY: {"map@10": 0.25, "precision@10": 0.33, "num_queries": 3.0},
        "blouse": {"map@10": 1.0, "precision@10": 0.1, "num_queries": 2.0},
        "coat": {"map@10": 0.75, "precision@10": 0.72, "num_queries": 4.0},
        "alone": {"map@10": None, "precision@10": None, "num_queries": 1.0},
    }
    return {
        "dataset": f"/home/someone/photos/{NASTY.replace('/', '|')}.csv",
        "split": "test",
        "step": 40,
        "protocol": "leave one out",
        "num_gallery": 8,
        "ks": [5, 10],
        "metrics": metrics,
        "chance": {"precision@5": 0.2, "precision@10": 0.21},
        "possible": {"precision@5": 1.0, "precision@10": 0.83},
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
        Neighbour(small, "coat", "coat/\udce9.jpg", 0.5, False),
    ]
    nothing = Query(small, "alone", "a.jpg", float("nan"), 0, [])
    return evaluation_page(
        report,
        model="resnet18_cbam",
        config={"data": {"name": NASTY, "manual_dir": "/home/someone/photos/"}, "seed": 3},
        queries={
            "Best queries": [Query(image, NASTY, "q.jpg", 0.75, 8, found)],
            "Chosen": [nothing],
            "Worst": [],
        },
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
    assert "map_all" not in table
    said = page.find("body")[0]["text"]
    assert "7 queries, 8 gallery images (leave one out); 2 queries left out" in said
    assert "95 % bootstrap interval of map@10 over queries: 0.6250 to 0.8750" in said
    title = f"resnet18_cbam on {NASTY.replace('/', '|')}.csv, split test"
    assert page.find("h1")[0]["text"] == title


def test_it_begins_with_what_a_shop_understands(page):
    first = page.find("p")[0]
    assert first["text"].startswith("Of the first 10 images found, 6.2 are of the same category")
    assert "by chance 2.1 would be; at most 8.3 are possible. " in first["text"]
    said = page.find("body")[0]["text"]
    assert said.index("Of the first 10") < said.index("Metrics") < said.index("Categories")


def test_no_folder_of_the_machine_is_named(text, page):
    assert "someone" not in text
    assert rows(page)["data.manual_dir"] == ["data.manual_dir", "photos/"]


def test_categories_are_bars_those_of_most_queries_first(page):
    table = rows(page)
    names = [name for name in table if name in (NASTY, "coat", "alone", "blouse")]
    assert names == ["coat", NASTY, "blouse", "alone"]
    assert table[NASTY][1:4] == ["3", "3.3", "0.2500"]
    assert table["alone"][1:4] == ["1", "", ""]
    bars = [e["style"] for e in page.find("div") if e.get("class") == "bar"]
    assert bars == ["width:75.0%", "width:25.0%", "width:100.0%", "width:0.0%"]


def test_of_very_many_categories_forty_are_shown(report):
    category = {"map@10": 0.5, "precision@10": 0.5, "num_queries": 3.0}
    report["per_category"] = {f"item {i}": category for i in range(11318)}
    page = Page(evaluation_page(report, model="resnet18", config={}, queries={}))
    assert sum(name.startswith("item ") for name in rows(page)) == 40
    assert "20 best and the 20 worst of 11318 categories" in page.find("body")[0]["text"]


def test_the_focus_is_on_it(report):
    report["focus"] = {
        "num_images": 9, "num_left_out": 2, "tolerance": 4.25, "area": 0.5, "pointing_center": 0.75,
        "targets": {"energy": {"heat_inside": 0.625, "pointing": 0.875, "num_empty": 3}},
        "gates": {"backbone.<gate>.spatial": {"inside": 0.375, "outside": 0.125}},
        "definitions": DEFINITIONS,
    }  # fmt: skip
    table = rows(Page(evaluation_page(report, model="resnet18", config={}, queries={})))
    assert table["an even map; the centre"][1:] == ["0.5000", "0.7500", ""]
    assert table["heat of energy"][1:] == ["0.6250", "0.8750", "3"]
    assert table["<gate>"][1:] == ["0.3750", "0.1250"]
    for name, definition in DEFINITIONS.items():
        assert table[name][1:] == [definition]


def test_every_picture_enlarges_and_its_name_is_seen(page):
    for figure in (element for element in page.find("figure")):
        assert figure["text"].strip()
    assert len(page.find("details")) == len(page.find("summary")) == len(page.find("img"))
    # One at a time.
    assert {element["name"] for element in page.find("details")} == {"enlarged"}
    names = [element["text"] for element in page.find("small")]
    # Below the picture, and once more where it is large.
    assert names == [
        name for name in ("q.jpg", f"{NASTY}/1.jpg", "coat/?.jpg", "a.jpg") for _ in "12"
    ]
    # Names by themselves, whatever direction they are read in.
    assert [e["text"] for e in page.find("bdi")][:2] == [NASTY, "q.jpg"]


def test_queries_show_what_was_found_in_words_too(page, image):
    images = page.find("img")
    assert [element["alt"] for element in images] == [
        f"Query: {NASTY}",
        f"Rank 1: {NASTY}, a hit",
        "Rank 2: coat, no hit",
        "Query: alone",
        "It falls",
    ]
    frames = [e for e in page.find("figure") if e.get("class") != "picture"]
    assert [e["class"] == "hit" for e in frames] == [False, True, False, False]
    assert ["✓" in e["text"] for e in frames] == [False, True, False, False]
    assert "0.125" in frames[1]["text"]
    said = page.find("body")[0]["text"]
    assert "8 of the first 10 are of its category; map@10 0.750" in said
    assert "There is no other image of its category to find." in said
    assert "nan" not in said

    def decode(element):
        encoded = base64.b64decode(element["src"].partition(",")[2])
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)

    # As they were given; red stays red.
    assert decode(images[0]).shape == (300, 200, 3)
    assert decode(images[2]).shape == (20, 40, 3)
    assert np.abs(decode(images[2]).astype(int) - (250, 10, 10)).max() < 12
    # A figure is the file's own bytes.
    np.testing.assert_array_equal(decode(images[4]), image)
