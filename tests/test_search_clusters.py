"""Searches of embeddings in tight clusters, of which each is searched alone."""

import logging

import jax
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force, in_clusters

from cbam_jax.search import clusters, near, passes, search, spread
from cbam_jax.search.order import packed, unpacked
from cbam_jax.search.types import Labels, Queries


@pytest.fixture
def proven(caplog):
    """How many queries each pass has proven, [(pass, proven, of), ...]."""
    caplog.set_level(logging.DEBUG, logger="cbam_jax.search")

    def read():
        done = [
            (a, int(b), c)
            for a, b, c in (r.args for r in caplog.records if r.name.endswith("passes"))
        ]
        caplog.clear()
        return done

    return read


def _queries(x):
    squares = np.sum(np.square(x, dtype=np.float64), axis=1).astype(np.float32)
    return Queries(x, squares, Labels(None, None, None))


def test_clusters_alone_prove_all_neighbours(rng, proven):
    """Some rows are copies, of which more than there are candidates tie."""
    gallery = in_clusters(rng, 12, 60, 24, 1e-2)
    gallery[100:140] = gallery[100]
    queries = gallery[60:190]
    found = search(queries, gallery, 4, exclude_self=np.arange(60, 190))
    ignored = np.arange(60, 190)[:, None] == np.arange(720)[None, :]
    assert_same(found, brute_force(queries, gallery, 4, ignored=ignored))
    assert proven() == [("clusters", 130, 130)]


@pytest.mark.slow
def test_random_clusters_match_float64(rng, proven):
    """Spreads, masks and devices of all kinds; copies, constants, few dimensions."""
    by_clusters = 0
    for i, spread_in_clusters in enumerate([0.1, 1e-2, 1e-4, 0.0, 0.1, 1e-3]):
        count, d = (20, 24) if i < 5 else (5, 3)
        gallery = in_clusters(rng, count, 1200 // count, d, spread_in_clusters)
        gallery *= np.float32(rng.choice([1.0, 100.0]))
        gallery += gallery.std() * np.float32(rng.choice([0.0, 3.0]))
        n, metric = len(gallery), rng.choice(["euclidean", "squared_euclidean"])
        gallery[: n // 10] = gallery[rng.integers(0, n, n // 10)]
        if rng.random() < 0.5:
            gallery = gallery[np.lexsort(gallery.T)]  # Whole clusters in one block.
        rows = rng.permutation(n)[:128]
        queries = gallery[rows] + rng.choice([0.0, 1e-3]).astype(np.float32)
        group, label = rng.integers(0, 9, n), rng.integers(0, 2, n)
        ignored, options = np.zeros((len(rows), n), bool), {}
        if rng.random() < 0.3:
            options |= {"query_group": group[rows], "gallery_group": group}
            ignored |= group[rows, None] == group
        if rng.random() < 0.3:
            options |= {"query_category": label[rows], "gallery_category": label}
            ignored |= label[rows, None] != label
        devices = jax.local_devices()[: int(rng.choice([1, 3]))]
        expected = brute_force(queries, gallery, 7, metric, ignored)
        found = search(queries, gallery, 7, metric=metric, devices=devices, **options)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-7)
        by_clusters += sum(number for name, number, _ in proven() if name == "clusters")
    assert by_clusters > 2 * 128  # Not all have few clusters, and masks may hide one.


@pytest.mark.slow
def test_cosine_of_clusters(rng, proven):
    gallery = in_clusters(rng, 16, 50, 24, 1e-2) * rng.uniform(0.1, 9, (800, 1)).astype(np.float32)
    gallery[5:9] = 0
    found = search(gallery[:130], gallery, 6, metric="cosine")
    expected = brute_force(gallery[:130], gallery, 6, "cosine")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-14)
    assert np.mean(found[1] == expected[1]) > 0.99  # Where float64's roundings decide.
    assert proven()[0] == ("clusters", 130, 130)


@pytest.mark.slow
def test_clusters_in_a_file_block_by_block(rng, proven, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "_ROWS", 336)
    np.save(tmp_path / "gallery.npy", in_clusters(rng, 20, 50, 24, 1e-3))
    gallery = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    found = search(gallery[:140], gallery, 6)
    assert_same(found, brute_force(gallery[:140], gallery, 6))
    assert proven() == [("clusters", 140, 140)]


