"""Lets TensorFlow Datasets write and read ArrayRecord files where TensorFlow is not installed.

TFDS reaches for TensorFlow in two private corners: the shuffler, once the records of a split exceed
``shuffle.MAX_MEM_BUFFER_SIZE`` (1000 MiB), and the extractor. Both use only plain file calls, which
the standard library has. Because these names are private, ``setup.cfg`` pins the version of TFDS.
"""

import importlib.util
import os
from types import SimpleNamespace


class _ResourceExhaustedError(Exception):
    """Stands for ``tf.errors.ResourceExhaustedError``; plain files raise OSError instead."""


def _as_text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def _open(path: str | os.PathLike, mode: str = "rb"):
    return open(os.fspath(path), mode)


_FILES = SimpleNamespace(
    compat=SimpleNamespace(as_text=_as_text),
    errors=SimpleNamespace(ResourceExhaustedError=_ResourceExhaustedError),
    io=SimpleNamespace(
        gfile=SimpleNamespace(GFile=_open, exists=os.path.exists, remove=os.remove),
    ),
)


def install() -> None:
    """Replaces the two references to TensorFlow, unless TensorFlow is installed. Idempotent."""
    if importlib.util.find_spec("tensorflow") is not None:
        return
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.download import extractor

    shuffle.tf = _FILES
    extractor.tf = _FILES
