"""What the commands share: one clear line for a mistake, quiet libraries, whole files."""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from cbam_jax import InputError


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


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a JSON file whole or not at all: beside it first, then renamed."""
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    os.replace(partial, path)
