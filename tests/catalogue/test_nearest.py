"""The catalogue's exact search, beside loops in float64."""

import numpy as np
import pytest
from brute_force import brute_force

from cbam_jax.catalogue import nearest as room
from cbam_jax.catalogue.nearest import nearest, squared_norms


def assert_exact(queries, gallery, k, rows=None):
    found = nearest(queries, gallery, k, squares=squared_norms(gallery), rows=rows)
    left = gallery if rows is None else gallery[rows]
    count = min(k, len(left))
    distances, places = brute_force(queries, left, count)
    places = places if rows is None else rows[places]
    np.testing.assert_array_equal([d for d, _ in found], distances)
    np.testing.assert_array_equal([p for _, p in found], places)


@pytest.fixture(autouse=True, params=["by one thread", "by a product of matrices"])
def few(request, monkeypatch):
    """Small galleries as they are, and as large ones."""
    if request.param == "by a product of matrices":
        monkeypatch.setattr(room, "_FEW", 0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_distances_and_order_are_those_of_float64(rng, scale):
    gallery = (scale * rng.standard_normal((500, 33))).astype(np.float32)
    queries = (scale * rng.standard_normal((5, 33))).astype(np.float32)
    assert_exact(queries, gallery, 7)
    assert_exact(gallery[:3], gallery, 500)


def test_ties_come_by_position(rng):
    few = rng.standard_normal((4, 9)).astype(np.float32)
    gallery = few[rng.integers(0, 4, 90)]
    assert_exact(few + np.float32(0.5), gallery, 40)


def test_what_float32_products_cannot_tell_apart(rng):
    """Far from the origin, and near each other: the first product is wrong in most digits."""
    gallery = (1000 + 1e-3 * rng.standard_normal((300, 20))).astype(np.float32)
    assert_exact(gallery[:4] + np.float32(1e-3), gallery, 10)


def test_a_filter_is_applied_before(rng):
    gallery = rng.standard_normal((200, 8)).astype(np.float32)
    rows = np.flatnonzero(rng.random(200) < 0.1)
    assert_exact(gallery[:6], gallery, 5, rows)
    assert_exact(gallery[:2], gallery, 150, rows)
    (distances, places), *_ = nearest(
        gallery[:1], gallery, 3, squares=squared_norms(gallery), rows=rows[:0]
    )
    assert len(distances) == len(places) == 0


def test_blocks_do_not_show(rng, monkeypatch):
    gallery = rng.standard_normal((70, 8)).astype(np.float32)
    monkeypatch.setattr(room, "_PRODUCTS", 100)
    monkeypatch.setattr(room, "_ROWS", 16)
    assert_exact(gallery[:9], gallery, 20, np.arange(3, 60))


def test_a_small_gallery_is_searched_by_one_thread(monkeypatch, rng):
    monkeypatch.setattr(room, "_FEW", 5 * 4 * 33)
    asked, vecdot = [], np.vecdot
    monkeypatch.setattr(room.np, "vecdot", lambda *a: asked.append(len(a[1][0])) or vecdot(*a))
    gallery = rng.standard_normal((9, 33)).astype(np.float32)
    for count in (5, 6):
        assert_exact(gallery[:4], gallery[:count], 3)
    assert asked == [5]
