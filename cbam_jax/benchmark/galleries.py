"""What searches are measured on: normal embeddings, tight clusters, or those of a file."""

import zipfile
from pathlib import Path

import numpy as np

from cbam_jax import InputError
from cbam_jax.foreign_files import expanded, map_array, read_arrays, shown

_NOISE = 0.05  # Of copies of a file's rows, over the deviation of their numbers.


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Normally distributed embeddings, the hardest case for a search: nothing clusters.

    Example:
      >>> embeddings(2, 3, seed=0).shape
      (2, 3)
    """
    return np.random.default_rng(seed).standard_normal((count, dim), np.float32)


def clustered(count: int, dim: int, spread: float) -> np.ndarray:
    """Unit vectors around 40 directions, as a triplet loss makes them.

    Args:
      count: of vectors.
      dim: numbers of a vector.
      spread: within a cluster, over that of their centres.

    Example:
      >>> np.linalg.norm(clustered(2, 3, spread=0.1), axis=1).round(4).tolist()
      [1.0, 1.0]
    """
    number = np.random.default_rng(2).integers(0, 40, count)
    y = embeddings(40, dim, seed=1)[number] + np.float32(spread) * embeddings(count, dim, seed=3)
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def of_file(path: str, count: int | None) -> np.ndarray:
    """The embeddings [n, d] of a file, as float32; ``count`` of them.

    Where the file has fewer, its rows come again and again, each number with some noise.

    Args:
      path: A NumPy file, or an archive in which they are called ``embedding``, as
        ``embeddings.npz`` of an evaluation.
      count: How many; None: as many as there are.

    Raises:
      InputError: Where there are none.
    """
    file = expanded(path)
    try:
        y = map_array(file) if file.suffix == ".npy" else read_arrays(file)["embedding"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_packed(path) if _is_packed(file) else _wrong(path)) from error
    y = y.astype(np.float32) if y.dtype.kind in "fiu" else np.zeros(0, np.float32)
    if y.ndim != 2 or not y.size:
        raise InputError(_wrong(path))
    if not np.isfinite(y).all():
        raise InputError(f"--embeddings={shown(path)}: NaN or infinity in it: leave such rows out")
    if count is None or count <= len(y):
        return y[:count]
    noise = np.float32(_NOISE * y.std()) * embeddings(count, y.shape[-1], seed=3)
    return y[np.arange(count) % len(y)] + noise


def _wrong(path: str) -> str:
    return (
        f"--embeddings={shown(path)}: no embeddings: give clusters:0.05, an array in a .npy file, "
        "or the embeddings.npz of an evaluation"
    )


def _is_packed(file: Path) -> bool:
    """Whether an archive is compressed: what it unpacks to may be larger than the memory."""
    if not file.is_file():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _packed(path: str) -> str:
    return (
        f"--embeddings={shown(path)}: it is compressed: write it anew, with np.savez in place of "
        "np.savez_compressed, or its array alone with np.save"
    )


def _spread(source: str, given: str) -> float:
    """The spread that ``source`` gives clusters."""
    try:
        spread = float(given)
    except ValueError as error:
        raise InputError(_wrong(source)) from error
    if not 0 <= spread <= 1e6:  # Beyond, the centres are rounded away.
        raise InputError(f"--embeddings={source}: give a spread from 0 to 1e6")
    return spread


def queries_and_gallery(
    source: str | None, queries: int, gallery: int | None, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of normal embeddings both; else a gallery, and some of its items as queries.

    Args:
      source: None, ``"clusters:0.05"`` with the spread of the clusters, or a file.
      queries: how many.
      gallery: likewise; None: 100,000, or those of the file.
      dim: numbers of an embedding, but of a file, which says itself.

    Raises:
      InputError: Where ``source`` is none of these.

    Example:
      >>> [a.shape for a in queries_and_gallery("clusters:0.1", 3, 50, 4)]
      [(3, 4), (50, 4)]
    """
    if source is None:
        return embeddings(queries, dim, seed=1), embeddings(gallery or 100_000, dim, seed=2)
    kind, _, spread = source.partition(":")
    if kind == "clusters":
        y = clustered(gallery or 100_000, dim, _spread(source, spread))
    else:
        y = of_file(source, gallery)
    return y[np.random.default_rng(4).integers(0, len(y), queries)], y
