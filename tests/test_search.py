from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force, in_clusters

from cbam_jax.search import (
    FIRST_PASSES,
    METRICS,
    bounds,
    candidates,
    exhaustive,
    groups,
    pairs,
    passes,
    search,
    shards,
    spread,
)
from cbam_jax.search.types import Labels, Queries, Shard


def equal_blocks_of(shard, size):
    return shards.equal_blocks(len(shard.rows), size)


@pytest.fixture(params=["near", "candidates"])
def step(request, monkeypatch):
    """The second step of a CPU's passes; or an accelerator's, which a CPU takes as well."""
    if request.param == "candidates":

        def found(*arguments):
            return SimpleNamespace(found=lambda: candidates.candidate_pass(*arguments))

        monkeypatch.setattr(passes, "near_pass", found)
        for room in (groups, candidates):  # An accelerator's blocks are equal.
            monkeypatch.setattr(room, "pass_blocks", equal_blocks_of)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_random_shapes_match_float64(rng, step, first_pass):
    """Sizes come from short lists: each new combination is compiled."""
    for _ in range(25):
        q, n, d = rng.choice([1, 7]), rng.choice([1, 150, 1111]), rng.choice([1, 200])
        queries = rng.normal(1.0, 2.0, (q, d)).astype(np.float32)
        gallery = rng.normal(1.0, 2.0, (n, d)).astype(np.float32)
        k = min(int(rng.choice([1, 5, 1111])), n)
        block = int(rng.choice([16128, 300]))  # 1,111 rows make 4 blocks of 300, with overlaps
        found = search(queries, gallery, k, gallery_block=block, first_pass=first_pass)
        distances, indices = found
        expected = brute_force(queries, gallery, k)
        assert distances.dtype == np.float32
        assert indices.dtype == np.int32
        np.testing.assert_array_equal(indices, expected[1])
        np.testing.assert_allclose(distances, expected[0], rtol=1e-7)


@pytest.mark.slow
def test_two_hundred_random_shapes_match_float64(rng, step):
    # Each new combination is compiled: there are forty, of which five times as many are made.
    sizes = rng.integers(1, (700, 90, 41, 50, 800), (40, 5)).tolist()
    for n, d, k, query_block, gallery_block in 5 * sizes:
        q, k = int(rng.integers(1, 40)), min(n, k)
        queries = rng.normal(1.0, 2.0, (q, d)).astype(np.float32)
        gallery = rng.normal(1.0, 2.0, (n, d)).astype(np.float32)
        options = {"query_block": query_block, "gallery_block": gallery_block}
        first_pass = rng.choice(FIRST_PASSES)
        distances, indices = search(queries, gallery, k, first_pass=first_pass, **options)
        expected = brute_force(queries, gallery, k)
        np.testing.assert_array_equal(indices, expected[1])
        np.testing.assert_allclose(distances, expected[0], rtol=1e-7)


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_match_float64(rng, step, metric, first_pass):
    queries = rng.normal(0.5, 1.0, (6, 40)).astype(np.float32)
    gallery = rng.normal(0.5, 1.0, (1500, 40)).astype(np.float32)
    gallery[700] = 0.0
    options = {"metric": metric, "first_pass": first_pass}
    distances, indices = search(queries, gallery, 9, gallery_block=600, **options)
    expected = brute_force(queries, gallery, 9, metric)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-6)
    if metric == "cosine":
        assert search(queries * 0, gallery, 2, **options)[0].tolist() == [[1.0, 1.0]] * 6
        assert not search(gallery[:5], gallery, 1, **options)[0].any()


@pytest.fixture(scope="module")
def tied():
    """Points of a small grid: nearly every distance occurs many times."""
    rng = np.random.default_rng(7)
    gallery = rng.integers(0, 3, (2100, 4)).astype(np.float32)
    queries = np.concatenate([gallery[50:56], rng.integers(0, 3, (5, 4)).astype(np.float32)])
    return queries, gallery, brute_force(queries, gallery, 20)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(256, 16128), (4, 999), (1, 64), (11, 2100)])
