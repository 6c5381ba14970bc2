"""Files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes that place once the block has ended well.

    After an error, or when the process is ended, what stood at ``path`` before still does.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "x.txt"
      >>> with written_whole(path) as partial:
      ...     _ = partial.write_text("all of it")
      >>> path.read_text(), [file.name for file in path.parent.iterdir()]
      ('all of it', ['x.txt'])
    """
    path = Path(path)
    partial = path.with_name(f"partial-{path.name}")  # Libraries look at the suffix.
    partial.unlink(missing_ok=True)  # In a stranger's folder it may be a link to elsewhere.
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(path: str | os.PathLike, **arrays: Any) -> None:
    """Write an npz file whole or not at all."""
    with written_whole(path) as partial:
        np.savez(partial, **arrays)
