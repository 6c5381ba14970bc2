"""A program that evaluates itself: embedding, neighbours and metrics in one jitted function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cbam_jax.metrics import (
    bootstrap_interval,
    count_relevant,
    label_matches,
    per_category_metrics,
    per_query_metrics,
    retrieval_metrics,
    t_interval,
)
from cbam_jax.search import search, top_k

KS = (1, 5, 20)


def random_hits(rng, queries, k):
    matches = rng.random((queries, k)) < rng.uniform(0, 0.7, (queries, 1))
    matches[:2] = False
    relevant = np.minimum(matches.sum(1) + rng.integers(0, 4, queries), k)
    relevant[0] = 0
    return matches, relevant


def assert_equal_to_numpy(found, expected):
    """But for metrics at R, which are NaN where they cannot be told."""
    assert found.keys() >= expected.keys()
    for name, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected.get(name, np.nan), atol=1e-6, err_msg=name)


def test_metrics_are_the_same_traced(rng):
    per_query = jax.jit(functools.partial(per_query_metrics, ks=KS))
    means = jax.jit(functools.partial(retrieval_metrics, ks=KS))
    for extra in (0, 30):  # The second time one has more relevant items than there are ranks.
        matches, relevant = random_hits(rng, 50, 33)
        relevant[7] += extra
        assert_equal_to_numpy(
            per_query(matches, relevant), per_query_metrics(matches, relevant, KS)
        )
        assert_equal_to_numpy(means(matches, relevant), retrieval_metrics(matches, relevant, KS))
    assert ("map@R" in retrieval_metrics(matches, relevant)) is False
    nothing = means(matches & False, relevant * 0)
    assert_equal_to_numpy(nothing, retrieval_metrics(matches & False, relevant * 0, KS))
    assert np.isnan(nothing["map@5"])


def test_relevant_items_are_counted_the_same_traced(rng):
    labels = rng.integers(-3, 5, 23), rng.integers(-3, 6, 40)
    groups = rng.integers(0, 4, 23), rng.integers(0, 5, 40)
    inside = rng.random(23) < 0.5
    count = jax.jit(count_relevant)
    for inputs in (labels, (*labels, inside), (*labels, False, *groups)):
        found = count(*inputs)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, count_relevant(*inputs))


def test_matches_are_the_same_traced(rng):
    labels = rng.integers(0, 5, 7), rng.integers(0, 5, 40)
    indices = rng.integers(-1, 40, (7, 9))
    found = jax.jit(label_matches)(indices, *labels)
    np.testing.assert_array_equal(found, label_matches(indices, *labels))
    assert not np.any(found[indices < 0])


@pytest.fixture
def data(rng):
    """Integers, and a map by integers: embeddings tie often, and by no rounding."""
    images = rng.integers(0, 3, (160, 6)).astype(np.float32)
    weights = rng.integers(-1, 2, (6, 4)).astype(np.float32)
    return images, weights, rng.integers(0, 7, 160), rng.integers(0, 30, 160)


def expected_metrics(images, weights, labels, groups):
    embeddings = images @ weights
    _, indices = search(embeddings, embeddings, 20, query_group=groups, gallery_group=groups)
    relevant = count_relevant(labels, labels, query_group=groups, gallery_group=groups)
    return retrieval_metrics(label_matches(indices, labels, labels), relevant, KS)


def test_one_program_equals_search_and_numpy(data):
    @jax.jit
    def evaluate(images, weights, labels, groups):
        embeddings = images @ weights
        both = {"query_group": groups, "gallery_group": groups}
        _, indices = top_k(embeddings, embeddings, 20, **both)
        relevant = count_relevant(labels, labels, **both)
        return retrieval_metrics(label_matches(indices, labels, labels), relevant, KS)

    assert_equal_to_numpy(evaluate(*data), expected_metrics(*data))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_one_program_on_eight_devices(data, axis_type):
    """Each embeds its own images and searches them for the queries of all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    whole, rows = PartitionSpec(), PartitionSpec("data")

    def evaluate(images, weights, labels, groups, all_images, all_labels, all_groups):
        _, indices = top_k(
            all_images @ weights,
            images @ weights,
            20,
            query_group=all_groups,
            gallery_group=groups,
            axis_name="data",
        )
        here = count_relevant(all_labels, labels, query_group=all_groups, gallery_group=groups)
        relevant = jax.lax.psum(here, "data")
        return retrieval_metrics(label_matches(indices, all_labels, all_labels), relevant, KS)

    images, weights, labels, groups = data
    arrays = images, weights, labels, groups, images, labels, groups
    specs = rows, whole, rows, rows, whole, whole, whole
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    program = jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=whole))
    assert_equal_to_numpy(program(*placed), expected_metrics(*data))


def test_what_runs_on_the_host_says_so():
    matches, relevant = np.ones((3, 20), bool), np.full(3, 30)
    for function, inputs in (
        (lambda m: per_category_metrics(m, relevant, [1, 2, 3]), matches),
        (bootstrap_interval, np.ones(3)),
        (t_interval, np.ones(3)),
    ):
        with pytest.raises(TypeError, match="runs on the host: .* return them from the jitted"):
            jax.jit(function)(inputs)
    with pytest.raises(ValueError, match="K is 50, but matches have 20 ranks"):
        jax.jit(functools.partial(retrieval_metrics, ks=(50,)))(matches, relevant)
