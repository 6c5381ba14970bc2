"""What the commands share: one clear line for a mistake, quiet libraries, whole files."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from cbam_jax import InputError
from cbam_jax.whole_files import written_whole


def run(main: Callable[[], Any]) -> int:
    """Run a command; a mistake of the user's ends in one line on stderr and exit status 2.

    With ``CBAM_JAX_TRACEBACK=1`` in the environment the traceback is shown as well.
    """
    # Orbax and TFDS tell much that nobody asked for through absl's logger.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return main() or 0
    except (InputError, FloatingPointError) as error:
        if os.environ.get("CBAM_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def to_json(document: Any, indent: int | None = None) -> str:
    """Return strict JSON: a mean over nothing, NaN here, is null, which every parser reads.

    >>> to_json({"map@10": float("nan"), "of": (0.25, 0.5)})
    '{"map@10": null, "of": [0.25, 0.5]}'
    """
    return json.dumps(_without_nan(document), indent=indent, allow_nan=False)


def _without_nan(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _without_nan(value) for name, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_without_nan(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, to_json(document, indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
