"""A catalogue in Milvus, for more photos than one machine holds: a copy that others can search.

``cbam-jax catalogue sync shop.db milvus://HOST:19530/shop`` brings a collection up to a catalogue,
whose file stays the truth, and ``cbam-jax catalogue find milvus://HOST:19530/shop new.jpg`` finds
the same photos at the same distances. Read

* ``addresses`` and ``collection`` first: where photos are, and what a row of them is;
* ``conditions`` and ``searching``: from a query to neighbours, whose order is ours;
* ``syncing``: from a catalogue to a collection, what changed of it;
* ``finding``: a collection as a `Catalogue`.

All needs ``pymilvus``: ``pip install 'cbam_jax[milvus]'``.
"""

from cbam_jax.catalogue.milvus.addresses import FORMS, address, did_you_mean, is_address
from cbam_jax.catalogue.milvus.collection import INDEXES

__all__ = ["FORMS", "INDEXES", "address", "did_you_mean", "is_address"]
