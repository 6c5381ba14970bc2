"""Files of trec_eval: read back as they were, and measured by trec_eval itself."""

import itertools

import numpy as np
import pytest

from cbam_jax import InputError
from cbam_jax.metrics import ndcg, per_query_metrics
from cbam_jax.trec import read_qrels, read_run, write_qrels, write_run

ITEMS = [
    "a b.jpg",
    "tab\t100%.jpg",
    "连衣裙.jpg",
    "\udce9.jpg",
    "%20.jpg",
    "\x85\u2003.jpg",
    *"zyxwvuts",
]


@pytest.fixture
def ranking(rng):
    """Queries, their ranking of the items with many ties, and grades of all items."""
    distance = rng.integers(0, 3, (9, len(ITEMS)))
    index = np.argsort(distance, axis=1, kind="stable")[:, :10]
    index[3, 7:] = -1
    grades = rng.integers(0, 3, (9, len(ITEMS)))
    grades[5] = 0
    return [f"query {i}" for i in range(9)], index, grades


@pytest.fixture
def files(ranking, tmp_path):
    queries, index, grades = ranking
    write_run(tmp_path / "run.txt", queries, ITEMS, index)
    write_qrels(tmp_path / "qrels.txt", queries, ITEMS, iter(grades))
    return tmp_path / "run.txt", tmp_path / "qrels.txt"


def test_ties_come_back_in_our_order(ranking, files):
    queries, index, grades = ranking
    run, qrels = read_run(files[0]), read_qrels(files[1])
    assert list(run) == queries
    for query, row, of in zip(queries, index, grades, strict=True):
        assert [item for item, _ in run[query]] == [ITEMS[i] for i in row if i >= 0]
        scores = [score for _, score in run[query]]
        assert all(a > b for a, b in itertools.pairwise(scores))
        assert qrels.get(query, {}) == {ITEMS[i]: of[i] for i in np.flatnonzero(of)}


def test_equal_scores_of_others_keep_their_ranks(tmp_path):
    lines = ["1 Q0 b 2 0.5 x", "1 Q0 a 3 0.5 x", "1 Q0 c 1 0.25 x", "", "1\tQ0\tz\t1\t0.5\tx"]
    (tmp_path / "run.txt").write_text("\n".join(lines))
    assert [item for item, _ in read_run(tmp_path / "run.txt")["1"]] == ["z", "b", "a", "c"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 Q0 a 1 0.5", "run.txt:1 is not 'query Q0 item rank score tag'"),
        ("1 Q0 a 1 0.5 x\n1 Q0 b 2 far x", "run.txt:2: 'far' is no number"),
        ("1 Q0 a 1 nan x", "run.txt:1: 'nan' is not finite"),
        ("1 Q0 a 1 0.5 x\n1 Q0 a 2 0.4 x", "query '1' has an item twice"),
    ],
)
def test_damaged_lines_are_named(tmp_path, lines, message):
    (tmp_path / "run.txt").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path / "run.txt")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 0 a nan", "qrels.txt:1: 'nan' is not finite"),
        ("1 0 a 1\n1 0 b 1e999", "qrels.txt:2: '1e999' is not finite"),
        ("1 0 a 0.5", "qrels.txt:1: grade '0.5' is no whole number"),
        ("1 0 a 1\n1 0 a 2", "qrels.txt:2: item 'a' of query '1' has another grade above"),
    ],
)
def test_grades_that_are_none_are_named(tmp_path, lines, message):
    (tmp_path / "qrels.txt").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_qrels(tmp_path / "qrels.txt")


def test_a_mark_at_the_beginning_is_no_part_of_a_name(tmp_path):
    (tmp_path / "qrels.txt").write_text("\ufeff1 0 a 2\n1 0 a 2\n", encoding="utf-8")
    assert read_qrels(tmp_path / "qrels.txt") == {"1": {"a": 2}}


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "qrels.txt"
    with pytest.raises(ValueError, match="one of the items has no name"):
        write_qrels(path, ["1"], [""], iter([np.array([1])]))
    for row in (np.array([0.5]), np.array([1, 1])):
        with pytest.raises(ValueError, match="the grades of query '1' have shape"):
            write_qrels(path, ["1"], ["a"], iter([row]))
    assert not list(tmp_path.iterdir())


def test_one_name_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two items have one name"):
        write_run(tmp_path / "run.txt", ["1"], ["a", "a"], np.array([[0, 1]]))
    assert not list(tmp_path.iterdir())


def test_trec_eval_agrees_on_the_files(ranking, files):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pip install pytrec-eval-terrier")
    queries, index, grades = ranking
    # As trec_eval reads them: its own order of ties, blanks part the fields.
    run, qrels = {}, {}
    for line in files[0].read_text(errors="surrogateescape").split("\n")[:-1]:
        query, _, item, _, score, _ = line.encode("ascii", "backslashreplace").decode().split(" ")
        run.setdefault(query, {})[item] = float(score)
    for line in files[1].read_text(errors="surrogateescape").split("\n")[:-1]:
        query, _, item, grade = line.encode("ascii", "backslashreplace").decode().split(" ")
        qrels.setdefault(query, {})[item] = int(grade)
    names = {"map_cut.5,10", "P.5,10", "recip_rank", "ndcg_cut.5,10", "success.5,10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    found = np.where(index >= 0, np.take_along_axis(grades, np.maximum(index, 0), axis=1), 0)
    ours = per_query_metrics(found > 0, (grades > 0).sum(axis=1), ks=(5, 10))
    same = {"recip_rank": "mrr"}
    for k in (5, 10):
        ours[f"ndcg@{k}"] = ndcg(found, grades, k)
        same |= {f"map_cut_{k}": f"map_all@{k}", f"P_{k}": f"precision@{k}"}
        same |= {f"success_{k}": f"recall@{k}", f"ndcg_cut_{k}": f"ndcg@{k}"}
    for i, query in enumerate(queries):
        name = query.replace(" ", "%20")
        for of_theirs, of_ours in same.items():
            if i == 5:  # Nothing is relevant: left out here, without judgements there.
                assert name not in theirs
                assert np.isnan(ours[of_ours][i])
            else:
                expected = theirs[name][of_theirs]
                assert ours[of_ours][i] == pytest.approx(expected, abs=1e-9), of_ours
