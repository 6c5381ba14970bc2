"""Exact nearest neighbours, streamed over blocks of the gallery.

A search has two steps. The first computes, by one product a block, a *lower bound* of each distance
(the product less its largest possible error), and of each group of gallery items (16, or fewer
where k is large beside n) keeps the lowest, whose it is, and the second lowest. The items with the
lowest bounds give a limit: the k-th of their distances, at most. The second step measures all items
whose bounds are within it: by differences in float32, which leave little more than k of them, and
those in float64. As everything within the limit is measured, the answer is proven. Products of
embeddings rounded to bfloat16 take half the time, and the rounding errors, whose norms are known,
widen the bounds little. Queries with too much within their limits are searched by float32 products,
then by float64 ones, and those with yet more ties pair by pair. Tight clusters, as a well trained
model makes them, are found first, and each is searched alone; where they are too many, it begins
with the product that can tell neighbours apart. So neither the first pass, nor block sizes, nor
devices, nor the batching of queries show in the result: the k lowest by (float32 distance, gallery
index).

An accelerator's second step has a fixed number of candidates, those with the lowest bounds, and
where the k-th distance is below every bound that was not kept, the answer is proven.

Few queries need no pass over a gallery made ready: one reading of it as it is bounds all distances.

Embeddings of photos are correlated: along a few principal directions, a product of a third of the
width bounds distances well. `prepare` makes such a projection of a gallery, or rounds it, once for
all searches.

The rooms, in the order to read them: `passes` (`search`: bounds, what is near, and again what was
left), `bounds` (why they are below every distance), `groups` (the lowest of them, block by block),
`near` (what is within a limit), `nearest` and `pairs` (of pairs the nearest, and distances in
float64), `candidates` (an accelerator's second step), `few` (queries, in one reading), `clusters`
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
