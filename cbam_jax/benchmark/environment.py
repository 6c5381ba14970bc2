"""What measured numbers depend on: the device, the versions, the memory that was held."""

import os
import platform
import resource

import jax
import numpy as np


def peak_memory() -> int:
    """The most memory the process has held, in bytes; on a GPU, the most of the first device.

    Example:
      >>> peak_memory() > 2**20
      True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(stats.get("peak_bytes_in_use", on_host))


def machine() -> dict[str, str | int]:
    """What the numbers depend on: device, cores, versions, how malloc was told to behave.

    Example:
      >>> sorted(machine())
      ['cores', 'device', 'devices', 'glibc_tunables', 'jax', 'numpy', 'python']
    """
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
