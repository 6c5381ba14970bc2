"""What an evaluation prints: plain words first, 80 columns, 40 lines however many categories."""

import numpy as np
import pytest

from cbam_jax.metrics import METRIC_DEFINITIONS
from cbam_jax.report_text import (
    display_width,
    format_report,
    plain_words,
    shown_categories,
)

FAMILIES = ("map", "map_min", "map_all", "precision", "recall")
SINGLE = ("map@R", "r_precision", "mrr")


def means(rng, ks, queries=9.0):
    names = [f"{family}@{k}" for family in FAMILIES for k in ks] + list(SINGLE)
    counted = {"num_queries": queries, "num_left_out": 0.0}
    return dict(zip(names, rng.uniform(size=len(names)).tolist(), strict=True)) | counted


def make_report(rng, names, ks=(5, 10, 20)):
    return {
        "protocol": "queries in a gallery, without the query's own item and series",
        "num_gallery": 60502,
        "ks": list(ks),
        "metrics": means(rng, ks, 60502.0) | {"precision@10": 0.7234, "recall@10": 0.996},
        "chance": {"precision@10": 0.1377},
        "interval": {"metric": "map@10", "of": (0.25, 0.5)},
        "definitions": dict(METRIC_DEFINITIONS),
        "per_category": {name: means(rng, ks, float(2 + i)) for i, name in enumerate(names)},
    }


def test_it_begins_with_what_a_shop_understands(rng):
    text = format_report(make_report(rng, ["coat"]))
    assert text.startswith(
        "Of the first 10 images found, 7.2 are of the same category as the query; by"
    )
    first = " ".join(text.split())
    # Not 100, for it is not all of them.
    assert "by chance 1.4 would be. 60260 of 60502 queries find at least one (99 %)." in first
    report = make_report(rng, ["coat"]) | {"chance": {"precision@10": 0.0012}}
    assert "by chance 0.01 would be" in plain_words(report)
    assert "at most" not in plain_words(report | {"possible": {"precision@10": 0.9999}})
    small = dict.fromkeys(("precision@10", "recall@10"), 0.2) | {
        "num_queries": 17.0,
        "num_left_out": 2.0,
    }
    told = plain_words(report | {"metrics": small, "possible": {"precision@10": 0.23}})
    assert told.endswith("; at most 2.3 are possible. 3 of 15 queries find at least one.")
    nothing = {"precision@5": float("nan"), "recall@5": float("nan")}
    report = {"ks": [5], "metrics": nothing, "chance": {"precision@5": float("nan")}}
    assert "No query has an image of its category to find" in plain_words(report)


def test_it_says_what_is_in_the_report(rng):
    ks = (1, 4, 10)
    report = make_report(rng, ["coat", "a long skirt"], ks)
    lines = format_report(report).splitlines()
    table = {line.split()[0]: line.split() for line in lines if line}
    for family in FAMILIES:
        assert table[family][1:] == [f"{report['metrics'][f'{family}@{k}']:.4f}" for k in ks]
    for name in SINGLE:
        assert [name, f"{report['metrics'][name]:.4f}"] in [line.split() for line in lines]
    text = " ".join(format_report(report).split())
    for name in [f"{family}@K" for family in FAMILIES] + list(SINGLE):
        assert f"{name} {METRIC_DEFINITIONS[name]}" in text
    assert "60502 queries, 60502 gallery images (queries in a gallery," in text
    assert "95% bootstrap interval of map@10 over queries: 0.2500 to 0.5000" in lines
    [skirt] = [line for line in lines if line.startswith("a long skirt")]
    metrics = report["per_category"]["a long skirt"]
    shown = [f"{metrics[f'{family}@10']:.4f}" for family in ("map", "precision", "recall")]
    assert skirt.removeprefix("a long skirt").split() == ["3", *shown]


NAMES = {
    "many": [f"item {i}" for i in range(11318)],
    "long": ["trousers that " * 9, "x" * 200, "连衣裙" * 30, "a\tb\nc"],
    "none": [],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("ks", [(10,), (5, 10, 20), tuple(range(1, 18))])
def test_it_fits_a_terminal(rng, names, ks):
    lines = format_report(make_report(rng, NAMES[names], ks)).splitlines()
    assert max(map(display_width, lines)) <= 80
    # One more block of rows for each eight K.
    assert len(lines) <= 40 + 6 * (len(ks) // 8)


def test_names_of_categories_move_no_cursor(rng):
    text = format_report(make_report(rng, ["\x1b[2Jcoat", "hat\u202e", "a\nb"]))
    assert "\\x1b[2Jcoat" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_few_categories_come_by_their_number_of_queries(rng):
    report = make_report(rng, ["blouse", "coat", "hat"])
    report["per_category"]["blouse"] |= {"map@10": 1.0, "num_queries": 2.0}
    lines = format_report(report).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["category", "hat", "coat", "blouse"]


def test_of_many_categories_the_best_and_the_worst_are_told(rng):
    share, size = rng.permutation(50) / 100 + 0.3, rng.integers(200, 900, 50)
    categories = {
        f"c{i}": {"map@10": share[i], "num_queries": float(size[i]), "num_left_out": 0.0}
        for i in range(50)
    }
    lucky = {"map@10": 1.0, "num_queries": 2.0, "num_left_out": 0.0}
    alone = {"map@10": float("nan"), "num_queries": 1.0, "num_left_out": 1.0}
    null = {"map@10": None, "num_queries": 1.0, "num_left_out": 1.0}
    best, worst = shown_categories(
        {"alone": alone, "lucky": lucky, "null": null, **categories}, "map@10", limit=12
    )
    order = np.argsort(-share)
    assert best == [f"c{i}" for i in order[:6]]
    assert worst == [f"c{i}" for i in order[-6:]]
