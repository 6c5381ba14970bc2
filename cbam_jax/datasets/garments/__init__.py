"""Drawn clothes of 16 categories, ``synthetic_garments``: every pixel and its truth is known.

To be read in this order:

* ``shapes``: the cut, from random numbers to polygons, one function a category
* ``textiles``: colours and cloth; ``scene``: what is behind a garment and in front of it
* ``drawing``: one picture from four numbers
* ``builder``: the TFDS dataset of such pictures; ``folder``: photos in class folders;
  ``__main__``: a sheet of them
"""

from cbam_jax.datasets.garments.builder import SyntheticGarments, SyntheticGarmentsConfig
from cbam_jax.datasets.garments.drawing import CATEGORIES, DOMAINS, contact_sheet, draw_garment
from cbam_jax.datasets.garments.folder import draw_folder
from cbam_jax.datasets.garments.textiles import TEXTILES

__all__ = [
    "CATEGORIES",
    "DOMAINS",
    "TEXTILES",
    "SyntheticGarments",
    "SyntheticGarmentsConfig",
    "contact_sheet",
    "draw_folder",
    "draw_garment",
]
