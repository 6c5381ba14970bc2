"""A lock on an open file, which goes with the process, however that ends."""

import os
from typing import IO


def open_lock(path: str | os.PathLike) -> IO:
    """Open a file to be locked, made where there is none.

    Raises:
        OSError: it cannot be made; or a pipe, which would be waited for, or a link, which may lead
            anywhere, stands in its place.

    Example:
        >>> import tempfile
        >>> with open_lock(os.path.join(tempfile.mkdtemp(), "lock")) as file:
        ...     take_lock(file)
        True
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "a")


def take_lock(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file unless another process has; whether it is locked now.

    True too where no lock is to be had: on Windows, and on file systems without locks, as some
    clusters have. Closing the file releases it.

    Args:
        file: open for writing, and kept open as long as the lock is to be held.
        wait: until the other process releases it.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as first, open(first.name, "a") as second:
        ...     take_lock(first), take_lock(second)
        (True, False)
    """
    try:
        import fcntl  # Not on Windows.

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True
