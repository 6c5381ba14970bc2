"""What is within a limit: limits as bounds, bounds by float32, the choice of what is measured."""

import jax
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force, in_clusters

from cbam_jax.search import METRICS, bounds, groups, near, nearest, passes, search
from cbam_jax.search.candidates import candidate_pass
from cbam_jax.search.order import INFINITE, NO_BOUND, NOBODY, unpacked
from cbam_jax.search.shards import split_gallery
from cbam_jax.search.types import Labels, Queries, Shard


def _queries(x):
    with np.errstate(over="ignore"):  # Infinite where float32 does not hold them.
        squares = np.sum(np.square(x, dtype=np.float64), axis=1).astype(np.float32)
    return Queries(x, squares, Labels(None, None, None))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1.0, 2.0**40, 2.0**-70])
def test_no_bound_of_what_is_as_near_is_above_a_limit(rng, metric, scale):
    """Whatever `bound_distances` takes for nearer or as near is within `distance_bounds`."""
    settings = bounds.Preparation(None, np.float32(scale), metric, "float32")
    some = rng.normal(size=(40, 300)).astype(np.float32) * 10.0 ** rng.uniform(-9, 9, (40, 1))
    integers = bounds.reordered(some.astype(np.float32).view(np.int32))
    share = rng.normal(size=40) * 10.0 ** rng.uniform(-9, 9, 40)
    distances = bounds.bound_distances(integers, share, settings)
    for kth in (distances[:, 7], 1.5 * distances[:, 3].astype(float), np.full(40, np.inf)):
        limits = bounds.distance_bounds(kth, share, settings)
        assert (integers <= limits[:, None])[distances <= kth[:, None]].all()
        assert (limits < INFINITE).all()
    # Nor is a limit much above the bound of the distance itself.
    kth = np.sort(distances, axis=1)[:, 150]
    above = integers > bounds.distance_bounds(kth, share, settings)[:, None]
    kth = np.nan_to_num(kth.astype(np.float64), posinf=np.inf, neginf=-1e300)[:, None]
    known = np.isfinite(kth[:, 0])
    assert above[known][distances[known] > (kth + 1e-4 * np.abs(kth))[known]].all()


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_of_pairs_hold_and_are_near(rng, metric):
    """In a cluster as well: of rows, of copies, zero, and numbers that float32 hardly holds."""
    x = in_clusters(rng, 3, 20, 300, 1e-3)
    y = np.concatenate([x[:30], x[5:8], np.zeros((1, 300)), 1e-18 * x[:2]]).astype(np.float32)
    y[4] *= 30
    row, item = np.sort(rng.integers(0, 60, 900)), rng.integers(0, len(y), 900)
    shard = Shard(None, 70, y, np.zeros(len(y), np.float32))
    low, high = nearest.pair_bounds(row, item + 70, _queries(x), shard, metric)
    exact = np.stack([all_distances(a, y.astype(np.float64), metric) for a in x.astype(float)])
    exact = exact[row, item]
    assert (low <= exact + 1e-15).all()
    assert (exact - 1e-15 <= high).all()
    known = np.isfinite(high)
    assert known.mean() > (0.9 if metric == "cosine" else 0.999)
    lengths = np.linalg.norm(x[row], axis=1) * np.linalg.norm(y[item], axis=1)
    share = {"cosine": 1.0, "inner_product": lengths}.get(metric, exact)
    assert (high - low <= 4 * 300 * 2.0**-23 * share + 1e-14)[known].all()


