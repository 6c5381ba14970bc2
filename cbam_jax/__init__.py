"""Image retrieval in JAX: train an embedding model with attention, measure it, search with it.

The package is a set of parts that are imported one by one, so that each stays cheap to import::

    from cbam_jax.attention import CBAM
    from cbam_jax.losses import triplet_loss
    from cbam_jax.search import search

A trained model is loaded whole, from a run, a folder or the hub::

    embedder = cbam_jax.load("runs/mine")
    embedder.embed_files(["a.jpg", "b.jpg"]).embeddings
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedded, Embedder, load

__version__ = "0.1.0"
__all__ = ["Embedded", "Embedder", "InputError", "load"]


class InputError(ValueError):
    """A mistake in what the user gave (a config, a file, a folder), told in one line.

    The message names the offending value and the remedy. ``train.py`` and ``evaluate.py`` print it
    without a traceback and exit with status 2.
    """


def __getattr__(name: str) -> Any:
    """Import what loads a model when it is asked for: the parts stay cheap to import."""
    if name in ("Embedded", "Embedder", "load"):
        import importlib

        return getattr(importlib.import_module("cbam_jax.embedder"), name)
    raise AttributeError(f"module 'cbam_jax' has no attribute {name!r}")
