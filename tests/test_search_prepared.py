"""Galleries that are prepared once, projected where embeddings are correlated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force

from cbam_jax.search import (
    METRICS,
    bounds,
    load_prepared,
    near,
    passes,
    prepare,
    preparing,
    projection,
    save_prepared,
    search,
)


@pytest.fixture
def proven(passes_told):
    """How many queries each pass has proven, {pass: proven}."""
    return lambda: {name: number for name, number, _ in passes_told()}


@pytest.fixture
def cheap_pairs(monkeypatch):
    """As if candidates cost nothing, so that small galleries are projected."""
    monkeypatch.setattr(projection, "_PAIR", {"bfloat16": 1e-3, "float32": 1e-3})


def correlated(rng, n, d, rank=20, noise=0.02):
    """Embeddings that vary in few directions, far from the origin."""
    basis = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    x = rng.normal(size=(n, rank)) * np.geomspace(3, 0.3, rank) @ basis.T
    return (x + noise * rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_projected_bounds_are_below_every_distance(rng, metric, dtype):
    """Along any directions, also where the rest has no length, or is all."""
    x = rng.normal(size=(60, 130)) * 10.0 ** rng.uniform(-3, 1, (60, 1))
    directions = projection.contraction(np.linalg.qr(rng.normal(size=(130, 63)))[0])
    oblique = 0.5 * directions * rng.uniform(0, 1, 63).astype(np.float32)
    inside = rng.normal(size=(60, 63)) @ directions.T
    outside = x - x @ directions @ directions.T
    for values, along in ((x, directions), (x, oblique), (inside, directions)):
        _check_bounds(values, along, metric, dtype)
    _check_bounds(np.concatenate([outside[:30], inside[:29], 0 * x[:1]]), directions, metric, dtype)


def _check_bounds(values, directions, metric, dtype):
    values = values.astype(np.float32)
    squares = np.sum(np.square(values, dtype=np.float64), axis=1).astype(np.float32)
    settings = bounds.Preparation(None, np.float32(1), metric, dtype, directions)
    product, share = (
        np.asarray(a).astype(np.float64) for a in bounds.prepared(values, squares, settings)
    )
    assert product.shape == (60, 64)
    doubles = values.astype(np.float64)
    exact = np.stack([all_distances(v, doubles, metric) for v in doubles])
    if metric == "euclidean":
        exact = exact**2
    lowest = (-2 if "euclidean" in metric else -1) * product @ product.T + share[:, None] + share
    assert (lowest <= exact + 1e-12 * np.abs(exact)).all()
    # And the squared distance along the directions is not lost.
    if metric.endswith("euclidean"):
        along = doubles @ directions
        along = np.stack([np.sum((along - a) ** 2, axis=1) for a in along])
        slack = {"bfloat16": 2.0**-5, "float32": 1e-3}[dtype]
        assert (lowest >= along - slack * (squares[:, None] + squares)).all()


def test_no_projection_makes_an_embedding_longer(rng):
    for d, r in ((130, 63), (64, 64)):
        directions = projection.contraction(np.linalg.qr(rng.normal(size=(d, r)))[0])
        assert np.linalg.norm(directions.astype(np.float64), 2) <= 1


def test_correlation_is_seen_where_it_is(rng):
    assert projection.correlated(correlated(rng, 300, 256).astype(np.float64))
    assert not projection.correlated(rng.normal(size=(300, 256)))
    assert not projection.correlated(rng.normal(5.0, 1.0, (300, 256)))
    assert not projection.correlated(np.ones((300, 256)))
    assert not projection.correlated(correlated(rng, 300, 64).astype(np.float64))  # Short.


@pytest.mark.parametrize(
    "first_pass", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"]
)
def test_a_projected_gallery_gives_the_same_neighbours(rng, proven, cheap_pairs, first_pass):
    gallery = correlated(rng, 1500, 192)
    gallery[700:730] = gallery[700]  # Ties, more than k.
    own = rng.permutation(1500)[:12]
    own[0] = 700
    group = rng.integers(0, 4, 1500)
    kept = prepare(gallery, first_pass=first_pass, k=9)
    assert kept.shape == (1500, 192)
    assert kept.width == 64
    assert kept.extra_bytes == 1500 * (64 * (2 if first_pass == "bfloat16" else 4) + 8)
    proven()
    masks = {"exclude_self": own, "query_group": group[own], "gallery_group": group}
    found = search(gallery[own], kept, 9, **masks)
    ignored = (group[own, None] == group) | (own[:, None] == np.arange(1500))
    assert_same(found, brute_force(gallery[own], gallery, 9, ignored=ignored))
    assert proven()["projected"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_files_and_devices(rng, proven, cheap_pairs, monkeypatch, metric, tmp_path):
    gallery = correlated(rng, 1501, 192)
    expected = brute_force(gallery[:9] + np.float32(0.1), gallery, 7, metric)
    np.save(tmp_path / "gallery.npy", gallery)
    kinds = (
        (gallery, None),
        (np.load(tmp_path / "gallery.npy", mmap_mode="r"), None),
        (jnp.asarray(gallery), jax.devices()[:3]),
    )
    for kind, devices in kinds:
        kept = prepare(kind, metric=metric, k=7, devices=devices)
        assert kept.width == 64
        proven()
        distances, indices = search(gallery[:9] + np.float32(0.1), kept, 7, metric=metric)
        np.testing.assert_array_equal(indices, expected[1])
        np.testing.assert_allclose(distances, expected[0], rtol=1e-6)
        assert proven()["projected"] >= 5


@pytest.mark.slow
def test_a_gallery_that_is_not_correlated_is_kept_whole(rng, proven):
    gallery = rng.normal(size=(1300, 160)).astype(np.float32)
    expected = brute_force(gallery[:5], gallery, 6)
    for first_pass, extra in (("bfloat16", 8 + 320), ("float32", 8)):
        kept = prepare(gallery, first_pass=first_pass)
        assert (kept.width, kept.extra_bytes) == (160, 1300 * extra)
        proven()
        assert_same(search(gallery[:5], kept, 6), expected)
        assert proven() == {first_pass: 5}
    # Numbers that only a scale brings into range have no preparation; queries may need one, too.
    queries = gallery[:5] * np.float32(1e30)
    assert_same(search(queries, kept, 6), brute_force(queries, gallery, 6))
    far = gallery * np.float32(1e25)
    assert_same(search(far[:5], prepare(far), 6), brute_force(far[:5], far, 6))


@pytest.mark.slow
def test_a_sample_that_misleads_costs_little(rng, monkeypatch, cheap_pairs):
    """All rows that are looked at vary in few directions, all queries and their neighbours do not.

    A few queries then show that the projection proves nothing.
    """
    gallery = correlated(rng, 6144, 192)
    unseen = np.flatnonzero(np.arange(6144) % 24 >= 16)
    gallery[unseen] = rng.normal(0, 2, (len(unseen), 192))
    gallery[unseen] += gallery[0]
    kept = prepare(gallery, k=5, first_pass="float32")
    assert kept.width < 192
    kept = dataclasses.replace(kept, candidates=((5, 32),))
    monkeypatch.setattr(near, "_CHEAP", 10**6)
    done = []
    one_pass = passes._pass

    def counted(queries, *rest):
        done.append(len(queries.rows) * (kept.width if rest[-1] is kept.sides else 192))
        return one_pass(queries, *rest)

    monkeypatch.setattr(passes, "_pass", counted)
    queries = gallery[unseen[:300]] + rng.normal(size=(300, 192)).astype(np.float32)
    found = search(queries, kept, 5)
    assert_same([a[::60] for a in found], brute_force(queries[::60], gallery, 5))
    assert len(done) == 2
    assert sum(done) <= 1.5 * 300 * 192


def embeddings_of_kind(rng, kind, n, d):
    """Galleries [n, d] that searches find hard, and queries [4, d] among them or near."""
    x = rng.normal(size=(n, d))
    if kind == "ties":
        x = rng.integers(0, 2, (n, d)) * (np.arange(d) < 4) + 0.0
    elif kind == "duplicates":
        x = x[rng.integers(0, 1 + n // 40, n)]
    elif kind == "constant":
        x = np.broadcast_to(x[:1], (n, d)).copy()
    elif kind == "few directions":
        x = x[:, :5] @ rng.normal(size=(5, d)) + 3
    elif kind == "large":
        x = x * 10.0 ** rng.uniform(-3, 9, (n, 1))
    elif kind == "clusters":
        x = x[rng.integers(0, 1 + n // 30, n)] + 1e-3 * x
    x = x.astype(np.float32)
    queries = x[rng.integers(0, n, 4)]
    queries[1:3] += rng.choice([1e-4, 1.0]) * rng.normal(size=(2, d)).astype(np.float32)
    return queries, x


KINDS = ("ties", "duplicates", "constant", "few directions", "large", "clusters", "normal")


def _check_along_any_directions(rng, monkeypatch, kind, n, d, k, first_pass):
    """A projection on some directions, right ones or not, changes nothing of a search's result."""
    queries, gallery = embeddings_of_kind(rng, kind, n, d)
    directions = np.linalg.qr(rng.normal(size=(d, 31)))[0]
    if rng.random() < 0.5:
        directions = np.linalg.svd(gallery, full_matrices=False)[2][:31].T
    choice = projection.Choice(projection.contraction(directions), ((n, 32),))
    monkeypatch.setattr(preparing, "_projection", lambda *_: choice)
    kept = prepare(gallery, first_pass=first_pass)
    assert kept.width == 32
    assert_same(search(queries, kept, k), brute_force(queries, gallery, k))


