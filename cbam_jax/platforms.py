"""What programs are traced for: layers take the form that suits a CPU, an accelerator or ONNX."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

# None: this process's own backend.
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Within it, layers that are traced take a platform's form: a program may be for elsewhere.

    >>> with compiled_for("cuda"):
    ...     on_cpu()
    False
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_cpu() -> bool:
    """Return whether XLA's CPU backend is what programs are compiled for."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def for_onnx() -> bool:
    """Return whether it is ONNX, whose runtimes lay maps out in their own way between convolutions.

    There a convolution of 1 x 1 stays one: a product would have the map laid out as ours is.
    """
    return _platform.get() == "onnx"
