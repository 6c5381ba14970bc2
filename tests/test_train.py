"""The commands end to end on a few drawn photos: interrupted runs, mistakes, files, numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from tiny_run import patch_tiny_models

import evaluate
import train
from cbam_jax import command_line, config_checks, experiment
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.configs import default
from cbam_jax.runlog import read_log

# ml_collections loads configs by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        yield


REPOSITORY = Path(__file__).parent.parent
CLASSES = ("coat", "dress", "hat", "skirt")
SIZES = {"train": 5, "validation": 3, "test": 4}


def overrides(manifest):
    """The config of all runs here: a ResNet of four blocks on 8 images of 32 px, six steps."""
    fields = {
        "data.name": manifest,
        "data.image_size": 32,
        "data.classes_per_batch": 4,
        "data.images_per_class": 2,
        "model.name": "tiny",
        "model.embedding_dim": 16,
        "optimizer.warmup_steps": 2,
        "train.steps": 6,
        "train.log_every": 1,
        "train.eval_every": 3,
        "train.checkpoint_every": 3,
        "train.ema_decay": 0.5,
        "train.ema_batch_stats": True,
        "eval.batch_size": 8,
        "eval.ks": "(5,10)",
    }
    config = REPOSITORY / "configs" / "quickstart.py"
    return [f"--config={config}", *(f"--config.{name}={v}" for name, v in fields.items())]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A CSV of photos whose colour tells the class, more or less."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    lines = ["path,label,split"]
    for split, size in SIZES.items():
        for label, name in enumerate(CLASSES):
            for i in range(size):
                image = rng.integers(0, 200, (36, 40, 3), np.uint8)
                image[..., label % 3] //= 1 + label
                cv2.imwrite(str(folder / f"{split}_{name}_{i}.png"), image)
                lines.append(f"{split}_{name}_{i}.png,{name},{split}")
    path = folder / "photos.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start train.py in a process of its own with one device; compiled steps are shared."""
    cache = tmp_path_factory.mktemp("compiled")
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(options, *arguments):
        driver = Path(__file__).with_name("train_driver.py")
        command = [sys.executable, str(driver), json.dumps(options), *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    """Wait; return the exit status, stdout and stderr."""
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def uninterrupted(manifest, start, tmp_path_factory):
    """A finished run: its workdir, its stdout, and the rows of each of its batches."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    record = workdir.with_suffix(".jsonl")
    process = start({"record": str(record)}, *overrides(manifest), f"--workdir={workdir}")
    status, stdout, stderr = finish(process)
    assert status == 0, stderr
    return workdir, stdout, read_rows(record)


def read_rows(record):
    rows = {}
    for line in record.read_text().splitlines():
        batch = json.loads(line)
        assert rows.setdefault(batch["step"], batch["rows"]) == batch["rows"]
    return rows


def restore(workdir):
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        return checkpoints.restore("last")


def losses(workdir):
    """Losses by step, each of which must be there once."""
    records = [record for record in read_log(workdir) if "loss" in record]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)
    return found


def assert_same_arrays(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.mark.slow
def test_a_run_killed_and_stopped_ends_as_one_that_was_not(
    uninterrupted, manifest, start, tmp_path
):
    workdir, record = tmp_path / "run", tmp_path / "rows.jsonl"
    command = [*overrides(manifest), f"--workdir={workdir}"]

    # Killed after step 4, so that the last checkpoint is of step 3.
    status, stdout, stderr = finish(start({"record": str(record), "kill": 4}, *command))
    assert status == -signal.SIGKILL, stderr
    assert restore(workdir).step == 3
    assert max(losses(workdir)) > 1

    # Goes on from 3; SIGTERM during step 5 ends it with step 5 saved.
    status, stdout, stderr = finish(start({"record": str(record), "terminate": 5}, *command))
    assert status == 75, stderr
    assert "SIGTERM: waiting for the step under way, to save it" in stderr
    assert "stopped by SIGTERM; step 5 is saved: the same command resumes" in stdout
    summary = json.loads(stdout.splitlines()[-1])
    assert (summary["step"], summary["finished"]) == (5, False)
    assert restore(workdir).step == 5

    status, stdout, stderr = finish(start({"record": str(record)}, *command))
    assert status == 0, stderr
    expected_workdir, expected_stdout, expected_rows = uninterrupted
    actual, expected = restore(workdir), restore(expected_workdir)
    assert (actual.step, actual.data) == (6, {"seed": 0, "next_step": 6, "window": []})
    assert_same_arrays(actual.model, expected.model)
    assert_same_arrays(actual.optimizer, expected.optimizer)
    assert read_rows(record) == expected_rows
    assert losses(workdir) == losses(expected_workdir)
    assert list(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    evaluated = [r for r in read_log(workdir) if "validation/map@10" in r]
    assert evaluated == [r for r in read_log(expected_workdir) if "validation/map@10" in r]
    summary = json.loads(stdout.splitlines()[-1])
    expected = json.loads(expected_stdout.splitlines()[-1])
    ignored = {"workdir": None, "images_per_second": None}
    assert summary | ignored == expected | ignored


def test_the_last_line_is_json_with_the_documented_keys(uninterrupted):
    workdir, stdout, _ = uninterrupted
    names = ("map@5", "map@10", "precision@10")
    values = {
        record["step"]: {name: record[f"validation/{name}"] for name in names}
        for record in read_log(workdir)
        if "validation/map@10" in record
    }
    assert list(values) == [0, 3, 6]
    best = max((6, 3), key=lambda step: values[step]["map@10"])
    summary = json.loads(stdout.splitlines()[-1])
    assert summary.pop("images_per_second") > 0
    assert summary == {
        "workdir": str(workdir),
        "step": 6,
        "finished": True,
        "images_seen": 48,
        "split": "validation",
        "untrained": values[0],
        "best": values[best],
        "best_step": best,
    }


def test_the_workdir_holds_what_is_promised(uninterrupted):
    workdir, _, rows = uninterrupted
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["name"] == "tiny"
    assert config["eval"]["ks"] == [5, 10]
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    training = SIZES["train"] * len(CLASSES)
    assert all(0 <= row < training for batch in rows.values() for row in batch)
    names = ("loss", "gradient_norm", "learning_rate", "images_per_second", "data_wait_seconds")
    [first, *_] = [record for record in read_log(workdir) if "loss" in record]
    assert set(names) <= first.keys()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(manifest, start, tmp_path):
    workdir, record = tmp_path / "run", tmp_path / "rows.jsonl"
    options = {"record": str(record), "poison": 5}
    status, _, stderr = finish(start(options, *overrides(manifest), f"--workdir={workdir}"))
    assert status == 2
    [line] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "at step 5" in line
    assert f"rows of the batch {read_rows(record)[5]}" in line
    for part in ("gradient norm nan", "'distance_positive'", "lower the learning rate"):
        assert part in line
    kept = restore(workdir)
    assert kept.step == 3
    for name, array in (*kept.model.items(), *kept.optimizer.items()):
        assert np.all(np.isfinite(array)), name


# --- evaluate.py ---


def brute_force(embedding, label, ks):
    """map@K, map_all@K, precision@K and recall@K by sorting all distances, leave-one-out."""
    sums = {f"{name}@{k}": 0.0 for name in ("map", "map_all", "precision", "recall") for k in ks}
    embedding = embedding.astype(np.float64)
    for query in range(len(label)):
        distance = np.sqrt(np.sum((embedding - embedding[query]) ** 2, axis=1))
        ranked = [i for i in np.argsort(distance, kind="stable") if i != query]
        hits = [label[i] == label[query] for i in ranked]
        for k in ks:
            precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(k) if hits[i]]
            sums[f"map@{k}"] += sum(precisions) / max(len(precisions), 1)
            sums[f"map_all@{k}"] += sum(precisions) / sum(hits)
            sums[f"precision@{k}"] += sum(hits[:k]) / k
            sums[f"recall@{k}"] += any(hits[:k])
    return {name: value / len(label) for name, value in sums.items()}


def run_main(monkeypatch, capsys, main, *arguments):
    """Run a command in this process; return its exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
    try:
        status = command_line.run(main)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_evaluate_writes_files_that_agree_with_brute_force(uninterrupted, monkeypatch, capsys):
    workdir = uninterrupted[0]
    chosen = ["test_hat_1.png", "test_coat_0.png"]
    arguments = (f"--workdir={workdir}", "--html", *(f"--query={name}" for name in chosen))
    status, stdout, stderr = run_main(
        monkeypatch, capsys, evaluate.main, *arguments, "--checkpoint=6"
    )
    assert status == 0, stderr
    folder = workdir / "eval" / "test"
    saved = np.load(folder / "embeddings.npz")
    assert set(saved) == {"embedding", "label", "id", "is_query", "is_gallery"}
    total = SIZES["test"] * len(CLASSES)
    assert saved["embedding"].shape == (total, 16)
    assert saved["embedding"].dtype == np.float32
    names = [f"test_{name}_{i}.png" for name in CLASSES for i in range(SIZES["test"])]
    assert saved["id"].tolist() == names
    assert saved["label"].tolist() == np.repeat(np.arange(4), SIZES["test"]).tolist()
    assert saved["is_query"].all()
    assert saved["is_gallery"].all()

    report = json.loads((folder / "metrics.json").read_text())
    line = json.loads(stdout.splitlines()[-1])
    assert (line["split"], line["step"], line["workdir"]) == ("test", 6, str(workdir))
    assert line["metrics"] == report["metrics"]
    assert report["metrics"]["num_queries"] == total
    for name, value in brute_force(saved["embedding"], saved["label"], (5, 10)).items():
        assert report["metrics"][name] == pytest.approx(value, abs=1e-6), name
    for path in (folder / "results.png", folder / "worst.png", folder.parent / "training.png"):
        assert cv2.imread(str(path)) is not None
    with np.load(folder / "heat.npz") as heat:
        assert (heat["id"].tolist(), heat["title"].tolist()) == (chosen, ["hat", "coat"])
        assert heat["heat"].shape == heat["image"].shape[:3] == (2, 32, 32)
    page = (folder / "report.html").read_text()
    assert f"{report['metrics']['map_min@10']:.4f}" in page
    # Two chosen, eight best and eight worst queries, each with five found; the figures.
    assert page.count("<img ") == (2 + 2 * 8) * 6 + page.count('class="picture"')
    assert page.count('class="picture"') >= 2
    assert f"{total} queries" in stdout
    assert report["definitions"]["map@K"] in " ".join(stdout.split())


def with_boxes(manifest, workdir, copied):
    """A copy of a run, whose manifest has a box on each photo."""
    first, *rows = manifest.read_text().splitlines()
    lines = [first + ",x1,y1,x2,y2", *(f"{row},4,6,30,33" for row in rows)]
    boxes = manifest.with_name("boxes.csv")
    boxes.write_text("\n".join(lines) + "\n")
    shutil.copytree(workdir, copied)
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"name": str(boxes), "image_size": 40}
    (copied / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_evaluate_measures_and_draws_where_the_model_looks(
    uninterrupted, manifest, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    with_boxes(manifest, uninterrupted[0], workdir)
    arguments = (f"--workdir={workdir}", "--checkpoint=6", "--figures", "--focus")
    status, stdout, stderr = run_main(monkeypatch, capsys, evaluate.main, *arguments)
    assert status == 0, stderr
    folder = workdir / "eval" / "test"
    report = json.loads((folder / "focus.json").read_text())
    assert json.loads(stdout.splitlines()[-1])["focus"] == report
    assert report["num_images"] == SIZES["test"] * len(CLASSES)
    # Of 40 x 36 pixels, resized by 46 / 36: the box is 33 by 34, and 2 px off the cut on the left.
    assert report["area"] == pytest.approx(33 * 34 / 40**2, abs=0.03)
    for target in ("energy", "nearest"):
        assert 0 < report["targets"][target]["heat_inside"] < 1
    assert report["gates"] == {}
    assert f"{report['targets']['nearest']['heat_inside']:.4f}" in stdout
    for name in ("heat", "pairs"):
        assert cv2.imread(str(folder / f"{name}.png")) is not None
    assert not (folder / "gates.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["best", "untrained"])
def test_evaluate_agrees_with_what_training_recorded(uninterrupted, monkeypatch, capsys, which):
    workdir, stdout, _ = uninterrupted
    summary = json.loads(stdout.splitlines()[-1])
    arguments = (f"--workdir={workdir}", "--split=validation", f"--checkpoint={which}")
    status, stdout, stderr = run_main(monkeypatch, capsys, evaluate.main, *arguments)
    assert status == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["step"] == (summary["best_step"] if which == "best" else 0)
    # One device embedded it in training, eight do so here.
    for name, value in summary[which].items():
        assert line["metrics"][name] == pytest.approx(value, abs=1e-6)


# --- mistakes ---

# Arguments of train.py that are wrong, and what the line must name.
MISTAKES = {
    "unknown field": (
        "--config.data.batch_size=7",
        "there is no field data.batch_size; near are eval.batch_size",
    ),
    "unknown field and value": ("--config.train.stepz.x=5", "no field train.stepz.x; near are tr"),
    "no rate": ("--config.optimizer.learning_rate=nan", "learning_rate=nan: give a number above 0"),
    "wrong type": ("--config.train.steps=many", "many"),
    "not divisible": ("--config.data.images_per_class=3", "= 12 cannot be divided among 8"),
    "no batch": ("--config.eval.batch_size=0", "eval.batch_size=0: give at least 1 image"),
    "ks beyond the gallery": ("--config.eval.ks=(5,10,30)", "set '--config.eval.ks=(5,10)'"),
    "model": ("--config.model.name=resnet19", "unknown model 'resnet19'"),
    "mining": ("--config.loss.mining=hardest", "loss.mining='hardest': choose one of"),
    "loss": (
        "--config.loss.name=quadruplet",
        "loss.name='quadruplet': choose one of cross_entropy",
    ),
    "loss of directions": (
        "--config.loss.name=circle",
        "loss.name=circle compares directions, and retrieval distances: set --config.model.norm",
    ),
    "optimizer": ("--config.optimizer.name=lamb", "optimizer.name='lamb': choose one of"),
    "dtype": ("--config.model.dtype=int8", "model.dtype='int8': choose one of"),
    "margin": ("--config.loss.margin=-0.1", "loss.margin=-0.1"),
    "warm-up": ("--config.optimizer.warmup_steps=6", "set --config.optimizer.warmup_steps=0"),
    "no steps": ("--config.train.eval_every=0", "train.eval_every=0"),
    "chunk": (
        "--config.train.chunk_size=3",
        "train.chunk_size=3: give a divisor of the batch of 8",
    ),
    "chunk of devices": ("--config.train.chunk_size=4", "that is a multiple of 8 devices"),
    "memory": ("--config.loss.memory_size=-1", "loss.memory_size=-1: give 0, or at least"),
    "small memory": ("--config.loss.memory_size=7", "at least the 8 images of a batch"),
    "late memory": ("--config.loss.memory_size=8", "loss.memory_start_step=1000: give a step from"),
    "accumulated": ("--config.optimizer.accumulate_steps=0", "accumulate_steps=0: give at least 1"),
    "clipped to nothing": (
        "--config.optimizer.clip_norm=0.0",
        "clip_norm=0.0: give a norm above 0",
    ),
    "crop of nothing": (
        "--config.data.crop_fraction=0.0",
        "data.crop_fraction=0.0: give a fraction",
    ),
    "unknown home": (
        "--config.data.data_dir=~nobody-here/d",
        "no such home folder; give the whole",
    ),
    "no time": ("--stop_after=45", "--stop_after=45: give a time such as 45m, 2h or 1h30m"),
    "average": ("--config.train.ema_decay=1.0", "train.ema_decay=1.0"),
    "average of statistics": (
        "--config.train.ema_decay=0.0",
        "set --config.train.ema_decay=0.999 too",
    ),
    "unknown dataset": ("--config.data.name=no_such_garments", "no_such_garments"),
    "missing csv": ("--config.data.name=absent/photos.csv", "absent/photos.csv"),
    "missing manual_dir": ("--config.data.manual_dir=/no/such", "manual_dir /no/such"),
    "unknown split": ("--config.data.train_split=training", "split 'training'"),
    "too many classes": ("--config.data.classes_per_batch=16", "has 4 classes, fewer than"),
    "series": ("--config.eval.ignore_same_series=True", "eval.ignore_same_series=True"),
    "config": ("--config=configs/absent.py", "configs/absent.py: no such file"),
    "unknown argument": ("--configs.seed=3", "configs.seed"),
}


def assert_one_line(status, stderr, expected):
    assert status == 2
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert expected in lines[0]


@pytest.fixture
def nothing_slow(monkeypatch):
    """No parameter is drawn where a mistake can be seen before; shapes alone cost nothing."""

    build_model = experiment.build_model

    def drawn(config):
        assert isinstance(jnp.zeros(()), jax.core.Tracer), "the slow part began"
        return build_model(config)

    monkeypatch.setattr(experiment, "build_model", drawn)


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_line(mistake, manifest, tmp_path, monkeypatch, capsys):
    wrong, expected = MISTAKES[mistake]
    field = wrong.partition("=")[0] + "="  # A tuple that is given twice would be joined.
    right = [argument for argument in overrides(manifest) if not argument.startswith(field)]
    arguments = sorted([*right, wrong], key=lambda argument: not argument.startswith("--config="))
    arguments.append(f"--workdir={tmp_path}")
    status, _, stderr = run_main(monkeypatch, capsys, train.main, *arguments)
    assert_one_line(status, stderr, expected)


@pytest.mark.usefixtures("nothing_slow")
def test_label_with_one_image(manifest, tmp_path, monkeypatch, capsys):
    lonely = manifest.with_name("lonely.csv")
    rows = [r for r in manifest.read_text().splitlines() if "train_hat" not in r or "hat_0" in r]
    lonely.write_text("\n".join(rows) + "\n")
    arguments = [*overrides(lonely), f"--workdir={tmp_path}"]
    status, _, stderr = run_main(monkeypatch, capsys, train.main, *arguments)
    assert_one_line(status, stderr, "1 labels with one image, which no other image can match: hat")


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("content", [None, b"not an image"])
def test_image_that_cannot_be_read(content, manifest, tmp_path, monkeypatch, capsys):
    broken = manifest.with_name("broken.png")
    broken.unlink(missing_ok=True)
    if content is not None:
        broken.write_bytes(content)
    table = manifest.with_name("broken.csv")
    table.write_text(manifest.read_text() + "broken.png,hat,train\n")
    arguments = [*overrides(table), f"--workdir={tmp_path}"]
    status, _, stderr = run_main(monkeypatch, capsys, train.main, *arguments)
    assert_one_line(status, stderr, "broken.png")
    assert "1 of 49 images" in stderr
    assert stderr.endswith("or leave them out with --config.data.on_bad_image=skip\n")


def test_workdir_of_another_model(uninterrupted, manifest, monkeypatch, capsys):
    other = ["--config.model.embedding_dim=8", f"--workdir={uninterrupted[0]}"]
    status, _, stderr = run_main(monkeypatch, capsys, train.main, *overrides(manifest), *other)
    assert_one_line(status, stderr, "holds a run with model.embedding_dim=16, not 8")
    assert restore(uninterrupted[0]).step == 6


@pytest.mark.slow
def test_workdir_beyond_the_steps(uninterrupted, manifest, monkeypatch, capsys):
    fewer = ["--config.train.steps=4", f"--workdir={uninterrupted[0]}"]
    status, _, stderr = run_main(monkeypatch, capsys, train.main, *overrides(manifest), *fewer)
    assert_one_line(status, stderr, "step 6, beyond train.steps=4")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--split=tests"], "split 'tests'"),
        (["--checkpoint=4"], "no checkpoint 4 in"),
        (["--queries=a.png"], "--query=a.png is no query of"),
        (["--checkpoint=newest"], "--checkpoint=newest: give best, last, untrained or a step"),
        (["--workdir=/no/such/run"], "no run in /no/such/run"),
        (["--focus"], "has neither masks nor boxes to tell where the garment is"),
    ],
)
def test_mistake_to_evaluate_gets_one_line(arguments, expected, uninterrupted, monkeypatch, capsys):
    workdir = f"--workdir={uninterrupted[0]}"
    status, _, stderr = run_main(monkeypatch, capsys, evaluate.main, workdir, *arguments)
    assert_one_line(status, stderr, expected)


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_missing_workdir(script, manifest, monkeypatch, capsys):
    main = {"train": train.main, "evaluate": evaluate.main}[script]
    arguments = overrides(manifest) if script == "train" else []
    status, _, stderr = run_main(monkeypatch, capsys, main, *arguments)
    assert status == 2
    assert "error: the following arguments are required: --workdir" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_scripts_exit_with_the_status(tmp_path):
    command = [sys.executable, "evaluate.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert_one_line(done.returncode, done.stderr, f"no run in {tmp_path}")
    assert done.stdout == ""


# --- configs ---


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_every_config_passes_and_builds_its_model(path):
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(["train.py", f"--config={path}"])
    assert config.value.is_locked
    assert config.value.keys() == default.get_config().keys()
    config_checks.check_config(config.value)