@pytest.mark.parametrize(
    "kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])]
)
def test_any_gallery_along_any_directions(rng, monkeypatch, kind):
    _check_along_any_directions(rng, monkeypatch, kind, 300, 130, 7, "float32")


@pytest.mark.slow
def test_eighty_galleries_along_any_directions(rng, monkeypatch):
    """Sizes come from short lists: each new combination is compiled."""
    cases = [(n, d, k) for n, d in ((40, 130), (700, 150)) for k in (1, n // 9, n)]
    for number in range(80):
        n, d, k = cases[number % len(cases)]
        first_pass = ("bfloat16", "float32")[number // len(cases) % 2]
        kind = KINDS[number % len(KINDS)]
        _check_along_any_directions(rng, monkeypatch, kind, n, d, k, first_pass)


@pytest.mark.slow
def test_what_was_prepared_is_read_for_its_gallery_alone(rng, cheap_pairs, tmp_path):
    gallery, path = correlated(rng, 300, 192), tmp_path / "gallery.prepared"
    kept = prepare(gallery, k=3, first_pass="bfloat16")
    save_prepared(path, kept)
    same = load_prepared(path, gallery)
    assert (same.width, same.candidates) == (kept.width, kept.candidates)
    assert same.preparation.metric == kept.preparation.metric
    for a, b in ((kept.sides[0], same.sides[0]), (kept.shards[0], same.shards[0])):
        np.testing.assert_array_equal(np.asarray(a.rows), np.asarray(b.rows))
        np.testing.assert_array_equal(a.squares, b.squares)
    np.testing.assert_array_equal(kept.preparation.directions, same.preparation.directions)
    with pytest.raises(ValueError, match=r"gallery\.prepared was prepared of another gallery"):
        load_prepared(path, gallery[::-1].copy())
    whole = path.read_bytes()
    list_of_contents = whole.rindex(b"PK\x01\x02")
    method = list_of_contents + 10  # How a member is compressed: not in a way there is.
    unknown = whole[:method] + bytes([99]) + whole[method + 1 :]
    away = list_of_contents + 42  # Where a member begins: before the file does.
    nowhere = whole[:away] + b"\xff\xff\xff\x7f" + whole[away + 4 :]
    half, other = whole[: len(whole) // 2], whole[:-3000] + bytes(9) + whole[-2991:]
    for damaged in (half, other, b"x", unknown, nowhere):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"gallery\.prepared is damaged"):
            load_prepared(path, gallery)
    with open(path, "wb") as file:
        np.savez(file, about=np.array('{"content": {}}'))
    with pytest.raises(ValueError, match=r"gallery\.prepared is damaged"):
        load_prepared(path, gallery)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_prepare_asks_for_a_whole_k(rng, k):
    gallery = rng.normal(size=(20, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=f"k is {k}: give a whole number from 1"):
        prepare(gallery, k=k)
    with pytest.raises(ValueError, match=f"k is {k}, but the gallery has 20 items; k is a whole"):
        search(gallery, gallery, k)


def test_a_search_asks_for_what_was_prepared(rng):
    gallery = rng.normal(size=(20, 3)).astype(np.float32)
    kept = prepare(gallery, first_pass="float32")
    with pytest.raises(ValueError, match=r"prepared for euclidean: prepare\(gallery, metric='cos"):
        search(gallery, kept, 1, metric="cosine")
    with pytest.raises(ValueError, match=r"float32: prepare\(gallery, first_pass='bfloat16'\)"):
        search(gallery, kept, 1, first_pass="bfloat16")
    with pytest.raises(ValueError, match="stays where it is"):
        search(gallery, kept, 1, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="queries are 2 wide, the gallery 3"):
        search(gallery[:, :2], kept, 1)
    with pytest.raises(ValueError, match="k is 21, but the gallery has 20 items"):
        search(gallery, kept, 21)


@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
def test_a_gallery_that_needs_scaling_and_queries_that_do_not(rng, metric):
    """The queries' numbers are just large enough for products, the gallery's are just too small."""
    x = rng.normal(size=(370, 8))
    x *= 2.0**-30 / np.linalg.norm(x, axis=1, keepdims=True)
    gallery, queries = (0.9 * x[:300]).astype(np.float32), (1.1 * x[300:]).astype(np.float32)
    kept = prepare(gallery, metric=metric, first_pass="float32")
    found = search(queries, kept, 5, metric=metric)
    np.testing.assert_array_equal(found[1], search(queries, gallery, 5, metric=metric)[1])
    np.testing.assert_array_equal(found[1], brute_force(queries, gallery, 5, metric)[1])


def test_long_rows_are_looked_at_for_correlation(rng):
    kept = prepare((1e11 * rng.normal(size=(300, 130))).astype(np.float32), first_pass="float32")
    assert kept.width == 130
