"""nDCG against scikit-learn, and loops where its ties are not ours."""

import math

import jax
import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from cbam_jax.metrics import ndcg

GAINS = {"linear": lambda grade: grade, "exp2": lambda grade: 2.0**grade - 1}


def loops(found, gallery, k, gain):
    dcg = math.fsum(GAINS[gain](g) / math.log2(i + 2) for i, g in enumerate(found[:k]))
    best = sorted(gallery, reverse=True)[:k]
    ideal = math.fsum(GAINS[gain](g) / math.log2(i + 2) for i, g in enumerate(best))
    return dcg / ideal if ideal else math.nan


@pytest.mark.parametrize("gain", ["linear", "exp2"])
@pytest.mark.parametrize("k", [1, 5, 31])
def test_scikit_learn_agrees_where_scores_differ(rng, gain, k):
    gallery = rng.integers(0, 4, (23, 31)) * rng.integers(0, 2, (23, 31))
    gallery[:, 7] += 1
    score = rng.normal(size=(23, 31))
    found = np.take_along_axis(gallery, np.argsort(-score, axis=1), axis=1)
    values = ndcg(found, gallery, k, gain=gain)
    theirs = [ndcg_score([GAINS[gain](g)], [s], k=k) for g, s in zip(gallery, score, strict=True)]
    np.testing.assert_allclose(values, theirs, rtol=1e-12)
    traced = jax.jit(lambda a, b: ndcg(a, b, k, gain=gain))(found, gallery)
    np.testing.assert_allclose(traced, theirs, rtol=1e-5)


def test_ties_keep_their_order_where_scikit_learn_takes_the_mean(rng):
    gallery = np.array([[0, 3, 1, 0]])
    # All four are equally near: ours is the order given, theirs the mean of all orders.
    ours, theirs = ndcg(gallery, gallery, 2)[0], ndcg_score(gallery, np.zeros((1, 4)), k=2)
    assert ours == pytest.approx(loops([0, 3], [3, 1], 2, "linear"))
    orders = [ndcg([rng.permutation(gallery[0])], gallery, 2)[0] for _ in range(4000)]
    assert np.mean(orders) == pytest.approx(theirs, abs=0.02)
    assert abs(ours - theirs) > 0.05


def test_fewer_items_than_k_and_nothing_to_find():
    found, gallery = [[0, 2, 0], [0, 0, 0]], [[2, 0], [0, 0]]
    values = ndcg(found, gallery, 3, gain="exp2")
    assert values[0] == pytest.approx(loops(found[0], gallery[0], 3, "exp2"))
    assert math.isnan(values[1])


@pytest.mark.parametrize(
    ("found", "gallery", "k", "gain", "message"),
    [
        ([[1, 0]], [[1, 0]], 3, "linear", "K is 3 of 2 ranks"),
        ([[1, 0]], [[1, 0]], 1, "exp", "gain 'exp'; expected 1 to that, and one of linear, exp2"),
        ([1, 0], [[1, 0]], 1, "linear", r"shape \(2,\) and gallery_grades \(1, 2\)"),
        ([[1, -1]], [[1, 0]], 1, "linear", "grades hold numbers that are negative"),
        ([[0, 0], [1, 2]], [[1, 0], [1, 0]], 2, "linear", "query 1 found grades that are higher"),
    ],
)
def test_wrong_grades_are_named(found, gallery, k, gain, message):
    with pytest.raises(ValueError, match=message):
        ndcg(found, gallery, k, gain=gain)