def test_keys_stay_where_no_pair_is_nearer(rng):
    """Nor does a row without pairs change, nor any where there are none."""
    x, y = (rng.normal(size=(n, 8)).astype(np.float32) for n in (3, 40))
    shard, keys = Shard(jax.devices()[0], 0, y, np.zeros(40, np.float32)), np.full((3, 2), NOBODY)
    row, index = np.repeat([0, 2], 40), np.tile(np.arange(40), 2).astype(np.int32)
    keys = nearest.nearest_keys(keys, row, index, _queries(x), shard, "euclidean")
    assert (keys[1] == NOBODY).all()
    distances, indices = brute_force(x, y, 40)
    assert_same(
        [a[[0, 2]] for a in unpacked(np.sort(keys))], [distances[[0, 2], :2], indices[[0, 2], :2]]
    )
    far = indices[[0, 2], 20:].reshape(-1).astype(np.int32)
    for some in (far, far[:0]):
        row = np.repeat([0, 2], 20)[: len(some)]
        same = nearest.nearest_keys(keys, row, some, _queries(x), shard, "euclidean")
        np.testing.assert_array_equal(np.sort(same), np.sort(keys))


def test_inner_products_of_faint_queries_are_bounded(rng):
    """Whose squares underflow, with embeddings that differ by float32's roundings."""
    x = (1e-25 * rng.normal(size=(3, 24))).astype(np.float32)
    y = (1e10 * (rng.normal(size=24) + 1e-7 * rng.normal(size=(80, 24)))).astype(np.float32)
    row, item = np.divmod(np.arange(240), 80)
    shard = Shard(None, 0, y, np.zeros(80, np.float32))
    low, high = nearest.pair_bounds(row, item, _queries(x), shard, "inner_product")
    exact = -np.ravel(x.astype(np.float64) @ y.astype(np.float64).T)
    assert (low <= exact).all()
    assert (exact <= high).all()


@pytest.mark.parametrize("on", ["cpu", "accelerator"])
def test_distances_beyond_float32_are_ties(rng, on):
    """Infinitely far is nearer than nobody, so the first items are the nearest."""
    gallery = (1e30 * rng.normal(size=(80, 8))).astype(np.float32)
    ignored = np.arange(2)[:, None] == np.arange(80)
    if on == "accelerator":
        settings = bounds.Preparation(
            np.zeros(8), np.float32(2**-100), "squared_euclidean", "float32"
        )
        settings = groups.Settings(settings, Labels(np.arange(80), None, None), 128, 2, 80)
        queries = _queries(gallery[:2])._replace(labels=Labels(np.arange(2), None, None))
        shards = split_gallery(gallery, None)
        *found, proven = candidate_pass(queries, shards, 5, settings, 16)
        assert proven.all()
    else:
        found = search(
            gallery[:2], gallery, 5, metric="squared_euclidean", exclude_self=np.arange(2)
        )
    assert np.isinf(found[0]).all()
    expected = [np.flatnonzero(~a)[:5] for a in ignored]
    np.testing.assert_array_equal(found[1], expected)


def test_directions_of_rows_that_float32_cannot_measure():
    """Whose length is beyond float32, in a scale that is no number below its smallest."""
    x = np.array([[3e38, -3e38, 0, 3e38], [1, 0, 0, 0]], np.float32)
    queries, shards = _queries(x[1:]), split_gallery(x, None)
    settings = bounds.preparation_of(queries, shards, "cosine", "float32")
    rows, _ = bounds.prepared(x, np.full(2, np.inf, np.float32), settings)
    np.testing.assert_allclose(rows, [[3**-0.5, -(3**-0.5), 0, 3**-0.5], [1, 0, 0, 0]], rtol=1e-6)
    with jax.enable_x64(True):
        rows, _ = bounds.prepared(x, np.ones(2), settings._replace(dtype="float64"))
    np.testing.assert_allclose(rows[0], [3**-0.5, -(3**-0.5), 0, 3**-0.5], rtol=1e-12)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_kth_lowest_of_rows(rng, uneven):
    """Of one row with nearly all the values, too, and of rows without any."""
    row = np.sort(rng.integers(0, 9, 500)) if not uneven else np.repeat([2, 3, 7], [2, 490, 8])
    values, others = rng.normal(size=500), rng.normal(size=(20, 6))
    others[5:] = np.inf
    expected = [np.sort(np.concatenate([others[i], values[row == i]]))[5] for i in range(20)]
    np.testing.assert_array_equal(nearest.kth_lowest(values, row, others), expected)


