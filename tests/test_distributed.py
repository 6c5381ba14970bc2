"""Flags and environments of several processes: what is refused, in one line, before anything else.

That the processes compute the same is in test_processes.py.
"""

import argparse

import jax
import pytest

from cbam_jax import InputError, distributed


def options(*flags):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(flags)


ADDRESS = "--coordinator=10.0.0.5:12345"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([ADDRESS], "--coordinator is of a run of several processes: add --distributed"),
        (["--process_id=1"], "--process_id is of a run of several processes"),
        (["--distributed", "--num_processes=0"], "--num_processes=0: give at least 1"),
        (
            ["--distributed", ADDRESS, "--num_processes=4", "--process_id=4"],
            "--process_id=4: give one from 0 to 3",
        ),
        (["--distributed", "--process_id=-1"], "--process_id=-1: give one from 0"),
        (["--distributed", "--coordinator=host"], "--coordinator=host: give HOST:PORT, such as"),
        (["--distributed", "--coordinator=:12345"], "--coordinator=:12345: give HOST:PORT"),
        (["--distributed", "--coordinator=host:123456"], "--coordinator=host:123456: give HOST"),
        (["--distributed", "--local_device_ids=0,²"], "--local_device_ids=0,²: give numbers"),
        (["--distributed", "--local_device_ids=0,a"], "--local_device_ids=0,a: give numbers"),
    ],
)
def test_flags_that_do_not_fit(flags, told):
    with pytest.raises(InputError) as caught:
        distributed.check_flags(options(*flags), {})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"PMI_SIZE": "2"}, "MPI"),
        ({"SKYPILOT_NUM_NODES": "2"}, "SkyPilot"),
        ({"WORLD_SIZE": "8"}, "torchrun"),
        ({"JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.5:1"}, "the environment"),
    ],
)
def test_a_process_that_is_one_of_several_has_to_be_told_so(environment, name):
    variable = next(iter(environment))
    with pytest.raises(InputError, match=f"^{name} started this as one of several") as caught:
        distributed.check_flags(options(), environment)
    assert f"({variable}={environment[variable]}): add --distributed" in str(caught.value)
    assert f"env -u {variable} " in str(caught.value)
    distributed.check_flags(options("--distributed"), environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "WORLD_SIZE": "1"},
        # Of an allocation, or of the script of a job: what runs there is one process.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_a_process_by_itself_is_left_alone(environment):
    distributed.check_flags(options(), environment)


OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def test_open_mpi_5_says_which_process_it_is():
    found = distributed.with_open_mpi(options("--distributed", ADDRESS), OPEN_MPI_5)
    assert (found.num_processes, found.process_id, found.local_device_ids) == (4, 3, "1")
    assert (found.coordinator, found.distributed) == ("10.0.0.5:12345", True)
    given = options("--distributed", ADDRESS, "--process_id=0", "--local_device_ids=0,1")
    found = distributed.with_open_mpi(given, OPEN_MPI_5)
    assert (found.num_processes, found.process_id, found.local_device_ids) == (4, 0, "0,1")


def test_open_mpi_5_does_not_say_where_process_0_is():
    with pytest.raises(InputError, match="Open MPI 5 .*: give --coordinator=HOST:PORT, such as --"):
        distributed.with_open_mpi(options("--distributed"), OPEN_MPI_5)


@pytest.mark.parametrize(
    "environment",
    [{}, {**OPEN_MPI_5, "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.5:34911"}],
)
def test_open_mpi_4_is_left_to_jax(environment):
    given = options("--distributed")
    assert distributed.with_open_mpi(given, environment) == given


def test_errors_of_collectives_are_those_of_another_process():
    lost = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1234"
    assert distributed._is_of_another(lost)
    assert not distributed._is_of_another("RESOURCE_EXHAUSTED: NCCL: out of memory")
    assert not distributed._is_of_another("INVALID_ARGUMENT: shapes differ")


def test_one_process_keeps_its_errors(monkeypatch):
    left = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    with pytest.raises(InputError), distributed.leaving_together():
        raise InputError("a photo")
    assert left == []


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("photos.csv: a.png"), 2, "error: photos.csv: a.png\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing is left half written\n"),
        (
            jax.errors.JaxRuntimeError("Gloo: connection closed by peer"),
            75,
            "error: another of the 2 processes ended or cannot be reached: give all of them the "
            "same command again, which goes on from the last checkpoint\n",
        ),
    ],
)
def test_one_of_several_ends_at_once_in_a_line(error, status, told, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with distributed.leaving_together():
        raise error
    assert left == [status]
    assert capsys.readouterr().err == told
