"""Distances of chosen pairs, computed in float64 from x - y and rounded to float32."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.shards import gathered_rows, padded_size, view_of
from cbam_jax.search.sums import halved, lane_sum
from cbam_jax.search.types import Shard

_CHUNK, _STEPS = 2**20, 16  # Numbers in a step of the second pass, 4 MiB; steps in a call.
# Numbers that NumPy compares at a time, 3 MiB: of fewer, threads wait for each other's Python.
_PART = 2**18


def on_device(rows: np.ndarray, device: Any) -> jax.Array:
    """Queries on a device, as `pair_distances` takes them; padded, so as not to compile anew."""
    padding = padded_size(len(rows)) - len(rows)
    return jax.device_put(np.pad(rows, ((0, padding), (0, 0))) if padding else rows, device)


def pair_distances(
    x: np.ndarray | jax.Array, shard: Shard, rows: np.ndarray, found: np.ndarray, metric: str
) -> np.ndarray:
    """Distances of x[rows[i]] and the gallery items found[i, :], [r, c] float32.

    An accelerator takes ``x`` as `on_device` returns it.
    """
    if not found.size:
        return np.zeros(found.shape, np.float32)
    on_cpu = shard.device.platform == "cpu"
    if found.shape[1] > max(1, (_PART if on_cpu else _CHUNK) // x.shape[1]):
        halves = np.array_split(found, 2, axis=1)
        parts = [pair_distances(x, shard, rows, half, metric) for half in halves]
        return np.concatenate(parts, axis=1)
    measure = _by_numpy if on_cpu else _by_programs
    return measure(x, shard, rows, found, metric)


def _by_programs(
    x: np.ndarray | jax.Array, shard: Shard, rows: np.ndarray, found: np.ndarray, metric: str
) -> np.ndarray:
    """`pair_distances` on an accelerator."""
    # In calls of few shapes, [calls, steps, rows, c]: the last one is padded.
    wide, c = max(1, _CHUNK // x.shape[1]), found.shape[1]
    size = min(max(16, 1024 // c), wide // c)
    shape = -1, next((s for s in (1, 4) if len(rows) <= s * size), _STEPS), size
    padding = -len(rows) % (shape[1] * shape[2])
    items = np.pad(np.maximum(found - shard.first, 0), ((0, padding), (0, 0)))
    items = items.reshape(*shape, found.shape[1])
    results = []
    with jax.enable_x64(True):
        for i, j in zip(np.pad(rows, (0, padding)).reshape(shape), items, strict=True):
            y = shard.rows
            if not isinstance(y, jax.Array):
                y = jax.device_put(gathered_rows(y, j.reshape(-1)), shard.device)
                j = np.arange(j.size, dtype=np.int32).reshape(j.shape)
            results.append(_distances(x, y, i, j, metric=metric))
    return np.concatenate([np.asarray(a) for a in results])[: len(rows)]


@functools.partial(jax.jit, static_argnames="metric")
def _distances(x, y, rows, items, metric):
    """Distances, [steps * rows, c], of ``rows`` [steps, rows] and ``items`` [steps, rows, c]."""

    def step(indices):
        near = y.at[indices[1]].get(mode="promise_in_bounds")
        return _pair_distance(x[indices[0]][:, None, :], near, metric)

    return jax.lax.map(step, (rows, items)).reshape(-1, items.shape[-1])


def _by_numpy(
    x: np.ndarray | jax.Array, shard: Shard, rows: np.ndarray, found: np.ndarray, metric: str
) -> np.ndarray:
    """`pair_distances` on a CPU: as fast as a program, which would be compiled for each gallery."""
    own, y = np.asarray(x), np.asarray(view_of(shard))
    items, (c, d) = np.maximum(found - shard.first, 0), (found.shape[1], x.shape[1])
    size = max(1, _PART // (c * d))

    def measured(starts):
        # Memory that is asked for once: each part's own would take as long as its numbers.
        near, wide = np.empty((size * c, d), np.float32), np.empty((size, c, d))
        for start in starts:
            some = slice(start, start + size)
            there = gathered_rows(y, items[some].reshape(-1), near).reshape(-1, c, d)
            yield _host_distance(own[rows[some], None], there, wide[: len(there)], metric)

    starts = range(0, len(rows), size)
    # A thread of a pool has the other cores busy already.
    threads = os.cpu_count() or 1 if threading.current_thread() is threading.main_thread() else 1
    shares = np.array_split(starts, min(len(starts), threads))
    if len(shares) == 1:
        return np.concatenate([*measured(starts)])
    with ThreadPoolExecutor() as pool:
        return np.concatenate([*pool.map(lambda s: np.concatenate([*measured(s)]), shares)])


def _host_distance(x: np.ndarray, near: np.ndarray, y: np.ndarray, metric: str) -> np.ndarray:
    """`_pair_distance` of x and ``near`` by NumPy, with room for ``near`` in float64, y."""
    x = x.astype(np.float64)
    y[...] = near
    with np.errstate(over="ignore"):
        if metric == "inner_product":
            return (-np.vecdot(x, y)).astype(np.float32)
        if metric == "cosine":
            xx, yy = (np.vecdot(a, a) for a in (x, y))
            y /= np.sqrt(np.where(yy > 0, yy, 1.0))[..., None]
            y -= x / np.sqrt(np.where(xx > 0, xx, 1.0))[..., None]
            half = np.vecdot(y, y) / 2
            half[half <= 1e-30] = 0.0
            return np.where((xx > 0) & (yy > 0), half, 1.0).astype(np.float32)
        y -= x
        squares = np.vecdot(y, y)
        return (squares if metric == "squared_euclidean" else np.sqrt(squares)).astype(np.float32)


def _pair_distance(x, y, metric):
    x, y = x.astype(jnp.float64), y.astype(jnp.float32).astype(jnp.float64)
    if metric == "inner_product":
        return (-lane_sum(x * y)).astype(jnp.float32)
    if metric == "cosine":
        xx, yy = lane_sum(x * x), lane_sum(y * y)
        x, y = (a / jnp.sqrt(jnp.where(s > 0, s, 1.0))[..., None] for a, s in ((x, xx), (y, yy)))
        # |x - y|^2 / 2 = 1 - cos for unit vectors. Those of equal vectors differ by roundings.
        half = lane_sum(jnp.square(x - y)) / 2
        half = jnp.where(half > 1e-30, half, 0.0)
        return jnp.where((xx > 0) & (yy > 0), half, 1.0).astype(jnp.float32)
    squares = lane_sum(halved(jnp.square(x - y)))
    return (squares if metric == "squared_euclidean" else jnp.sqrt(squares)).astype(jnp.float32)
