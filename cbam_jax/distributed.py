"""A run of several processes: who they are, and how all of them end when one does.

``start`` joins the processes by ``jax.distributed``, from the flags or from what a cluster's
launcher put into the environment, and says what it found; ``leaving_together`` ends this process in
one line where another one is lost. What a run computes does not depend on their number.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cbam_jax import InputError, command_line

# Seconds to wait for all processes to come, and after which one that is silent counts as lost.
_ALL_COME, _LOST = 50, 30
# What says how many processes a launcher has started, where it is above 1, and whose it is.
_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPI",
    "SKYPILOT_NUM_NODES": "SkyPilot",
    "WORLD_SIZE": "torchrun",
}
# What says that this process is one of several, whatever its value.
_SIGNS = {
    "JOB_COMPLETION_INDEX": "Kubernetes",
    "JAX_COORDINATOR_ADDRESS": "the environment",
}
STATUS = 75  # As of a run that was stopped: the same command goes on.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run of several processes."""
    group = parser.add_argument_group("several processes, the same command for each")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one of several: SLURM, Open MPI, Cloud TPU and Kubernetes say which; else give",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    group.add_argument("--num_processes", type=int, metavar="N", help="of all hosts together")
    group.add_argument("--process_id", type=int, metavar="I", help="from 0 to N - 1")
    group.add_argument(
        "--local_device_ids", metavar="0,1", help="devices of this host that are this process's"
    )


def launcher(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return who started this process as one of several, and by which variable; None: nobody did.

    >>> launcher({"SLURM_STEP_NUM_TASKS": "4"})
    ('SLURM', 'SLURM_STEP_NUM_TASKS=4')
    >>> launcher({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}) is None
    True
    """
    for variable, name in _COUNTS.items():
        value = environment.get(variable, "")
        if value.isdigit() and int(value) > 1:
            return name, f"{variable}={value}"
    for variable, name in _SIGNS.items():
        if variable in environment:
            return name, f"{variable}={environment[variable]}"
    return None


def start(options: argparse.Namespace, workdir: Path) -> None:
    """Join the processes of a run, where the flags ask for it, and say what was found.

    Args:
        options: of ``add_flags``.
        workdir: of the run; what JAX's own service says goes to ``processes/`` in it.

    Raises:
        InputError: flags that do not fit each other; a process that was started as one of several
            and not told to be; not all processes came.
    """
    check_flags(options, os.environ)
    if not options.distributed:
        return
    options = with_open_mpi(options, os.environ)
    log = _keep_aside(workdir, options.process_id)
    local = options.local_device_ids
    # Where not all come, JAX ends the process rather than to raise.
    apart = _not_joined(options, f"what JAX said of it is in {log}")
    _tell_an_abort(f"error: {apart}", 2)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            None if local is None else [int(number) for number in local.split(",")],
            initialization_timeout=_ALL_COME,
            heartbeat_timeout_seconds=_LOST,
        )
    except (ValueError, RuntimeError) as error:
        _leave(InputError(_not_joined(options, str(error))))  # JAX would wait for the others.
    _tell_an_abort(f"{_lost()}; what JAX said of it is in {log}", STATUS)
    print(topology(), flush=True)


def check_flags(options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Raise InputError for flags that do not fit each other, or the environment."""
    names = ("coordinator", "num_processes", "process_id", "local_device_ids")
    given = [name for name in names if getattr(options, name) is not None]
    started = launcher(environment)
    if not options.distributed and given:
        raise InputError(f"--{given[0]} is of a run of several processes: add --distributed")
    if not options.distributed and started:
        name, variable = started
        raise InputError(
            f"{name} started this as one of several processes ({variable}): add --distributed; "
            f"for a run by itself, start it as env -u {variable.partition('=')[0]} cbam-jax train"
        )
    count, number = options.num_processes, options.process_id
    if count is not None and count < 1:
        raise InputError(f"--num_processes={count}: give at least 1")
    if number is not None and not 0 <= number < (count or number + 1):
        raise InputError(f"--process_id={number}: give one from 0 to {(count or 1) - 1}")
    address = options.coordinator
    if address is not None and not _is_address(address):
        raise InputError(f"--coordinator={address}: give HOST:PORT, such as 10.0.0.5:12345")
    local = options.local_device_ids
    if local is not None and not all(part.isdecimal() for part in local.split(",")):
        raise InputError(f"--local_device_ids={local}: give numbers, such as 0,1")


def with_open_mpi(
    options: argparse.Namespace, environment: Mapping[str, str]
) -> argparse.Namespace:
    """Return the flags, with what Open MPI 5 says in place of those that were not given.

    JAX knows Open MPI 4 by a variable that Open MPI 5 no longer sets. As under that, a process
    takes of its host's devices the one of its number on the host.

    Raises:
        InputError: ``--coordinator`` is missing, which Open MPI 5 does not say.
    """
    if "OMPI_MCA_orte_hnp_uri" in environment or "OMPI_COMM_WORLD_SIZE" not in environment:
        return options
    if options.coordinator is None and "JAX_COORDINATOR_ADDRESS" not in environment:
        raise InputError(
            "Open MPI 5 does not say where process 0 is: give --coordinator=HOST:PORT, such as "
            f"--coordinator={os.uname().nodename}:12345 where it is on this host"
        )
    size, rank, local = (
        environment[f"OMPI_COMM_WORLD_{n}"] for n in ("SIZE", "RANK", "LOCAL_RANK")
    )
    told = {"num_processes": int(size), "process_id": int(rank), "local_device_ids": local}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(options) | told | given)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def connect() -> None:
    """Let all devices of a run of several processes meet in a first, tiny sum.

    Those of CPUs wait 30 s for a connection and 30 min for a result. Were the first sum that of a
    step, a process that compiles it half a minute longer than another would be taken for lost.
    """
    if jax.process_count() == 1:
        return
    devices = Mesh(np.asarray(jax.devices()), ("data",))
    split = NamedSharding(devices, PartitionSpec("data"))
    one = np.ones(1, np.float32)
    ones = jax.make_array_from_callback((devices.size,), split, lambda _: one)
    jax.block_until_ready(jax.jit(jnp.sum)(ones))
    multihost_utils.sync_global_devices("connect")  # The processes beside, as checkpoints need it.


