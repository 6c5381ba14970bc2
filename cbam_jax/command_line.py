"""What the commands share: one clear line for a mistake, quiet libraries, whole files, a cache."""

import argparse
import difflib
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cbam_jax import InputError
from cbam_jax.foreign_files import escaped, expanded
from cbam_jax.whole_files import written_whole

_READER_LEFT = 141  # As of a command that SIGPIPE ends.
_INTERRUPTED = 130  # As of a command that Ctrl-C ends.


def run(main: Callable[[], Any]) -> int:
    """Run a command; a mistake of the user's ends in one line on stderr and exit status 2.

    Ctrl-C ends it with 130.

    With ``CBAM_JAX_TRACEBACK=1`` in the environment the traceback is shown as well.
    """
    # Orbax and TFDS tell much that nobody asked for through absl's logger, and Orbax each error
    # several times, with its traceback, before it raises it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that the terminal cannot show, or that are no UTF-8, end no command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()
    except (InputError, FloatingPointError) as error:
        if os.environ.get("CBAM_JAX_TRACEBACK"):
            raise
        # A name of a file may hold what moves the cursor, or hides the rest of the line.
        for line in f"error: {error}".split("\n"):
            print(escaped(line), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing is left half written", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # Who reads the output, such as head, has all that it wants.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_LEFT


def parsed(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    commands: Mapping[str, argparse.ArgumentParser] | None = None,
) -> argparse.Namespace:
    """Read flags, which may stand between a list's elements; what is unknown ends the process.

    Args:
        parser: reads them, and tells what is unknown with the name that may have been meant.
        argv: what is typed; None: that of the process.
        commands: read what follows their names, where ``parser`` has such.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    if commands and typed and not typed[0].startswith("-"):
        name, *typed = typed
        if name not in commands:
            parser.error(f"unknown command {name!r}{closest(name, commands)}")
        parser = commands[name]
    elif commands:
        return parser.parse_args(typed)  # Its help, or that a command is missing.
    options, unknown = parser.parse_known_intermixed_args(typed)
    if unknown:
        # What stands after an unknown flag is not read either, and is no mistake.
        unknown = [text for text in unknown if text.startswith("-")] or unknown
        names = re.findall(r"--?[a-z][a-z-]*", parser.format_usage())
        told = closest(unknown[0].partition("=")[0], names)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{told}")
    return options


def closest(name: str, names: Iterable[str]) -> str:
    """Ask whether another name was meant; nothing where none is like it.

    >>> closest("--modle", ["--model", "--sample"]), closest("x", ["add", "find"])
    ('; did you mean --model?', '')
    """
    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def path(text: str) -> Path:
    """Return an option's path, with ``~`` expanded, as argparse's ``type=`` takes it.

    >>> path("~") == Path.home()
    True
    """
    return expanded(text)


def listed(each: Sequence[str], together: str) -> list[str]:
    """Return names that were given one by one, and those that were given parted by commas.

    >>> listed(["a, b.png"], "c.png,d.png"), listed([], "")
    (['a, b.png', 'c.png', 'd.png'], [])
    """
    return [*each, *filter(None, together.split(","))]


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


def cache_folder() -> Path:
    """Return the folder of what was fetched or compiled: $CBAM_JAX_CACHE or ~/.cache/cbam_jax.

    Raises:
        InputError: there is no home folder, as for a user id that the system does not know.
    """
    if folder := os.environ.get("CBAM_JAX_CACHE"):
        return path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cbam_jax"
    except RuntimeError as error:
        raise InputError(
            "this user has no home folder for what is fetched: set CBAM_JAX_CACHE=DIR"
        ) from error


def keep_compiled_programs() -> None:
    """Let JAX keep what takes a second or more to compile, for the next run of the same program.

    Under ``compiled/`` of the cache folder, unless ``JAX_COMPILATION_CACHE_DIR`` or JAX's config
    names another folder; ``JAX_ENABLE_COMPILATION_CACHE=0`` switches it off. A program is kept for
    one kind of processor: where a home is shared, another could not run its instructions. Where
    there is no folder for it, nothing is kept.
    """
    import jax  # Here: not every command needs it.

    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = cache_folder() / "compiled" / _processor()
    except InputError as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """Return digits that two processors share when they have the same instructions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    told = flags[0] if flags else platform.processor()
    return hashlib.sha256(f"{platform.machine()} {told}".encode()).hexdigest()[:12]
