"""Values and gradients of the losses by name, against loops in float64."""

import functools

import jax
import loss_references as reference
import numpy as np
import pytest
from loss_references import central_differences

from cbam_jax import losses
from cbam_jax.losses.distance_weighted import drawn as drawn_by
from cbam_jax.losses.distance_weighted import sampling_weights

LABELS = np.array([3, 0, 3, 1, 0, 3, 1, 7, 0])  # 7 has no positive.
PAIRS = ("multi_similarity", "circle", "contrastive", "n_pair", "sup_con", "nt_xent")
RANKS = ("recall_at_k_surrogate", "smooth_ap")
PROXIES = ("proxy_anchor", "proxy_nca", "cosface", "arcface", "soft_triple")
# Compiling a loss with its gradient takes half a second, so that each kind has some for every run.
SLOW = {"circle", "contrastive", "nt_xent", "recall_at_k_surrogate", "proxy_nca", "cosface"}
# Steps with a slope, and negatives on both sides of the margin.
OPTIONS = {name: {"temperature": 0.2} for name in RANKS} | {"contrastive": {"margin": 2.5}}


@functools.cache
def drawn():
    rng = np.random.default_rng(2022)
    shapes = {"x": (9, 4), "proxies": (8, 4), "centers": (8, 3, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def call(loss, labels, options, arrays):
    return loss(**arrays, labels=labels, **options)


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@functools.cache
def results(slow=False):
    """Of each loss ((loss, stats), gradients), by one program: much of what they compute is one."""

    def find(x, labels, proxies, centers):
        found = {}
        for name in PAIRS + RANKS + PROXIES:
            if slow != (name in SLOW):
                continue
            vectors = {"proxies": centers if name == "soft_triple" else proxies}
            arrays = {"embeddings": x} | (vectors if name in PROXIES else {})
            loss = getattr(losses, f"{name}_loss")
            loss = functools.partial(call, loss, labels, OPTIONS.get(name, {}))
            found[name] = jax.value_and_grad(loss, has_aux=True)(arrays)
        return found

    given = drawn()
    return jax.device_get(jax.jit(find)(given["x"], LABELS, given["proxies"], given["centers"]))


@pytest.mark.parametrize("name", marked(PAIRS))
def test_value_and_gradient_match_float64(name):
    (value, _), gradient = results(name in SLOW)[name]
    x = drawn()["x"].astype(np.float64)
    options = {"fixed": x} if name == "circle" else OPTIONS.get(name, {})  # Weights have no slope.
    loss = functools.partial(getattr(reference, name), labels=LABELS, **options)
    check(value, gradient["embeddings"], loss, x)


@pytest.mark.parametrize("name", marked(RANKS))
def test_losses_of_rankings_match_float64(name):
    (value, _), gradient = results(name in SLOW)[name]
    x = drawn()["x"].astype(np.float64)
    loss = functools.partial(getattr(reference, name), labels=LABELS, **OPTIONS[name])
    check(value, gradient["embeddings"], loss, x)


@pytest.mark.parametrize("name", marked(PROXIES))
def test_value_and_gradients_with_proxies_match_float64(name):
    (value, stats), gradient = results(name in SLOW)[name]
    x = drawn()["x"].astype(np.float64)
    p = drawn()["centers" if name == "soft_triple" else "proxies"].astype(np.float64)
    loss = getattr(reference, name)
    check(value, gradient["embeddings"], lambda x: loss(x, LABELS, p), x)
    check(value, gradient["proxies"], lambda p: loss(x, LABELS, p), p)
    if name != "soft_triple":
        nearest = np.argmax(reference.unit(x) @ reference.unit(p).T, axis=1)
        np.testing.assert_allclose(stats["accuracy"], np.mean(nearest == LABELS), rtol=1e-6)


def check(value, gradient, expected, x):
    np.testing.assert_allclose(value, expected(x), rtol=1e-5)
    slopes = central_differences(expected, x)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)
    assert np.abs(gradient).max() > 0.01


@pytest.mark.parametrize("name", marked(PAIRS + RANKS + PROXIES))
def test_spread_and_valid_anchors(name):
    x = drawn()["x"]
    (_, stats), _ = results(name in SLOW)[name]
    spread = np.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, axis=1)))
    np.testing.assert_allclose(stats["embedding_spread"], spread, rtol=1e-5)
    if name not in PROXIES:
        valid = 3 / 9 if name == "n_pair" else 8 / 9
        np.testing.assert_allclose(stats["valid_anchors"], valid, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
def test_negatives_are_drawn_in_proportion_to_the_inverse_density(rng, fits):
    """One row of distances, drawn from many times; where none is near enough, alike."""
    distances, dim = np.array([[0.3, 0.6, 0.8, 0.7, 1.3, 1.5, 0.9]], np.float32), 6
    negative = np.array([[True, True, True, False, True, True, True]])
    farthest = 1.4 if fits else 0.2
    weights = sampling_weights(distances, negative, dim, 0.5, farthest)
    r = np.maximum(distances.astype(np.float64), 0.5)[0]
    expected = 1 / (r ** (dim - 2) * (1 - r**2 / 4) ** ((dim - 3) / 2)) if fits else np.ones(7)
    expected[[3, 5] if fits else [3]] = 0
    expected /= expected.sum()
    weights = np.asarray(weights)[0]
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-5)
    many = drawn_by(jax.random.key(1), np.tile(weights, (3000, 1)))
    counts = np.bincount(np.asarray(many).ravel(), minlength=7)
    total = counts.sum()
    deviation = np.sqrt(total * expected * (1 - expected))
    assert np.all(np.abs(counts - total * expected) <= 4.5 * deviation)


@pytest.mark.slow
def test_a_triplet_costs_by_the_negative_that_was_drawn():
    """With one negative for each anchor nothing is left to chance."""
    x, labels = drawn()["x"][:5], np.array([4, 4, 4, 4, 1])
    loss, stats = losses.distance_weighted_loss(x, labels, jax.random.key(0), farthest=2.0)
    unit = reference.unit(x.astype(np.float64))
    d = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    costs = [max(0, 0.2 + d[a, p] - d[a, 4]) for a in range(4) for p in range(4) if a != p]
    np.testing.assert_allclose(loss, np.mean(costs), rtol=1e-5)
    np.testing.assert_allclose(stats["valid_anchors"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(stats["active_fraction"], np.mean(np.array(costs) > 0), rtol=1e-6)
