"""A linear map of embeddings that do not change, trained by any of the losses in seconds.

``train_head`` is one jitted program a loss and a number of classes: learning rate, options of the
loss, batches and the rows that they are of are its arguments, so that neither trials nor folds nor
seeds compile anything. Compiled, 50 steps take 0.02 s, and the compilation a second or two.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbam_jax import losses
from cbam_jax.distances import l2_normalize

# Trained vectors of classes learn faster than the map, as their authors have it (there 100 times).
_PROXIES_FASTER = 10.0


class Tuned(NamedTuple):
    """What is tuned of a loss: option -> (lowest, highest); vectors a class, 0 for none."""

    options: Mapping[str, tuple[float, float]]
    vectors: int = 0
    unit: bool = True  # Whether it is given embeddings of unit length.


LOSSES: Mapping[str, Tuned] = {
    "triplet": Tuned({"margin": (0.05, 0.5)}),
    "contrastive": Tuned({"margin": (0.3, 1.5)}),
    "multi_similarity": Tuned({"base": (0.3, 0.8), "alpha": (1.0, 10.0)}),
    "sup_con": Tuned({"temperature": (0.03, 0.5)}),
    "nt_xent": Tuned({"temperature": (0.03, 0.5)}),
    "circle": Tuned({"margin": (0.1, 0.5), "scale": (16.0, 256.0)}),
    "n_pair": Tuned({"l2": (1e-4, 1e-1)}, unit=False),
    "distance_weighted": Tuned({"margin": (0.05, 0.5)}),
    "recall_at_k_surrogate": Tuned({"temperature": (0.005, 0.1)}),
    "smooth_ap": Tuned({"temperature": (0.005, 0.1)}),
    "proxy_anchor": Tuned({"margin": (0.02, 0.4), "scale": (8.0, 64.0)}, 1),
    "proxy_nca": Tuned({"temperature": (0.03, 0.5)}, 1),
    "arcface": Tuned({"margin": (0.1, 0.8), "scale": (8.0, 64.0)}, 1),
    "cosface": Tuned({"margin": (0.05, 0.5), "scale": (8.0, 64.0)}, 1),
    "soft_triple": Tuned({"margin": (0.005, 0.2), "scale": (8.0, 64.0)}, 5),
    "cross_entropy": Tuned({"label_smoothing": (0.01, 0.3)}, 1, unit=False),
}


def initial_head(width: int, dim: int, seed: int) -> np.ndarray:
    """A projection on random orthogonal axes, [width, dim] float32: distances are about kept."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(width, dim)))
    return axes.astype(np.float32)


def train_head(
    features: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    loss: str,
    options: Mapping[str, float],
    *,
    learning_rate: float,
    steps: int,
    batch: tuple[int, int],
    dim: int,
    seed: int,
) -> np.ndarray:
    """Train a map of features by Adam, and return it.

    Args:
      features: ``[n, d]`` float32.
      labels: ``[n]`` integers.
      rows: Which of them are trained on; no other is looked at.
      loss: One of `LOSSES`.
      options: Of the loss function, of those that are tuned; others have its defaults.
      learning_rate: Of Adam, constant.
      steps: How many batches.
      batch: Classes of a batch, at most those that there are, and images of each.
      dim: Width of the result.
      seed: Of the map's start and of the batches.

    Returns:
      ``[d, dim]`` float32; embeddings are ``features @ head``, to be compared at unit length.
    """
    names, numbers = np.unique(labels[rows], return_inverse=True)
    rng = np.random.default_rng([seed, 1])
    params = {"head": initial_head(features.shape[1], dim, seed)}
    if vectors := LOSSES[loss].vectors:
        shape = (len(names), vectors, dim) if vectors > 1 else (len(names), dim)
        params["proxies"] = (rng.normal(size=shape) / np.sqrt(dim)).astype(np.float32)
    drawn = np.stack([draw_batch(numbers, *batch, rng) for _ in range(steps)])
    batches = rows[drawn].astype(np.int32), numbers[drawn].astype(np.int32)
    given = {name: np.float32(value) for name, value in {**defaults(loss), **options}.items()}
    key = jax.random.key(seed)
    arrays = (params, features, batches, given, np.float32(learning_rate))
    return np.asarray(_trained(*arrays, key, loss=loss)["head"])


def defaults(loss: str) -> dict[str, float]:
    """The loss function's own values of what is tuned.

    >>> defaults("circle")
    {'margin': 0.4, 'scale': 80.0}
    """
    parameters = inspect.signature(getattr(losses, f"{loss}_loss")).parameters
    return {name: parameters[name].default for name in LOSSES[loss].options}


def draw_batch(labels: np.ndarray, classes: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of ``classes`` classes, ``each`` of each, again where a class has fewer, int32."""
    present = np.unique(labels)
    chosen = rng.choice(present, min(classes, len(present)), replace=False)
    rows = [np.flatnonzero(labels == label) for label in chosen]
    drawn = [rng.choice(of, each, replace=len(of) < each) for of in rows]
    return np.concatenate(drawn).astype(np.int32)


@functools.partial(jax.jit, static_argnames="loss")
def _trained(
    params: Any,
    features: jax.Array,
    batches: tuple[jax.Array, jax.Array],
    options: Any,
    rate: jax.Array,
    key: jax.Array,
    *,
    loss: str,
) -> Any:
    """The parameters after all batches."""
    adam = optax.scale_by_adam()

    def step(carry, batch):
        params, state = carry
        rows, labels, key = batch
        gradient = jax.grad(_cost)(params, features[rows], labels, options, key, loss)
        update: Any
        update, state = adam.update(gradient, state)
        multiple = {"head": 1.0, "proxies": _PROXIES_FASTER}
        moved = {name: params[name] - rate * multiple[name] * update[name] for name in params}
        return (moved, state), None

    keys = jax.random.split(key, len(batches[0]))
    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), (*batches, keys))
    return params


def _cost(params, features, labels, options, key, loss):
    """The loss of a batch; each function has its own arguments beside embeddings and labels."""
    embeddings = features @ params["head"]
    embeddings = l2_normalize(embeddings) if LOSSES[loss].unit else embeddings
    function = getattr(losses, f"{loss}_loss")
    if loss == "cross_entropy":
        return function(embeddings @ params["proxies"].T, labels, **options)[0]
    if LOSSES[loss].vectors:
        return function(embeddings, labels, params["proxies"], **options)[0]
    if loss == "distance_weighted":
        return function(embeddings, labels, key, **options)[0]
    return function(embeddings, labels, **options)[0]


def embed(features: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Embeddings of unit length, [n, dim] float32."""
    return np.asarray(l2_normalize(jnp.asarray(features @ head)))
