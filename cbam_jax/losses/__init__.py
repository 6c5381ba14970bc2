"""What is minimised: losses of embeddings or logits and labels, as pure functions.

Each is ``<name>_loss(embeddings, labels, ...) -> (loss, stats)``, a float32 scalar and a dict of
float32 scalars to log, and stands under that name in ``config.loss.name``. Shapes are static: pairs
are masks over the full matrix, so that memory grows with [b, b] and any mesh gives what one device
does. docs/losses.md says which is when of use.

In the order to read them: `common` (arguments, means, log-sums) and `pairs` (each row beside each
column), `similarity` and `softmax` (losses of pairs), `triplet_costs`, `triplet`, `batch_all`,
`distance_weighted` (of triplets), `ranking` (of whole rankings), `proxies` (with trained vectors of
the classes), `cross_entropy` (of a classifier).
"""

from cbam_jax.losses.cross_entropy import cross_entropy_loss, deep_cross_entropy_loss
from cbam_jax.losses.distance_weighted import distance_weighted_loss
from cbam_jax.losses.proxies import (
    Proxies,
    arcface_loss,
    cosface_loss,
    proxy_anchor_loss,
    proxy_nca_loss,
    soft_triple_loss,
)
from cbam_jax.losses.ranking import recall_at_k_surrogate_loss, smooth_ap_loss
from cbam_jax.losses.similarity import (
    circle_loss,
    contrastive_loss,
    multi_similarity_loss,
    multi_similarity_miner,
    n_pair_loss,
)
from cbam_jax.losses.softmax import nt_xent_loss, sup_con_loss
from cbam_jax.losses.triplet import MININGS, collapse_warning, triplet_loss

__all__ = [
    "MININGS",
    "Proxies",
    "arcface_loss",
    "circle_loss",
    "collapse_warning",
    "contrastive_loss",
    "cosface_loss",
    "cross_entropy_loss",
    "deep_cross_entropy_loss",
    "distance_weighted_loss",
    "multi_similarity_loss",
    "multi_similarity_miner",
    "n_pair_loss",
    "nt_xent_loss",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "recall_at_k_surrogate_loss",
    "smooth_ap_loss",
    "soft_triple_loss",
    "sup_con_loss",
    "triplet_loss",
]
