import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import all_distances, assert_same, brute_force
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cbam_jax.search import METRICS, search, streamed, top_k
from cbam_jax.search.compensated import compensated_distances


def jitted(**static):
    return jax.jit(functools.partial(top_k, **static))


def as_numpy(found):
    assert [a.dtype for a in found] == [np.float32, np.int32]
    return tuple(np.asarray(a) for a in found)


@pytest.fixture(scope="module")
def tied():
    """Points of a small grid: nearly every distance occurs many times, many rows as well."""
    rng = np.random.default_rng(7)
    gallery = rng.integers(0, 3, (1200, 4)).astype(np.float32)
    gallery[77] = 0.0
    queries = np.concatenate([gallery[50:55], rng.integers(0, 3, (6, 4)).astype(np.float32)])
    return queries, gallery


ONE_AND_SLOW_OTHERS = [
    "euclidean",
    *(pytest.param(m, marks=pytest.mark.slow) for m in METRICS if m != "euclidean"),
]


@pytest.mark.parametrize("metric", ONE_AND_SLOW_OTHERS)
def test_equal_to_search_bit_for_bit(rng, tied, metric):
    """Ties, random numbers, both far from the origin, and rows of every length."""
    find = jitted(k=20, metric=metric, block_size=500)
    normal = rng.normal(size=(1200, 4)).astype(np.float32)
    cases = [tied, (normal[:11], normal), (tied[0] + 1000, tied[1] + 1000)]
    cases.append(tuple(a * 10.0 ** rng.uniform(-3, 3, (len(a), 1)) for a in cases[1]))
    for queries, gallery in cases:
        queries, gallery = queries.astype(np.float32), gallery.astype(np.float32)
        found = as_numpy(find(queries, gallery))
        same = search(queries, gallery, 20, metric=metric)
        np.testing.assert_array_equal(found[1], same[1])
        # Below that, float64 itself is no better than float32.
        clear = (same[0] > 1e-12) | (same[0] == 0) | (metric != "cosine")
        np.testing.assert_array_equal(found[0][clear], same[0][clear])
        expected = brute_force(queries, gallery, 20, metric)
        # As inner products of multiples of one vector, cosines tie in exact arithmetic alone.
        if metric != "cosine":
            np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 64, 10_000])
def test_block_sizes_change_no_bit(tied, block_size):
    queries, gallery = tied[0], tied[1][:300]
    expected = brute_force(queries, gallery, 9)
    assert_same(as_numpy(jitted(k=9, block_size=block_size)(queries, gallery)), expected)


@pytest.mark.slow
def test_wide_embeddings_and_few_rows(rng):
    for q, n, d, k in ((3, 700, 300, 5), (1, 9, 1, 9), (5, 1, 2, 1)):
        queries = rng.normal(1.0, 2.0, (q, d)).astype(np.float32)
        gallery = rng.normal(1.0, 2.0, (n, d)).astype(np.float32)
        assert_same(as_numpy(jitted(k=k)(queries, gallery)), search(queries, gallery, k))


@pytest.mark.slow
def test_more_near_ties_than_candidates(rng, monkeypatch):
    """Duplicates, and near duplicates that no product can tell apart, are searched again."""
    copies = np.repeat(rng.normal(size=(3, 12)), 301, axis=0).astype(np.float32)
    copies = copies[rng.permutation(903)]
    steps = np.concatenate([np.arange(1, 61), np.arange(500_000, 500_843)])
    center = rng.normal(size=12) * 1000
    near = (center + np.outer(steps, rng.normal(size=12) * 1e-3)).astype(np.float32)
    near = near[rng.permutation(903)]
    queries = np.concatenate([copies[:2], rng.normal(size=(2, 12)).astype(np.float32)])
    find = jitted(k=30, block_size=400)
    cases = [(queries, copies), (np.float32(center)[None] + 0 * queries, near)]
    cases.append((np.ones((4, 12), np.float32), np.ones((903, 12), np.float32)))
    for case in cases:
        assert_same(as_numpy(find(*case)), brute_force(*case, 30))
    unproven = []

    def candidates_alone(queries, gallery, found, proven):
        unproven.append(int(np.sum(~np.asarray(proven))))
        return found

    monkeypatch.setattr(streamed, "_searched_again", candidates_alone)
    wrong = [np.any(top_k(*c, 30)[1] != brute_force(*c, 30)[1]) for c in cases]
    assert [bool(w) for w in wrong] == [False, True, False]
    assert unproven == [4, 4, 4]


