"""Re-ranking against dense definitions in float64, written by loops."""

import numpy as np
import pytest
from brute_force import brute_force
from sklearn.decomposition import PCA

from cbam_jax.rerank import (
    apply_whitening,
    augment_gallery,
    expand_by_neighbours,
    expand_queries,
    fit_whitening,
    k_reciprocal,
)


def plain_search(
    x, y, k, metric="euclidean", exclude_self=False, query_group=None, gallery_group=None
):
    """`search` by loops: that of the package compiles for each size, and has tests of its own."""
    own = np.arange(len(x)) if exclude_self is True else np.broadcast_to(exclude_self, len(x))
    ignored = (own[:, None] == np.arange(len(y))) & (exclude_self is not False)
    if query_group is not None:
        ignored = ignored | (query_group[:, None] == gallery_group[None])
    return brute_force(x, y, k, metric, ignored)


@pytest.fixture
def slow_search(monkeypatch):
    for room in ("encodings", "expansion"):
        monkeypatch.setattr(f"cbam_jax.rerank.{room}.search", plain_search)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def dense_k_reciprocal(points, k1, k2, lambda_):
    """Zhong et al. 2017 with matrices of all pairs, as the authors' program does it."""
    m = len(points)
    points = points.astype(np.float64)
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)
    scaled = squares / squares.max(axis=1, keepdims=True)
    rank = np.argsort(np.sqrt(squares).astype(np.float32), axis=1, kind="stable")

    def reciprocal(i, k):
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    encodings = np.zeros((m, m))
    for i in range(m):
        near = reciprocal(i, k1)
        members = set(near)
        for j in near:
            theirs = reciprocal(j, int(np.around(k1 / 2)))
            if len(set(theirs) & set(near)) > 2 / 3 * len(theirs):
                members |= set(theirs)
        members = sorted(members)
        weight = np.exp(-scaled[i, members])
        encodings[i, members] = weight / weight.sum()
    encodings = np.stack([encodings[rank[i, :k2]].mean(axis=0) for i in range(m)])
    shared = np.minimum(encodings[:, None], encodings[None]).sum(-1)
    return (1 - lambda_) * (1 - shared / (2 - shared)) + lambda_ * scaled


def clusters(rng, count, width, spread=0.7):
    centre = rng.normal(size=(7, width))
    return (centre[rng.integers(0, 7, count)] + spread * rng.normal(size=(count, width))).astype(
        np.float32
    )


def assert_same(found, dense, allowed):
    """Distances within 1e-6 of the dense ones; indices in their order where these differ."""
    distances, indices = found
    for i, row in enumerate(dense):
        order = [j for j in np.lexsort((np.arange(len(row)), row.astype(np.float32)))]
        order = [j for j in order if allowed(i, j)][: distances.shape[1]]
        count = len(order)
        np.testing.assert_allclose(distances[i, :count], row[order], atol=1e-6)
        np.testing.assert_allclose(row[indices[i, :count]], row[order], atol=1e-6)
        assert len(set(indices[i, :count])) == count
        assert all(allowed(i, j) for j in indices[i, :count])
        assert (indices[i, count:] == -1).all()
        assert np.isinf(distances[i, count:]).all()


@pytest.mark.parametrize(
    ("q", "n", "k1", "k2", "lambda_"),
    [(17, 60, 7, 3, 0.3), (5, 90, 20, 6, 0.3), (9, 40, 5, 1, 0.0), (6, 11, 30, 4, 0.6)],
)
def test_k_reciprocal_is_the_dense_definition(slow_search, rng, q, n, k1, k2, lambda_):
    points = clusters(rng, q + n, 5)
    points[q + 2] = points[q + 3] = points[1]  # Duplicates in the gallery, and of a query.
    points[q + 4 : q + 9] = np.round(points[q + 4 : q + 9])
    dense = dense_k_reciprocal(points, k1, k2, lambda_)[:q, q:]
    for k in (3, n):
        found = k_reciprocal(points[:q], points[q:], k, k1=k1, k2=k2, lambda_=lambda_)
        assert_same(found, dense, lambda i, j: True)


def test_k_reciprocal_of_queries_in_the_gallery_and_groups(slow_search, rng, monkeypatch):
    monkeypatch.setattr("cbam_jax.rerank.encodings._ROWS", 16)
    monkeypatch.setattr("cbam_jax.rerank.encodings._PAIRS", 100)
    monkeypatch.setattr("cbam_jax.rerank.reciprocal._CELLS", 500)
    points = clusters(rng, 70, 4)
    dense = dense_k_reciprocal(points, 8, 3, 0.3)
    found = k_reciprocal(points, points, 12, k1=8, k2=3, exclude_self=True)
    assert_same(found, dense, lambda i, j: i != j)
    # Queries 0 to 9 are outside of the gallery, the others in it, and some items are ignored.
    group = rng.integers(0, 9, 70)
    own = np.where(np.arange(30) < 10, -1, np.arange(30) - 10)
    found = k_reciprocal(
        points[:30], points[10:], 60, k1=8, k2=3,
        exclude_self=own, query_group=group[:30], gallery_group=group[10:],
    )  # fmt: skip
    assert_same(found, dense[:30, 10:], lambda i, j: own[i] != j and group[i] != group[10 + j])


