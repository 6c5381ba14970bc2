"""The gallery in memory: parts on devices, blocks of rows, files of which little is read."""

import mmap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.sums import lane_sum
from cbam_jax.search.types import Shard

GROUP = 16  # Gallery items whose lowest bound stands for them, at most; a power of two.
_RESIDENT = 2**30  # Bytes up to which a NumPy gallery is copied to the device once.


def split_gallery(gallery: np.ndarray | jax.Array, devices: Sequence[Any] | None) -> list[Shard]:
    """The gallery in contiguous parts, one a device, with its squared norms."""
    return measured(parts_of(gallery, devices))


def measured(shards: Sequence[Shard]) -> list[Shard]:
    """The parts with their squared norms; raises where there is NaN or infinity."""
    return [s._replace(squares=squared_norms(s.rows, "gallery", s.first)) for s in shards]


def parts_of(gallery: np.ndarray | jax.Array, devices: Sequence[Any] | None) -> list[Shard]:
    """The gallery in contiguous parts, one a device, its squared norms not known yet."""
    n = len(gallery)
    if isinstance(gallery, jax.Array) and devices is None:
        parts = {s.index[0].start or 0: s for s in gallery.addressable_shards}
        if sum(len(s.data) for s in parts.values()) != n or any(
            s.data.shape[1] != gallery.shape[1] for s in parts.values()
        ):
            raise ValueError("the gallery is to be sharded over its rows only, on local devices")
        return [_shard(parts[i].device, i, parts[i].data) for i in sorted(parts)]
    if devices is None:
        devices = jax.local_devices()[:1]
    # Copying once is faster than twice block by block, where there is room.
    resident = isinstance(gallery, jax.Array) or (
        not isinstance(gallery, np.memmap) and gallery.nbytes <= _RESIDENT
    )
    edges = np.linspace(0, n, len(devices) + 1).astype(int)
    with np.errstate(over="ignore"):  # What float32 does not hold is refused once it is measured.
        return [
            _shard(d, int(i), jax.device_put(gallery[i:j], d) if resident else gallery[i:j])
            for d, i, j in zip(devices, edges[:-1], edges[1:], strict=True)
            if j > i
        ]


def _shard(device: Any, first: int, rows: np.ndarray | jax.Array) -> Shard:
    return Shard(device, first, rows, np.empty(0, np.float32))


class Blocks(NamedTuple):
    """Where the rows begin that each block brings, [b], and how many rows it has, [b].

    The last of a length begins before its first new row where a shard has no more; and before the
    shard's first, where it has fewer: there is padding.
    """

    starts: np.ndarray
    rows: np.ndarray


def equal_blocks(n: int, size: int) -> Blocks:
    """Blocks of at most ``size`` rows, about equally many."""
    rows = block_rows(n, size)
    starts = np.arange(0, n, rows)
    return Blocks(starts, np.full(len(starts), rows))


