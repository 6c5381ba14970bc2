"""Which model embeds: the one that is named, or the one that a catalogue was made with."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import cbam_jax
from cbam_jax import InputError
from cbam_jax.catalogue.store import Store

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


def load_embedder(source: str | None, store: Store) -> "Embedder":
    """Load the model named ``source``, or None: that of the catalogue.

    Raises:
        InputError: there is none, or its embeddings are others than those in the catalogue.
    """
    remembered = store.about("model")
    if source is None and remembered is None:
        raise InputError(no_model(store.path))
    try:
        embedder = load_named(source or remembered)
    except InputError as error:
        if source is not None:
            raise
        raise InputError(
            f"the model of {store.path} cannot be loaded ({error}): give --model, where it is now"
        ) from None
    check_fingerprint(store, embedder)
    return embedder


def load_named(source: str | os.PathLike) -> "Embedder":
    """Load a model by its folder or name; raises as `cbam_jax.load`."""
    return cbam_jax.load(source)


def no_model(path: Path) -> str:
    """Say how a new catalogue gets its model."""
    return (
        f"{path} has no model yet: give --model=RUN, the folder of a trained run, or --model=ID "
        "of the Hugging Face hub"
    )


def check_fingerprint(store: Store, embedder: "Embedder") -> None:
    """Raise an InputError where a catalogue holds the embeddings of another model."""
    own = store.about("fingerprint")
    if own not in (None, embedder.fingerprint):
        raise InputError(
            f"{store.path} holds embeddings of another model ({own[:12]}, this one is "
            f"{embedder.fingerprint[:12]}): give that one, or embed all photos anew with "
            f"`cbam-jax catalogue rebuild {store.path} --model=MODEL`"
        )


def lasting(source: str | os.PathLike) -> str:
    """The name of a model as it holds from every folder.

    >>> lasting("user/model-of-the-hub")
    'user/model-of-the-hub'
    """
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)
