"""A list of photos embedded in parts, and the parts taken together."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from fakes import FakeEmbedder, lock, write_photos

import cbam_jax
from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue, commands, sources
from cbam_jax.catalogue.shards import commands as embedding
from cbam_jax.catalogue.shards import files, making

COLUMNS = "id, path, hash, size, modified, box, payload, look, problem, embedding"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twelve photos, two of them copies of a third, one broken, one not there."""
    paths = write_photos(tmp_path / "photos")
    paths[4].write_bytes(paths[0].read_bytes())
    paths[7].write_bytes(paths[0].read_bytes())
    paths[9].write_bytes(b"no photo")
    rows = ["path,price,x1,y1,x2,y2", *(f"{path},{i}.5,,,," for i, path in enumerate(paths))]
    rows[4] = f"{paths[3]},7,1,2,30,40"
    (tmp_path / "list.csv").write_text("\n".join([*rows, f"{tmp_path}/nowhere.jpg,1,,,,"]))
    monkeypatch.setattr(cbam_jax, "load", lambda *_, **__: FakeEmbedder())
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    return tmp_path / "list.csv"


def embed(photos, *flags):
    out = photos.parent / "out"
    return embedding.main([f"--data={photos}", f"--out={out}", "--model=fake", *flags])


def rows(path):
    with Catalogue.open(path, create=False) as shop:
        return shop.store.rows(f"SELECT {COLUMNS} FROM item ORDER BY id")


def test_parts_taken_together_are_what_adding_the_list_makes(photos, tmp_path, capsys):
    for shard in (3, 0, 4, 1, 2):
        assert embed(photos, "--shards=5", f"--shard={shard}") == 0
    assert commands.main(["add", f"{tmp_path}/parts.db", f"--from={tmp_path}/out"]) == 0
    with Catalogue.open(tmp_path / "whole.db", FakeEmbedder()) as whole:
        counts = whole.add(photos, progress=False).counts
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("new", "copies", "unreadable"))
    assert told == "9 new, 2 copies, 2 unreadable"
    assert capsys.readouterr().out.startswith(told)
    made, expected = rows(tmp_path / "parts.db"), rows(tmp_path / "whole.db")
    assert made == expected
    assert len(made) == 13
    assert json.loads(made[3][6]) == {"price": 7}
    assert made[3][5] == "1,2,30,40"


def test_photos_of_another_machine_that_are_copies_are_all_kept(photos, tmp_path):
    embed(photos)
    for path in (tmp_path / "photos").glob("*/*"):
        path.unlink()
    with Catalogue.open(tmp_path / "shop.db") as shop:
        assert shop.add_shards(tmp_path / "out", progress=False).counts["copies"] == 2
        assert len(shop) == 11
        before = shop.store.rows(f"SELECT {COLUMNS} FROM item")
        assert shop.add_shards(tmp_path / "out").counts["unchanged"] == 11
        assert shop.store.rows(f"SELECT {COLUMNS} FROM item") == before


def test_embeddings_are_an_array_in_the_order_of_the_list(photos, tmp_path):
    embed(photos, "--shards=3")
    parts = [np.load(tmp_path / "out" / f"0000{i}-of-00003.npy") for i in range(3)]
    assert [part.shape for part in parts] == [(4, 48), (4, 48), (5, 48)]
    listed = sources.listed([photos]).photos
    alone = FakeEmbedder().embed_files([listed[5].path]).embeddings[0]
    np.testing.assert_array_equal(np.concatenate(parts)[5], alone)
    bad = np.isnan(np.concatenate(parts)).all(axis=1)
    assert np.flatnonzero(bad).tolist() == [9, 12]


def test_a_folder_that_may_not_be_read_is_told_and_the_others_are_embedded(
    photos, tmp_path, capsys, monkeypatch
):
    lock(monkeypatch, tmp_path / "photos" / "hat")
    assert embed(tmp_path / "photos") == 1
    assert f"{tmp_path}/photos/hat may not be read (Permission denied)" in capsys.readouterr().err
    assert len(np.load(tmp_path / "out" / "00000-of-00001.npy")) == 6


