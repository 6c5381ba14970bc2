"""A run used elsewhere: moved, only readable, on other data, with damaged or missing files."""

import builtins
import csv
import fcntl
import functools
import io
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from tiny_run import CLASSES, drawn_model, make_config, patch_tiny_models, write_photos, write_run

from cbam_jax import (
    InputError,
    command_line,
    config_files,
    experiment,
    model_state,
    runs,
    steps,
    training,
    workdirs,
)
from cbam_jax.datasets import open_dataset
from cbam_jax.pretrained import load_pretrained
from cbam_jax.trec import read_qrels, read_run

# ml_collections loads configs by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return write_photos(folder, splits=("train", "test"), count=6)


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    write_run(workdir, make_config(manifest))
    return workdir


@pytest.fixture(scope="module")
def measured(run):
    """The report of the test split, and its embeddings."""
    report = runs.evaluate(run)
    return report, np.load(run / "eval" / "test" / "embeddings.npz")


def evaluate(monkeypatch, capsys, *arguments):
    """Run the command; its exit status, its last line as JSON or None, and stderr."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = command_line.run(runs.main)
    stdout, stderr = capsys.readouterr()
    return status, json.loads(stdout.splitlines()[-1]) if status == 0 else None, stderr


@pytest.mark.slow
def test_a_run_that_may_only_be_read_is_measured_elsewhere(
    run, measured, tmp_path, monkeypatch, capsys
):
    def refuse(path):
        if str(path).startswith(str(run)):
            raise PermissionError(13, "Permission denied", str(path))

    def opened(file, mode="r", *args, open=builtins.open, **kwargs):
        if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
            refuse(file)
        return open(file, mode, *args, **kwargs)

    def made(path, *args, mkdir=os.mkdir, **kwargs):
        refuse(path)
        return mkdir(path, *args, **kwargs)

    before = sorted(str(path) for path in run.rglob("*"))
    monkeypatch.setattr(os, "mkdir", made)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    out = tmp_path / "results"
    flags = (f"--workdir={run}", f"--out={out}")
    status, line, stderr = evaluate(monkeypatch, capsys, *flags)
    assert status == 0, stderr
    assert line["metrics"] == measured[0]["metrics"]
    assert sorted(str(path) for path in run.rglob("*")) == before
    written = {"metrics.json", "embeddings.npz", "neighbours.csv"}
    assert {path.name for path in out.iterdir()} == written
    status, _, stderr = evaluate(monkeypatch, capsys, f"--workdir={run}", "--split=train")
    assert status == 2
    assert f"{run}/eval/train cannot be written" in stderr
    assert stderr.count("\n") == 1
    assert "--out=DIR" in stderr


@pytest.mark.slow
def test_other_data_go_to_a_folder_of_their_own(run, measured, tmp_path, monkeypatch, capsys):
    other = write_photos(tmp_path, splits=("test",), count=4, size=(33, 35))
    monkeypatch.chdir(tmp_path)
    flags = (f"--workdir={run}", "--data=photos.csv")
    status, line, stderr = evaluate(monkeypatch, capsys, *flags)
    assert status == 0, stderr
    assert line["dataset"] == "photos.csv"
    saved = np.load(run / "eval" / "photos-test" / "embeddings.npz")
    assert saved["id"].tolist() == open_dataset(str(other), "test").id.tolist()
    again = np.load(run / "eval" / "test" / "embeddings.npz")
    np.testing.assert_array_equal(again["embedding"], measured[1]["embedding"])


@pytest.mark.parametrize("folders", [False, True])
def test_all_splits_at_once(folders, run, manifest, measured, tmp_path, monkeypatch, capsys):
    data = manifest
    if folders:
        for file in manifest.parent.glob("*_*.*"):
            split, name, _ = file.name.split("_")
            (tmp_path / "photos" / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "photos" / split / name / file.name)
        data = f"{tmp_path}/photos/"
    flags = (f"--workdir={run}", f"--data={data}", "--split=all", f"--out={tmp_path / 'all'}")
    status, line, stderr = evaluate(monkeypatch, capsys, *flags)
    assert status == 0, stderr
    assert line["metrics"]["num_queries"] == 2 * 3 * 6
    saved = np.load(tmp_path / "all" / "embeddings.npz")
    where = {name.split("/")[-1]: row for row, name in enumerate(saved["id"])}
    rows = [where[name] for name in measured[1]["id"]]
    np.testing.assert_array_equal(saved["embedding"][rows], measured[1]["embedding"])
    names = [CLASSES[label] for label in saved["label"]]
    assert all(f"_{name}_" in file for name, file in zip(names, saved["id"], strict=True))


@pytest.mark.slow
def test_ks_and_batch_size_are_those_of_the_evaluation(
    run, measured, tmp_path, monkeypatch, capsys
):
    fields = ("--config.eval.ks=(1,3)", "--config.eval.batch_size=5")
    flags = (f"--workdir={run}", f"--out={tmp_path}", "--html", *fields)
    status, line, stderr = evaluate(monkeypatch, capsys, *flags)
    assert status == 0, stderr
    assert line["interval"]["metric"] == "map@3"
    assert {"map@1", "map@3"} <= line["metrics"].keys()
    assert "map@10" not in line["metrics"]
    assert line["metrics"]["mrr"] == pytest.approx(measured[0]["metrics"]["mrr"], abs=1e-6)
    saved = np.load(tmp_path / "embeddings.npz")
    np.testing.assert_allclose(saved["embedding"], measured[1]["embedding"], atol=2e-6, rtol=1e-5)
    assert {"report.html", "training.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_ranked_again_beside_the_plain_ranking(run, measured, tmp_path, monkeypatch, capsys):
    flags = (
        f"--workdir={run}",
        f"--out={tmp_path}",
        "--rerank=whiten:dim=5,k_reciprocal:k1=4:k2=2",
        "--trec",
    )
    status, line, stderr = evaluate(monkeypatch, capsys, *flags)
    assert status == 0, stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["metrics"] == pytest.approx(measured[0]["metrics"], abs=1e-6)
    assert report["rerank"] == line["rerank"]
    assert report["rerank"]["plain"]["map@10"] == pytest.approx(report["metrics"]["map@10"])
    rows = (tmp_path / "reranked.csv").read_text().splitlines()
    assert len(rows) == len((tmp_path / "neighbours.csv").read_text().splitlines())
    found, qrels = read_run(tmp_path / "run.txt"), read_qrels(tmp_path / "qrels.txt")
    with open(tmp_path / "neighbours.csv", encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            assert found[row["query"]][int(row["rank"]) - 1][0] == row["neighbour"]
            same = row["neighbour"] in qrels[row["query"]]
            assert same == (row["same_category"] == "true")
    assert {query: len(items) for query, items in qrels.items()} == dict.fromkeys(found, 5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_any_number_of_devices_will_do(devices, run, measured, monkeypatch, tmp_path):
    mesh = steps.data_mesh(jax.devices()[:devices])
    monkeypatch.setattr(steps, "data_mesh", lambda *_: mesh)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    report = runs.evaluate(run, out=tmp_path)
    saved = np.load(tmp_path / "embeddings.npz")
    np.testing.assert_allclose(saved["embedding"], measured[1]["embedding"], atol=2e-6, rtol=1e-5)
    for name, value in measured[0]["metrics"].items():
        assert report["metrics"][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.name=vgg16"], "--config.model.name=vgg16': an evaluation can set"),
        (["--config.eval.kz=(1,)"], "kz"),
        (["--rerank=qe"], "--rerank=qe: 'qe' is no step; give whiten, dba, aqe, k_reciprocal"),
        (["--config.eval.ks=()"], r"eval.ks=(): give positive ks, such as"),
        (["--config.eval.ks=(0,5)"], "eval.ks=(0, 5): give positive ks"),
        (["--config.eval.batch_size=0"], "eval.batch_size=0: give at least 1 image"),
        (["--config.eval.ks=(5,60)"], "18 queries among 17 gallery images cannot give ks=(5, 60)"),
        (["--data=absent.csv"], "absent.csv"),
        (["--split=trian"], "comes from"),
        (["--splits=train"], "--splits=train"),
    ],
)
def test_mistakes_get_one_line(flags, message, run, monkeypatch, capsys):
    monkeypatch.setattr(runs, "evaluate_split", None)  # The slow part.
    status, _, stderr = evaluate(monkeypatch, capsys, f"--workdir={run}", *flags)
    assert status == 2
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_moved_manifest_is_told_with_the_flag_that_gives_it(manifest, tmp_path):
    config = make_config("elsewhere/photos.csv")
    write_run(tmp_path / "run", config)
    message = "data.name comes from .*run/config.json; or give --data=PATH"
    with pytest.raises(InputError, match=message):
        runs.evaluate(tmp_path / "run", out=tmp_path / "out")


# --- config.json ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"image_size": 32', '"image_size": "32"'),
        lambda text: text.replace('"model": {', '"model": 3, "other": {'),
        lambda text: "{}",
    ],
)
def test_a_damaged_config_falls_back_to_the_checkpoints_copy(damage, run, tmp_path, capsys):
    expected = runs.read_config(run)
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("eval"))
    path = copy / "config.json"
    path.write_text(damage(path.read_text()))
    assert runs.read_config(copy) == expected
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count(f"{path} cannot be read")) == ("", 1)
    assert "attribute" not in stderr
    for item in (copy / "checkpoints").rglob("config"):
        shutil.rmtree(item)
    with pytest.raises(InputError, match="and no checkpoint has a copy: restore it") as caught:
        runs.read_config(copy)
    assert "\n" not in str(caught.value)


def test_a_field_that_an_older_run_lacks_is_the_defaults(run, tmp_path):
    document = json.loads((run / "config.json").read_text())
    del document["data"]["crop_fraction"], document["loss"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = runs.read_config(tmp_path)
    assert config.data.crop_fraction == 0.875
    assert config.loss.name == "triplet"
    assert config.data.image_size == 32


def test_paths_of_a_config_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fields = {"data.data_dir": "~/prepared", "model.pretrained": "weights.pth"}
    config = experiment.with_whole_paths(make_config("photos.csv", **fields))
    assert config.data.name == f"{tmp_path}/photos.csv"
    assert config.data.data_dir == f"{tmp_path}/home/prepared"
    assert config.model.pretrained == f"{tmp_path}/weights.pth"
    assert experiment.dataset_name(config) == "photos.csv"
    folder = experiment.with_whole_paths(make_config("./photos"))
    assert folder.data.name == f"{tmp_path}/photos"
    assert experiment.with_whole_paths(make_config("synthetic_garments")).data.name == (
        "synthetic_garments"
    )


# --- a workdir in use ---


def test_a_workdir_is_trained_in_by_one_at_a_time(manifest, tmp_path):
    workdir = tmp_path / "run"
    with workdirs.locked(workdir):
        config = make_config(manifest, **{"data.classes_per_batch": 2, "data.images_per_class": 4})
        with pytest.raises(InputError, match=f"--workdir={workdir} is in use by another training"):
            training.train_and_evaluate(config, str(workdir))
        assert [path.name for path in workdir.iterdir()] == ["lock"]
    with open(workdir / "lock") as file:  # Nobody has it now.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_workdir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/run cannot be written"), workdirs.locked(
        tmp_path / "file" / "run"
    ):  # fmt: skip
        pass


DATA = {
    "moved/photos": "moved/photos/",
    "moved/photos/": "moved/photos/",
    "./moved/photos": "./moved/photos",
    "moved/absent": "moved/absent",
    "moved": "moved",
    "synthetic_garments/clean": "synthetic_garments/clean",
}


@pytest.mark.parametrize("given", DATA)
def test_a_folder_that_is_there_is_taken_as_the_data(given, tmp_path, monkeypatch):
    for folder in ("moved/photos", "synthetic_garments/clean"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--workdir=run", f"--data={given}"])
    assert runs.parse_flags()[1] == [f"--config.data.name={DATA[given]}"]


# --- configs by name ---


@pytest.mark.parametrize(
    "config", ["quickstart", "quickstart.py", "configs/quickstart.py", "configs/quickstart"]
)
def test_a_config_is_found_by_name_in_any_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config_files.read_config_file(config, ["--config.seed=7"])
    assert (found.model.name, found.seed) == ("resnet10_cbam", 7)


def test_a_config_of_ones_own_stands_on_the_packages(tmp_path, monkeypatch):
    text = "from cbam_jax.configs import default\n\n\ndef get_config():\n"
    text += "    config = default.get_config()\n    config.seed = 5\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_files.read_config_file("~/mine.py", []).seed == 5
    (tmp_path / "old.py").write_text(text.replace("cbam_jax.configs", "no_such_configs"))
    with pytest.raises(InputError, match="No module named 'no_such_configs'; the package's own"):
        config_files.read_config_file(str(tmp_path / "old.py"), [])


def test_a_run_without_a_validation_gives_its_last_step(manifest, tmp_path, capsys):
    config = make_config(manifest)
    write_run(tmp_path / "run", config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3" / "metrics")
    _, _, step = runs.restore_model(config, tmp_path / "run", "best", steps.data_mesh())
    assert step == 3
    assert "no step was validated yet, so the last is taken" in capsys.readouterr().err


def test_a_run_that_ended_before_it_began_is_none(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"ended before it began: train first"):
        runs.read_config(tmp_path / "run")


def test_averaged_statistics_are_saved_gone_on_with_and_evaluated(tmp_path):
    options = {"train.ema_decay": 0.5, "train.ema_batch_stats": True}
    config, mesh = make_config("none", **options), steps.data_mesh()
    model, optimizer = (
        drawn_model(lambda: experiment.build_model(config)),
        steps.create_optimizer("sgd", 0.1),
    )
    state = training.first_state(config, model, optimizer, mesh)
    averages = [jax.tree.map(lambda a: a * 2, t) for t in (state.ema, state.ema_batch_stats)]
    state = state._replace(ema=averages[0], ema_batch_stats=averages[1])
    with runs.open_checkpoints(config, tmp_path) as checkpoints:
        training.save(config, checkpoints, training.Position(state, 4, []))
        checkpoints.wait()
        fresh = training.first_state(config, model, optimizer, mesh)
        again = training.restore(config, checkpoints, fresh, mesh).state
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(again, state)
    same(runs.restore_model(config, tmp_path, "last", mesh)[1], tuple(averages))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    load_pretrained(model, tmp_path)
    same(model_state.split(model)[1:3], tuple(averages))
