"""Embeddings made in parts, by processes that know nothing of each other: on a cluster, or in turn.

``cbam-jax embed --data photos.csv --out DIR --shards 64 --shard 3`` embeds one part of a list of
photos into a folder, and ``cbam-jax catalogue add shop.db --from DIR`` takes all of them. Read

* ``files`` first: what a part is on disk, and when it is whole;
* ``making``: from a list of photos to one part of it;
* ``merging``: from all parts to rows of a catalogue;
* ``commands``: what is typed, and which part a cluster's scheduler asks for.
"""

from cbam_jax.catalogue.shards.files import findings
from cbam_jax.catalogue.shards.making import make_shard
from cbam_jax.catalogue.shards.merging import add_shards, check_whole

__all__ = ["add_shards", "check_whole", "findings", "make_shard"]
