import io
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cbam_jax import InputError, command_line, experiment
from cbam_jax.configs import default
from cbam_jax.datasets import open_dataset
from cbam_jax.paper import __main__ as paper_command


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error", [InputError("width=0: give at least 1"), FloatingPointError("loss nan at step 3")]
)
def test_a_mistake_is_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.delenv("CBAM_JAX_TRACEBACK", raising=False)
    assert command_line.run(raising(error)) == 2
    assert capsys.readouterr() == ("", f"error: {error}\n")
    monkeypatch.setenv("CBAM_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        command_line.run(raising(error))


def test_an_interrupted_command_says_so_without_a_traceback(capsys):
    assert command_line.run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted: nothing is left half written\n")


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"):
        command_line.run(raising(ValueError("a bug")))


def test_status_of_what_went_well():
    assert command_line.run(lambda: None) == 0
    assert command_line.run(lambda: 3) == 3


def test_names_that_the_terminal_cannot_show_end_no_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert command_line.run(lambda: print("连衣裙 \udce9t\xe9", flush=True)) == 0
    assert written.getvalue() == b"\\u8fde\\u8863\\u88d9 \\udce9t\\xe9\n"


def test_a_reader_that_leaves_is_no_error():
    """As ``cbam-jax --help | head -1`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "cbam_jax", "--help"], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_error_moves_no_cursor(capsys):
    def main():
        raise InputError("a\x1b[2J\u202e is no name\n  choose another")

    assert command_line.run(main) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2J\\u202e is no name\n  choose another\n"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    command_line.write_json(path, {"map@10": 0.5})
    with pytest.raises(TypeError):
        command_line.write_json(path, {"map@10": 0.75, "model": object()})
    assert json.loads(path.read_text()) == {"map@10": 0.5}


def test_the_cache_folder_is_the_variables_or_in_the_home(monkeypatch):
    monkeypatch.setenv("CBAM_JAX_CACHE", "/somewhere")
    assert command_line.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("CBAM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert command_line.cache_folder() == Path("/caches/cbam_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert command_line.cache_folder() == Path.home() / ".cache" / "cbam_jax"


def test_the_users_home_is_meant_wherever_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CBAM_JAX_CACHE", "~/cache")
    assert command_line.cache_folder() == tmp_path / "cache"
    command = paper_command._parser().parse_args
    for name in ("tables", "figures"):
        assert command([name, "--workdir=~/paper"]).workdir == tmp_path / "paper"


@pytest.fixture
def nowhere(monkeypatch):
    """A user id that the system does not know, as of docker run --user."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "CBAM_JAX_CACHE", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("nowhere")
def test_without_a_home_nothing_is_kept_and_what_needs_one_is_told(cache_dir, capsys, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    command_line.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err.startswith("compiled programs are not kept: this user has no")
    with pytest.raises(InputError, match="set CBAM_JAX_CACHE=DIR"):
        command_line.cache_folder()
    with pytest.raises(InputError, match="~/run: there is no such home folder"):
        command_line.path("~/run")
    with pytest.raises(InputError, match="--config.data.data_dir=DIR.*TFDS_DATA_DIR=DIR"):
        open_dataset("synthetic_garments/quickstart", "train")
    with pytest.raises(InputError, match="~/weights.pth: there is no such home folder"):
        experiment.with_whole_paths(with_weights("~/weights.pth"))
    assert not (tmp_path / "~").exists()


def with_weights(path):
    config = default.get_config()
    config.model.pretrained = path
    return config


@pytest.fixture
def cache_dir():
    """Undo what is set in JAX's config."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_unless_the_user_chose_a_folder(
    cache_dir, monkeypatch, tmp_path
):
    monkeypatch.setenv("CBAM_JAX_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "chosen")
    command_line.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "chosen"
    jax.config.update("jax_compilation_cache_dir", None)
    command_line.keep_compiled_programs()
    kept = Path(jax.config.jax_compilation_cache_dir)
    assert kept.parent == tmp_path / "compiled"
