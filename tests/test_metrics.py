import math
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from cbam_jax.metrics import (
    METRIC_DEFINITIONS,
    bootstrap_interval,
    count_relevant,
    label_matches,
    per_category_metrics,
    per_query_metrics,
    retrieval_metrics,
    t_interval,
)

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"

# Worked by hand: hits, R, K, then map@K, map_min@K, map_all@K, precision@K, recall@K, mrr, and
# map@R, r_precision where the list reaches R.
WORKED = [
    ("10100", 3, 5, 0.8333, 0.5556, 0.5556, 0.4, 1, 1, 0.5556, 0.6667),
    ("11011", 20, 5, 0.8875, 0.71, 0.1775, 0.8, 1, 1, None, None),
    ("00110", 2, 5, 0.4167, 0.4167, 0.4167, 0.4, 1, 1 / 3, 0, 0),
    ("00000", 2, 5, 0, 0, 0, 0, 0, 0, 0, 0),
    ("10000", 1, 5, 1, 1, 1, 0.2, 1, 1, 1, 1),
    ("1111101111", 333, 10, 0.9468, 0.8521, 0.0256, 0.9, 1, 1, None, None),
]


def loops(hits, relevant, ks):
    """One query's metrics, by loops, in Python floats."""
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]

    def precision_sum(k):
        return math.fsum(precision[i] for i in range(k) if hits[i])

    values = {}
    for k in ks:
        retrieved = sum(hits[:k])
        values[f"map@{k}"] = precision_sum(k) / retrieved if retrieved else 0.0
        values[f"map_min@{k}"] = precision_sum(k) / min(k, relevant)
        values[f"map_all@{k}"] = precision_sum(k) / relevant
        values[f"precision@{k}"] = retrieved / k
        values[f"recall@{k}"] = float(any(hits[:k]))
    if relevant <= len(hits):
        values["map@R"] = precision_sum(relevant) / relevant
        values["r_precision"] = sum(hits[:relevant]) / relevant
    values["mrr"] = next((1 / (i + 1) for i, hit in enumerate(hits) if hit), 0.0)
    return values


def random_hits(rng, queries, k):
    matches = rng.random((queries, k)) < rng.uniform(0, 0.7, (queries, 1))
    relevant = matches.sum(1) + rng.integers(0, 4, queries)
    return matches, relevant


@pytest.mark.parametrize("row", WORKED, ids=[row[0] for row in WORKED])
def test_worked_vectors(row):
    hits, relevant, k, *expected = row
    metrics = retrieval_metrics([[h == "1" for h in hits]], [relevant], ks=(k,))
    families = ("map", "map_min", "map_all", "precision", "recall")
    names = [f"{family}@{k}" for family in families] + ["mrr", "map@R", "r_precision"]
    for name, value in zip(names, expected, strict=True):
        if value is None:
            assert name not in metrics
        else:
            assert metrics[name] == pytest.approx(value, abs=5e-5), name


def test_per_query_matches_loops(rng):
    matches, relevant = random_hits(rng, 60, 33)
    matches[3], relevant[3] = False, 0
    relevant = np.minimum(relevant, 33)
    values = per_query_metrics(matches, relevant, ks=(1, 5, 33))
    for i in range(60):
        if relevant[i]:
            expected = loops(matches[i].tolist(), int(relevant[i]), (1, 5, 33))
            assert values.keys() == expected.keys()
            for name, value in expected.items():
                assert values[name][i] == pytest.approx(value, abs=1e-12), (i, name)
        else:
            assert all(np.isnan(value[i]) for value in values.values())


def test_means_leave_out_queries_without_relevant_items(rng):
    matches, relevant = random_hits(rng, 41, 20)
    empty = rng.choice(41, 6, replace=False)
    matches[empty], relevant[empty] = False, 0
    metrics = retrieval_metrics(matches, relevant)
    rows = [
        loops(m.tolist(), int(r), (5, 10, 20)) for m, r in zip(matches, relevant, strict=True) if r
    ]
    left_out = int(np.sum(relevant == 0))
    assert (metrics["num_queries"], metrics["num_left_out"]) == (41, left_out)
    for name in ("map@5", "map_min@10", "map_all@20", "precision@10", "recall@5", "mrr"):
        assert metrics[name] == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-12)
    assert all(isinstance(value, float) for value in metrics.values())


def test_blocks_of_queries_change_nothing(rng, monkeypatch):
    matches, relevant = random_hits(rng, 50, 12)
    expected = per_query_metrics(matches, relevant, ks=(5,))
    monkeypatch.setattr("cbam_jax.metrics._ROWS", 7)
    for name, values in per_query_metrics(matches, relevant, ks=(5,)).items():
        np.testing.assert_array_equal(values, expected[name])