def fixed_blocks(n: int, size: int) -> Blocks:
    """Blocks of ``size`` rows, then of an eighth of that: programs know two lengths, never n.

    Of the few rows of a small shard one block, padded to a power of two.

    >>> fixed_blocks(1010, 256)
    Blocks(starts=array([  0, 256, 512, 768]), rows=array([256, 256, 256, 256]))
    >>> fixed_blocks(820, 256)
    Blocks(starts=array([  0, 256, 512, 768, 800]), rows=array([256, 256, 256,  32,  32]))
    >>> fixed_blocks(100, 8192)
    Blocks(starts=array([0]), rows=array([128]))
    """
    small = min(size // 8 // GROUP * GROUP or size, max(GROUP, 1 << (n - 1).bit_length()))
    whole, rest = divmod(n, size)
    if rest > size - small:
        whole, rest = whole + 1, 0
    tail = -(-rest // small)
    starts = [*range(0, whole * size, size), *range(whole * size, whole * size + rest, small)]
    return Blocks(np.array(starts), np.array([size] * whole + [small] * tail))


def pass_blocks(shard: Shard, size: int) -> Blocks:
    """The blocks of a pass over a shard; an accelerator's, which has memory to fill, are equal."""
    cut = fixed_blocks if shard.device.platform == "cpu" else equal_blocks
    return cut(len(shard.rows), size)


def blocks_of(shard: Shard, blocks: Blocks) -> Iterator[tuple[int, int, Any, Any]]:
    """Of each block the gallery index of its first row, the number of rows that are not new, rows.

    And the squares of the rows.
    """
    n, source = len(shard.rows), view_of(shard)
    for start, rows in zip(*(a.tolist() for a in blocks), strict=True):
        begin = min(start, n - rows)
        there = slice(max(begin, 0), begin + rows)
        block, squares = source[there], shard.squares[there]
        if block.dtype == np.float64:  # Bounds are of the numbers that are compared.
            with np.errstate(over="ignore"):
                block = block.astype(np.float32)
        if begin < 0:
            block = np.pad(np.asarray(block), ((-begin, 0), (0, 0)))
            squares = np.pad(squares, (-begin, 0))
        if source is not shard.rows:
            block = placed(block, shard.device)
        elif isinstance(block, np.ndarray):
            block = jax.block_until_ready(jax.device_put(np.array(block), shard.device))
            _release(shard.rows)
        yield shard.first + begin, start - begin, block, squares


def placed(arrays: Any, device: Any) -> Any:
    """Arrays on a device; on a CPU that is the only kind as they are: calls take them sooner."""
    first = device.platform == "cpu" and device == jax.local_devices()[0]
    return arrays if first else jax.device_put(arrays, device)


def view_of(shard: Shard) -> np.ndarray | jax.Array:
    """The rows to take blocks from: NumPy's view on a CPU, since slices of jnp are copies."""
    on_cpu = isinstance(shard.rows, jax.Array) and shard.device.platform == "cpu"
    return np.asarray(shard.rows) if on_cpu else shard.rows


def block_rows(n: int, size: int) -> int:
    """Rows of each block: about equally many, whole groups where there are several blocks."""
    rows = -(-n // -(-n // size))
    return rows if rows == n else min(n, -(-rows // GROUP) * GROUP)


def padded_size(q: int) -> int:
    """The number of rows that ``q`` queries are padded to, so that few programs are compiled.

    A power of two from 16 to 64; then 4 sizes up to each next one, at most a quarter more.

    >>> [padded_size(q) for q in (1, 17, 64, 65, 100, 257)]
    [16, 32, 64, 80, 112, 320]
    """
    power = max(16, 1 << (q - 1).bit_length())
    step = power if power <= 64 else power // 8
    return -(-q // step) * step


def query_tiles(q: int, size: int) -> list[np.ndarray]:
    """Rows of queries to be searched at a time: ``size``, the last of a padded size.

    A last tile begins before its first new row where there are rows enough, else it repeats one.
    """
    tiles = [np.arange(i, i + size) for i in range(0, q - size + 1, size)]
    rest = q % size
    if rest:
        last = min(size, padded_size(rest))
        start = max(0, q - last)
        tiles.append(np.minimum(np.arange(start, start + last), q - 1))
    return tiles


def gathered_rows(x: np.ndarray, rows: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    """x[rows] as float32, in ``memory`` [at least as many, d] or anew.

    Of a file a few at a time, since each brings its neighbours along.
    """
    result = (
        np.empty((len(rows), x.shape[1]), np.float32) if memory is None else memory[: len(rows)]
    )
    if isinstance(x, np.memmap):
        for i in range(0, len(rows), 32):
            result[i : i + 32] = x[rows[i : i + 32]]
            _release(x)
    elif x.dtype == np.float32:
        np.take(x, rows, axis=0, mode="clip", out=result)
    else:
        result[...] = np.take(x, rows, axis=0, mode="clip")
    return result


def _release(x: np.ndarray | jax.Array) -> None:
    """Lets go of the pages read from a file, which would count as memory of the process."""
    if isinstance(x, np.memmap) and x.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        x._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]


def squared_norms(x: np.ndarray | jax.Array, name: str, first: int = 0) -> np.ndarray:
    """Squared norms, [m] float32, infinite if too large; raises where there is NaN or infinity."""
    if isinstance(x, jax.Array) and next(iter(x.devices())).platform == "cpu":
        x = np.asarray(x)  # A program would be compiled for each number of rows.
    if isinstance(x, jax.Array):
        squares = np.asarray(_square_sums(x))
    else:
        squares = np.empty(len(x), np.float32)
        for block in host_blocks(x):
            with np.errstate(over="ignore"):
                rows = np.asarray(x[block], np.float32)
                squares[block] = np.einsum("ij,ij->i", rows, rows)
    if not np.isfinite(np.sum(squares, dtype=np.float64)):
        _refuse_not_finite(x, name, first)
    return squares


@jax.jit
def _square_sums(x: jax.Array) -> jax.Array:
    return lane_sum(jnp.square(x.astype(jnp.float32)))


def _refuse_not_finite(x: np.ndarray | jax.Array, name: str, first: int) -> None:
    with np.errstate(over="ignore"):  # What float32 does not hold is infinite in a search.
        wrong = [~np.isfinite(np.asarray(x[b], np.float32)).all(axis=1) for b in host_blocks(x)]
    wrong = np.concatenate(wrong)
    if wrong.any():
        row = first + int(np.argmax(wrong))
        raise ValueError(f"{name}: NaN or infinity in {wrong.sum()} rows, the first is row {row}")


def largest_magnitude(x: np.ndarray | jax.Array) -> float:
    """The largest magnitude."""
    return float(max(np.max(np.abs(np.asarray(x[block]))) for block in host_blocks(x)))


def host_blocks(x: np.ndarray | jax.Array) -> Iterator[slice]:
    """Blocks of rows to look at one after another; of a file, not kept in memory."""
    for i in range(0, len(x), 4096):
        yield slice(i, i + 4096)
        _release(x)