def test_exact_ties_for_any_block_size(tied, step, blocks):
    queries, gallery, expected = tied
    found = search(queries, gallery, 20, query_block=blocks[0], gallery_block=blocks[1])
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8])
def test_exact_ties_for_any_device_count(tied, step, count):
    queries, gallery, expected = tied
    devices = jax.devices()[:count]
    assert_same(search(queries, gallery, 20, devices=devices), expected)
    assert_same(search(queries, jnp.asarray(gallery), 20, devices=devices), expected)
    if len(gallery) % count == 0:
        mesh = jax.make_mesh((count,), ("data",), devices=devices)
        spec = jax.sharding.PartitionSpec("data")
        sharded = jax.device_put(gallery, jax.sharding.NamedSharding(mesh, spec))
        assert_same(search(queries, sharded, 20), expected)


@pytest.mark.slow
def test_batching_of_queries_changes_no_bit(rng):
    queries = rng.normal(size=(11, 33)).astype(np.float32)
    gallery = rng.normal(size=(1200, 33)).astype(np.float32)
    whole = search(queries, gallery, 7)
    for size in (1, 5):
        parts = [search(queries[i : i + size], gallery, 7) for i in range(0, 11, size)]
        assert_same([np.concatenate(part) for part in zip(*parts, strict=True)], whole)
    assert_same(search(queries, gallery, 7, gallery_block=300), whole)
    assert_same(search(queries, gallery, 7, devices=jax.devices()), whole)


@pytest.mark.slow
@pytest.mark.parametrize("double_block", [(64, 4096), (3, 100)])
def test_more_duplicates_than_candidates(rng, monkeypatch, double_block):
    monkeypatch.setattr(exhaustive, "_DOUBLE_BLOCK", double_block)
    gallery = np.repeat(rng.normal(size=(3, 12)), 401, axis=0).astype(np.float32)
    gallery = gallery[rng.permutation(1203)]
    queries = np.concatenate([gallery[:2], rng.normal(size=(2, 12)).astype(np.float32)])
    for devices in (None, jax.devices()[:2]):
        assert_same(
            search(queries, gallery, 30, devices=devices), brute_force(queries, gallery, 30)
        )
    ones = np.ones((900, 5), np.float32)
    distances, indices = search(ones[:2], ones, 25)
    assert not distances.any()
    assert indices.tolist() == [list(range(25))] * 2


def test_near_duplicates_are_ordered_as_in_float64(rng):
    """Far from the origin, float32 products lose what tells these apart."""
    center = rng.normal(size=24) * 1000
    steps = np.concatenate([np.arange(1, 51), np.arange(2000, 4000)])
    gallery = (center + np.outer(steps, rng.normal(size=24) * 1e-3)).astype(np.float32)
    gallery = gallery[rng.permutation(len(gallery))]
    query = center[None].astype(np.float32)
    assert_same(search(query, gallery, 30), brute_force(query, gallery, 30))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_float64_search_alone(rng, monkeypatch, metric):
    """As if no query were proven, in blocks that overlap."""
    monkeypatch.setattr(exhaustive, "_DOUBLE_BLOCK", (3, 101))
    monkeypatch.setattr(passes, "_passes", lambda *_: iter(()))
    queries = rng.normal(size=(7, 12)).astype(np.float32)
    gallery = rng.normal(size=(451, 12)).astype(np.float32)
    gallery[[5, 440]] = 0.0
    groups = rng.integers(0, 5, 7), rng.integers(0, 5, 451)
    for devices in (None, jax.devices()[:3]):
        distances, indices = search(
            queries,
            gallery,
            120,
            metric=metric,
            query_group=groups[0],
            gallery_group=groups[1],
            devices=devices,
        )
        ignored = groups[0][:, None] == groups[1][None, :]
        expected = brute_force(queries, gallery, 120, metric, ignored)
        np.testing.assert_array_equal(indices, expected[1])
        np.testing.assert_allclose(distances, expected[0], rtol=1e-6)


