"""A large catalogue searched by a part of its numbers, beside loops in float64."""

import numpy as np
import pytest
from brute_force import brute_force

from cbam_jax.catalogue import Catalogue, narrowing
from cbam_jax.catalogue import nearest as room
from cbam_jax.catalogue.gallery import cache_path
from cbam_jax.catalogue.nearest import nearest, squared_norms

from fakes import FakeEmbedder  # isort: skip


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Small galleries as large ones."""
    monkeypatch.setattr(narrowing, "_WORTH_WHILE", 0)
    monkeypatch.setattr(room, "_FEW", 0)
    monkeypatch.setattr(room, "_NARROWED", 6)


def correlated(rng, n, d, rank=12):
    """Rows of which most lies along a few directions, far from the origin."""
    rows = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + 3
    return (rows + 0.1 * rng.standard_normal((n, d))).astype(np.float32)


def assert_exact(queries, gallery, k, narrowed, rows=None):
    squares = squared_norms(gallery)
    found = nearest(queries, gallery, k, squares=squares, rows=rows, narrowed=narrowed)
    left = gallery if rows is None else gallery[rows]
    distances, places = brute_force(queries, left, k)
    np.testing.assert_array_equal([d for d, _ in found], distances)
    np.testing.assert_array_equal([p for _, p in found], places if rows is None else rows[places])


def test_narrowed_answers_are_those_of_float64(rng, monkeypatch):
    gallery = correlated(rng, 3000, 320)
    gallery[7:90:3] = gallery[4]  # Ties.
    narrowed = narrowing.narrow(gallery, squared_norms(gallery))
    assert narrowed.along.shape == (3000, 64)
    left, may_be = [], narrowing.may_be_nearest
    monkeypatch.setattr(
        room, "may_be_nearest", lambda *a: left.append(len(may_be(*a))) or may_be(*a)
    )
    queries = gallery[:6] + rng.normal(0, 0.02, (6, 320)).astype(np.float32)
    assert_exact(queries, gallery, 9, narrowed)
    assert len(left) == 6
    assert np.median(left) < 600
    assert_exact(gallery[:5], gallery, 20, narrowed)
    assert_exact(queries, gallery, 9, narrowed, np.flatnonzero(rng.random(3000) < 0.4))
    monkeypatch.setattr(room, "_PRODUCTS", 5000)
    assert_exact(queries, gallery, 9, narrowed)


@pytest.mark.parametrize("kind", ["normal", "constant", "large", "tiny", "far", "duplicates"])
def test_any_directions_give_the_same(rng, kind):
    """Right ones or not: bounds hold, however little they tell."""
    gallery = rng.standard_normal((900, 80)).astype(np.float32)
    if kind == "constant":
        gallery[:] = gallery[0]
    if kind == "duplicates":
        gallery = gallery[rng.integers(0, 30, 900)]
    scale, shift = {"large": (1e12, 0), "tiny": (1e-9, 0), "far": (1e-3, 1000)}.get(kind, (1, 0))
    gallery = (gallery * scale + shift).astype(np.float32)
    squares = squared_norms(gallery)
    random = np.linalg.qr(rng.standard_normal((80, 15)))[0] * (1 - 2.0**-16)
    for directions in (random.astype(np.float32), narrowing._directions(gallery, 15)):
        along = narrowing.projected(gallery, squares, directions)
        assert_exact(gallery[:4], gallery, 11, narrowing.Narrow(directions, along))


def test_bounds_are_below_every_distance_and_not_far(rng):
    gallery = correlated(rng, 120, 192)
    squares = squared_norms(gallery)
    directions = narrowing._directions(gallery, 63)
    along = narrowing.projected(gallery, squares, directions)
    lower = narrowing.lower_bounds(along @ along.T, squares[:, None], squares, directions)
    doubles = gallery.astype(np.float64)
    exact = np.sum((doubles[:, None] - doubles) ** 2, axis=2)
    assert (lower <= exact).all()
    assert np.mean(exact - lower < 0.1 * exact.mean()) > 0.9


def test_where_it_would_not_pay_nothing_is_kept(rng, monkeypatch):
    normal = rng.standard_normal((2500, 320)).astype(np.float32)
    assert narrowing.narrow(normal, squared_norms(normal)) is None
    few = correlated(rng, 2500, 100)  # Numbers.
    assert narrowing.narrow(few, squared_norms(few)) is None
    monkeypatch.setattr(narrowing, "_WORTH_WHILE", 2500 * 320 + 1)
    some = correlated(rng, 2500, 320)
    assert narrowing.narrow(some, squared_norms(some)) is None


def test_a_catalogue_keeps_it_beside_and_makes_it_anew(rng, tmp_path):
    """After photos were added or removed, and where the copy is damaged: the answer is exact."""
    rows = correlated(rng, 800, 192)
    path = tmp_path / "shop.db"

    def assert_whole(shop, ids):
        for query in rows[:1] + np.float32(0.01):
            found = [(n.id, n.distance) for n in shop.find(query, k=7)]
            distances, places = brute_force(query[None], rows[ids - 1], 7)
            expected = zip(ids[places[0]].tolist(), distances[0].tolist(), strict=True)
            assert found == list(expected)

    with Catalogue.open(path, _Embedder()) as shop:
        shop.add_embeddings([f"{i}.jpg" for i in range(600)], rows[:600])
        assert_whole(shop, np.arange(1, 601))
        assert shop.gallery.narrowed.along.shape == (600, 64)
        shop.add_embeddings([f"{i}.jpg" for i in range(600, 800)], rows[600:])
        left = np.delete(np.arange(1, 801), [2, 70, 700])
        shop.remove([3, 71, 701])
        assert_whole(shop, left)
        parts = [part.tobytes() for part in shop.gallery.narrowed]
    whole, file = cache_path(path).read_bytes(), cache_path(path)
    # As where the power went before it was written.
    file.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    with Catalogue.open(path, _Embedder()) as shop:
        assert_whole(shop, left)
    assert file.read_bytes() == whole
    for part in parts:
        damaged = bytearray(whole)
        damaged[whole.index(part) + len(part) // 2] ^= 64
        file.write_bytes(damaged)
        with Catalogue.open(path) as shop:
            found = shop.verify(sample=0)
            assert found == [f"{file} is damaged: the next search makes it anew"]
            assert_whole(shop, left)
            assert len(shop.gallery.narrowed.along) == 797
            assert shop.verify(sample=0) == []


class _Embedder(FakeEmbedder):
    """Of embeddings of 192 numbers."""

    def __init__(self):
        super().__init__()
        self.dimension = 192
