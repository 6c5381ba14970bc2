"""Evaluation of embeddings against loops over queries and ranks, in float64."""

import csv

import numpy as np
import pytest

from cbam_jax import InputError
from cbam_jax.evaluation import (
    Evaluation,
    chance_precision,
    evaluate_embeddings,
    make_protocol,
    possible_precision,
    relevant_images,
    save_neighbours,
)

KS = (1, 4, 10)
NAMES = ("coat", "dress", "hat", "a long skirt", "shoe")


@pytest.fixture
def split(rng):
    """45 images of five labels, one of which has a single image; distances with ties."""
    label = np.append(rng.integers(0, 4, 44), 4)
    # Small integers: many equal distances, and each is exact in float32.
    embeddings = rng.integers(-2, 3, (45, 3)).astype(np.float32)
    return embeddings, label


def brute_force(embeddings, label, is_query, is_gallery, ignored):
    """The metrics of the counted queries by label, and (query, ranking, distances) of each."""
    points = embeddings.astype(np.float64)
    values, rankings = {}, []
    for query in np.flatnonzero(is_query):
        distance = np.sqrt(np.sum((points - points[query]) ** 2, axis=1))
        among = [i for i in np.flatnonzero(is_gallery) if not ignored(query, i)]
        ranking = sorted(among, key=lambda i: (distance[i], i))
        rankings.append((query, ranking, distance[ranking]))
        hits = [label[i] == label[query] for i in ranking]
        relevant = sum(hits)
        if not relevant:
            continue
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
        one = {"mrr": 1 / (hits.index(True) + 1)}
        one["r_precision"] = sum(hits[:relevant]) / relevant
        for k in (*KS, relevant):
            at_hits = [p for p, hit in zip(precision[:k], hits[:k], strict=True) if hit]
            total, found = sum(at_hits), len(at_hits)
            if k == relevant:
                one["map@R"] = total / relevant
            if k in KS:
                one[f"map@{k}"] = total / found if found else 0.0
                one[f"map_min@{k}"] = total / min(k, relevant)
                one[f"map_all@{k}"] = total / relevant
                one[f"precision@{k}"] = found / k
                one[f"recall@{k}"] = float(found > 0)
        values.setdefault(int(label[query]), []).append(one)
    return values, rankings


def assert_means(metrics, values, num_queries):
    assert metrics["num_queries"] == num_queries
    assert metrics["num_left_out"] == num_queries - len(values)
    assert metrics.keys() == {*values[0], "num_queries", "num_left_out"}
    for name in values[0]:
        expected = sum(value[name] for value in values) / len(values)
        assert metrics[name] == pytest.approx(expected, abs=1e-12), name


def assert_agrees(result, label, reference):
    values, rankings = reference
    everyone = [value for one in values.values() for value in one]
    assert_means(result.report["metrics"], everyone, len(rankings))
    queries = np.bincount([label[query] for query, _, _ in rankings], minlength=len(NAMES))
    categories = result.report["per_category"]
    assert categories.keys() == {NAMES[i] for i in np.flatnonzero(queries)}
    for which, one in values.items():
        assert_means(categories[NAMES[which]], one, queries[which])
    for row, (query, ranking, distance) in enumerate(rankings):
        k = min(max(KS), len(ranking))
        assert result.query[row] == query
        assert result.neighbour[row, :k].tolist() == ranking[:k]
        assert (result.neighbour[row, k:] == -1).all()
        np.testing.assert_allclose(result.distance[row, :k], distance[:k], rtol=1e-6)
        np.testing.assert_array_equal(result.match[row, :k], label[ranking[:k]] == label[query])


def test_leave_one_out(split):
    embeddings, label = split
    everyone = np.ones(len(label), bool)
    protocol = make_protocol(everyone, everyone, ks=KS)
    result = evaluate_embeddings(embeddings, label, NAMES, protocol, ks=KS)
    reference = brute_force(embeddings, label, everyone, everyone, lambda q, i: q == i)
    assert_agrees(result, label, reference)
    metrics = result.report["metrics"]
    assert metrics["num_left_out"] == 1
    assert np.isnan(result.headline).tolist() == (label == 4).tolist()
    assert np.nanmean(result.headline) == pytest.approx(metrics["map@10"])
    low, high = result.report["interval"]["of"]
    assert low < metrics["map@10"] < high
    relevant = np.bincount(label)[label] - 1
    by_chance = np.mean(relevant[relevant > 0] / 44)
    assert result.report["chance"]["precision@10"] == pytest.approx(by_chance)
    assert result.report["protocol"] == "leave one out"
    assert result.report["num_gallery"] == 45


def test_queries_in_a_gallery_that_holds_some_of_them(split, rng):
    embeddings, label = split
    is_query, is_gallery = rng.random(45) < 0.4, rng.random(45) < 0.7
    both = is_query & is_gallery
    assert 0 < both.sum() < min(is_query.sum(), is_gallery.sum())
    protocol = make_protocol(is_query, is_gallery, ks=KS)
    result = evaluate_embeddings(embeddings, label, NAMES, protocol, ks=KS)
    reference = brute_force(embeddings, label, is_query, is_gallery, lambda q, i: q == i)
    assert_agrees(result, label, reference)
    assert result.report["protocol"] == "queries in a gallery"
    assert result.report["num_gallery"] == is_gallery.sum()


