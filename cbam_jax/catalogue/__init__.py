"""A catalogue: photos that grow in number, to be searched by photos.

``cbam-jax catalogue add shop.db photos/ --model=RUN`` embeds a folder's photos into one file, and
``cbam-jax catalogue find shop.db new.jpg`` finds those that look most like another. Read

* ``store`` first: the file, which is the truth, and its transactions;
* ``sources``, ``reading``, ``near`` and ``indexing``: from what is given to rows of the file;
* ``embedders``, ``gallery``, ``filters``, ``queries`` and ``nearest``: from a query to neighbours;
* ``alike``: why two photos are alike;
* ``checks``, ``rebuilding`` and ``doctor``: whether all is well, and another model;
* ``items``: a photo as it is listed, and as it is found;
* ``catalogue``: all of it as one object, `Catalogue`;
* ``commands``, ``printing`` and ``contact_sheets``: what is typed, and what is answered;
* ``server``: a page, and JSON.
"""

from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.indexing import Added
from cbam_jax.catalogue.items import Item, Neighbour

__all__ = ["Added", "Catalogue", "Item", "Neighbour"]