@pytest.mark.slow
def test_masks(rng):
    n, q = 700, 8
    gallery = rng.normal(size=(n, 6)).astype(np.float32)
    own = rng.permutation(n)[:q]
    queries, own[2] = gallery[own], -1
    valid = rng.random(n) < 0.8
    gallery[~valid] = rng.choice([np.nan, np.inf, 0.0], (np.sum(~valid), 6))
    labels = {
        "exclude_self": own,
        "query_group": rng.integers(0, 3, q),
        "gallery_group": rng.integers(0, 3, n),
        "query_category": rng.integers(0, 30, q),
        "gallery_category": rng.integers(0, 30, n),
    }
    labels["query_category"][3] = 99  # in no gallery
    ignored = labels["query_group"][:, None] == labels["gallery_group"][None, :]
    ignored |= labels["query_category"][:, None] != labels["gallery_category"][None, :]
    ignored |= own[:, None] == np.arange(n)[None, :]
    ignored |= ~valid[None, :]
    expected = brute_force(queries, np.where(valid[:, None], gallery, 0), 20, ignored=ignored)
    traced = jax.jit(lambda x, y, valid, labels: top_k(x, y, 20, valid=valid, **labels))
    found = as_numpy(traced(queries, gallery, valid, labels))
    assert_same(found, expected)
    assert (found[1][3] == -1).all()
    assert np.isinf(found[0][found[1] == -1]).all()
    assert 0 < np.sum(found[1] == -1) < found[1].size
    constant = jitted(k=20, valid=valid, block_size=128, **labels)
    assert_same(as_numpy(constant(queries, gallery)), expected)


@pytest.mark.slow
def test_no_row_is_valid():
    x = jnp.ones((30, 3))
    found = jitted(k=2, valid=np.zeros(30, bool))(x, x)
    assert as_numpy(found)[1].tolist() == [[-1, -1]] * 30
    assert np.isinf(found[0]).all()


@pytest.mark.slow  # test_masks has it among others.
def test_exclude_self(rng):
    x = rng.integers(0, 2, (200, 5)).astype(np.float32)
    found = as_numpy(jitted(k=7, exclude_self=True)(x, x))
    assert_same(found, search(x, x, 7, exclude_self=True))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e37])
def test_extreme_magnitudes(rng, scale):
    gallery = (rng.normal(size=(900, 8)) * scale).astype(np.float32)
    gallery[3] = 0.0
    queries = gallery[:4] * np.float32(1.5)
    find = jitted(k=5)
    assert_same(as_numpy(find(queries, gallery)), brute_force(queries, gallery, 5))
    # One giant among normal numbers: whose bounds say nothing of the others.
    mixed = np.concatenate([gallery[:1] * 0 + np.float32(scale), gallery[1:] / np.float32(scale)])
    queries = mixed[1:5]
    assert_same(as_numpy(find(queries, mixed)), brute_force(queries, mixed, 5))


def test_distances_beyond_float32_are_infinite_but_found():
    gallery = np.array([[3e38, 0], [-3e38, 0], [0, 0]], np.float32)
    distances, indices = as_numpy(jitted(k=3)(gallery[:1], gallery))
    assert indices.tolist() == [[0, 2, 1]]
    assert distances.tolist() == [[0.0, float(np.float32(3e38)), np.inf]]


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_nan_in_nan_out(rng, metric):
    gallery = rng.normal(size=(300, 5)).astype(np.float32)
    queries = gallery[:3].copy()
    find = jitted(k=4, metric=metric)
    clean = as_numpy(find(queries, gallery))
    queries[1, 2] = np.nan
    found = as_numpy(find(queries, gallery))
    assert np.isnan(found[0][1]).all()
    assert found[1][1].tolist() == [0, 1, 2, 3]
    assert_same([a[[0, 2]] for a in found], [a[[0, 2]] for a in clean])
    gallery[[250, 40]] = np.nan
    found = as_numpy(find(queries[:1].repeat(3, 0), gallery))
    assert np.isnan(found[0][:, :2]).all()
    assert found[1][:, :2].tolist() == [[40, 250]] * 3
    assert_same([a[:1, 2:] for a in found], [a[:1, :2] for a in clean])