@pytest.mark.parametrize(("k", "heights"), [(3, (96, 96, 40)), (2, (400, 130)), (9, (71, 33))])
def test_the_lowest_bounds_are_chosen_from_all_blocks(rng, monkeypatch, k, heights):
    """Nearly the lowest where rows collide; the very lowest where all are looked at."""
    monkeypatch.setattr(near, "_SLAB", 100)
    size, t, first = 4, 5, 1000
    minima, of_item = [], {}
    for height in heights:
        lowest = (rng.permutation(height * t).reshape(height, t).astype(np.int32) + 1) * 1024
        slab = rng.integers(0, size, lowest.shape).astype(np.int32)
        for i, j in np.ndindex(lowest.shape):
            of_item[j, first + i + slab[i, j] * height] = lowest[i, j] | slab[i, j]
        minima.append((first, lowest | slab, None))
        first += 10_000
    minima[0][1][:, 4] = NO_BOUND  # Nothing there for the last query.
    every = np.concatenate([block[1] for block in minima])
    row, index = near._lowest(minima, k, size)
    assert (np.diff(row) >= 0).all()
    for query in range(t):
        mine = [of_item[query, item] for item in index[row == query].tolist()]
        assert len(set(mine)) == len(mine) == min(k, (every[:, query] < INFINITE).sum())
        assert set(mine) <= set(every[:, query].tolist())
        allowed = k if 8 * k > heights[0] else 4 * k
        assert max(mine) <= np.sort(every[:, query])[allowed - 1]


def test_queries_with_the_most_pairs_are_given_up():
    left = np.zeros(6, bool)
    near._give_up(left, np.array([5, 100, 3, 0, 40, 7]), 60)
    assert left.tolist() == [False, True, False, False, False, False]
    near._give_up(left, np.array([5, 0, 3, 0, 40, 7]), 10)
    assert left.tolist() == [False, True, False, False, True, True]


def test_what_is_given_up_is_left_to_the_next_pass(rng, monkeypatch, passes_told):
    """Around half of the queries more is near than may be measured."""
    monkeypatch.setattr(near, "_CHEAP", 10**6)
    monkeypatch.setattr(passes.few, "MOST", 4)
    queries = rng.normal(size=(10, 32)).astype(np.float32)
    gallery = rng.normal(size=(5000, 32)).astype(np.float32)
    gallery[:2000] = queries[::2].repeat(400, axis=0) + rng.normal(0, 0.03, (2000, 32))
    found = search(queries, gallery, 5, first_pass="bfloat16")
    assert_same(found, brute_force(queries, gallery, 5))
    assert passes_told() == [("bfloat16", 5, 10), ("float32", 5, 5)]
    assert_same(search(queries, gallery, 5, first_pass="float32"), found)
    assert passes_told() == [("float32", 10, 10)]


@pytest.mark.parametrize("kept", [1, 2**12])
def test_limits_of_earlier_turns_hold_for_later_ones(rng, monkeypatch, kept):
    """From far to near, so that each turn has nearer items; with ties over all turns, and masks."""
    monkeypatch.setattr(groups, "_KEPT", kept)
    x = rng.normal(size=(1500, 20)).astype(np.float32)
    gallery = x[np.argsort(-np.linalg.norm(x - x[0], axis=1))]
    gallery[::100] = gallery[1499]
    group = rng.integers(0, 3, 1500)
    masks = {"query_group": group[1400:], "gallery_group": group}
    found = search(gallery[1400:], gallery, 9, gallery_block=160, first_pass="float32", **masks)
    ignored = group[1400:, None] == group
    assert_same(found, brute_force(gallery[1400:], gallery, 9, ignored=ignored))