def test_full_ranking_is_average_precision_of_sklearn(rng):
    matches, _ = random_hits(rng, 30, 80)
    matches[:, 40] = True
    values = per_query_metrics(matches, matches.sum(1), ks=(80,))["map_all@80"]
    expected = [average_precision_score(row, -np.arange(80.0)) for row in matches]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_golden_torchmetrics():
    golden = np.load(GOLDEN)
    matches = golden["matches"]
    values = per_query_metrics(matches, matches.sum(1), ks=(10, 60))
    for name in ("map_all@60", "map@10", "precision@10", "recall@10", "r_precision", "mrr"):
        np.testing.assert_allclose(values[name], golden[name], atol=1e-6, err_msg=name)


def test_golden_pytorch_metric_learning():
    golden = np.load(GOLDEN)
    embeddings, labels = golden["embeddings"].astype(np.float64), golden["labels"]
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, :-1]
    relevant = count_relevant(labels, labels, query_in_gallery=True)
    metrics = retrieval_metrics(label_matches(order, labels, labels), relevant)
    names = {
        "map@R": "mean_average_precision_at_r",
        "r_precision": "r_precision",
        "mrr": "mean_reciprocal_rank",
    }
    for ours, theirs in names.items():
        assert metrics[ours] == pytest.approx(float(golden[f"pml_{theirs}"]), abs=1e-6)


def test_short_ranking_omits_metrics_at_r():
    matches = np.array([[True, True], [True, False]])
    assert "map@R" in retrieval_metrics(matches, [2, 2], ks=(2,))
    short = retrieval_metrics(matches, [2, 3], ks=(2,))
    assert "map@R" not in short
    assert "r_precision" not in short


def test_every_key_has_a_definition(rng):
    matches, relevant = random_hits(rng, 5, 30)
    for key in retrieval_metrics(matches, np.minimum(relevant, 30)):
        family = key if key in METRIC_DEFINITIONS else key.split("@")[0] + "@K"
        assert METRIC_DEFINITIONS[family]


def test_all_left_out_is_nan():
    metrics = retrieval_metrics(np.zeros((2, 5), bool), [0, 0], ks=(5,))
    assert math.isnan(metrics["map@5"])
    assert (metrics["num_queries"], metrics["num_left_out"]) == (2, 2)


def test_labels_of_objects_are_text_or_integers(rng):
    names, numbers = np.array(["hat", "coat", "dress"]), np.array([5, 7**20 % 2**40, -3])
    index = rng.integers(-1, 12, (9, 4))
    for kinds in (names, numbers):
        own, labels = rng.choice(kinds, 9), rng.choice(kinds, 12)
        for dtype in (object, *([np.dtypes.StringDType()] if kinds is names else [])):
            objects = own.astype(dtype), labels.astype(dtype)
            for given in (objects, (own, objects[1]), (objects[0], labels)):
                expected = label_matches(index, own, labels)
                np.testing.assert_array_equal(label_matches(index, *given), expected)
                assert count_relevant(*given).tolist() == [(labels == x).sum() for x in own]
    hits = np.ones((3, 1), bool)
    table = per_category_metrics(hits, [1, 1, 1], names.astype(object), ks=(1,))
    assert list(table) == ["coat", "dress", "hat"]


@pytest.mark.parametrize(
    ("own", "labels", "message"),
    [
        (np.array(["1", "1", "2"]), np.array([1, 1, 2]), "query_labels are <U1 and gallery_labels"),
        (np.array([1, 1, 2]), np.array(["1", "1", "2"], object), "give both as numbers or both as"),
        (np.array([b"a", b"b"]), np.array(["a", "b"]), "which are never equal: give both as bytes"),
        (np.array([1.0, np.nan]), np.array([1, 2]), "query_labels hold NaN, which equals nothing"),
        (
            np.array([1, 2]),
            np.array([[1], [2]]),
            r"gallery_labels have shape \(2, 1\), expected",
        ),
        (np.array(["a", None]), np.array(["a", "b"]), "query_labels hold None: give integers alon"),
        (np.array([1, "a"], object), np.array([1, 2]), "query_labels hold 'a'"),
        (np.array(["a", float("nan")], object), np.array(["a"]), "query_labels hold nan"),
    ],
)
def test_labels_that_could_never_match_are_refused(own, labels, message):
    index = np.zeros((len(own), 1), int)
    with pytest.raises(ValueError, match=message):
        label_matches(index, own, labels)
    with pytest.raises(ValueError, match=message):
        count_relevant(own, labels)
    if "labels are" in message or "give both" in message:
        ids = np.zeros(len(own), int), np.zeros(len(labels), int)
        with pytest.raises(ValueError, match=message.replace("_labels", "_group")):
            count_relevant(*ids, query_group=own, gallery_group=labels)


def test_no_label_at_all_is_of_every_type():
    assert count_relevant([], ["a"]).tolist() == []
    assert count_relevant(["a"], []).tolist() == [0]


