"""A run's log with lines that someone, or a disk, damaged."""

import json
import os
import re

import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.runlog import RunLog, read_log

RECORDS = [{"step": step, "loss": step / 8} for step in range(0, 12, 2)]
LINES = [json.dumps(record).encode() for record in RECORDS]

# What stands in the place of the second of six lines.
DAMAGED_LINES = {
    "a changed byte in a log": LINES[1].replace(b'"', b"\x81", 1),
    "a log's line cut off within": LINES[1][:7],
    "a log's line of zeros": bytes(30),
    "a log's line that is no UTF-8": b"\xff\xfe",
    "a log's line that is a list": b"[1, 2]",
    "a log's line that is a number": b"7",
    "a log's record without a step": b'{"loss": 0.5}',
    "a log's record whose step is text": b'{"step": "2", "loss": 0.5}',
    "a log's record whose step is true": b'{"step": true}',
    "a log's line nested 100,000 deep": b'{"step":' * 100_000,
    "a log's number of 5,000 digits": b'{"step": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("what", DAMAGED_LINES)
def test_a_damaged_line_costs_that_line_alone(what, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    content = b"\n".join([LINES[0], DAMAGED_LINES[what], *LINES[2:], b""])
    path.write_bytes(content)
    assert read_log(tmp_path) == [RECORDS[0], *RECORDS[2:]]
    assert path.read_bytes() == content  # Reading changes nothing.
    for _ in range(2):
        with RunLog(tmp_path, step=8, total=20):
            pass
        assert read_log(tmp_path) == [RECORDS[0], *RECORDS[2:5]]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == content
    assert len(list(tmp_path.glob("metrics.damaged*"))) == 1
    told = "1 damaged lines of .*metrics.jsonl are left out; kept in metrics.damaged-1.jsonl"
    assert re.fullmatch(told, capsys.readouterr().out.strip())


def test_a_second_damage_does_not_take_the_place_of_the_first(tmp_path):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_bytes(b"damage %d\n" % number + LINES[0] + b"\n")
        with RunLog(tmp_path, step=8, total=20):
            pass
    for number in (1, 2):
        kept = (tmp_path / f"metrics.damaged-{number}.jsonl").read_bytes()
        assert kept.startswith(b"damage %d\n" % number)


def test_a_flipped_bit_costs_two_records_at_most(tmp_path, rng):
    whole = b"\n".join([*LINES, b""])
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        (tmp_path / "metrics.jsonl").write_bytes(data)
        records = read_log(tmp_path)
        assert sum(record in RECORDS for record in records) >= len(RECORDS) - 2


def test_a_last_line_cut_off_is_no_damage(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(LINES)[:-3])
    with RunLog(tmp_path, step=8, total=20):
        pass
    assert read_log(tmp_path) == RECORDS[:5]
    assert not list(tmp_path.glob("metrics.damaged*"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_what_stands_in_the_place_of_a_log(make, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl is a"):
        read_log(tmp_path)