def topology() -> str:
    """Say which process this is, and which devices of how many are its own.

    >>> topology().partition(",")[0]
    'process 0 of 1'
    """
    mine = jax.local_devices()
    ids = ", ".join(str(device.id) for device in mine)
    return (
        f"process {jax.process_index()} of {jax.process_count()}, on {os.uname().nodename}: "
        f"{len(mine)} of {jax.device_count()} {mine[0].platform} devices ({ids})"
    )


def _not_joined(options: argparse.Namespace, error: str) -> str:
    """What to do where the processes did not come together."""
    flags = "--coordinator=HOST:PORT --num_processes=N --process_id=I"
    if "should be defined" in error or "must be defined" in error:
        return f"--distributed: no launcher that JAX knows started this process: give {flags}"
    told = " ".join(error.split())[:160]
    return (
        f"the processes did not come together within {_ALL_COME} s ({told}): start "
        f"{options.num_processes or 'all'} of them, each with its own --process_id and the same "
        "--coordinator, which must be reached from all hosts"
    )


def _lost() -> str:
    return (
        f"error: another of the {jax.process_count()} processes ended or cannot be reached: give "
        "all of them the same command again, which goes on from the last checkpoint"
    )


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Where one of several processes fails, end it at once: the others would be waited for.

    It is told as the commands tell it; a collective that broke, for another process was lost, is
    told in one line.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    def again() -> NoReturn:
        raise error

    status = 1
    try:
        if isinstance(error, jax.errors.JaxRuntimeError) and _is_of_another(str(error)):
            print(_lost(), file=sys.stderr)
            os.write(2, f"{error}\n".encode())  # Where JAX's own service says why.
            status = STATUS
        else:
            status = command_line.run(again)
    except BaseException:
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _is_of_another(error: str) -> bool:
    """Whether a collective failed for want of another process."""
    signs = ("gloo", "nccl", "unavailable", "connection", "peer", "aborted", "deadline_exceeded")
    return "RESOURCE_EXHAUSTED" not in error and any(sign in error.lower() for sign in signs)


def _keep_aside(workdir: Path, number: int | None) -> Path:
    """Send what libraries write to the standard error into a file; Python's own stays."""
    path = workdir / "processes" / f"{os.getpid() if number is None else number}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another"
        ) from error
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(file, 2)
    os.close(file)
    return path


_handlers: list[Any] = []  # Kept: C holds no reference to them.


def _tell_an_abort(line: str, status: int) -> None:
    """Print ``line`` where JAX's service ends this process, which it does by SIGABRT.

    It does so from inside of its own code, where no handler of Python's ``signal`` would run.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        print(line, file=sys.stderr, flush=True)
        os._exit(status)

    _handlers.append(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