@pytest.mark.parametrize("kept", [3, 1])
def test_a_selection_keeps_the_lowest(rng, kept):
    """Of 3 blocks at once, or of one after another."""
    blocks = []
    for first in (0, 80, 150):
        low = rng.permutation(20 * 6).reshape(20, 6).astype(np.int32) * 1024 + first
        low = (low & -4) | rng.integers(0, 4, low.shape, np.int32)
        blocks.append((np.int32(first), low, low + rng.integers(0, 99, low.shape, np.int32)))
    turns = [blocks] if kept > 1 else [[block] for block in blocks]
    best = groups._nothing(6, 9)
    for turn in turns:
        best = groups._select(best, turn, size=4)
    low, second = (np.concatenate([block[i].T for block in blocks], axis=1) for i in (1, 2))
    at = np.argsort(low, axis=1)[:, :9]
    np.testing.assert_array_equal(best.bound, np.take_along_axis(low, at, axis=1))
    np.testing.assert_array_equal(best.second, np.take_along_axis(second, at, axis=1))
    slab = np.take_along_axis(low, at, axis=1) & 3
    np.testing.assert_array_equal(
        best.index, np.array([0, 80, 150])[at // 20] + at % 20 + 20 * slab
    )


@pytest.mark.parametrize("kept", [groups._KEPT, 1])
def test_neighbours_that_share_a_group_are_all_found(rng, monkeypatch, step, kept):
    """Bounds are kept of the lowest two of each group of 8: rows i, i + groups, ..."""
    assert passes.group_size(4, 1130) == 8
    monkeypatch.setattr(groups, "_KEPT", kept)
    queries = rng.normal(size=(5, 24)).astype(np.float32)
    gallery = rng.normal(size=(1130, 24)).astype(np.float32)
    # One block with padding before it; three and a tail; and three, the last one overlapping.
    for cut, block in (
        (shards.fixed_blocks, 1200),
        (shards.fixed_blocks, 384),
        (shards.equal_blocks, 384),
    ):
        if step == "candidates" and cut is shards.fixed_blocks:
            continue
        for room in (groups, candidates):
            monkeypatch.setattr(room, "pass_blocks", lambda s, size, c=cut: c(len(s.rows), size))
        starts, lengths = cut(1130, block)
        near = gallery.copy()
        for i, query in enumerate(queries):
            for start, rows in ((starts[0], lengths[0]), (starts[-1], lengths[-1])):
                first = min(start, 1130 - rows)
                members = np.arange(first + 3 * i, first + rows, -(-rows // 8))
                members = members[members >= 0]
                noise = rng.normal(0, 0.1, (len(members), 24))
                near[members] = (query + noise).astype(np.float32)
        assert_same(search(queries, near, 4, gallery_block=block), brute_force(queries, near, 4))
        ignored = rng.integers(0, 3, 5)[:, None] == rng.integers(0, 3, 1130)
        group = {"query_group": np.arange(5), "gallery_group": np.where(ignored.any(0), 2, 9)}
        found = search(queries, near, 4, gallery_block=block, **group)
        expected = brute_force(
            queries, near, 4, ignored=group["query_group"][:, None] == group["gallery_group"]
        )
        assert_same(found, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_pairs_are_measured_alike_by_numpy_and_by_programs(rng, metric):
    """That of a CPU, and that of an accelerator."""
    x, y = (rng.normal(size=(n, 200)).astype(np.float32) for n in (16, 90))
    x[3], y[5], y[7], y[8] = 0, 0, x[2], 2 * x[2]
    rows, found = rng.permutation(16).astype(np.int32), rng.integers(40, 130, (16, 70), np.int32)
    found[:, :4] = 45, 47, 48, 45
    shard = Shard(jax.devices()[0], 40, jnp.asarray(y), np.zeros(90, np.float32))
    ours = pairs._by_numpy(jnp.asarray(x), shard, rows, found, metric)
    doubles = y.astype(np.float64)
    every = np.stack([all_distances(a, doubles, metric) for a in x.astype(np.float64)])
    expected = every[rows[:, None], found - 40].astype(np.float32)
    np.testing.assert_allclose(ours, expected, rtol=1.2e-7, atol=1e-15)
    theirs = pairs._by_programs(jnp.asarray(x), shard, rows, found, metric)
    np.testing.assert_array_equal(ours, theirs)


def test_query_in_the_gallery_is_at_distance_zero(rng):
    gallery = rng.normal(5.0, 1.0, (1300, 64)).astype(np.float32)
    distances, indices = search(gallery[100:140], gallery, 1)
    assert not distances.any()
    assert indices[:, 0].tolist() == list(range(100, 140))


@pytest.mark.parametrize("blocks", [(256, 16128), (3, 700)])
def test_masks_and_ragged_rows(rng, step, blocks):
    n, q = 1500, 8
    gallery = rng.normal(size=(n, 6)).astype(np.float32)
    own = rng.permutation(n)[:q]
    own[2] = -1
    labels = {
        "query_group": rng.integers(0, 3, q),
        "gallery_group": rng.integers(0, 3, n),
        "query_category": rng.integers(0, 40, q),
        "gallery_category": rng.integers(0, 40, n),
    }
    labels["query_category"][3] = 99  # in no gallery
    ignored = labels["query_group"][:, None] == labels["gallery_group"][None, :]
    ignored |= labels["query_category"][:, None] != labels["gallery_category"][None, :]
    ignored |= own[:, None] == np.arange(n)[None, :]
    sizes = {"query_block": blocks[0], "gallery_block": blocks[1]}
    found = search(gallery[own], gallery, 30, exclude_self=own, **labels, **sizes)
    assert_same(found, brute_force(gallery[own], gallery, 30, ignored=ignored))
    assert found[1][3].tolist() == [-1] * 30
    assert np.isinf(found[0][found[1] == -1]).all()
    assert 0 < np.sum(found[1] == -1) < found[1].size


@pytest.mark.slow
def test_masks_hold_for_queries_that_are_searched_again(rng, step):
    gallery = np.ones((800, 3), np.float32)
    groups = rng.integers(0, 4, 800)
    found = search(
        gallery, gallery, 20, exclude_self=True, query_group=groups, gallery_group=groups
    )
    ignored = (groups[:, None] == groups[None, :]) | np.eye(800, dtype=bool)
    for i in range(800):
        assert found[1][i].tolist() == np.flatnonzero(~ignored[i])[:20].tolist()


@pytest.mark.slow
def test_k_equal_to_the_gallery_and_one_query(rng):
    gallery = rng.normal(size=(1040, 3)).astype(np.float32)
    found = search(gallery[:1], gallery, 1040)
    assert_same(found, brute_force(gallery[:1], gallery, 1040))
    excluded = search(gallery, gallery, 1040, exclude_self=True)
    assert (excluded[1][:, -1] == -1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e37])
def test_extreme_magnitudes(rng, step, scale):
    gallery = (rng.normal(size=(900, 8)) * scale).astype(np.float32)
    gallery[3] = 0.0
    queries = gallery[:4] * np.float32(1.5)
    assert_same(search(queries, gallery, 5), brute_force(queries, gallery, 5))


@pytest.mark.parametrize("queries", [2, 70])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_numbers_that_may_be_computed_as_zero(rng, queries, metric, largest):
    """XLA takes float32's smallest for 0 on a CPU: here all of the nearest, and of no other."""
    edge = np.float32(2.0**-126)
    gallery = (edge * rng.uniform(1.1, 1.3, (900, 16))).astype(np.float32)
    gallery[700] = np.nextafter(edge, np.float32(0))
    gallery[3] = largest * rng.uniform(1, 2, 16)
    x = np.full((queries, 16), edge)
    found = search(x, gallery, 3, metric=metric)
    larger = (a.astype(np.float64) * 2.0**60 for a in (x, gallery))
    expected = brute_force(*larger, 3, metric)
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_file_of_float64_is_searched_as_float32(tmp_path):
    """By bounds of rounded numbers: the nearest is the seventh before it is rounded."""
    gallery = np.memmap(tmp_path / "gallery", np.float64, "w+", shape=(900, 16))
    last_bit = 2.0**-23
    gallery[:], gallery[720] = 3.0, 1 + 100.49 * last_bit
    gallery[:6] = 1 + (100 + np.tri(6, 16)) * last_bit
    x = np.ones((2, 16), np.float32)
    (shard,) = shards.split_gallery(gallery, None)
    settings = bounds.Preparation(None, np.float32(1), "euclidean", "float64")
    queries = Queries(x, np.full(2, 16, np.float32), Labels(None, None, None))
    items = Labels(np.arange(900, dtype=np.int32), None, None)
    _, indices, proven = passes._pass(queries, [shard], 1, settings, items, (16, 900), 2, 1)
    assert proven.all()
    assert (indices == 720).all()
    gallery[5, 3] = 1e39  # Infinite in float32.
    for count in (1, 2):
        with pytest.raises(ValueError, match="gallery: NaN or infinity in 1 rows.* is row 5"):
            search(np.ones((count, 16)), gallery, 1)


def test_memory_mapped_and_large_host_galleries(rng, tmp_path, monkeypatch):
    gallery = rng.normal(size=(1100, 10)).astype(np.float32)
    mapped = np.memmap(tmp_path / "gallery", np.float32, "w+", shape=gallery.shape)
    mapped[:] = gallery
    expected = brute_force(gallery[:5], gallery, 12)
    assert_same(search(gallery[:5], mapped, 12, gallery_block=256), expected)
    mapped.flush()
    read_only = np.memmap(tmp_path / "gallery", np.float32, "r", shape=gallery.shape)
    assert_same(search(gallery[:5], read_only, 12, gallery_block=256), expected)
    monkeypatch.setattr(shards, "_RESIDENT", 0)
    assert_same(search(gallery[:5], gallery, 12, gallery_block=256), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_every_float_dtype(rng, dtype):
    gallery = rng.normal(size=(800, 20)).astype(dtype)
    expected = brute_force(gallery[:3].astype(np.float32), gallery.astype(np.float32), 6)
    assert_same(search(gallery[:3], gallery, 6), expected)
    assert_same(search(jnp.asarray(gallery[:3].astype(np.float32)), gallery, 6), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [*FIRST_PASSES, "float64"])
def test_bounds_are_below_every_distance(rng, metric, dtype):
    """Also where all numbers lie halfway between two of bfloat16's, and norms differ."""
    x = rng.normal(size=(60, 100)) * 10.0 ** rng.uniform(-3, 1, (60, 1))
    worst = (1 + rng.integers(0, 128, x.shape) / 128 + 2.0**-8) * 2.0 ** rng.integers(
        -3, 3, (60, 1)
    )
    for values in (x, worst, worst * rng.choice([-1, 1], x.shape)):
        values = values.astype(np.float32)
        squares = np.sum(np.square(values, dtype=np.float64), axis=1).astype(np.float32)
        settings = bounds.Preparation(None, np.float32(1), metric, dtype)
        with jax.enable_x64(dtype == "float64"):
            products, share = bounds.prepared(values, squares, settings)
        products, share = (np.asarray(a).astype(np.float64) for a in (products, share))
        doubles = values.astype(np.float64)
        exact = np.stack([all_distances(v, doubles, metric) for v in doubles])
        if metric == "euclidean":
            exact = exact**2
        factor = -2 if "euclidean" in metric else -1
        lowest = factor * products @ products.T + share[:, None] + share
        # Brute force has float64's errors as well.
        assert (lowest < exact + (1e-12 if dtype == "float64" else 0) * np.abs(exact)).all()
        # And not far below: what is lost has the size of the numbers' last bits.
        lengths = np.ones(60) if metric == "cosine" else squares.astype(np.float64)
        last_bit = {"bfloat16": 2.0**-9, "float32": 3e-5, "float64": 1e-13}[dtype]
        assert (exact - lowest < 4 * last_bit * (lengths[:, None] + lengths)).all()


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-5])
def test_tight_clusters_are_proven_in_float64(rng, monkeypatch, metric, spread):
    """Whose distances are far below the errors of float32 products; some rows are copies."""
    monkeypatch.setattr(passes, "_leaders", lambda *_: None)
    gallery = in_clusters(rng, 4, 250, 24, spread)
    gallery[::50] = gallery[1]
    group = rng.integers(0, 3, 1000)
    left = []
    every_pair = passes.exhaustive_search
    monkeypatch.setattr(
        passes,
        "exhaustive_search",
        lambda q, *rest: left.append(len(q.rows)) or every_pair(q, *rest),
    )
    options = {"query_group": group[:140], "gallery_group": group}
    found = search(gallery[:140], gallery, 6, metric=metric, gallery_block=336, **options)
    ignored = group[:140, None] == group[None, :]
    expected = brute_force(gallery[:140], gallery, 6, metric, ignored)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-14)
    if metric != "inner_product":  # Whose differences, beside 1, are lost in float32: many ties.
        assert sum(left) <= 64  # Few enough for a search of every pair.


def test_a_search_begins_with_a_pass_that_can_tell_neighbours_apart(rng):
    dtypes = ("bfloat16", "float32", "float64")

    def begun(x):
        squares = np.sum(np.square(x), axis=1)
        queries = bounds.Queries(x, squares, Labels(None, None, None))
        settings = bounds.Preparation(None, np.float32(1), "euclidean", "bfloat16")
        return spread.first_useful(dtypes, spread.spread_of(queries, "euclidean"), settings)

    assert begun(rng.normal(size=(400, 64)).astype(np.float32)) == "bfloat16"
    assert begun(in_clusters(rng, 10, 60, 64, 0.5)) == "bfloat16"
    assert begun(in_clusters(rng, 10, 60, 64, 0.1)) == "float32"
    assert begun(in_clusters(rng, 10, 60, 64, 0.01)) == "float64"
    assert begun(in_clusters(rng, 10, 5, 64, 0.01)) == "bfloat16"  # Too few to tell.
    assert begun(np.ones((400, 64), np.float32)) == "bfloat16"


def test_first_pass_suits_the_device(monkeypatch):
    class Device:
        platform = "cpu"

    for flags, expected in (("avx2", "float32"), ("avx2 avx512_bf16", "bfloat16")):
        monkeypatch.setattr(passes.pathlib.Path, "read_text", lambda _, f=flags: f)
        assert passes.fastest_pass(Device) == passes.fastest_pass(Device, 65) == expected
        assert passes.fastest_pass(Device, 64) == "float32"
    Device.platform = "gpu"
    assert passes.fastest_pass(Device) == passes.fastest_pass(Device, 1) == "bfloat16"
    # A T4's, an A100's, an H100's, a Blackwell's, and AMD's MI300's.
    capabilities = {"7.5": "float32", "8.0": "bfloat16", "9.0": "bfloat16", "12.0": "bfloat16"}
    for capability, expected in (capabilities | {"gfx942": "bfloat16"}).items():
        Device.compute_capability = capability
        assert passes.fastest_pass(Device) == expected


def test_an_accelerator_selects_seldom_and_within_its_memory():
    """10,000 queries, 1,000,000 items: 2 selections of each of 3 tiles, where there were 16."""

    class Device:
        platform = "gpu"

    def kept(q, d=512):
        blocks = passes.block_sizes(Device, (q, d), None, None)
        parts = shards.query_tiles(q, blocks[0])
        count = groups._blocks_kept("gpu", parts, blocks[1], 16)
        # Two int32 of each query and group of 16 items.
        gigabytes = 8 * sum(map(len, parts)) * count * blocks[1] / 16 / 2**30
        return -(-1_000_000 // (count * blocks[1])) * len(parts), gigabytes

    assert kept(10_000)[0] == 6
    assert kept(4096)[0] == 1
    assert max(kept(q)[1] for q in (1, 100, 4096, 10_000, 50_000)) <= 3


def test_wrong_arguments_are_named(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, but the gallery has 4"):
            search(x, x, k)
    with pytest.raises(ValueError, match="queries are 2 wide, the gallery 3"):
        search(x[:, :2], x, 1)
    with pytest.raises(ValueError, match="int64"):
        search(x.astype(np.int64), x, 1)
    with pytest.raises(ValueError, match=r"queries have shape \(3,\)"):
        search(x[0], x, 1)
    with pytest.raises(ValueError, match="pass the gallery index"):
        search(x[:2], x, 1, exclude_self=True)
    with pytest.raises(ValueError, match="'l1'; choose one of euclidean"):
        search(x, x, 1, metric="l1")
    with pytest.raises(ValueError, match="'float16'; choose bfloat16 or float32"):
        search(x, x, 1, first_pass="float16")
    for ids in (np.arange(4) + 10**12, np.array(["a", "b", "c", "d"])):
        with pytest.raises(ValueError, match=r"query_group .* number both together: np\.unique"):
            search(x, x, 1, query_group=ids, gallery_group=ids)
    with pytest.raises(ValueError, match="query_group and gallery_group are given together"):
        search(x, x, 1, query_group=np.arange(4))
    with pytest.raises(ValueError, match=r"gallery_category has shape \(3,\)"):
        search(x, x, 1, query_category=np.arange(4), gallery_category=np.arange(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_before_the_search(rng, value):
    x = rng.normal(size=(900, 3)).astype(np.float32)
    bad = x.copy()
    bad[[640, 777], 1] = value
    for gallery in (bad, jnp.asarray(bad)):
        with pytest.raises(ValueError, match="gallery: NaN or infinity in 2 rows.* is row 640"):
            search(x, gallery, 1)
    with pytest.raises(ValueError, match="queries: NaN or infinity in 2 rows.* is row 640"):
        search(bad, x, 1)