def test_the_querys_own_item_and_series_are_ignored(split, rng):
    embeddings, label = split
    item, series = rng.integers(0, 6, 45), rng.integers(0, 2, 45)
    everyone = np.ones(45, bool)
    options = {"item": item, "series": series, "ignore_same_series": True}
    protocol = make_protocol(everyone, everyone, **options, ks=KS)
    result = evaluate_embeddings(embeddings, label, NAMES, protocol, ks=KS)

    def ignored(query, i):
        return item[query] == item[i] and series[query] == series[i]

    assert_agrees(result, label, brute_force(embeddings, label, everyone, everyone, ignored))
    assert result.report["protocol"].endswith("without the query's own item and series")


def test_too_little_to_search_and_missing_columns():
    everyone = np.ones(11, bool)
    make_protocol(everyone, everyone, ks=(5, 10))
    with pytest.raises(InputError, match=r"11 queries among 10 gallery images .* ks=\(5, 11\)"):
        make_protocol(everyone, everyone, ks=(5, 11))
    # A gallery without the queries loses none to leaving them out.
    first = np.arange(11) < 1
    make_protocol(first, ~first, ks=(10,))
    with pytest.raises(InputError, match="0 queries among 11"):
        make_protocol(~everyone, everyone, ks=(5,))
    with pytest.raises(InputError, match="eval.ignore_same_series=True needs .* set it to False"):
        make_protocol(everyone, everyone, ignore_same_series=True, ks=(5,))


def test_embeddings_that_are_not_finite(split):
    embeddings, label = split
    embeddings[7, 1] = np.nan
    protocol = make_protocol(label >= 0, label >= 0, ks=KS)
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, the first is row 7"):
        evaluate_embeddings(embeddings, label, NAMES, protocol, ks=KS)


def test_possible_is_what_embeddings_give_that_are_the_categories():
    label = np.repeat([0, 1, 2, 3], [13, 6, 2, 1])
    everyone = np.ones(22, bool)
    protocol = make_protocol(everyone, everyone, ks=KS)
    report = evaluate_embeddings(
        np.eye(4, dtype=np.float32)[label], label, NAMES, protocol, ks=KS
    ).report
    for k in KS:
        best = report["metrics"][f"precision@{k}"]
        assert report["possible"][f"precision@{k}"] == pytest.approx(best)
    assert report["possible"]["precision@10"] == pytest.approx((13 * 10 + 6 * 5 + 2 * 1) / 210)
    assert np.isnan(possible_precision(np.array([0, 0]), 2))


@pytest.mark.parametrize("grouped", [False, True])
def test_chance_is_what_random_orders_give(split, rng, grouped):
    _, label = split
    everyone, is_gallery = np.ones(45, bool), rng.random(45) < 0.8
    item, series = rng.integers(0, 6, 45), rng.integers(0, 2, 45)
    options = {"item": item, "series": series, "ignore_same_series": grouped}
    protocol = make_protocol(everyone, is_gallery, **options, ks=(4, 9))
    relevant = relevant_images(label, protocol)
    searched = relevant_images(np.zeros_like(label), protocol)
    for k in (4, 9):
        shares = []
        for query in range(45):
            own = (item == item[query]) & (series == series[query]) if grouped else [query]
            among = is_gallery.copy()
            among[own] = False
            hits = label[among] == label[query]
            if hits.any():
                # The mean over all orders of the hits among the first k, each place being alike.
                shares.append(sum(hits.mean() for _ in range(min(k, len(hits)))) / k)
        assert chance_precision(relevant, searched, k) == pytest.approx(np.mean(shares))
    # Three images are searched and found, of which two are relevant: 2 of 6 places.
    assert chance_precision(np.array([2]), np.array([3]), 6) == pytest.approx(1 / 3)
    assert np.isnan(chance_precision(np.array([0, 0]), np.array([3, 4]), 2))


def test_neighbours_are_written_with_names(rng, tmp_path):
    query = np.flatnonzero(np.arange(45) % 3)
    neighbour, match = rng.integers(0, 45, (30, 3)), rng.random((30, 3)) < 0.5
    neighbour[1, 2] = -1
    distance = rng.random((30, 3)).astype(np.float32)
    result = Evaluation({}, query, neighbour, distance, match, rng.random(30))
    ids = np.array([f'é "{i}", 连衣裙.jpg' for i in range(44)] + ["\udce9.jpg"])
    categories = [NAMES[i % 5] for i in range(45)]
    path = tmp_path / "neighbours.csv"
    save_neighbours(path, result, ids, categories)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first, *rows = csv.reader(file)
    assert first == [
        "query", "query_category", "rank", "neighbour", "neighbour_category", "distance",
        "same_category",
    ]  # fmt: skip
    expected = []
    for row in range(30):
        for rank in range(2 if row == 1 else 3):
            q, i = query[row], neighbour[row, rank]
            far, same = f"{distance[row, rank]:.7g}", str(match[row, rank]).lower()
            expected.append(
                [ids[q], categories[q], str(rank + 1), ids[i], categories[i], far, same]
            )
    assert rows == expected
    assert {path.name for path in tmp_path.iterdir()} == {"neighbours.csv"}
