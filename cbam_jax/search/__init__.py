"""Exact nearest neighbours, streamed over blocks of the gallery.

A search has two steps. The first computes, by one product a block, a *lower bound* of each distance
(the product less its largest possible error), and of each group of gallery items (16, or fewer
where k is large beside n) keeps the lowest, whose it is, and the second lowest; then, of each
query, the few groups with the lowest. The second step computes those few distances from x - y in
float64, and those of a group's other items where its second lowest bound asks for it. Where the
k-th distance is below every bound that was not kept, the answer is proven. Products of embeddings
rounded to bfloat16 take half the time, and the rounding errors, whose norms are known, widen the
bounds little: they prove nearly all queries. The others are searched by float32 products, then by
float64 ones, and those with more ties than candidates pair by pair. Tight clusters, as a well
trained model makes them, are found first, and each is searched alone; where they are too many, it
begins with the product that can tell neighbours apart. So neither the first pass, nor block sizes,
nor devices, nor the batching of queries show in the result: the k lowest by (float32 distance,
gallery index).

Few queries need no such care: one reading of the gallery as it is bounds all distances from both
sides, and all items that may be near are measured.

Embeddings of photos are correlated: along a few principal directions, a product of a fifth of the
width bounds distances well. `prepare` makes such a projection of a gallery, or rounds it, once for
all searches.

The rooms, in the order to read them: `passes` (`search`: bounds, candidates, proof, and again what
is not proven), `bounds` (why they are below every distance), `groups` (the lowest of them, block by
block), `candidates` and `pairs` (distances in float64), `few` (queries, in one reading), `clusters`
(each searched alone), `spread` (how embeddings lie), `exhaustive` (every pair); `preparing`,
`projection`, `prepared` and `prepared_files` (what a gallery needs once, kept); and what they stand
on: `types`, `order` (of ties), `shards` (the gallery in memory), `sums`, `arguments`. `counting`:
what is nearer than the first relevant item.

`top_k` finds the same inside other JAX programs: `traced` (the function, its gradient, shards),
`streamed` (bounds, candidates, proof under `jax.jit`), `compensated` (distances as exact as
float64's without float64).
"""

from cbam_jax.search.arguments import FIRST_PASSES, METRICS, check_search
from cbam_jax.search.counting import first_ranks
from cbam_jax.search.passes import search
from cbam_jax.search.prepared import Prepared
from cbam_jax.search.prepared_files import load_prepared, save_prepared
from cbam_jax.search.preparing import prepare
from cbam_jax.search.traced import top_k

__all__ = [
    "FIRST_PASSES",
    "METRICS",
    "Prepared",
    "check_search",
    "first_ranks",
    "load_prepared",
    "prepare",
    "save_prepared",
    "search",
    "top_k",
]
