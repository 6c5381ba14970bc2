"""Few queries: one reading of the gallery as it is, and no pass after it.

The product of a gallery and few queries takes about as long as reading it does, and making it ready
would take longer. So norms and products are computed block by block of the gallery as it is, and
every item is a group of its own: what may be among the nearest is measured, see `near`. In tight
clusters that is the whole cluster, which is small beside the gallery.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.search.bounds import LARGEST, Preparation, center_of, prepared, sampled_rows, usual
from cbam_jax.search.groups import Settings
from cbam_jax.search.near import near_of_turns
from cbam_jax.search.order import NO_BOUND, ordered
from cbam_jax.search.shards import blocks_of, fixed_blocks, padded_size, placed
from cbam_jax.search.spread import if_clustered, squared_distances
from cbam_jax.search.sums import lane_sum
from cbam_jax.search.types import Labels, Queries, Shard, ignores

MOST = 64  # Queries that are few.
_LEAST = 4  # Queries of which the product takes less than reading the gallery.
_LOOKED_AT = 64  # Rows that show whether there are clusters: a millisecond.
_BLOCK, _ROWS = 2**22, 2**15  # Numbers and rows of a block of the gallery, at most.
_KEPT = 2**24  # Bounds that are kept, 64 MiB.
PAIRS = 2**21  # Pairs of a query and an item that are measured, at most.
_CENTERED = 0.9  # The mean's share of the squared norms from which it is worth taking off.


def pays(shards: Sequence[Shard], queries: int, metric: str) -> bool:
    """Whether `few_search` is likely to be the fastest; of how the gallery lies, by some rows.

    A pass would make a gallery far from the origin ready, and prove nothing in tight clusters.
    """
    if queries > MOST or shards[0].device.platform != "cpu":
        return False
    if queries <= _LEAST or center_of(shards, metric, 0.25) is not None:
        return True
    return clustered(shards)


def clustered(shards: Sequence[Shard]) -> bool:
    """Whether some rows of the gallery lie in tight clusters, where products prove little."""
    rows = sampled_rows(shards, _LOOKED_AT // 16)
    with np.errstate(over="ignore", invalid="ignore"):  # Numbers may not be finite.
        return len(rows) > 1 and if_clustered(squared_distances(rows)) is not None


def few_search(
    queries: Queries,
    shards: Sequence[Shard],
    k: int,
    metric: str,
    items: Labels,
    rows: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Distances and indices of the k nearest, and whether it is proven.

    The shards' ``squares`` are not looked at. None where numbers are not finite or need to be
    scaled. ``rows`` of the gallery are taken at a time.
    """
    (q, d), squares = queries.rows.shape, [float(np.max(queries.squares))]
    if not squares[0] < LARGEST:
        return None
    center = center_of(shards, metric, _CENTERED)
    preparation = Preparation(center, np.float32(1), metric, "float32")
    x, share = prepared(queries.rows, queries.squares, preparation)
    seats = next((s for s in (1, 4) if q <= s), padded_size(q))
    factor = np.float32(-2 if metric.endswith("euclidean") else -1)
    own = queries.labels.taken(np.minimum(np.arange(seats), q - 1))
    side = _Side(np.pad(np.asarray(x) * factor, ((0, seats - q), (0, 0))), center, own)
    size = rows or max(1, min(_BLOCK // d, _ROWS))
    settings = Settings(preparation, items, size, 1, max(k, PAIRS // q))
    turns = _turns(side, shards, settings, squares)
    parts = [np.minimum(np.arange(seats), q - 1)]
    near = near_of_turns(turns, parts, queries, np.asarray(share), shards, k, settings)
    return near.found() if usual(float(np.max(squares))) else None


class _Side(NamedTuple):
    """The queries as the product takes them, [seats, d], the centre [d] they are less, labels."""

    rows: np.ndarray
    center: np.ndarray | None
    labels: Labels


def _turns(
    side: _Side, shards: Sequence[Shard], settings: Settings, squares: list[float]
) -> Iterator[list[list[list]]]:
    """As `minima_by_turns`, of one tile and groups of one; adds the largest squared norms.

    Ends where one is too large for products, or no number.
    """
    size, seats = settings.gallery_block, len(side.rows)
    most = max(1, _KEPT // (size * seats))
    for shard in shards:
        there, turn = jax.device_put(side, shard.device), []
        for block in blocks_of(shard, fixed_blocks(len(shard.rows), size)):
            turn.append((block[0], *_bounds_of(there, block, shard, settings)))
            jax.block_until_ready([bounds for _, bounds, _ in turn[-2:-1]])
            if len(turn) == most or block[0] + len(block[2]) == shard.first + len(shard.rows):
                squares += [float(square) for *_, square in turn]
                if not np.max(squares) < LARGEST:
                    return
                yield [[_minima(turn)] if s is shard else [[]] for s in shards]
                turn = []


def _minima(turn: list[tuple]) -> list[tuple]:
    """Bounds of blocks as of groups of one."""
    nobody = np.int32(NO_BOUND)
    return [(first, low, np.broadcast_to(nobody, low.shape)) for first, low, _ in turn]


def _bounds_of(side: _Side, block: tuple, shard: Shard, settings: Settings) -> tuple:
    """Bounds of a block's items, and the largest of their squared norms, see `_bounds`."""
    first, fresh, rows, _ = block
    labels = settings.items.taken(np.maximum(np.arange(first, first + len(rows)), 0))
    labels, fresh = placed((labels, np.int32(fresh)), shard.device)
    return _bounds(*side, rows, labels, fresh, metric=settings.preparation.metric)


@functools.partial(jax.jit, static_argnames="metric")
def _bounds(x, center, query, y, items, fresh, *, metric):
    """Lower bounds of distances, integers of their order [m, q]; and the largest squared norm.

    Rows before ``fresh`` were in the block before.
    """
    y = y.astype(jnp.float32)
    squares = lane_sum(y * y)
    y, share = prepared(y, squares, Preparation(center, np.float32(1), metric, "float32"))
    # With so few columns the compiler's options for large products would make it slower.
    product = jax.lax.dot_general(
        y,
        x,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    share = jnp.where(jnp.arange(len(y), dtype=jnp.int32) < fresh, jnp.inf, share)
    low = product + share[:, None]
    if any(label is not None for label in query):
        low = jnp.where(ignores(query.row(), items.column()), jnp.inf, low)
    return ordered(low), jnp.max(squares)