def test_what_is_there_and_whole_is_not_made_again(photos, tmp_path, capsys, monkeypatch):
    embed(photos, "--shards=4")
    names = sorted(os.listdir(tmp_path / "out"))
    assert len(names) == 12
    (tmp_path / "out" / "00001-of-00004.json").unlink()
    damage(tmp_path / "out" / "00002-of-00004.npy", -1)
    damage(tmp_path / "out" / "00003-of-00004.jsonl", 5)
    capsys.readouterr()
    assert embedding.main([f"--out={tmp_path}/out", "--verify"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "shard 1 of 4: missing",
        "shard 2 of 4: 00002-of-00004.npy is not as it was written",
        "shard 3 of 4: 00003-of-00004.jsonl is not as it was written",
        "1 of 4 shards are whole, 3 photos",
        "to make anew, as SLURM takes it: --array=1-3",
    ]
    made = []
    monkeypatch.setattr(making, "write_shard", noted(making.write_shard, made))
    embed(photos, "--shards=4")
    assert made == [1, 2, 3]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert embedding.main([f"--out={tmp_path}/out", "--verify"]) == 0


def test_shards_that_are_missing_are_told_as_ranges(photos, tmp_path, capsys):
    for shard in (0, 1, 4):
        embed(photos, "--shards=12", f"--shard={shard}")
    capsys.readouterr()
    assert embedding.main([f"--out={tmp_path}/out", "--verify"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "shards 2-3,5-11 of 12: missing",
        "3 of 12 shards are whole, 3 photos",
        "to make anew, as SLURM takes it: --array=2-3,5-11",
    ]


def test_where_the_reasons_are_is_told(photos, tmp_path, capsys):
    embed(photos, "--shards=3")
    told = [line for line in capsys.readouterr().err.splitlines() if " embedded, " in line]
    assert "; " not in told[0]
    assert "3 of 5 photos embedded, " in told[2]
    command = told[2].partition("; which not, and why: ")[2]
    lines = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in lines.splitlines()]
    assert rows[0]["problem"].startswith("cannot be decoded")
    assert [rows[1][name] for name in ("path", "problem")] == [
        f"{tmp_path}/nowhere.jpg", "no such file",
    ]  # fmt: skip


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def noted(function, made):
    def call(folder, about, batches):
        made.append(about.shard)
        return function(folder, about, batches)

    return call


def test_an_ended_process_leaves_no_shard(photos, tmp_path, monkeypatch):
    def ended(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "embedded", ended)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, "--shards=2", "--shard=1")
    assert os.listdir(tmp_path / "out") == []


def test_shards_that_do_not_belong_together_are_refused(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    embed(photos, "--shards=2", "--shard=0")
    add = ["add", f"{tmp_path}/shop.db", f"--from={out}"]
    refused(rf"{out}: 1 of 2 shards cannot be taken \(shard 1: missing\)", commands.main, add)
    assert not (tmp_path / "shop.db").exists()
    monkeypatch.setattr(cbam_jax, "load", lambda *_, **__: FakeEmbedder("e" * 64))
    refused("has shard 0 of another model: give another --out", embed, photos, "--shards=2")
    embed(photos, "--shards=2", "--shard=1")
    refused("shard 1: of another list of photos or model than shard 0", commands.main, add)
    (out / "00000-of-00003.json").touch()
    refused(f"{out} has shards of 2 and of 3: remove those", commands.main, add)
    (out / "00000-of-00003.json").unlink()
    with open(photos, "a") as file:
        file.write(f"\n{tmp_path}/one-more.jpg,1,,,,")
    refused("has shard 0 of another list of photos", embed, photos, "--shards=2")


def test_shards_of_another_number_are_refused_at_once(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001-of-00003.json").touch()
    monkeypatch.setattr(cbam_jax, "load", None)  # It is not asked.
    remedy = rf"give another --out, or first `rm {out}/\*-of-00003\.\*`"
    refused(
        f"{out} has shards of 3, and these are of 4: {remedy}",
        embed, photos, "--shards=4", "--shard=1",
    )  # fmt: skip
    assert len(os.listdir(out)) == 1
    files.check_count(out, 3)


def test_a_catalogue_of_another_model_is_refused(photos, tmp_path):
    embed(photos)
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder("e" * 64)) as shop:
        shop.add(photos, progress=False)
    add = ["add", f"{tmp_path}/shop.db", f"--from={tmp_path}/out"]
    refused(r"embeddings of another model \(eeeeeeeeeeee", commands.main, add)


def refused(match, function, *arguments):
    with pytest.raises(InputError, match=match) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def test_more_shards_than_photos(photos, tmp_path):
    embed(photos, "--shards=20")
    with Catalogue.open(tmp_path / "shop.db") as shop:
        shop.add_shards(tmp_path / "out", progress=False)
        assert len(shop) == 11


ARRAY = {f"SLURM_ARRAY_TASK_{name}": text for name, text in
         {"ID": "3", "COUNT": "8", "MIN": "0", "MAX": "7"}.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("shards", "shard", "environment", "expected"),
    [
        (None, None, {}, (1, [0])),
        (3, None, {}, (3, [0, 1, 2])),
        (3, 2, ARRAY, (3, [2])),
        (None, None, ARRAY, (8, [3])),
        (16, None, ARRAY, (16, [3])),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_MIN": "1"}, "give --shards=N"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "give --shards=N"),
        (None, None, {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0 is one of how many"),
        (2, None, {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2: the shards of --shards="),
        (2, 2, {}, "--shard=2: the shards of --shards=2 are 0 to 1"),
        (2, -1, {}, "--shard=-1: the shards of"),
        (0, None, {}, "--shards=0: give at least 1"),
        (2, None, {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX=x is no number"),
    ],
)
def test_which_shards_a_process_makes(shards, shard, environment, expected):
    if isinstance(expected, tuple):
        assert embedding.wanted(shards, shard, environment) == expected
        return
    with pytest.raises(InputError, match=re.escape(expected)):
        embedding.wanted(shards, shard, environment)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_parts_have_each_photo_once(count, shards):
    parts = [making.part(count, shards, shard) for shard in range(shards)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_no_shard_is_told(tmp_path):
    refused("make them with `cbam-jax embed --data PHOTOS --out", files.shard_count, tmp_path)
    refused("nothing to embed: give --data", embedding.main, [f"--out={tmp_path}"])
    (tmp_path / "00000-of-00001.json").write_text('{"shard": 0}')
    assert files.findings(tmp_path, 1) == {0: "00000-of-00001.json is damaged"}
