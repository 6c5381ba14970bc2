import json
import logging
import os
import resource
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from cbam_jax import InputError, checkpoint
from cbam_jax.checkpoint import Checkpoints, flatten, unflatten


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", best_metric="map@10") as opened:
        yield opened


def trees(seed):
    rng = np.random.default_rng(seed)
    model = {"params": [rng.normal(size=(3, 5)).astype(np.float32), np.float32(rng.normal())]}
    optimizer = {"count": np.int32(seed), "trace": rng.normal(size=(3, 5)).astype(np.float32)}
    return model, optimizer


def save(checkpoints, step, value=None):
    model, optimizer = trees(step)
    checkpoints.save(
        step,
        model=model,
        optimizer=optimizer,
        data={"next_step": step},
        config={"seed": 3},
    )
    if value is not None:
        checkpoints.add_metrics(step, {"map@10": value, "mrr": 0.5})
    checkpoints.wait()


def assert_equal(tree, arrays):
    expected = flatten(tree)
    assert expected.keys() == dict(arrays).keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_round_trip_is_exact(checkpoints):
    save(checkpoints, 4)
    read = checkpoints.restore()
    model, optimizer = trees(4)
    assert_equal(model, read.model)
    assert_equal(optimizer, read.optimizer)
    assert (read.step, read.data, read.config) == (4, {"next_step": 4}, {"seed": 3})
    assert checkpoints.restore(optimizer=False).optimizer == {}


def test_keeps_the_newest_two_and_the_best_across_a_restart(tmp_path):
    values = {1: 0.2, 2: 0.9, 3: float("nan"), 4: None, 5: 0.3}
    for step, value in values.items():  # Opened anew for every step, as after interruptions.
        with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
            save(checkpoints, step, value)
    with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        assert_equal(trees(2)[0], checkpoints.restore("best").model)
        assert_equal(trees(4)[0], checkpoints.restore(4).model)


def array_files(directory, step):
    item = Path(directory, str(step), "model")
    return [path for path in item.rglob("*") if "/d/" in str(path) and path.is_file()]


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 16] = bytes(255 - byte for byte in content[middle : middle + 16])
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["missing", "truncated", "overwritten"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(checkpoints, capsys, kind):
    save(checkpoints, 1)
    save(checkpoints, 2)
    files = array_files(checkpoints.directory, 2)
    assert files
    for path in files:
        damage(path, kind)
    read = checkpoints.restore()
    assert read.step == 1
    assert_equal(trees(1)[0], read.model)
    assert "checkpoint 2 is damaged" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"checkpoint 2 is damaged.*choose another of 1, 2"):
        checkpoints.restore(2)


def test_checksums_find_changed_values(checkpoints, monkeypatch):
    save(checkpoints, 1)
    read = checkpoints._manager.restore

    def flipped(*args, **kwargs):
        items = dict(read(*args, **kwargs).items())
        if "optimizer" in items:
            items["optimizer"] = {**items["optimizer"], "count": np.int32(77)}
        return items

    monkeypatch.setattr(checkpoints._manager, "restore", flipped)
    with pytest.raises(InputError, match=r"every checkpoint .* is damaged \(steps 1\)"):
        checkpoints.restore()
    assert checkpoints.restore(optimizer=False).step == 1


def test_what_is_not_finite_is_not_saved(checkpoints):
    broken = {"params": np.array([1.0, np.nan])}
    with pytest.raises(FloatingPointError, match=r"params is not finite at step 3"):
        checkpoints.save(3, model=broken, optimizer={}, data={}, config={})
    assert checkpoints.steps() == []


def test_delete_after(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.delete_after(1)
    assert checkpoints.steps() == [1]


def test_errors_say_what_is_there(checkpoints):
    with pytest.raises(InputError, match="no checkpoint in .*train first"):
        checkpoints.restore()
    save(checkpoints, 1)
    with pytest.raises(InputError, match=r"no checkpoint 7 in .* it has steps 1"):
        checkpoints.restore(7)
    with pytest.raises(InputError, match=r"no checkpoint 'best' in .* it has steps 1"):
        checkpoints.restore("best")


def test_unflatten_is_strict():
    tree = {"a": np.zeros(2), "b": np.zeros((2, 3)), "c": np.zeros(1)}
    arrays = flatten({"a": np.ones(2), "b": np.ones((3, 2)), "d": np.ones(1)})
    with pytest.raises(InputError, match=r"1 missing \(c\), 1 unexpected \(d\), 1 of another"):
        unflatten(tree, arrays)
    restored = unflatten({"a": np.zeros(2)}, {"a": np.ones(2)})
    np.testing.assert_array_equal(restored["a"], np.ones(2))


def edited(checkpoints, item, edit):
    """The checkpoint of step 2 with a JSON document that is another one."""
    path = Path(checkpoints.directory, "2", item, "metadata")
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("item", "edit", "reason"),
    [
        ("data", lambda d: d.update(next_step=3), "the data's checksum differs"),
        ("data", lambda d: d.pop("next_step"), "the data's checksum differs"),
        ("config", lambda d: d.update(seed=4), "the config's checksum differs"),
        ("checksums", lambda d: d.pop("model"), "the model's checksums differ"),
        ("checksums", lambda d: d["model"].clear(), "the model's checksums differ"),
    ],
)
def test_a_document_that_was_changed_is_damage(checkpoints, capsys, item, edit, reason):
    save(checkpoints, 1)
    save(checkpoints, 2)
    edited(checkpoints, item, edit)
    assert checkpoints.restore().step == 1
    assert f"checkpoint 2 is damaged ({reason})" in capsys.readouterr().out


