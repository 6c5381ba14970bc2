"""The rank of the first relevant item, against sorting everything in float64."""

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score

from cbam_jax.metrics import count_relevant, per_query_metrics, retrieval_metrics
from cbam_jax.search import first_ranks


def sorted_ranks(queries, gallery, own, labels, ignored):
    """By a loop: sort by (float32 of the float64 distance, index), then look for the first."""
    ranks = []
    for i, x in enumerate(queries.astype(np.float64)):
        distance = np.sqrt(((gallery.astype(np.float64) - x) ** 2).sum(1)).astype(np.float32)
        order = [j for j in np.lexsort((np.arange(len(gallery)), distance)) if not ignored(i, j)]
        ranks.append(next((r for r, j in enumerate(order, 1) if labels[j] == own[i]), 0))
    return ranks


@pytest.mark.parametrize("values", ["whole", "close"])
def test_ranks_are_those_of_sorting_everything(rng, values, monkeypatch):
    monkeypatch.setattr("cbam_jax.search.counting._BLOCK", (8, 32))
    # Whole numbers have many ties; close ones differ by less than a float32 product's error.
    draw = {
        "whole": lambda n: rng.integers(-2, 3, (n, 4)),
        "close": lambda n: 1 + 1e-6 * rng.normal(size=(n, 4)),
    }[values]
    gallery, queries = draw(101).astype(np.float32), draw(21).astype(np.float32)
    queries[:9] = gallery[90:99]
    index = np.where(np.arange(21) < 9, np.arange(90, 111), -1)
    own, labels = rng.integers(0, 30, 21), rng.integers(0, 29, 101)
    own[20] = 31
    found = first_ranks(queries, gallery, own, labels, exclude_self=index)
    expected = sorted_ranks(queries, gallery, own, labels, lambda i, j: index[i] == j)
    assert found.tolist() == expected
    assert max(expected) > 20
    assert expected[20] == 0
    group, groups = rng.integers(0, 4, 21), rng.integers(0, 4, 101)
    found = first_ranks(queries, gallery, own, labels, query_group=group, gallery_group=groups)
    ignored = lambda i, j: group[i] == groups[j]  # noqa: E731
    assert found.tolist() == sorted_ranks(queries, gallery, own, labels, ignored)


def test_mrr_of_the_whole_gallery_is_that_of_scikit_learn(rng):
    # One relevant item a query: there the mean reciprocal rank is label ranking average precision.
    gallery, queries = rng.normal(size=(200, 8)), rng.normal(size=(50, 8))
    gallery, queries = gallery.astype(np.float32), queries.astype(np.float32)
    labels, own = np.arange(200), rng.integers(0, 200, 50)
    distance = np.linalg.norm(queries[:, None].astype(float) - gallery[None], axis=-1)
    matches = labels[np.argsort(distance, axis=1)[:, :10]] == own[:, None]
    rank = first_ranks(queries, gallery, own, labels)
    theirs = label_ranking_average_precision_score(labels[None] == own[:, None], -distance)
    relevant = count_relevant(own, labels)
    whole = retrieval_metrics(matches, relevant, ks=(10,), first_rank=rank)
    assert whole["mrr"] == pytest.approx(theirs, abs=1e-12)
    # Of the ranks retrieved alone it is another number, which the other metrics do not change by.
    short = retrieval_metrics(matches, relevant, ks=(10,))
    assert short["mrr"] < theirs - 1e-3
    assert {n: v for n, v in short.items() if n != "mrr"} == {
        n: v for n, v in whole.items() if n != "mrr"
    }
    values = per_query_metrics(matches, relevant, ks=(10,), first_rank=rank)["mrr"]
    np.testing.assert_array_equal(values, 1 / rank)


def test_first_ranks_refuses_what_search_refuses():
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="unknown metric 'manhattan'"):
        first_ranks(rows, rows, [0, 1], [0, 1], metric="manhattan")
    with pytest.raises(ValueError, match="query_labels has shape"):
        first_ranks(rows, rows, [0], [0, 1])
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, the first is row 1"):
        first_ranks(rows, np.array([[1, 1, 1], [1, np.nan, 1]], np.float32), [0, 1], [0, 1])
