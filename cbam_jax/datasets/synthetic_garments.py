"""The earlier name of :mod:`cbam_jax.datasets.garments`; what it was imported for still works."""

import sys

from cbam_jax.datasets.garments import *  # noqa: F403
from cbam_jax.datasets.garments.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
