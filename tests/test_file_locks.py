"""Locks on files, and what needs one where there are none."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from cbam_jax import InputError, workdirs
from cbam_jax.file_locks import open_lock, take_lock


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert take_lock(first)
        assert not take_lock(second)
        waiting = threading.Thread(target=take_lock, args=(second,), kwargs={"wait": True})
        waiting.start()
        assert waiting.is_alive()
        first.close()
        waiting.join(10)
        assert not waiting.is_alive()
        with open(tmp_path / "lock", "a") as third:
            assert not take_lock(third)


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "lock", "a") as file:
        assert take_lock(file)


def test_without_fcntl_as_on_windows_all_that_locks_can_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import cbam_jax.datasets.prepared, cbam_jax.paper.processes\n"
        "from cbam_jax.file_locks import take_lock\n"
        "print(take_lock(open(sys.argv[1], 'a')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to(p.parent / "other")])
def test_a_lock_is_neither_waited_for_nor_made_elsewhere(make, tmp_path):
    make(tmp_path / "lock")
    with pytest.raises(OSError, match="lock"):
        open_lock(tmp_path / "lock")
    with pytest.raises(InputError, match="cannot be written"), workdirs.locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
