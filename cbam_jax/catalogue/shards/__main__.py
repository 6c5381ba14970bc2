"""Embed one part of a list of photos: ``python -m cbam_jax.catalogue.shards``."""

import sys

from cbam_jax import command_line
from cbam_jax.catalogue.shards.commands import main

if __name__ == "__main__":
    sys.exit(command_line.run(main))
