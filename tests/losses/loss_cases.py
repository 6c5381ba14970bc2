"""Batches that losses have trouble with, all of one shape, so that a loss compiles once."""

import inspect

import numpy as np

from cbam_jax import losses

NAMES = (
    "contrastive", "n_pair", "distance_weighted", "multi_similarity", "circle", "sup_con",
    "nt_xent", "recall_at_k_surrogate", "smooth_ap",
    "proxy_anchor", "proxy_nca", "arcface", "cosface", "soft_triple",
)  # fmt: skip
SIZE, DIM, CLASSES, CENTERS = 16, 5, 16, 3

# Embeddings' scale, labels, and whether rows stand there twice.
CASES = {
    "singletons": (1.0, [3, 0, 3, 1, 0, 3, 1, 7, 0, 3, 4, 1, 9, 3, 0, 12], False),
    "one class": (1.0, [5] * SIZE, False),
    "all different": (1.0, range(SIZE), False),
    "duplicates": (1.0, [0, 0, 1, 2, 1, 2, 0, 0, 1, 4, 4, 2, 2, 1, 0, 5], True),
    "large": (1e4, [3, 0, 3, 1, 0, 3, 1, 7, 0, 3, 4, 1, 9, 3, 0, 12], False),
    "pairs": (1.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7], False),
}


def loss_of(name):
    return getattr(losses, f"{name}_loss")


def takes(name, argument):
    return argument in inspect.signature(loss_of(name)).parameters


def case(name, seed=7):
    """Embeddings [16, 5] and labels [16]."""
    scale, labels, doubled = CASES[name]
    x = scale * np.random.default_rng(seed).normal(size=(SIZE, DIM))
    if doubled:
        x[SIZE // 2 :] = x[: SIZE // 2]
    return x.astype(np.float32), np.array(labels, np.int32)


def proxies_of(name, seed=8):
    """None, or [16, 5], or [16, 3, 5]; the first is an embedding of the case with duplicates."""
    if not takes(name, "proxies"):
        return None
    shape = (CLASSES, CENTERS, DIM) if name == "soft_triple" else (CLASSES, DIM)
    proxies = np.random.default_rng(seed).normal(size=shape)
    if len(shape) == 2:
        proxies[0] = case("duplicates")[0][0]
    return proxies.astype(np.float32)
