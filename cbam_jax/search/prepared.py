"""What a gallery needs once, kept for the searches to come."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cbam_jax.search.bounds import Preparation
from cbam_jax.search.types import Shard


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A gallery as `prepare` makes it ready for `search`.

    Attributes:
      shards: The gallery as it was given, in parts, with its squared norms.
      sides: The same rows as the products of the first pass take them: projected, or whole.
      preparation: How they were made so.
      candidates: Pairs (k, how many beyond k a projected pass keeps), by k; none if not projected.
    """

    shards: Sequence[Shard]
    sides: Sequence[Shard]
    preparation: Preparation
    candidates: tuple[tuple[int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Items and numbers of an embedding, n and d."""
        return sum(len(s.rows) for s in self.shards), self.shards[0].rows.shape[1]

    @property
    def width(self) -> int:
        """Numbers of an embedding in the first product: d, or fewer where projected."""
        return self.sides[0].rows.shape[1]

    @property
    def extra_bytes(self) -> int:
        """The memory that is held beyond the gallery."""
        return sum(
            side.rows.nbytes * (side.rows is not shard.rows)
            + side.squares.nbytes
            + shard.squares.nbytes
            for side, shard in zip(self.sides, self.shards, strict=True)
        )

    @property
    def usual(self) -> bool:
        """Whether the sides are for products: of unusual size, each search scales the gallery."""
        return float(self.preparation.scale) == 1

    def sides_of(self, dtype: str) -> Sequence[Shard] | None:
        """The sides, for a product of whole embeddings in ``dtype``; None if they are others."""
        whole = self.preparation.directions is None and self.preparation.dtype == dtype
        return self.sides if whole else None

    def candidates_of(self, k: int) -> int:
        """How many candidates beyond k a projected pass keeps; 0 where it would not pay."""
        return next((count for most, count in self.candidates if k <= most), 0)

    def suited(self, metric: str, first_pass: str | None, devices: Sequence[Any] | None) -> str:
        """The first pass; a ValueError where a search asks for something else than was prepared."""
        own, dtype = self.preparation.metric, self.preparation.dtype
        if metric != own and not (metric.endswith("euclidean") and own.endswith("euclidean")):
            raise ValueError(
                f"the gallery was prepared for {own}: prepare(gallery, metric={metric!r})"
            )
        if first_pass not in (None, dtype):
            raise ValueError(
                f"the gallery was prepared for products of {dtype}: "
                f"prepare(gallery, first_pass={first_pass!r})"
            )
        if devices is not None:
            raise ValueError("a prepared gallery stays where it is: prepare(gallery, devices=...)")
        return dtype
