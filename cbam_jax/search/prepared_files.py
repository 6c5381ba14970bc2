"""A prepared gallery in a file, which is read for the same gallery alone."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cbam_jax import InputError
from cbam_jax.foreign_files import parse_json, read_arrays, shown
from cbam_jax.search import arguments
from cbam_jax.search.bounds import Preparation
from cbam_jax.search.prepared import Prepared
from cbam_jax.search.shards import host_blocks, split_gallery
from cbam_jax.search.types import Shard
from cbam_jax.whole_files import written_whole

_BITS = {2: np.uint16, 4: np.uint32}  # NumPy's files have no bfloat16.
_ABOUT = {"metric", "dtype", "scale", "candidates", "gallery", "content"}


def save_prepared(path: str | os.PathLike, prepared: Prepared) -> None:
    """Write what `prepare` made, without the gallery itself, to a file that is whole or not there.

    `load_prepared` shows an example.
    """
    settings = prepared.preparation
    parts = {
        "rows": [] if _shared(prepared) else [_bits(side.rows) for side in prepared.sides],
        "share": [side.squares for side in prepared.sides],
        "center": [] if settings.center is None else [settings.center],
        "directions": [] if settings.directions is None else [settings.directions],
    }
    arrays = {name: np.concatenate(part) for name, part in parts.items() if part}
    about = {
        "metric": settings.metric,
        "dtype": settings.dtype,
        "scale": float(settings.scale),
        "candidates": prepared.candidates,
        "gallery": _digest([shard.rows for shard in prepared.shards]),
        "content": {name: _digest([array]) for name, array in arrays.items()},
    }
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)


def load_prepared(
    path: str | os.PathLike, gallery: ArrayLike, *, devices: Sequence[Any] | None = None
) -> Prepared:
    """What `save_prepared` wrote, of the same gallery, which is read once to make sure.

    Args:
      path: The file.
      gallery: ``[n, d]``, as it was given to `prepare`.
      devices: Devices to split the gallery over, see `search`.

    Raises:
      ValueError: Where the file is damaged or was written for another gallery.
      OSError: Where there is none, or it may not be read.

    Example:
      >>> import os, tempfile
      >>> from cbam_jax.search import prepare, search
      >>> gallery = np.array([[0.0], [2.0], [3.0]], np.float32)
      >>> path = os.path.join(tempfile.mkdtemp(), "gallery.prepared")
      >>> save_prepared(path, prepare(gallery))
      >>> search(np.ones((1, 1), np.float32), load_prepared(path, gallery), k=2)[1].tolist()
      [[0, 1]]
    """
    gallery = arguments.matrix(gallery, "gallery")
    about, arrays = _read(Path(path))
    if _digest([gallery]) != about["gallery"]:
        raise ValueError(
            f"{path} was prepared of another gallery: save_prepared({str(path)!r}, "
            "prepare(gallery)) writes it anew"
        )
    if not _fits(arrays, len(gallery)):
        raise _damaged(Path(path))
    settings = Preparation(
        arrays.get("center"),
        np.float32(about["scale"]),
        about["metric"],
        about["dtype"],
        arrays.get("directions"),
    )
    shards = split_gallery(gallery, devices)
    rows = arrays.get("rows")
    if rows is not None:
        rows = rows.view(jnp.dtype(about["dtype"]))
    sides = [_part(shard, rows, arrays["share"]) for shard in shards]
    return Prepared(shards, sides, settings, tuple((k, count) for k, count in about["candidates"]))


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        arrays = read_arrays(path)
        about = parse_json(arrays.pop("about").item())
        whole = about["content"] == {name: _digest([a]) for name, a in arrays.items()}
    except InputError:  # No file at all: a pipe, a folder.
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if not (whole and set(about) >= _ABOUT and "share" in arrays):
        raise _damaged(path)
    return about, arrays


def _fits(arrays: dict[str, np.ndarray], count: int) -> bool:
    """Whether there are rows and numbers for each item: past an end JAX repeats the last."""
    rows, share = arrays.get("rows"), arrays.get("share")
    known = rows is None or (rows.ndim == 2 and len(rows) == count)
    return known and share is not None and share.shape == (count,)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{shown(path)} is damaged: save_prepared writes it anew")


def _part(shard: Shard, rows: np.ndarray | None, share: np.ndarray) -> Shard:
    here = slice(shard.first, shard.first + len(shard.rows))
    side = shard.rows if rows is None else jax.device_put(rows[here], shard.device)
    return shard._replace(rows=side, squares=share[here])


def _shared(prepared: Prepared) -> bool:
    pairs = zip(prepared.sides, prepared.shards, strict=True)
    return all(side.rows is shard.rows for side, shard in pairs)


def _bits(rows: np.ndarray | jax.Array) -> np.ndarray:
    rows = np.asarray(rows)
    return rows.view(_BITS[rows.itemsize])


def _digest(parts: Sequence[np.ndarray | jax.Array]) -> str:
    """SHA-256 of the numbers of some matrices, one below the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {part.shape[1:]}".encode() if part is parts[0] else b"")
        for block in host_blocks(part):
            digest.update(np.ascontiguousarray(part[block]).view(np.uint8).data)
    return digest.hexdigest()
