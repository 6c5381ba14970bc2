"""Adds a folder to a catalogue by the fake embedder: ``python add_driver.py CATALOGUE FOLDER``."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeEmbedder

from cbam_jax.catalogue import Catalogue, indexing

indexing.BATCH = 7


class Slow(FakeEmbedder):
    """So slow that a kill falls anywhere, and mostly between the batches."""

    def embed_files(self, paths, **options):
        time.sleep(0.004)
        return super().embed_files(paths, **options)


if __name__ == "__main__":
    print("ready", flush=True)
    with Catalogue.open(sys.argv[1], Slow()) as shop:
        shop.add(sys.argv[2], progress=False)
        shop.find(2)
