"""Few queries, searched in one reading of the gallery."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force, in_clusters
from test_search_prepared import KINDS, embeddings_of_kind

from cbam_jax.search import METRICS, few, near, passes, prepare, search
from cbam_jax.search import shards as parts
from cbam_jax.search.bounds import bound_distances
from cbam_jax.search.types import Labels, Queries


def _queries(x):
    squares = np.sum(np.square(x, dtype=np.float64), axis=1).astype(np.float32)
    return Queries(x, squares, Labels(None, None, None))


def _assert_near(found, expected, metric):
    if metric.endswith("euclidean"):
        assert_same(found, expected)
    else:  # float64's own roundings decide the last bits.
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-12)
        assert np.mean(found[1] == expected[1]) > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_one_reading_finds_all_neighbours(rng, passes_told, metric):
    """Of ties more than k, with masks, in blocks of which the last overlaps."""
    gallery = rng.normal(1.0, 1.0, (700, 24)).astype(np.float32)
    gallery[300:360] = gallery[300]
    group, own = rng.integers(0, 5, 700), np.array([300, 5, 699])
    ignored = (group[own, None] == group) | (own[:, None] == np.arange(700))
    masks = {"exclude_self": own, "query_group": group[own], "gallery_group": group}
    found = search(gallery[own], gallery, 7, metric=metric, gallery_block=192, **masks)
    _assert_near(found, brute_force(gallery[own], gallery, 7, metric, ignored), metric)
    assert passes_told() == [("few", 3, 3)]


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_hold_and_are_near(rng, monkeypatch, metric):
    """About a centre as well; of norms that differ by a thousand; in two blocks that overlap."""
    x, y = (rng.normal(size=(m, 90)) * 10.0 ** rng.uniform(-2, 1, (m, 1)) for m in (5, 70))
    seen, look = [], few.near_of_turns

    def seeing(turns, parts_, queries, share, shards, k, settings):
        turns = list(turns)
        seen.append((turns, share, settings))
        return look(turns, parts_, queries, share, shards, k, settings)

    monkeypatch.setattr(few, "near_of_turns", seeing)
    for far in (0.0, 50.0):
        queries, gallery = _queries((x + far).astype(np.float32)), (y + far).astype(np.float32)
        items = Labels(np.arange(70, dtype=np.int32), None, None)
        few.few_search(queries, parts.parts_of(gallery, None), 3, metric, items, 64)
        turns, share, settings = seen.pop()
        assert (settings.preparation.center is None) == (far == 0 or "euclid" not in metric)
        blocks = [block for turn in turns for block in turn[0][0]]
        exact = np.stack(
            [all_distances(a, gallery.astype(float), metric) for a in queries.rows.astype(float)]
        )
        found = np.full(exact.shape, np.inf)
        for first, low, _ in blocks:
            bound = bound_distances(np.asarray(low).T[:5], share, settings.preparation)
            found[:, first : first + 64] = np.minimum(found[:, first : first + 64], bound)
        assert (found <= exact + 1e-6 * np.abs(exact) * (metric == "euclidean")).all()
        center = 0 if settings.preparation.center is None else settings.preparation.center
        lengths = [np.sum((a - center) ** 2, axis=1) for a in (queries.rows, gallery)]
        lengths = 1 if metric == "cosine" else lengths[0][:, None] + lengths[1]
        power = 2 if metric == "euclidean" else 1
        assert (exact**power - found**power <= 1e-4 * lengths).all()


def test_nothing_is_read_twice_and_what_is_not_finite_is_named(rng, monkeypatch):
    gallery = rng.normal(size=(900, 8)).astype(np.float32)
    monkeypatch.setattr(parts, "_square_sums", None)
    assert_same(search(gallery[:3], gallery, 4), brute_force(gallery[:3], gallery, 4))
    monkeypatch.undo()
    for value in (np.nan, np.inf):
        gallery[800, 2] = value
        with pytest.raises(ValueError, match=r"gallery: NaN or infinity in 1 rows.*row 800"):
            search(gallery[:3], gallery, 4)


def test_numbers_near_the_end_of_float32_or_beyond_it_make_no_noise(rng):
    gallery = np.clip(1e38 * rng.normal(size=(300, 8)), -3e38, 3e38).astype(np.float32)
    queries = np.full((2, 8), 3e38, np.float32)
    found = search(queries, gallery, 4)
    with np.errstate(over="ignore"):
        assert_same(found, brute_force(queries, gallery, 4))
    for wrong in (1e200 * gallery.astype(np.float64), np.inf * gallery):
        with pytest.raises(ValueError, match="gallery: NaN or infinity in 300 rows"):
            search(queries, wrong, 4)


def test_too_many_that_are_as_near_are_left_to_other_passes(rng, monkeypatch):
    """In a gallery from far to near, limits of earlier blocks fall; of equal rows all stays."""
    monkeypatch.setattr(few, "PAIRS", 100)
    monkeypatch.setattr(few, "_KEPT", 500)
    monkeypatch.setattr(near, "_CHEAP", 10**6)
    gallery = np.linspace(9, 1, 960, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    queries, items = _queries(np.zeros((2, 3), np.float32)), Labels(np.arange(960), None, None)
    shards = parts.parts_of(gallery, None)
    found = few.few_search(queries, shards, 5, "euclidean", items, 48)
    assert found is not None
    assert found[2].all()
    assert_same(found[:2], brute_force(queries.rows, gallery, 5))
    shards = parts.parts_of(np.ones((960, 3), np.float32), None)
    found = few.few_search(queries, shards, 5, "euclidean", items, 48)
    assert found is not None
    assert not found[2].any()


def test_one_reading_pays_for_the_fewest_far_from_the_origin_and_in_clusters(rng):
    def pays(x, queries, metric="euclidean"):
        return few.pays(parts.parts_of(x.astype(np.float32), None), queries, metric)

    normal = rng.normal(size=(3000, 40))
    assert pays(normal, 1)
    assert not pays(normal, 30)
    assert pays(normal + 3, 30)
    assert not pays(normal + 3, 30, "inner_product")
    assert not pays(normal + 3, 65)
    assert pays(in_clusters(rng, 8, 400, 40, 0.05), 30)


@pytest.mark.slow
def test_what_a_pass_leaves_is_found_in_one_reading(rng, passes_told, monkeypatch):
    """Of 20 queries in no clusters, of which half have more copies than there are candidates."""
    monkeypatch.setattr(passes, "_MANY", 0)
    monkeypatch.setattr(near, "_CHEAP", 10**6)
    gallery = rng.normal(size=(1000, 24)).astype(np.float32)
    gallery[:400] = gallery[:10].repeat(40, axis=0)
    expected = brute_force(gallery[300:500:10], gallery, 6)
    for kind in (gallery, prepare(gallery, first_pass="float32")):
        assert_same(search(gallery[300:500:10], kind, 6), expected)
        (_, proven, _), last = passes_told()[-2:]
        assert 10 <= proven < 20
        assert last == ("few", 20 - proven, 20 - proven)


@pytest.mark.slow
def test_two_hundred_galleries_of_all_kinds(rng, monkeypatch, tmp_path):
    """Sizes come from short lists: each new combination is compiled."""
    sizes = [(40, 130), (600, 140), (500, 7), (900, 17)]
    for number in range(200):
        n, d = sizes[number % len(sizes)]
        k = int(rng.choice([1, 20, 1 + n // 9, n]))
        queries, gallery = embeddings_of_kind(rng, KINDS[number % len(KINDS)], n, d)
        queries = queries[: rng.integers(1, 5)]
        metric = METRICS[number % 2 if number % 5 else number % 4]
        own = rng.integers(-1, n, len(queries))
        ignored = own[:, None] == np.arange(n)
        kind = (gallery, jnp.asarray(gallery), None)[number % 3]
        if kind is None:
            np.save(tmp_path / "gallery.npy", gallery)
            kind = np.load(tmp_path / "gallery.npy", mmap_mode="r")
        devices = jax.local_devices()[:3] if number % 7 == 0 and number % 3 else None
        options = {"exclude_self": own, "devices": devices, "metric": metric}
        block = (None, 256, None, 64, None)[number % 5]
        found = search(queries, kind, k, gallery_block=block, **options)
        expected = brute_force(queries, gallery, k, metric, ignored)
        _assert_near(found, expected, metric)
