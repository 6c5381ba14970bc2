"""Nearest neighbours by loops in float64, to compare searches with."""

import numpy as np


def brute_force(queries, gallery, k, metric="euclidean", ignored=None):
    """Distances and indices by loops in float64; ties by (distance in float32, index)."""
    distances = np.full((len(queries), k), np.inf, np.float32)
    indices = np.full((len(queries), k), -1)
    gallery = np.asarray(gallery, np.float64)
    for i, query in enumerate(np.asarray(queries, np.float64)):
        to = all_distances(query, gallery, metric).astype(np.float32)
        left = [j for j in range(len(gallery)) if ignored is None or not ignored[i, j]]
        ranked = sorted(left, key=lambda j, to=to: (to[j], j))[:k]
        distances[i, : len(ranked)], indices[i, : len(ranked)] = to[ranked], ranked
    return distances, indices


def all_distances(query, gallery, metric):
    if metric == "inner_product":
        return -np.sum(gallery * query, axis=1)
    if metric == "cosine":
        lengths = np.linalg.norm(gallery, axis=1) * np.linalg.norm(query)
        cosines = np.sum(gallery * query, axis=1) / np.where(lengths > 0, lengths, 1.0)
        return 1 - cosines
    squares = np.sum((gallery - query) ** 2, axis=1)
    return squares if metric == "squared_euclidean" else np.sqrt(squares)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def in_clusters(rng, clusters, each, d, spread):
    """Unit vectors around a few directions, as a triplet loss makes them."""
    x = rng.normal(size=(clusters, 1, d)) + spread * rng.normal(size=(clusters, each, d))
    x = rng.permutation(x.reshape(-1, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
