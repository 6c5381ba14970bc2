"""Parts of one's own by name, ``"package.module:factory"``: models, attention blocks and others.

Importing a module runs it, and a name may come from a stranger's config. So a name is imported only
once it is trusted: a training trusts those in its own config, `trust` does in a program, and for
any command ``CBAM_JAX_TRUST``, names with commas between them, does.
"""

import functools
import importlib
import inspect
import os
import traceback
from typing import Any

from cbam_jax import InputError
from cbam_jax.foreign_files import shown

_trusted: set[str] = set()


def is_named(name: str) -> bool:
    """Whether a name is that of a part of one's own.

    >>> is_named("mine.parts:backbone"), is_named("resnet50")
    (True, False)
    """
    return ":" in name


def trust(*names: str) -> None:
    """Let names of the form ``"package.module:factory"`` be imported, in this process."""
    _trusted.update(name for name in names if is_named(name))


def load(name: str, field: str) -> Any:
    """Import a trusted part.

    Args:
        name: ``"package.module:factory"``.
        field: what names it, for messages, such as ``"model.name"``.

    Raises:
        InputError: the name is not trusted, there is no such module or function, or importing the
            module failed.

    >>> trust("math:sqrt")
    >>> load("math:sqrt", "model.name")(4)
    2.0
    """
    module, _, attribute = name.partition(":")
    if not is_named(name) or not all(part.isidentifier() for part in module.split(".")):
        raise InputError(
            f"{field}={shown(repr(name), 80)} names no module; expected package.module:function"
        )
    if name not in _trusted | set(os.environ.get("CBAM_JAX_TRUST", "").split(",")):
        raise InputError(
            f"{field}={shown(repr(name), 80)} would import code: if you trust it, put "
            f"CBAM_JAX_TRUST={shown(name, 80)} before the command, or call "
            f"cbam_jax.named_parts.trust({shown(repr(name), 80)})"
        )
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{field}={name!r}: {error}; put PYTHONPATH=FOLDER, where it lies, before the command"
        ) from error
    except Exception as error:  # Whatever the module does wrong as it is imported.
        raise InputError(
            f"{field}={name!r}: importing {module} failed{_where(error)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    part = getattr(found, attribute, None)
    if not callable(part):
        raise InputError(f"{field}={name!r}: {module} has no function {attribute!r}")
    return part


def call(name: str, field: str, *arguments: Any, **options: Any) -> Any:
    """Load a trusted part and call it.

    Raises:
        InputError: as `load` does, or the part does not take these arguments.

    >>> trust("math:sqrt")
    >>> call("math:sqrt", "model.name", 4)
    2.0
    """
    part = load(name, field)
    try:
        _signature(part).bind(*arguments, **options)
    except TypeError as error:
        taken = ", ".join(["..."] * len(arguments) + [f"{option}=..." for option in options])
        raise InputError(
            f"{field}={name!r}: {error}; it is called as {name.partition(':')[2]}({taken})"
        ) from None
    return part(*arguments, **options)


def first_line(error: Exception) -> str:
    """What a part of one's own raised, in one line for a message.

    >>> first_line(ValueError("no such shape\\nhere is why"))
    'no such shape'
    """
    return shown(next(iter(str(error).splitlines()), ""))


def _where(error: Exception) -> str:
    """The line that failed; a SyntaxError's own message has it."""
    if isinstance(error, SyntaxError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" in {last.filename}, line {last.lineno}"


def _signature(part: Any) -> inspect.Signature:
    # Of a module of Flax, whose metaclass takes anything, it is that of __init__.
    is_class = inspect.isclass(part) and inspect.isfunction(part.__init__)
    return inspect.signature(functools.partial(part.__init__, None) if is_class else part)
