"""What reading a hostile input may cost: 2 s of one processor, and 200 MB beyond the start."""

import contextlib
import re
import time
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
SECONDS = 2
MEGABYTES = 200


def memory() -> tuple[float, float]:
    """Megabytes that this process has, and that it had at most since `forget_peak`."""
    status = STATUS.read_text()
    now, peak = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))
    return now / 1024, peak / 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):  # The peak of all before is then the least.
        Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(autouse=True)
def cheap():
    """Every test of a module that imports this fails where it costs more."""
    if not STATUS.exists():  # Linux's account of a process.
        yield
        return
    forget_peak()
    before, start = memory()[0], time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert memory()[1] - before < MEGABYTES
