import io
import json
import os
import socket
from pathlib import Path

import pytest

from cbam_jax import InputError, foreign_files
from cbam_jax.foreign_files import expanded, open_regular, read_file, read_json, read_text, shown


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A socket's path may have 100 bytes.
    os.mkfifo("pipe")
    for path, kind in (("pipe", "a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(InputError, match=f"is {kind}, not a"):
            read_file(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OSError, match="No such device"):
            read_file("socket")
    os.symlink("/dev/zero", "link")
    with pytest.raises(InputError, match="link is a device"):
        read_json("link")
    with pytest.raises(InputError, match=r"a\\x00b is no path"):
        read_file("a\0b")
    with pytest.raises(FileNotFoundError):
        read_file("absent")


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match="sparse has 1099511627776 bytes, more than the 1000"):
        read_file(path, 1000)
    os.truncate(path, 1000)
    assert read_file(path, 1000) == bytes(1000)


def test_a_file_that_grows_while_it_is_read_ends_at_its_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    with open_regular(path, 5) as file:
        with open(path, "ab") as other:
            other.write(b"678")
        assert file.read(5) == b"12345"


def test_text_is_read_as_open_reads_it(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\xc3\xa4\n")
    assert read_text(path) == path.read_text(encoding="utf-8-sig") == "a\nb\ncä\n"
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)


@pytest.mark.parametrize("text", ["[" * 99 + "]" * 99, '{"a": [1, {"b": null}]}', "3"])
def test_json_that_is_read(text, tmp_path):
    (tmp_path / "x").write_text(text)
    assert read_json(tmp_path / "x") == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 101 + "]" * 101, "[" * 100_000, '{"a":' * 100_000, "9" * 5_000]
)
def test_json_that_is_refused(text, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="Expecting|nested too deeply|digits"):
        read_json(tmp_path / "x")


def test_what_is_shown_moves_no_cursor():
    assert shown("Kleid (blau), 连衣裙") == "Kleid (blau), 连衣裙"
    assert shown("a\x1b]0;x\x07\r\n\u202eb\udcff") == r"a\x1b]0;x\x07\r\n\u202eb\udcff"
    assert shown("y" * 10_000).isprintable()
    assert len(shown("\0" * 10_000)) <= 300


def test_a_tilde_is_a_home_folder_or_the_beginning_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert expanded("~/a.jpg") == expanded(Path("~/a.jpg")) == tmp_path / "me" / "a.jpg"
    assert expanded("photos/~a.jpg") == Path("photos/~a.jpg")
    with pytest.raises(InputError, match="~a.jpg: there is no such home folder; give the whole"):
        expanded("~a.jpg")
    Path("~a.jpg").touch()
    assert expanded("~a.jpg") == Path("~a.jpg")


def test_a_file_that_would_be_waited_for_is_told(tmp_path, monkeypatch):
    class Log(io.BytesIO):
        def read(self, size=-1):
            return None

    monkeypatch.setattr(foreign_files, "open_regular", lambda path, most: Log())
    with pytest.raises(InputError, match="kmsg is a file that would be waited for"):
        foreign_files.read_file("/proc/kmsg")
