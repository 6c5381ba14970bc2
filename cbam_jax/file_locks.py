"""A lock on an open file, which goes with the process, however that ends."""

from typing import IO


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
