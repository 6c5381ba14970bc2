import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.distances import pairwise_distances
from cbam_jax.losses import (
    MININGS,
    collapse_warning,
    cross_entropy_loss,
    deep_cross_entropy_loss,
    triplet_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "metrics.npz"
LABELS = np.array([3, 0, 3, 1, 0, 3, 1, 7, 0])  # 7 has no positive


@functools.cache
def compiled(mining, soft=False, margin=0.2):
    """(embeddings, labels) -> ((loss, stats), gradient); tests share shapes, to compile little."""
    return jax.jit(
        jax.value_and_grad(lambda x, y: triplet_loss(x, y, margin, mining, soft), has_aux=True)
    )


def triplets_of(distances, labels, mining):
    """(anchor, positive, negative) lists by loops, straight from the definitions.

    Anchors are the rows; what follows the first columns is a memory's.
    """
    n = range(len(labels))
    chosen = []
    for a in range(len(distances)):
        positives = [p for p in n if labels[p] == labels[a] and p != a]
        negatives = [q for q in n if labels[q] != labels[a]]
        if not positives or not negatives:
            continue
        to = distances[a]
        if mining == "batch_hard":
            positives = [max(positives, key=lambda p: to[p])]
        for p in positives:
            farther = [q for q in negatives if to[q] > to[p]]
            if mining == "batch_hard":
                picked = [min(negatives, key=lambda q: to[q])]
            elif mining == "batch_all":
                picked = negatives
            elif farther:
                picked = [min(farther, key=lambda q: to[q])]
            else:
                picked = [max(negatives, key=lambda q: to[q])]
            chosen += [(a, p, q) for q in picked]
    return chosen


def reference_loss(embeddings, labels, margin, mining, soft, memory=None):
    others = embeddings if memory is None else np.concatenate([embeddings, memory])
    distances = np.linalg.norm(embeddings[:, None] - others[None], axis=-1)
    costs = []
    for a, p, q in triplets_of(distances, labels, mining):
        gap = distances[a, p] - distances[a, q]
        costs.append(math.log1p(math.exp(gap)) if soft else max(0.0, margin + gap))
    if mining == "batch_all":
        costs = [cost for cost in costs if cost > 0]
    return sum(costs) / len(costs) if costs else 0.0


def central_differences(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (f(up) - f(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mining", MININGS)
def test_value_and_gradient_match_float64(rng, mining, soft):
    embeddings = rng.normal(size=(len(LABELS), 3)).astype(np.float32)

    def reference(x):
        return reference_loss(x, LABELS, 0.2, mining, soft)

    (value, _), gradient = compiled(mining, soft)(embeddings, LABELS)
    embeddings = embeddings.astype(np.float64)
    np.testing.assert_allclose(value, reference(embeddings), rtol=2e-6)
    np.testing.assert_allclose(gradient, central_differences(reference, embeddings), atol=2e-6)
    assert np.abs(gradient).max() > 0.01


@pytest.mark.parametrize("mining", MININGS)
def test_stats_match_loops(rng, mining):
    embeddings = rng.normal(size=(len(LABELS), 3)).astype(np.float32)
    (_, stats), _ = compiled(mining)(embeddings, LABELS)
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    chosen = triplets_of(distances, LABELS, mining)
    # batch_all averages over pairs: a positive counts once, however many negatives it meets.
    positives = [(a, p) for a, p, _ in chosen]
    negatives = [(a, q) for a, _, q in chosen]
    if mining == "batch_all":
        positives, negatives = sorted(set(positives)), sorted(set(negatives))
    active = [distances[a, p] - distances[a, q] + 0.2 > 0 for a, p, q in chosen]
    spread = np.sqrt(np.mean(np.sum((embeddings - embeddings.mean(0)) ** 2, axis=1)))
    expected = {
        "distance_positive": np.mean([distances[pair] for pair in positives]),
        "distance_negative": np.mean([distances[pair] for pair in negatives]),
        "active_fraction": np.mean(active),
        "valid_anchors": 8 / 9,
        "embedding_spread": spread,
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(stats[name], value, rtol=1e-5, err_msg=name)


@functools.cache
def compiled_with_memory(mining, soft):
    """(embeddings, labels, memory) -> ((loss, stats), gradients of embeddings and memory)."""

    def loss(rows, labels, memory_labels, filled):
        memory = (rows["memory"], memory_labels, filled)
        return triplet_loss(rows["batch"], labels, 0.2, mining, soft, memory)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


WITH_MEMORY = [("batch_hard", False), ("semi_hard", False), ("batch_all", True)]
MEMORY_LABELS = np.array([7, 0, 1, 3, 4, 7, 0])  # In the batch 7 has no positive, 4 does not occur.


@pytest.mark.slow
@pytest.mark.parametrize(("mining", "soft"), WITH_MEMORY)
def test_memory_matches_float64(rng, mining, soft):
    embeddings = rng.normal(size=(9, 3)).astype(np.float32)
    memory = 0.5 * rng.normal(size=(7, 3)).astype(np.float32)
    filled = np.array([True, True, False, True, True, True, False])
    labels = np.concatenate([LABELS, MEMORY_LABELS[filled]])

    def reference(x):
        return reference_loss(x, labels, 0.2, mining, soft, memory[filled].astype(np.float64))

    (value, stats), gradients = compiled_with_memory(mining, soft)(
        {"batch": embeddings, "memory": memory}, LABELS, MEMORY_LABELS, filled
    )
    embeddings = embeddings.astype(np.float64)
    np.testing.assert_allclose(value, reference(embeddings), rtol=2e-6)
    expected = central_differences(reference, embeddings)
    np.testing.assert_allclose(gradients["batch"], expected, atol=2e-6)
    assert not np.any(gradients["memory"])
    assert stats["valid_anchors"] == 1.0
    np.testing.assert_allclose(stats["memory_filled"], 5 / 7, rtol=1e-6)


@pytest.mark.parametrize(("mining", "soft"), WITH_MEMORY)
def test_an_empty_memory_changes_nothing(rng, mining, soft):
    embeddings = rng.normal(size=(9, 3)).astype(np.float32)
    memory = rng.normal(size=(7, 3)).astype(np.float32)
    (value, stats), gradients = compiled_with_memory(mining, soft)(
        {"batch": embeddings, "memory": memory}, LABELS, MEMORY_LABELS, np.zeros(7, bool)
    )
    (expected, expected_stats), gradient = compiled(mining, soft)(embeddings, LABELS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients["batch"], gradient, atol=1e-7)
    assert stats.pop("memory_filled") == 0
    for name, stat in expected_stats.items():
        np.testing.assert_allclose(stats[name], stat, rtol=1e-6, err_msg=name)


def test_golden_pytorch_metric_learning():
    """golden/make_metrics.py: its losses where the definitions agree."""
    golden = np.load(GOLDEN)
    embeddings, labels = golden["loss_embeddings"], golden["loss_labels"]
    for mining in ("batch_hard", "batch_all"):
        (loss, _), gradient = compiled(mining)(embeddings, labels)
        np.testing.assert_allclose(loss, golden[f"{mining}_loss"], rtol=2e-6)
        np.testing.assert_allclose(gradient, golden[f"{mining}_gradient"], atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("labels", [[5] * 9, range(9)])
def test_no_valid_anchor_costs_nothing(rng, mining, soft, labels):
    embeddings = rng.normal(size=(9, 3)).astype(np.float32)
    (loss, stats), gradient = compiled(mining, soft)(embeddings, np.array(labels))
    assert loss == 0
    assert not np.any(np.asarray(gradient))
    assert stats["valid_anchors"] == 0
    assert all(np.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("mining", MININGS)
def test_batch_of_one(mining):
    (loss, _), gradient = compiled(mining)(np.ones((1, 3), np.float32), np.array([0]))
    assert loss == 0
    assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mining", MININGS)
def test_collapsed_batch_has_zero_gradient_and_a_warning(mining, soft):
    embeddings = np.full((9, 3), 0.37, np.float32)
    (loss, stats), gradient = compiled(mining, soft)(embeddings, LABELS)
    np.testing.assert_allclose(loss, math.log(2) if soft else 0.2, rtol=1e-6)
    assert not np.any(np.asarray(gradient))
    warning = collapse_warning(stats, 0.2, soft)
    assert "learning rate" in warning
    assert "semi_hard" in warning
    assert "\n" not in warning


def test_no_warning_when_spread_or_without_anchors(rng):
    embeddings = rng.normal(size=(9, 3)).astype(np.float32)
    (_, stats), _ = compiled("batch_hard")(embeddings, LABELS)
    assert collapse_warning(stats) is None
    (_, stats), _ = compiled("batch_hard")(np.ones((9, 3), np.float32), np.arange(9))
    assert collapse_warning(stats) is None


@pytest.mark.parametrize("mining", MININGS)
def test_duplicates_have_finite_gradient(rng, mining):
    embeddings = np.repeat(rng.normal(size=(3, 3)), 3, axis=0).astype(np.float32)
    labels = np.array([0, 0, 1, 2, 1, 2, 0, 0, 1])  # duplicates within a label and across labels
    (value, _), gradient = compiled(mining)(embeddings, labels)
    assert value > 0
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("mining", MININGS)
def test_huge_distances_do_not_overflow(rng, mining):
    embeddings = 1e4 * rng.normal(size=(9, 3)).astype(np.float32)
    for soft in (False, True):
        (loss, _), gradient = compiled(mining, soft)(embeddings, LABELS)
        assert np.isfinite(loss)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("mining", MININGS)
def test_order_of_the_batch_and_dtype_do_not_matter(rng, mining):
    embeddings = jnp.asarray(rng.normal(size=(len(LABELS), 3)), jnp.bfloat16)
    order = rng.permutation(len(LABELS))
    (loss, _), _ = compiled(mining)(embeddings, LABELS)
    (shuffled, _), _ = compiled(mining)(embeddings[order], LABELS[order])
    (exact, _), _ = compiled(mining)(embeddings.astype(jnp.float32), LABELS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, shuffled, rtol=1e-6)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mining", MININGS)
def test_sharded_batch_equals_one_device(rng, mining):
    embeddings = rng.normal(size=(32, 12)).astype(np.float32)
    labels = rng.integers(0, 6, 32).astype(np.int32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    step = compiled(mining)
    one = step(embeddings, labels)
    many = step(jax.device_put(embeddings, sharding), jax.device_put(labels, sharding))
    np.testing.assert_allclose(many[0][0], one[0][0], rtol=1e-6)
    np.testing.assert_allclose(many[1], one[1], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("mining", MININGS)
def test_traced_margin(rng, mining):
    """Equal to the number's, with a gradient; its value cannot be checked."""
    embeddings = rng.normal(size=(9, 4)).astype(np.float32)

    def loss(margin):
        return triplet_loss(embeddings, LABELS, margin, mining)[0]

    both = jax.jit(jax.value_and_grad(loss))
    for margin in (0.1, 0.7):
        value, slope = both(margin)
        np.testing.assert_allclose(value, loss(margin), rtol=1e-6)
        active = triplet_loss(embeddings, LABELS, margin, mining)[1]["active_fraction"]
        # A cost above 0 grows with the margin; batch_all's mean is over these alone.
        np.testing.assert_allclose(slope, 1.0 if mining == "batch_all" else active, rtol=1e-6)
        if mining != "batch_all":
            difference = (loss(margin + 1e-3) - loss(margin - 1e-3)) / 2e-3
            np.testing.assert_allclose(slope, difference, rtol=1e-2)
    jitted = jax.jit(functools.partial(triplet_loss, mining=mining))
    assert float(jitted(embeddings, LABELS, 1)[0]) == pytest.approx(float(loss(1.0)), rel=1e-6)


@pytest.mark.slow
def test_margin_annealed_inside_a_program(rng):
    embeddings = rng.normal(size=(9, 4)).astype(np.float32)
    margins = np.linspace(0.0, 1.0, 5, dtype=np.float32)

    def step(x, margin):
        loss, gradient = jax.value_and_grad(lambda x: triplet_loss(x, LABELS, margin)[0])(x)
        return x - 0.1 * gradient, loss

    last, losses = jax.jit(lambda x: jax.lax.scan(step, x, margins))(embeddings)
    x, expected = jnp.asarray(embeddings), []
    for margin in margins.tolist():
        x, loss = step(x, margin)
        expected.append(loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(last, x, atol=1e-6)


def test_traced_smoothing_and_weight(rng):
    logits = rng.normal(size=(9, 8)).astype(np.float32)

    def loss(smoothing, weight):
        return deep_cross_entropy_loss([logits, 2 * logits], LABELS, smoothing, weight)[0]

    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(0.1, 0.3)
    np.testing.assert_allclose(value, loss(0.1, 0.3), rtol=1e-6)
    # It is linear in either.
    np.testing.assert_allclose(slopes[0], (loss(0.5, 0.3) - loss(0.1, 0.3)) / 0.4, rtol=1e-4)
    np.testing.assert_allclose(slopes[1], (loss(0.1, 1.3) - loss(0.1, 0.3)), rtol=1e-4)


@pytest.mark.parametrize("mining", MININGS)
def test_float64_is_computed_in_float32(rng, mining):
    x, y = rng.normal(size=(9, 4)), jnp.asarray(LABELS)
    (expected, _), slope = compiled(mining)(x.astype(np.float32), y)
    with jax.enable_x64(True):
        (loss, _), gradient = compiled(mining)(jnp.asarray(x), y)
        distances = pairwise_distances(jnp.asarray(x), jnp.asarray(x))
    assert (loss.dtype, distances.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.float64)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


def test_wrong_arguments_are_named():
    x, y = jnp.ones((4, 2)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="'hard'; choose one of batch_hard, semi_hard, batch_all"):
        triplet_loss(x, y, mining="hard")
    with pytest.raises(ValueError, match=r"margin is -0\.1"):
        triplet_loss(x, y, margin=-0.1)
    with pytest.raises(ValueError, match=r"margin is nan"):
        triplet_loss(x, y, margin=math.nan)
    with pytest.raises(ValueError, match=r"margin has shape \(4,\), expected a number"):
        jax.jit(triplet_loss)(x, y, jnp.ones(4))
    with pytest.raises(ValueError, match=r"\(4, 2\) and labels \(3,\)"):
        triplet_loss(x, y[:3])
    with pytest.raises(ValueError, match="float32, expected integers"):
        triplet_loss(x, y.astype(jnp.float32))
    with pytest.raises(
        ValueError, match=r"memory's embeddings have shape \(4, 2\) .* \[n, d\] and"
    ):
        triplet_loss(x, y, memory=(x, y[:3], y == 0))
    for mask in (y[:3] == 0, y):
        with pytest.raises(
            ValueError, match=r"memory's mask has shape .* expected \(4,\) and bool"
        ):
            triplet_loss(x, y, memory=(x, y, mask))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_float64(rng, smoothing):
    logits = rng.normal(size=(9, 8)).astype(np.float32) * 4
    logits[2] += 200  # exp would overflow
    exact = logits.astype(np.float64)

    def reference(flat):
        total = 0.0
        for row, label in zip(flat.reshape(9, 8), LABELS, strict=True):
            log_sum = row.max() + math.log(sum(math.exp(x - row.max()) for x in row))
            for i, x in enumerate(row):
                target = (1 - smoothing) * (i == label) + smoothing / 8
                total -= target * (x - log_sum)
        return total / 9

    grad = jax.value_and_grad(
        lambda x: cross_entropy_loss(x, jnp.asarray(LABELS), smoothing), has_aux=True
    )
    (loss, stats), gradient = grad(jnp.asarray(logits))
    np.testing.assert_allclose(loss, reference(exact.ravel()), rtol=1e-5)
    expected = central_differences(reference, exact.ravel(), step=1e-4).reshape(9, 8)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    hits = [int(np.argmax(row)) == label for row, label in zip(exact, LABELS, strict=True)]
    np.testing.assert_allclose(stats["accuracy"], np.mean(hits), rtol=1e-6)


def test_cross_entropy_names_wrong_arguments():
    logits, labels = jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"label_smoothing is 1, expected a number in \[0, 1\)"):
        cross_entropy_loss(logits, labels, 1)
    with pytest.raises(ValueError, match=r"logits have shape \(3, 4\) and labels \(2,\)"):
        cross_entropy_loss(logits, labels[:2])
    with pytest.raises(ValueError, match="labels have dtype float32"):
        cross_entropy_loss(logits, jnp.zeros(3))


@pytest.mark.parametrize("outside", [-1, 4])
def test_a_label_that_is_no_class_makes_the_cross_entropy_nan(outside):
    assert math.isnan(cross_entropy_loss(jnp.ones((3, 4)), jnp.array([0, outside, 3]))[0])


def test_labels_may_be_a_list():
    x = jnp.array([[0.0], [1.0], [1.5], [3.5]])
    labels = [0, 0, 1, 1]
    assert triplet_loss(x, labels)[0] == triplet_loss(x, jnp.array(labels))[0]


# --- what is not finite ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mining", MININGS)
def test_a_loss_of_what_is_not_finite_is_nan(rng, mining, value):
    embeddings = rng.normal(size=(9, 3)).astype(np.float32)
    for row in (1, 7):  # No triplet need be mined of the second: its class has no other image.
        broken = embeddings.copy()
        broken[row, 2] = value
        (loss, stats), _ = compiled(mining)(broken, LABELS)
        assert np.isnan(loss)
        assert np.isnan(stats["embedding_spread"])
        assert collapse_warning(jax.tree.map(float, stats)) is None


def test_a_memory_counts_once_it_is_filled(rng):
    embeddings = rng.normal(size=(4, 3)).astype(np.float32)
    labels, filled = np.array([0, 0, 1, 1], np.int32), np.array([True, False])
    memory = np.array([[1.0, 2.0, 3.0], [np.nan] * 3], np.float32)
    loss, _ = triplet_loss(embeddings, labels, memory=(memory, labels[:2], filled))
    assert np.isfinite(loss)
    loss, _ = triplet_loss(embeddings, labels, memory=(memory[::-1], labels[:2], filled))
    assert np.isnan(loss)


def test_cross_entropy_of_nan_is_nan_and_so_is_its_accuracy():
    logits = jnp.array([[1.0, jnp.nan], [0.0, 2.0]])
    loss, stats = cross_entropy_loss(logits, jnp.array([1, 1]))
    assert np.isnan(loss)
    assert np.isnan(stats["accuracy"])


# --- batch_all's own derivatives ---


def all_triplets(distances, labels, soft, margin):
    """The loss of every triplet at once, by jnp alone."""
    same = labels[:, None] == labels[None, :]
    positive = same & ~np.eye(len(labels), dtype=bool)
    triplets = positive[:, :, None] & ~same[:, None, :]
    gap = distances[:, :, None] - distances[:, None, :]
    cost = jax.nn.softplus(gap) if soft else jax.nn.relu(margin + gap)
    above = jnp.sum(jnp.where(triplets, cost > 0, False)).astype(jnp.float32)
    return jnp.sum(jnp.where(triplets, cost, 0.0)) / above


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
def test_batch_all_has_its_second_derivatives_and_the_margins(rng, soft):
    embeddings = rng.normal(size=(9, 4)).astype(np.float32)

    def derivatives(loss):
        def all_of(x, margin, direction):
            slope = jax.grad(loss)
            both = jax.value_and_grad(loss, argnums=(0, 1))(x, margin)
            forward = jax.jvp(lambda x: slope(x, margin), (x,), (direction,))[1]
            backward = jax.grad(lambda x: jnp.sum(direction * slope(x, margin)))(x)
            return both, forward, backward

        return jax.jit(all_of)(embeddings, 0.3, rng.normal(size=(9, 4)).astype(np.float32))

    state = rng.bit_generator.state
    actual = derivatives(lambda x, m: triplet_loss(x, LABELS, m, "batch_all", soft)[0])
    rng.bit_generator.state = state
    distances = lambda x: pairwise_distances(x, x)  # noqa: E731
    expected = derivatives(lambda x, m: all_triplets(distances(x), LABELS, soft, m))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected
    )


def test_a_soft_cost_too_small_for_float32_is_still_one_of_the_mean():
    embeddings = jnp.array([[0.0], [1.0], [200.0], [0.5]])
    loss, _ = triplet_loss(embeddings, jnp.array([0, 0, 1, 1]), mining="batch_all", soft=True)
    gaps = []
    x, y = [0.0, 1.0, 200.0, 0.5], [0, 0, 1, 1]
    for a in range(4):
        for p in range(4):
            for n in range(4):
                if a != p and y[a] == y[p] != y[n]:
                    gaps.append(abs(x[a] - x[p]) - abs(x[a] - x[n]))
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, gaps)), rtol=1e-6)
