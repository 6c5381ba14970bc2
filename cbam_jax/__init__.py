"""Image retrieval in JAX: train an embedding model with attention, measure it, search with it.

The package is a set of parts that are imported one by one, so that each stays cheap to import::

    from cbam_jax.attention import CBAM
    from cbam_jax.losses import triplet_loss
    from cbam_jax.search import search
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """A mistake in what the user gave (a config, a file, a folder), told in one line.

    The message names the offending value and the remedy. ``train.py`` and ``evaluate.py`` print it
    without a traceback and exit with status 2.
    """