@pytest.mark.slow
def test_few_queries_are_searched_near_themselves(rng, proven, monkeypatch):
    monkeypatch.setattr(passes, "_MANY", 0)
    monkeypatch.setattr(near, "_CHEAP", 10**6)
    gallery = in_clusters(rng, 20, 50, 24, 1e-3)
    gallery[:20] = gallery[0]
    queries = gallery[::200] + np.float32(1e-4) * rng.normal(size=(5, 24)).astype(np.float32)
    found = search(queries, gallery, 6, first_pass="float32")
    assert_same(found, brute_force(queries, gallery, 6))
    name, number, of = proven()[-1]
    assert name == "few"
    assert number == of > 0


@pytest.mark.slow
def test_queries_that_ignore_their_cluster_are_left_to_other_passes(rng, proven):
    centers, number = rng.normal(size=(16, 24)), rng.integers(0, 16, 1000)
    gallery = (centers[number] + 1e-3 * rng.normal(size=(1000, 24))).astype(np.float32)
    masks = {"query_group": number[:140], "gallery_group": number}
    found = search(gallery[:140], gallery, 6, **masks)
    ignored = number[:140, None] == number[None, :]
    assert_same(found, brute_force(gallery[:140], gallery, 6, ignored=ignored))
    assert proven()[0] == ("clusters", 0, 140)


def test_leaders_are_near_all_others(rng):
    x = in_clusters(rng, 7, 30, 16, 0.05)
    device = jax.local_devices()[0]
    found = clusters.leaders_of(_queries(x), 0.5, "euclidean", device, most=20)
    assert found is not None
    assert len(found.rows) == 7
    exact = np.linalg.norm(x.astype(np.float64) - x[found.rows[found.number]], axis=1)
    assert (exact <= found.apart).all()
    np.testing.assert_allclose(found.apart, exact, rtol=1e-5, atol=1e-14)
    assert clusters.leaders_of(_queries(x), 0.5, "euclidean", device, most=6) is None


def test_clusters_are_seen_where_they_are(rng):
    def radius(x, metric="euclidean"):
        return spread.cluster_radius(spread.spread_of(_queries(x), metric))

    assert radius(rng.normal(size=(400, 32)).astype(np.float32)) is None
    assert radius(in_clusters(rng, 8, 5, 32, 0.01)) is None  # Too few to tell.
    assert radius(in_clusters(rng, 8, 50, 32, 0.6)) is None
    tight = in_clusters(rng, 8, 50, 32, 0.05)
    assert radius(tight) == pytest.approx(0.25 * 2 * 7 / 8, rel=0.2)
    longer = tight * rng.uniform(1, 100, (400, 1)).astype(np.float32)
    assert radius(longer) != radius(tight)
    assert radius(longer, "cosine") == pytest.approx(radius(tight), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
def test_lengths_and_bounds_are_on_the_safe_side(rng, metric):
    with jax.enable_x64(True):
        x, y = (rng.normal(size=(m, 48)).astype(np.float32) for m in (9, 70))
        y[:30] = x[0] + 1e-5 * rng.normal(size=(30, 48)).astype(np.float32)
        low = np.asarray(clusters._bounds(*map(jax.numpy.asarray, (x, y, x[0])), metric))
    exact = np.stack([all_distances(a, y.astype(np.float64), metric) for a in x.astype(np.float64)])
    rounded = exact.astype(np.float32)
    assert (low <= rounded + (1e-13 if metric == "cosine" else 0)).all()
    np.testing.assert_allclose(low, exact, rtol=1e-6, atol=1e-12)
    lengths = clusters._length(rounded, metric)
    assert (clusters._distance(lengths, metric) <= np.maximum(rounded, 1e-28)).all()
    roots = {"euclidean": exact, "cosine": np.sqrt(np.maximum(2 * exact, 0))}
    assert (lengths >= roots.get(metric, np.sqrt(exact))).all()


def test_the_lowest_keys_of_tiles_are_kept(rng):
    nobody = packed(np.full((6, 3), np.inf, np.float32), np.full((6, 3), -1, np.int32))
    index = rng.permutation(3 * 2 * 4).astype(np.int32).reshape(3, 2, 4)
    fresh = packed(rng.integers(0, 5, index.shape).astype(np.float32), index)
    seats = np.array([[4, 1], [4, 1], [0, -1]])
    lowest = nobody.copy()
    clusters._merge(lowest, seats, fresh)
    np.testing.assert_array_equal(lowest[4], np.sort(fresh[:2, 0].ravel())[:3])
    np.testing.assert_array_equal(lowest[1], np.sort(fresh[:2, 1].ravel())[:3])
    np.testing.assert_array_equal(lowest[0], np.sort(fresh[2, 0])[:3])
    np.testing.assert_array_equal(lowest[[2, 3, 5]], nobody[:3])
    assert unpacked(lowest[[2]])[1].tolist() == [[-1, -1, -1]]