@pytest.mark.slow
def test_k_reciprocal_by_the_search_of_the_package(rng):
    points = clusters(rng, 77, 5)
    points[20] = points[21] = points[1]
    found = k_reciprocal(points[:17], points[17:], 30, k1=7, k2=3)
    assert_same(found, dense_k_reciprocal(points, 7, 3, 0.3)[:17, 17:], lambda i, j: True)


def test_expansion_is_the_weighted_mean(slow_search, rng):
    queries, gallery = clusters(rng, 9, 6).astype(float), clusters(rng, 40, 6).astype(float)
    group, groups = rng.integers(0, 3, 9), rng.integers(0, 3, 40)
    for alpha in (0.0, 1.5, 3.0):
        found = expand_queries(queries, gallery, 35, alpha, query_group=group, gallery_group=groups)
        for i, x in enumerate(unit(queries)):
            among = unit(gallery)[groups != group[i]]
            cosine = among @ x
            first = np.argsort(-cosine)[:35]
            weight = np.maximum(cosine[first], 0) ** alpha
            expected = unit(x + weight @ among[first])
            np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_lists_that_are_known_are_not_searched_for(monkeypatch, rng):
    points = clusters(rng, 40, 5)
    lists = plain_search(points, points, 8)[1]
    monkeypatch.setattr("cbam_jax.rerank.encodings.search", None)
    found = k_reciprocal(points[:4], points[4:], 9, k1=7, k2=3, lists=lists)
    dense = dense_k_reciprocal(points, 7, 3, 0.3)[:4, 4:]
    assert_same(found, dense, lambda i, j: True)


def test_expansion_by_neighbours_that_are_known(rng):
    queries, near = rng.normal(size=(3, 6)), rng.normal(size=(3, 5, 6)).astype(np.float32)
    near[1, 2:] = 0
    found = expand_by_neighbours(queries, near, 1.5)
    for i, x in enumerate(unit(queries)):
        rows = [y / np.linalg.norm(y) for y in near[i].astype(float) if y.any()]
        expected = x + sum(max(x @ y, 0) ** 1.5 * y for y in rows)
        np.testing.assert_allclose(found[i], unit(expected), atol=1e-6)


def test_augmentation_expands_each_item_by_the_others(slow_search, rng):
    gallery = clusters(rng, 30, 6)
    found = augment_gallery(gallery, 4, 2.0)
    x = unit(gallery.astype(float))
    for i in range(30):
        cosine = np.where(np.arange(30) == i, -2, x @ x[i])
        first = np.argsort(-cosine)[:4]
        expected = unit(x[i] + np.maximum(cosine[first], 0) ** 2 @ x[first])
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_whitening_is_that_of_scikit_learn(rng):
    train = (rng.normal(size=(80, 9)) @ rng.normal(size=(9, 9)) + 3).astype(np.float32)
    test = (rng.normal(size=(20, 9)) + 3).astype(np.float32)
    theirs = unit(PCA(5, whiten=True).fit(train.astype(float)).transform(test.astype(float)))
    found = apply_whitening(test, fit_whitening(train, 5))
    # An axis has no sign.
    np.testing.assert_allclose(np.abs(found), np.abs(theirs), atol=1e-5)
    np.testing.assert_allclose(found @ found.T, theirs @ theirs.T, atol=1e-5)
    # Without scaling, all axes: a rotation about the mean.
    turned = apply_whitening(test, fit_whitening(train, power=0.0))
    centred = unit(test - train.mean(axis=0, dtype=float))
    np.testing.assert_allclose(turned @ turned.T, centred @ centred.T, atol=1e-5)


def test_axes_that_do_not_vary_are_left_out(rng):
    flat = np.repeat(rng.normal(size=(30, 3)), 2, axis=1)
    assert fit_whitening(flat).components.shape == (6, 3)
    with pytest.raises(ValueError, match="30 embeddings of 6 numbers vary along 3 axes"):
        fit_whitening(flat, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: k_reciprocal(x, x, 1, k1=0), "k1 is 0, k2 6 and lambda_ 0.3"),
        (lambda x: k_reciprocal(x, x, 1, k1=3, k2=5), "k2 5"),
        (lambda x: k_reciprocal(x, x, 1, lambda_=1.5), "lambda_ 1.5"),
        (lambda x: k_reciprocal(x, x, 9), "k is 9, but the gallery has 4 items"),
        (lambda x: k_reciprocal(x, x[:, :1], 1), "queries are 2 wide, the gallery 1"),
        (lambda x: k_reciprocal(x, x, 1, k1=2, k2=1, lists=x), r"expected \(8, 3\) ints"),
        (
            lambda x: k_reciprocal(x, x, 1, k1=2, k2=1, lists=np.full((8, 3), 8)),
            "indices from 8 to 8, expected 0 to 7",
        ),
        (lambda x: expand_by_neighbours(x, x[:, None], -1), "alpha is -1, expected 0 or more"),
        (lambda x: expand_queries(x, x, 2, -1), "alpha is -1, expected 0 or more"),
        (lambda x: fit_whitening(x * np.nan), r"shape \(4, 2\), power 0.5; expected"),
        (lambda x: apply_whitening(x[:, :1], fit_whitening(x)), r"\(4, 1\), expected \[n, 2\]"),
    ],
)
def test_wrong_arguments_are_named(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(4, 2)).astype(np.float32))
