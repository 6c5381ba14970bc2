"""A run's config from the command line: ``--config`` by name or by path, and its overrides."""

import contextlib
import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from cbam_jax import InputError
from cbam_jax.foreign_files import expanded, shown

# An ml_collections.ConfigDict. Its fields, which configs/default.py lists, no type checker knows.
Config = Any
CONFIGS = Path(__file__).parent / "configs"
# What errors of a dataset advise, in a program's words, and in those of the commands with a config.
_AS_FLAGS = {
    "on_bad_image='skip'": "--config.data.on_bad_image=skip",
    "crop_to_box=False": "--config.data.crop_to_box=False",
    "replace the file, or leave it out": (
        "replace the file, or leave it out with --config.data.on_bad_image=skip"
    ),
}


@contextlib.contextmanager
def told_as_flags() -> Iterator[None]:
    """Within it, an InputError that advises an argument advises the flag instead.

    >>> with told_as_flags():
    ...     raise InputError("no boxes: set crop_to_box=False")
    Traceback (most recent call last):
    cbam_jax.InputError: no boxes: set --config.data.crop_to_box=False
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        for argument, flag in _AS_FLAGS.items():
            message = message.replace(argument, flag)
        raise InputError(message) from error


def find_config(config: str) -> Path:
    """Return the file of a config: a path, or the name of one of those that the package has.

    ``configs/NAME.py`` means the package's too where there is no such file, so that a command
    written for a checkout works in any folder.

    Raises:
        InputError: there is no such file and no such name.

    >>> find_config("quickstart").name
    'quickstart.py'
    """
    path = expanded(config)
    if path.suffix == ".py" and path.is_file():
        return path
    own = CONFIGS / f"{path.stem}.py"
    if path.parts[:-1] in ((), ("configs",)) and path.suffix in ("", ".py") and own.is_file():
        return own
    raise InputError(f"--config={config}: no such file; give one, or one of {names()}")


def names() -> str:
    """Return the names of the package's configs, separated by commas."""
    return ", ".join(sorted(file.stem for file in CONFIGS.glob("[a-z]*.py")))


def read_config_file(config: str, overrides: Sequence[str]) -> Config:
    """Return a config file's fields, locked, with ``--config.FIELD=VALUE`` flags applied.

    Raises:
        InputError: for a missing file, an unknown field or argument, or a value of another type.
    """
    arguments = ["train", f"--config={find_config(config)}", *overrides]
    return _parsed(config_flags.DEFINE_config_file, arguments)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Return a copy of a config with ``--config.FIELD=VALUE`` flags applied; raises likewise.

    >>> from ml_collections import ConfigDict
    >>> config = ConfigDict({"eval": {"ks": (5, 10)}})
    >>> override(config, ["--config.eval.ks=(1,2)"]).eval.ks
    (1, 2)
    """
    arguments = ["evaluate", *overrides]
    return _parsed(config_flags.DEFINE_config_dict, arguments, config=copy.deepcopy(config))


def _parsed(define: Callable, arguments: list[str], **options: Any) -> Config:
    """The config that a flag holds once the arguments are read, locked."""
    values = flags.FlagValues()
    with _told_in_one_line():
        try:
            holder = define(
                "config", lock_config=True, flag_values=values, sys_argv=arguments, **options
            )
            rest = values(arguments)
        except (AttributeError, KeyError, TypeError):
            plain = [arguments[0], *(a for a in arguments if a.startswith("--config="))]
            if plain != arguments:
                _refuse_unknown(_parsed(define, plain, **options), arguments)
            raise
    if rest[1:]:
        raise InputError(f"unknown argument {rest[1]!r}: see --help")
    return holder.value


def _refuse_unknown(config: Config, arguments: Sequence[str]) -> None:
    """Raise InputError for the first argument whose field a config lacks, with the nearest ones."""
    fields = list(_fields(config))
    for argument in arguments:
        field = argument.partition("=")[0].partition("[")[0].removeprefix("--config.")
        if not argument.startswith("--config.") or field in fields:
            continue
        last = field.rpartition(".")[2]
        same = [known for known in fields if known.rpartition(".")[2] == last]
        near = dict.fromkeys([*same, *difflib.get_close_matches(field, fields, cutoff=0.8)])
        told = f"; near are {', '.join(near)}" if near else ""
        raise InputError(
            f"{shown(argument)}: there is no field {shown(field)}{told}; configs/default.py lists "
            "every field"
        )


def _fields(config: Config) -> Iterator[str]:
    """Names of all fields as flags have them: ``train.steps``; and of the sections."""
    for name, value in config.items():
        yield name
        if isinstance(value, ConfigDict):
            yield from (f"{name}.{field}" for field in _fields(value))


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"config: {error}; the package's own are imported as: from cbam_jax.configs import "
            "default"
        ) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections wraps a message in its repr, with escaped quotes and line breaks.
        message = " ".join(str(error).replace("\\n", " ").replace("\\", "").split())
        if message[0] == message[-1] == "'":
            message = message[1:-1]
        raise InputError(f"config: {message}; configs/default.py lists every field") from error