def test_a_checkpoint_of_another_step_is_damage(checkpoints, capsys):
    save(checkpoints, 1)
    save(checkpoints, 2)
    os.rename(Path(checkpoints.directory, "2"), Path(checkpoints.directory, "3"))
    with Checkpoints(checkpoints.directory, best_metric="map@10", read_only=True) as opened:
        assert opened.steps() == [1, 3]
        assert opened.restore().step == 1
    assert "checkpoint 3 is damaged (it goes on at another step)" in capsys.readouterr().out


def test_checkpoints_of_before_have_no_sums_of_documents(checkpoints):
    save(checkpoints, 2)
    edited(checkpoints, "checksums", lambda d: [d.pop("data"), d.pop("config")])
    edited(checkpoints, "config", lambda d: d.update(seed=4))
    assert checkpoints.restore().config == {"seed": 4}


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b'{"map@10": "x"}', b"[" * 100_000, None]
)
def test_damaged_metrics_do_not_keep_a_folder_from_being_opened(checkpoints, capsys, content):
    save(checkpoints, 1, 0.2)
    save(checkpoints, 2, 0.9)
    path = Path(checkpoints.directory, "2", "metrics", "metrics")
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    checkpoint._tell_once.cache_clear()
    with Checkpoints(checkpoints.directory, best_metric="map@10", read_only=True) as opened:
        assert opened.best_step() == 1
        if content is not None:
            assert opened.restore().step == 2
    assert "the metrics of checkpoint 2 are damaged" in capsys.readouterr().err


def test_lost_metrics_are_told(checkpoints, capsys):
    save(checkpoints, 1, 0.9)
    save(checkpoints, 2, 0.2)
    save(checkpoints, 3)
    Path(checkpoints.directory, "1", "metrics", "metrics").unlink()
    checkpoint._tell_once.cache_clear()
    with Checkpoints(checkpoints.directory, best_metric="map@10", read_only=True) as opened:
        assert opened.best_step() == 2
    told = "the metrics of checkpoint 1 are lost: it is not taken for the best by them\n"
    assert capsys.readouterr().err == told


def test_a_pipe_in_a_checkpoint_is_damage(checkpoints, capsys):
    save(checkpoints, 1)
    save(checkpoints, 2)
    path = array_files(checkpoints.directory, 2)[0]
    path.unlink()
    os.mkfifo(path)
    assert checkpoints.restore().step == 1
    assert "is not a regular file" in capsys.readouterr().out


def test_answers_that_come_after_orbax_gave_up_are_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    checkpoint._ignore_closed_loops.__wrapped__()
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "something else")
    )
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert shown == [other]


def test_what_a_killed_save_left_is_cleared(tmp_path):
    with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
        save(checkpoints, 1)
    left = tmp_path / "2.orbax-checkpoint-tmp"
    (left / "model").mkdir(parents=True)
    (left / "model" / "part").write_bytes(bytes(100))
    with Checkpoints(tmp_path, best_metric="map@10", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert left.exists()
    with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
        save(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]
    assert not left.exists()


def test_a_mean_over_nothing_is_no_damage(checkpoints, capsys):
    checkpoint._tell_once.cache_clear()
    save(checkpoints, 1, float("nan"))
    save(checkpoints, 2, 0.5)
    save(checkpoints, 3, float("nan"))
    with Checkpoints(checkpoints.directory, best_metric="map@10", read_only=True) as opened:
        assert opened.best_step() == 2
    assert capsys.readouterr().err == ""


def save_without_room(folder):
    """Save step 1, then a step whose files may not be as large as they are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).normal(size=(5, 30_000))
    model = {f"a{i}": array for i, array in enumerate(noise)}
    with Checkpoints(folder, best_metric="map@10") as checkpoints:
        save(checkpoints, 1, 0.5)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            checkpoints.save(2, model=model, optimizer={}, data={"next_step": 2}, config={})
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_without_room_is_one_line_and_keeps_what_is_saved(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.CRITICAL)  # As of commands.
    message = r"cannot be written \(.*\): make room there, .* same command again; saved: step 1$"
    with pytest.raises(InputError, match=message) as told:
        save_without_room(tmp_path)
    assert "\n" not in str(told.value)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path, best_metric="map@10") as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1], 1)