def test_per_category(rng):
    matches, relevant = random_hits(rng, 60, 20)
    relevant[:3], matches[:3] = 0, False
    categories = rng.choice(["coat", "dress", "shoes"], 60)
    table = per_category_metrics(matches, relevant, categories)
    assert list(table) == ["coat", "dress", "shoes"]
    for category, metrics in table.items():
        rows = categories == category
        # Whether map@R is there is decided over all queries, so that columns do not differ.
        alone = retrieval_metrics(matches[rows], relevant[rows])
        for name in metrics:
            np.testing.assert_allclose(metrics[name], alone[name], rtol=1e-14, err_msg=name)
    assert all(isinstance(key, int) for key in per_category_metrics(matches, relevant, relevant))


def test_bootstrap_interval(rng):
    values = rng.gamma(2.0, size=400)
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert (low, high) != bootstrap_interval(values, seed=4)
    # The normal approximation of the mean's interval, close at 400 values.
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.2 * half)
    narrow = bootstrap_interval(values, confidence=0.5, seed=3)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([*values, np.nan], seed=3) == (low, high)
    assert bootstrap_interval([2.5] * 7) == (2.5, 2.5)
    assert all(math.isnan(bound) for bound in bootstrap_interval([np.nan]))


@pytest.mark.parametrize("indices", [[[0, 1], [1, 0]], [0, 1]])
@pytest.mark.parametrize("traced", [False, True])
def test_labels_of_fewer_queries_than_were_searched_are_told_so(indices, traced):
    find = lambda index: label_matches(index, [7], [7, 8])  # noqa: E731
    with pytest.raises(ValueError, match=r"and query_labels \(1,\), expected \[q, k\] and \[q\]"):
        (jax.jit(find) if traced else find)(np.array(indices))


def test_groups_of_one_side_alone_are_told_so():
    with pytest.raises(ValueError, match="belong together"):
        count_relevant([7], [7, 8], query_group=[1])


def test_label_matches_and_ragged_rows():
    matches = label_matches([[1, 2, -1], [0, -1, -1]], ["b", "c"], ["a", "b", "c"])
    assert matches.tolist() == [[True, False, False], [False, False, False]]
    # Index -1 must not read the last gallery item.
    assert not label_matches([[-1]], [5], [4, 5]).any()


def test_count_relevant_matches_loops(rng):
    query_labels, gallery_labels = rng.integers(0, 5, 23), rng.integers(0, 6, 40)
    query_group, gallery_group = rng.integers(0, 4, 23), rng.integers(0, 5, 40)
    plain = [sum(g == q for g in gallery_labels) for q in query_labels]
    assert count_relevant(query_labels, gallery_labels).tolist() == plain
    inside = rng.random(23) < 0.5
    ignored = count_relevant(query_labels, gallery_labels, query_in_gallery=inside)
    assert ignored.tolist() == [c - int(i) for c, i in zip(plain, inside, strict=True)]
    grouped = [
        sum(gallery_labels[j] == q and gallery_group[j] != s for j in range(40))
        for q, s in zip(query_labels, query_group, strict=True)
    ]
    result = count_relevant(
        query_labels.astype(str),
        gallery_labels.astype(str),
        query_group=query_group,
        gallery_group=gallery_group,
    )
    assert result.tolist() == grouped


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and num_relevant \(3,\)"):
        retrieval_metrics(np.zeros((2, 3), bool), [1, 1, 1])
    with pytest.raises(ValueError, match="int64"):
        retrieval_metrics(np.zeros((2, 3), np.int64), [1, 1])
    with pytest.raises(ValueError, match="K is 20, but matches have 3 ranks"):
        retrieval_metrics(np.zeros((2, 3), bool), [1, 1], ks=(3, 20))
    with pytest.raises(ValueError, match="query 1 has 2 hits but num_relevant 1"):
        retrieval_metrics([[True, False], [True, True]], [1, 1], ks=(2,))
    with pytest.raises(ValueError, match="confidence 1"):
        bootstrap_interval([1.0], confidence=1)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), confidence 0.95; expected \[n\]"):
        t_interval([[1.0, 2.0]])


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_t_interval_agrees_with_scipy(rng, n, confidence):
    ours, baseline = rng.normal(0.6, 0.03, n), rng.normal(0.5, 0.1, n)
    expected = stats.t.interval(confidence, n - 1, ours.mean(), stats.sem(ours))
    assert t_interval(ours, confidence) == pytest.approx(expected, rel=1e-12)
    # Of paired differences it is the interval of the paired t test, which is another one than that
    # of two independent samples.
    paired = stats.ttest_rel(ours, baseline).confidence_interval(confidence)
    assert t_interval(ours - baseline, confidence) == pytest.approx(tuple(paired), rel=1e-12)


def test_t_interval_by_hand():
    # Mean 4, deviations -2, 0 and 2, s = 2; t of 2 degrees of freedom is 4.302653 (any table).
    half = 4.302653 * 2 / math.sqrt(3)
    assert t_interval([2, 4, 6]) == pytest.approx((4 - half, 4 + half), abs=1e-6)
    assert t_interval([0.25, 0.25]) == (0.25, 0.25)
    assert all(math.isnan(bound) for values in ([], [0.5]) for bound in t_interval(values))