@pytest.mark.slow
def test_zero_vectors_as_cosine(rng):
    gallery = rng.normal(size=(50, 4)).astype(np.float32)
    gallery[[7, 9]] = 0.0
    find = jitted(k=50, metric="cosine")
    assert find(gallery[:3] * 0, gallery)[0].tolist() == [[1.0] * 50] * 3
    found = as_numpy(find(gallery[:3], gallery))
    assert_same(found, search(gallery[:3], gallery, 50, metric="cosine"))
    assert not np.asarray(found[0][:, 0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_cast(rng, dtype):
    gallery = jnp.asarray(rng.normal(size=(300, 20)).astype(np.float32)).astype(dtype)
    expected = search(gallery[:3], gallery, 6)
    assert_same(as_numpy(jitted(k=6, block_size=128)(gallery[:3], gallery)), expected)


@pytest.mark.slow
def test_vmap_and_scan(tied):
    queries, gallery = tied
    galleries = jnp.stack([gallery, gallery[::-1]])
    both = jnp.stack([queries, queries + 0.25])
    expected = [search(x, y, 9) for x, y in zip(both, galleries, strict=True)]
    found = jax.jit(jax.vmap(functools.partial(top_k, k=9, block_size=500)))(both, galleries)
    for i in range(2):
        assert_same([np.asarray(a[i]) for a in found], expected[i])

    def step(state, x):
        return state + 1, top_k(x, gallery, 9)

    count, found = jax.jit(lambda xs: jax.lax.scan(step, 0, xs))(both)
    assert count == 2
    for i in range(2):
        assert_same([np.asarray(a[i]) for a in found], search(both[i], gallery, 9))


def mesh_of(axis_type, *shape):
    return jax.make_mesh(
        shape, ("data", "model")[: len(shape)], axis_types=(axis_type,) * len(shape)
    )


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map(tied, axis_type, check_vma):
    """With masks, and more neighbours than a shard has."""
    queries, gallery = tied[0], tied[1][:160]
    mesh, whole, rows = mesh_of(axis_type, 8), PartitionSpec(), PartitionSpec("data")
    valid, group = np.arange(160) % 5 > 0, np.arange(160) % 7
    own = np.array([50, 51, 52, 53, 54, 60, 0, -1, -1, 1, 2])
    arrays = queries, gallery, valid, group, own, own % 7
    specs = whole, rows, rows, rows, whole, whole

    def find(x, y, valid, group, own, query_group, axis_name=None):
        groups = {"query_group": query_group, "gallery_group": group}
        masks = {"exclude_self": own, "valid": valid, **groups}
        return top_k(x, y, 50, axis_name=axis_name, block_size=16, **masks)

    def loss(find, x, y, *rest):
        distances, indices = find(x, y, *rest)
        weights = jnp.arange(1, 51, dtype=jnp.float32)[None]
        return jnp.sum(jnp.where(indices < 0, 0.0, weights * distances))

    sharded = jax.shard_map(
        functools.partial(find, axis_name="data"),
        mesh=mesh,
        in_specs=specs,
        out_specs=whole,
        check_vma=check_vma,
    )
    ignored = (own[:, None] == np.arange(160)) | ~valid | ((own % 7)[:, None] == group)
    expected = brute_force(queries, gallery, 50, ignored=ignored)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    assert_same(as_numpy(jax.jit(sharded)(*placed)), expected)
    gradients = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1)))(*placed)
    alone = jax.jit(jax.grad(functools.partial(loss, find), (0, 1)))(*arrays)
    for one, other in zip(gradients, alone, strict=True):
        assert np.abs(other).max() > 10
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_jit_of_sharded_arrays(tied, axis_type):
    mesh = mesh_of(axis_type, 8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    queries, gallery = np.repeat(tied[0], 8, axis=0), tied[1]
    expected = search(queries, gallery, 9)
    find = jitted(k=9, block_size=500)
    for x, y in (
        (queries, jax.device_put(gallery, rows)),
        (jax.device_put(queries, rows), gallery),
    ):
        assert_same(as_numpy(find(x, y)), expected)


@pytest.mark.slow
def test_two_axes_of_a_mesh(tied):
    queries, gallery = tied
    axes = "data", "model"
    find = jax.shard_map(
        functools.partial(top_k, k=9, axis_name=axes),
        mesh=mesh_of(AxisType.Auto, 4, 2),
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(),
    )
    assert_same(as_numpy(jax.jit(find)(queries, gallery)), search(queries, gallery, 9))


def analytic(x, y, indices, weights, metric):
    """Gradients of the weighted sum of distances, in float64."""
    dx, dy = np.zeros_like(x), np.zeros_like(y)
    for i, j in np.ndindex(*indices.shape):
        item, w = indices[i, j], weights[i, j]
        a, b = x[i], y[item]
        if metric == "inner_product":
            to_a, to_b = -b, -a
        elif metric == "cosine":
            la, lb = np.linalg.norm(a), np.linalg.norm(b)
            if not la or not lb:
                continue
            cos = a @ b / (la * lb)
            to_a = -(b / lb - cos * a / la) / la
            to_b = -(a / la - cos * b / lb) / lb
        else:
            distance = np.linalg.norm(a - b)
            factor = 2.0 if metric == "squared_euclidean" else 1 / distance if distance else 0.0
            to_a, to_b = factor * (a - b), factor * (b - a)
        dx[i] += w * to_a
        dy[item] += w * to_b
    return dx, dy


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_match_float64(rng, metric):
    gallery = rng.normal(size=(60, 6)).astype(np.float32)
    gallery[5] = 0.0
    gallery[30:40] = gallery[:10]
    queries = np.concatenate([gallery[:6], rng.normal(size=(3, 6)).astype(np.float32)])
    weights = rng.normal(size=(9, 60)).astype(np.float32)

    def loss(x, y):
        return jnp.sum(weights * top_k(x, y, 60, metric=metric)[0])

    gradients = jax.jit(jax.grad(loss, (0, 1)))(queries, gallery)
    indices = np.asarray(top_k(queries, gallery, 60, metric=metric)[1])
    expected = analytic(
        queries.astype(np.float64), gallery.astype(np.float64), indices, weights, metric
    )
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_gradients_of_copies_of_masks_and_of_half_precision(rng):
    """All distances are 0, or none is left, or a masked row is NaN: finite, and 0."""
    ones = jnp.ones((20, 3))

    def total(x, y, valid):
        distances, indices = top_k(x, y, 15, valid=valid)
        return jnp.sum(jnp.where(indices >= 0, distances, 0.0))

    gradient = jax.jit(jax.grad(total, (0, 1)))
    for a in gradient(ones, ones, np.ones(20, bool)):
        assert not np.asarray(a).any()
    padded = ones.at[0].set(jnp.nan)
    for a in gradient(ones, padded, np.arange(20) > 11):
        assert not np.asarray(a).any()
    x, y = (jnp.asarray(rng.normal(size=(n, 3)).astype(np.float32)) for n in (4, 20))
    exact = gradient(x, y, np.ones(20, bool))
    half = gradient(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), np.ones(20, bool))
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.3)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives(rng):
    x, y = (jnp.asarray(rng.normal(size=(n, 3)).astype(np.float32)) for n in (2, 20))

    def loss(x):
        return jnp.sum(jnp.sin(top_k(x, y, 4)[0]))

    def plain(x):
        near = y[top_k(x, y, 4)[1]]
        return jnp.sum(jnp.sin(jnp.sqrt(jnp.sum(jnp.square(x[:, None] - near), axis=-1))))

    np.testing.assert_allclose(*(jax.jit(jax.hessian(f))(x) for f in (loss, plain)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_changes_where_float64_is_enabled(tied, metric):
    queries, gallery = tied[0], tied[1][:200].astype(np.float64)
    expected = search(queries, gallery, 9, metric=metric, exclude_self=np.arange(11))
    with jax.enable_x64(True):
        found = jitted(k=9, metric=metric, exclude_self=np.arange(11))(queries, gallery)
        assert_same(as_numpy(found), expected)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_gallery():
    def temporary(n):
        shapes = [jax.ShapeDtypeStruct((rows, 64), jnp.float32) for rows in (100, n)]
        compiled = jitted(k=10, block_size=1024).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(262_144)
    # But for what says of each row which item it is, 4 bytes.
    assert large - small < 3 * 4 * 262_144 < 262_144 * 64 * 4 / 20


@pytest.mark.slow
def test_nothing_is_compiled_anew_for_other_values(tied):
    find = jitted(k=9)
    for shift in (0.0, 1.0):
        find(tied[0] + np.float32(shift), tied[1])
    assert find._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_compensated_distances_are_float64_rounded(rng, metric):
    for d in (1, 3, 130):
        x = rng.normal(size=(60, 1, d)).astype(np.float32)
        y = rng.normal(size=(60, 20, d)).astype(np.float32)
        y[0], y[1, 3] = x[0], 0.0
        wild = y * (10.0 ** rng.uniform(-12, 12, y.shape)).astype(np.float32)
        y[2:20] = x[2:20] + np.float32(1e-4) * y[2:20]
        for other in (y, y * np.float32(1e-30), wild):
            measure = jax.jit(functools.partial(compensated_distances, metric=metric))
            found = np.asarray(measure(x, other))
            expected = exact_distances(x, other, metric)
            if metric == "cosine":
                np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=1e-15)
            else:
                np.testing.assert_array_equal(found, expected)


def norm(x):
    return np.linalg.norm(x, axis=-1, keepdims=True)


def exact_distances(x, y, metric):
    x, y = np.broadcast_arrays(x.astype(np.float64), y.astype(np.float64))
    pairs = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, 1, x.shape[-1]), strict=True)
    if metric == "cosine":  # Without the cancellation of 1 - cos.
        units = [np.divide(a, n, out=0 * a, where=n > 0) for a, n in ((a, norm(a)) for a in (x, y))]
        half = norm(units[0] - units[1])[..., 0] ** 2 / 2
        return np.where((norm(x) * norm(y))[..., 0] > 0, half, 1).astype(np.float32)
    found = [all_distances(one, other, metric)[0] for one, other in pairs]
    return np.array(found).reshape(x.shape[:-1]).astype(np.float32)


def test_wrong_arguments_are_named(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, but the gallery has 4 items"):
            jitted(k=k)(x, x)
    with pytest.raises(ValueError, match="queries are 2 wide, the gallery 3"):
        top_k(x[:, :2], x, 1)
    with pytest.raises(ValueError, match="queries have dtype int"):
        jitted(k=1)(x.astype(np.int32), x)
    with pytest.raises(ValueError, match="unknown metric 'l1'"):
        top_k(x, x, 1, metric="l1")
    with pytest.raises(ValueError, match=r"valid has shape \(3,\)"):
        top_k(x, x, 1, valid=np.ones(3, bool))
    with pytest.raises(ValueError, match=r"exclude_self has shape \(3,\)"):
        jax.jit(lambda own: top_k(x, x, 1, exclude_self=own))(np.arange(3))
    with pytest.raises(ValueError, match="pass the gallery index"):
        top_k(x[:2], x, 1, exclude_self=True)
    with pytest.raises(ValueError, match="query_group and gallery_group are given together"):
        top_k(x, x, 1, query_group=np.arange(4))
    with pytest.raises(ValueError, match="expected at least 1"):
        top_k(x, x, 1, block_size=0)
