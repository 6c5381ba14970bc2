"""What runs measured query by query, against loops."""

import csv

import numpy as np
import pytest

from cbam_jax.paper import queries


@pytest.fixture
def evaluated(tmp_path, rng):
    """An evaluation of 30 images, 20 of them queries, one without a match; its hits [20, 12]."""
    label = np.append(rng.integers(0, 3, 29), 3)
    ids = np.array([f"photo, {i}" for i in range(30)])
    is_query = rng.permutation(np.arange(30) < 20)
    is_query[29], is_query[np.flatnonzero(is_query[:29])[0]] = True, is_query[29]
    np.savez(
        tmp_path / "embeddings.npz",
        id=ids,
        label=label,
        is_query=is_query,
        is_gallery=np.ones(30, bool),
    )
    hits = rng.random((is_query.sum(), 12)) < 0.4
    hits[-1] = False
    with (tmp_path / "neighbours.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "same_category"])
        for query, found in zip(ids[is_query], hits, strict=True):
            writer.writerows([query, rank, str(hit).lower()] for rank, hit in enumerate(found, 1))
    return tmp_path, hits


def test_each_query_is_measured_by_what_was_found(evaluated):
    folder, hits = evaluated
    measured = queries.per_query(folder)
    for row, found in enumerate(hits[:-1, :10].tolist()):
        parts = [sum(found[: i + 1]) / (i + 1) for i in range(10) if found[i]]
        assert measured["map@10"][row] == pytest.approx(sum(parts) / max(len(parts), 1))
        assert measured["precision@10"][row] == pytest.approx(sum(found) / 10)
    # Alone in its category: left out of every mean.
    assert measured["map@10"][-1] is measured["precision@10"][-1] is None


def test_without_neighbours_there_is_nothing_to_measure(tmp_path):
    assert queries.per_query(tmp_path) == {}
    run = {"per_query": {}}
    assert queries.over_queries([run], [run]) == {}


def test_differences_are_paired_query_by_query(rng):
    """Queries differ by far more than the models do, which pairing takes out."""
    hard = rng.random(200)
    rows = [
        [{"per_query": {name: [*(hard + gain + rng.normal(0, 0.01, 200)), None]
                        for name in queries.METRICS}} for _ in range(3)]
        for gain in (0.0, 0.02)
    ]  # fmt: skip
    found = queries.over_queries(rows[1], rows[0])["map@10"]
    low, high = found["interval"]
    assert high - low > 0.05
    low, high = found["difference"]["interval"]
    assert 0.018 < low < found["difference"]["mean"] < high < 0.022
    assert found["difference"]["shown"]
    assert not queries.over_queries(rows[0], rows[0])["map@10"]["difference"]["shown"]
