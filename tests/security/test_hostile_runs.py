"""The config of a run that someone damaged, or that comes from someone else."""

import json
import os
import sys

import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError, experiment, runs, saved_config, training, workdirs
from cbam_jax.command_line import write_text
from cbam_jax.configs import default

WHOLE = json.loads(json.dumps(default.get_config().to_dict()))


def changed(**fields):
    document = json.loads(json.dumps(WHOLE))
    for field, value in fields.items():
        *section, name = field.split("__")
        place = document[section[0]] if section else document
        place[name] = value
    return json.dumps(document).encode()


# What stands in a run's config.json, and a part of the line that refuses it.
CONFIGS = {
    "an empty config of a run": (b"", "Expecting value"),
    "half a config of a run": (changed()[:200], "Expecting|Unterminated"),
    "a run's config that is a list": (b"[]", "not the config of a run"),
    "a run's config of nothing": (b"{}", "not the config of a run"),
    "a run's config without data": (changed(data=None), "not the config of a run"),
    "a run's config nested 100,000 deep": (b'{"data":' * 100_000, "nested too deeply"),
    "a run's config of zeros": (bytes(500), "Expecting value"),
    "a run's config that is no UTF-8": (b'{"data": "\xff"}', "utf-8"),
    "a section that is text": (changed(model="resnet50"), "model is no object"),
    "a section that is a list": (changed(eval=[1]), "eval is no object"),
    "a seed that is text": (changed(seed="x"), "seed is 'x'"),
    "a size that is text": (changed(data__image_size="32"), "image_size is '32'"),
    "a size of 10**9": (changed(data__image_size=10**9), "image_size is 1000000000, not from"),
    "a size below one": (changed(data__image_size=0), "image_size is 0, not from"),
    "a million processes": (changed(data__workers=10**6), "workers is 1000000, not from"),
    "a batch of 10**12": (changed(eval__batch_size=10**12), "batch_size is 1000000000000"),
    "ks that are text": (changed(eval__ks=["a"]), "ks is"),
    "ks that are lists": (changed(eval__ks=[[1]]), "ks is"),
    "ks that are a number": (changed(eval__ks=5), "ks is 5"),
    "a path that is a number": (changed(data__data_dir=5), "data_dir is 5"),
    "a path that is a list": (changed(data__name=["a"]), "name is"),
    "a flag that is text": (changed(data__crop_to_box="yes"), "crop_to_box is 'yes'"),
    "a crop of text": (changed(data__crop_scale=["a", "b"]), "crop_scale is"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_runs_config_is_refused_in_one_line(what, tmp_path):
    content, message = CONFIGS[what]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"config.json cannot be read.*({message})") as caught:
        runs.read_config(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_what_stands_in_the_place_of_a_runs_config(make, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config.json cannot be read \(.* is a"):
        runs.read_config(tmp_path)


def test_a_whole_config_is_read_as_it_was(tmp_path):
    (tmp_path / "config.json").write_bytes(changed(eval__ks=[1, 10], data__data_dir="/d"))
    config = saved_config.read(tmp_path / "config.json")
    expected = default.get_config()
    expected.eval.ks, expected.data.data_dir = (1, 10), "/d"
    assert config == expected


def test_each_damaged_byte_of_a_config_ends_in_a_config_or_a_line(tmp_path, rng):
    whole = changed()
    for place in rng.integers(0, len(whole), 300):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        (tmp_path / "config.json").write_bytes(data)
        try:
            config = saved_config.read(tmp_path / "config.json")
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017, most of the damages end here
        else:
            assert config.keys() == default.get_config().keys()


def evaluation_config(tmp_path, *overrides, **fields):
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "config.json").write_bytes(changed(**fields))
    return runs.evaluation_config(tmp_path, overrides)


CODE = {
    "a dataset of a module": "evil_module.photos",
    "a dataset of Python's own module": "this.x",
    "a dataset of a module's config": "evil_module.photos/config",
    "a dataset of a namespace": "huggingface:evil/photos",
    "a dataset that is a program": "os; x",
    "a dataset that clears the screen": "a\x1b[2J.b",
}


@pytest.mark.parametrize("what", CODE)
def test_a_saved_config_imports_nothing(what, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with pytest.raises(InputError, match="which would import code.*--data=") as caught:
        evaluation_config(tmp_path, data__name=CODE[what])
    assert str(caught.value).isprintable()
    assert not {"evil_module", "this"} & (set(sys.modules) - before)


BUILDERS = {
    "model": experiment.build_model,
    "loss": experiment.build_loss,
    "optimizer": experiment.build_optimizer,
}
PARTS = {
    "a model of a module": ("model__name", "evil_module:build"),
    "a model of Python's own module": ("model__name", "antigravity:fly"),
    "a model that clears the screen": ("model__name", "a\x1b[2J:b"),
    "a loss of a module": ("loss__name", "evil_module:loss"),
    "an optimizer of a module": ("optimizer__name", "evil_module:adam"),
    "a schedule of a module": ("optimizer__schedule", "evil_module:rate"),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_saved_config_builds_nothing_of_a_module(what, tmp_path, monkeypatch):
    field, name = PARTS[what]
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = evaluation_config(tmp_path, **{field: name})
    with pytest.raises(InputError, match="import code: .*CBAM_JAX_TRUST=|no module") as caught:
        BUILDERS[field.partition("__")[0]](config)
    assert str(caught.value).isprintable()
    assert not {"evil_module", "antigravity"} & sys.modules.keys()


def test_who_gives_the_name_may_import(tmp_path):
    given = evaluation_config(tmp_path, "--config.data.name=mine.photos", data__name="evil.photos")
    assert given.data.name == "mine.photos"


PLACES = {
    "a folder in which a dataset would be prepared": ("synthetic_garments", "elsewhere"),
    "a folder whose features would be imported": ("photos", "elsewhere"),
    "somebody's home": ("synthetic_garments/clean", "~root/x"),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_saved_config_writes_nowhere_else(what, tmp_path):
    name, place = PLACES[what]
    place = str(tmp_path / place)
    with pytest.raises(InputError, match=r"keeps its datasets in .*--config.data.data_dir="):
        evaluation_config(tmp_path, data__name=name, data__data_dir=place)
    assert not os.path.exists(place)
    given = evaluation_config(
        tmp_path, f"--config.data.data_dir={place}", data__name=name, data__data_dir=place
    )
    assert given.data.data_dir == place


@pytest.mark.parametrize("name", ["synthetic_garments/clean", "photos.csv", "./photos/"])
def test_what_a_config_may_name(name, tmp_path):
    assert evaluation_config(tmp_path, data__name=name)


def test_a_dataset_that_lies_prepared_where_the_config_says_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_config, "is_prepared", lambda name, folder: folder == "/prepared")
    fields = {"data__name": "synthetic_garments/clean", "data__data_dir": "/prepared"}
    assert evaluation_config(tmp_path, **fields).data.data_dir == "/prepared"


@pytest.mark.parametrize("place", ["eval", "eval/test"])
def test_an_evaluation_writes_into_no_folder_elsewhere_by_a_link(place, tmp_path):
    run, home = tmp_path / "run", tmp_path / "home"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_bytes(changed(data__name="photos.csv"))
    home.mkdir()
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).symlink_to(home)
    with pytest.raises(InputError, match=r"eval/test leads to .*home.* outside the run.*--out=DIR"):
        runs.evaluate(run, "test")
    assert not [*home.iterdir()]


def test_what_is_written_whole_is_written_through_no_link(tmp_path):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    for name in ("metrics.json", "neighbours.csv"):
        (run / f"partial-{name}").symlink_to(mine)
        (run / name).symlink_to(mine)
    workdirs.make_writable(run)
    (run / "partial-metrics.json").symlink_to(tmp_path / "new")
    workdirs.make_writable(run)
    os.mkfifo(run / "partial-focus.json")
    for name in ("metrics.json", "neighbours.csv", "focus.json"):
        write_text(run / name, "theirs")
        assert (run / name).read_text() == "theirs"
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def resumed(tmp_path):
    """A run's folder with what training writes to, and another's home."""
    run, home = tmp_path / "run", tmp_path / "home"
    for folder in ("checkpoints/3/model", "tensorboard", "eval/test"):
        (run / folder).mkdir(parents=True)
    (run / "config.json").write_bytes(changed(data__name="photos.csv"))
    (run / "metrics.jsonl").write_text("{}\n")
    home.mkdir()
    (home / "mine").write_text("mine")
    return run, home


# A path of a run, and what of another's it is a link to.
LINKS = {
    "a log that is a link": ("metrics.jsonl", "mine"),
    "a log that is a link to nothing yet": ("metrics.jsonl", ".bashrc"),
    "a log of before that is a link": ("metrics.damaged-1.jsonl", "mine"),
    "a config that is a link": ("config.json", "mine"),
    "a lock that is a link": ("lock", "mine"),
    "checkpoints that are a link": ("checkpoints", "."),
    "a checkpoint that is a link": ("checkpoints/4", "."),
    "a checkpoint's file that is a link": ("checkpoints/3/model/d", "mine"),
    "a folder for metrics that is a link": ("checkpoints/partial-metrics", "."),
    "a board that is a link": ("tensorboard", "."),
    "a board's file that is a link": ("tensorboard/events.out.tfevents.1", ".profile"),
    "results that are a link": ("eval/test", "."),
    "half a file that is a link": ("partial-config.json", "mine"),
}


@pytest.mark.parametrize("what", LINKS)
def test_training_follows_no_link_of_a_run(what, tmp_path):
    place, target = LINKS[what]
    run, home = resumed(tmp_path)
    path = run / place
    path.is_dir() and path.rename(tmp_path / "aside")
    path.unlink(missing_ok=True)
    path.symlink_to(home / target)
    with pytest.raises(InputError, match=f"{place} is a link to .*home.* put what it leads to"):
        workdirs.check_links(run)


def test_training_looks_for_links_before_it_writes(tmp_path):
    run, home = resumed(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(home / "mine")
    before = sorted(run.iterdir())
    with pytest.raises(InputError, match="metrics.jsonl is a link to"):
        training.train_and_evaluate(default.get_config(), run)
    assert sorted(run.iterdir()) == before
    assert (home / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock"])
def test_training_appends_to_no_file_of_another_name(name, tmp_path):
    run, home = resumed(tmp_path)
    (run / name).unlink(missing_ok=True)
    (run / name).hardlink_to(home / "mine")
    with pytest.raises(InputError, match=f"{name} is a file of another name too"):
        workdirs.check_links(run)


def test_a_workdir_may_be_a_link_and_hold_what_is_not_trainings(tmp_path):
    run, home = resumed(tmp_path)
    (run / "photos").symlink_to(home)
    (tmp_path / "disk").symlink_to(tmp_path)
    (tmp_path / "mine").symlink_to(tmp_path / "disk" / "run")
    workdirs.check_links(tmp_path / "mine")
    workdirs.check_links(tmp_path / "disk" / "run")
    workdirs.check_links(tmp_path / "not there yet")
