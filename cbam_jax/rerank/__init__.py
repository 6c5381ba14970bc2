"""Re-ranking: neighbours of neighbours move a ranking, without a label and without training.

The rooms: `expansion` (`expand_queries`, `augment_gallery`, `expand_by_neighbours`: an embedding
becomes a mean of itself and its neighbours; `unit_rows`), `whitening` (`fit_whitening`,
`apply_whitening`: a linear map, fitted on the training split), `reciprocal` (`k_reciprocal`: who is
in whose list), which stands on `encodings` (its sparse rows).

What each looks at decides what a result may be compared with. `expand_queries` takes each query
alone. `k_reciprocal` ranks by all queries together: such a result is transductive, and its report
should say so.
"""

from cbam_jax.rerank.expansion import (
    augment_gallery,
    expand_by_neighbours,
    expand_queries,
    unit_rows,
)
from cbam_jax.rerank.reciprocal import k_reciprocal
from cbam_jax.rerank.whitening import Whitening, apply_whitening, fit_whitening

__all__ = [
    "Whitening",
    "apply_whitening",
    "augment_gallery",
    "expand_by_neighbours",
    "expand_queries",
    "fit_whitening",
    "k_reciprocal",
    "unit_rows",
]
