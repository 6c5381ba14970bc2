"""The tables' command: what it runs, what it keeps, and what it says.

In the default suite small scripts stand in for train.py and evaluate.py; their numbers follow from
row and seed. With ``-m processes`` the real ones are killed and started again.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cbam_jax import InputError, command_line, config_files, datasets
from cbam_jax.metrics import METRIC_DEFINITIONS
from cbam_jax.paper import TABLES, processes
from cbam_jax.paper import rows as running
from cbam_jax.paper.__main__ import main

DRIVER = Path(__file__).with_name("paper_driver.py")

# Writes its arguments down; ends as train.py does, or as the file named "fail" says.
TRAIN = """\
import json, os, pathlib, signal, sys
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
run = pathlib.Path(flags.pop("workdir"))
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(["train", run.name, flags]) + "\\n")
fields = {name.removeprefix("config."): value for name, value in flags.items()}
name, seed = fields["model.name"], int(fields["seed"])
fail = (here / "fail").read_text() if (here / "fail").exists() else ""
if fail.startswith(run.name + " early"):
    sys.exit("error: data.name is wrong: mend it")
run.mkdir(parents=True, exist_ok=True)
data = {"name": "x", "eval_split": "validation", "image_size": 32, "data_dir": None}
config = {
    "seed": seed, "data": data, "eval": {"batch_size": 4},
    "model": {"name": name, "embedding_dim": 8, "pooling": "average", "dtype": "float32"},
    "train": {"steps": int(fields.get("train.steps", 10))},
}
(run / "config.json").write_text(json.dumps(config))
finished = True
if fail.startswith(run.name):
    if fail.endswith("error"):
        print("error: loss nan at step 3", file=sys.stderr)
        sys.exit(2)
    if fail.endswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fail.endswith("parent"):  # As Ctrl-C or a scheduler would, while this is under way.
        def save(*_):
            (here / "saved").touch()
            print(json.dumps({"finished": False}), flush=True)
            os._exit(75)
        signal.signal(signal.SIGTERM, save)
        os.kill(os.getppid(), signal.SIGTERM)
        while True:
            signal.pause()
print("step 5")
print(json.dumps({"finished": finished}))
"""
EVALUATE = """\
import json, pathlib, sys
import numpy as np
flags = {}
for name, _, value in (argument[2:].partition("=") for argument in sys.argv[1:]):
    flags[name] = [*flags.get(name, []), value] if name == "query" else value
run, split = pathlib.Path(flags.pop("workdir")), flags["split"]
with open(pathlib.Path(__file__).parent / "calls.jsonl", "a") as file:
    file.write(json.dumps(["evaluate", run.name, flags]) + "\\n")
config = json.loads((run / "config.json").read_text())
seed, name = config["seed"], config["model"]["name"]
value = 0.5 + 0.01 * seed + 0.001 * len(name) + 0.0001 * config["train"]["steps"]
metrics = {f"{m}@{k}": value / k for m in ("map", "map_min", "precision") for k in (5, 10)}
report = {
    "split": split, "step": 10, "protocol": "leave one out", "num_gallery": 9, "ks": [5, 10],
    "metrics": metrics | {"num_queries": 9.0, "num_left_out": 0.0}, "definitions": DEFINITIONS,
}
folder = run / "eval" / (split + "-untrained" * (flags.get("checkpoint") == "untrained"))
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.json").write_text(json.dumps(report))
ids = np.array(["q0", "q1", "q2,", *(f"q{i}" for i in range(3, 9))])
np.savez(folder / "embeddings.npz", id=ids, label=np.array([0] * 7 + [1, 0]),
    is_query=np.arange(9) < 8, is_gallery=np.ones(9, bool))
# The first image found is a hit of seed 0, the second of seed 1; q7 has nothing to find.
lines = [f'"{q}",{rank},{str(i < 7 and rank == 1 + seed).lower()}'
    for i, q in enumerate(ids[:8]) for rank in (1, 2, 3)]
(folder / "neighbours.csv").write_text("\\n".join(["query,rank,same_category", *lines]))
if "figures" in flags:
    chosen = flags["query"]
    for picture in ("results", "worst"):
        (folder / f"{picture}.png").write_text(f"{picture} {run.name} {chosen}")
    n = len(chosen)
    np.savez(folder / "heat.npz", image=np.full((n, 8, 8, 3), 100, np.uint8),
        title=np.array(chosen), heat=np.full((n, 8, 8), len(name) / 20, np.float32))
print("measured")
print(json.dumps({"split": split}))
"""
# Stands in for ``-m cbam_jax``: runs the script beside it that its first argument names.
PROGRAM = """\
import pathlib, runpy, sys
script = pathlib.Path(__file__).with_name(sys.argv.pop(1) + ".py")
runpy.run_path(str(script), run_name="__main__")
"""
COST = {
    "parameters": 10, "flops": 20.0, "images_per_second": 30.0,
    "device": "abacus", "cores": 2, "jax": "1", "numpy": "2", "python": "3",
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of stand-ins; costs and the dataset need none here."""
    folder = tmp_path / "checkout"
    (folder / "configs").mkdir(parents=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "evaluate.py").write_text(
        EVALUATE.replace("DEFINITIONS", repr(dict(METRIC_DEFINITIONS)))
    )
    for row in [*TABLES[1], *TABLES[2], "photos"]:
        (folder / "configs" / f"{row}.py").write_text(
            "def get_config():\n"
            "    data, model = {'name': 'x', 'label': 'label'}, {'pretrained': 'imagenet'}\n"
            "    return {'data': data, 'model': model}\n"
        )
    (folder / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(processes, "PROGRAM", [str(folder / "program.py")])
    monkeypatch.setattr(config_files, "CONFIGS", folder / "configs")
    monkeypatch.setattr(datasets, "open_dataset", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        running,
        "measure_cost",
        lambda workdir, row, config: command_line.write_json(running.cost_path(workdir, row), COST),
    )
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; its exit status, stdout and stderr."""

    def run(*arguments, command="tables"):
        workdir = f"--workdir={tmp_path / 'work'}"
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = command_line.run(lambda: main([command, workdir, *arguments]))
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr()

    return run


def calls(checkout):
    """Which script ran on which run, in order; and forget them."""
    path = checkout / "calls.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def names(checkout):
    return [f"{script} {name}" for script, name, _ in calls(checkout)]


def test_every_row_is_trained_and_measured_once_a_seed(checkout, run, tmp_path):
    status, stdout, stderr = run("--seeds=2", "--data=photos.csv", "--config.train.steps=7")
    assert (status, stderr) == (0, "")
    rows = ["resnet50", "resnet50_se", "resnet50_cbam", "vgg16_cbam", "googlenet_cbam"]
    made = calls(checkout)
    assert [name for script, name, _ in made if script == "train"] == [
        f"{row}-seed{seed}" for seed in range(2) for row in rows
    ]
    assert [name for script, name, _ in made if script == "evaluate"] == [
        f"{row}-seed{seed}" for seed in range(2) for row in rows
    ]
    assert made[2][2] == {
        "config": str(checkout / "configs" / "resnet50_se.py"),
        "config.model.name": "resnet50_se",
        "config.seed": "0",
        "config.data.name": "photos.csv",
        "config.train.steps": "7",
    }
    work = tmp_path / "work"
    first, second = (json.loads((work / f"table{n}.json").read_text()) for n in (1, 2))
    assert [row["row"] for row in first["rows"]] == rows[:3]
    assert [row["row"] for row in second["rows"]] == [*rows[3:], "resnet50_cbam"]
    for table in (first, second):
        for row in table["rows"]:
            base = 0.5 + 0.001 * len(row["row"]) + 0.0007
            assert row["metrics"]["map@5"]["values"] == pytest.approx([base / 5, base / 5 + 0.002])
            assert row["parameters"] == 10
    # The same in every seed, so the paired interval has no width.
    found = first["rows"][1]["metrics"]["map@5"]["difference"]
    assert found["interval"] == pytest.approx((0.0006, 0.0006))
    assert "[10/10] GoogLeNet + CBAM, seed 1; about" in stdout
    assert "    step 5\n" in stdout
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["tables"][0]["seeds"] == [0, 1]
    assert summary["tables"][0]["file"] == str(work / "table1.json")
    assert "| ResNet50 + SE |" in (work / "table1.md").read_text()
    assert (work / "table2.csv").read_text().startswith("table,model,metric,mean")
    assert cv2.imread(str(work / "table1.png")) is not None
    assert first["command"].startswith("python -m cbam_jax.paper tables --workdir=")


@pytest.mark.slow
def test_rows_on_pretrained_weights_share_a_config_and_the_untrained_one_trains_nothing(
    checkout, run, tmp_path
):
    assert run("--table=3", "--seeds=1", "--data=photos.csv")[0] == 0
    made = calls(checkout)
    trained = {name: flags for script, name, flags in made if script == "train"}
    assert {(flags["config.model.name"], flags["config.model.attention_init"]) for flags in
            trained.values()} == {
        ("efficientnet_lite0", "identity"),
        *((f"efficientnet_lite0_{kind}", start) for kind in ("se", "cbam")
          for start in ("paper", "identity")),
    }  # fmt: skip
    assert {flags["config"] for flags in trained.values()} == {
        str(checkout / "configs" / "photos.py")
    }
    measured = [(name, flags.get("checkpoint")) for script, name, flags in made if script[0] == "e"]
    assert [name for name, _ in measured[:-1]] == list(trained)
    assert measured[-1] == ("efficientnet_lite0-seed0", "untrained")
    table = json.loads((tmp_path / "work" / "table3.json").read_text())
    assert table["rows"][-1]["config"].endswith("attention_init=identity, before its first step")
    assert "In %: one seed" in (tmp_path / "work" / "table3.md").read_text()
    assert "paper's mAP" not in (tmp_path / "work" / "table3.md").read_text()
    # By the stand-in's neighbours: of the first ten, the first alone is of the query's category.
    assert table["rows"][1]["over_queries"]["precision@10"]["interval"] == pytest.approx((0.1, 0.1))
    assert run("--table=3", "--seeds=1", "--data=photos.csv")[0] == 0
    assert calls(checkout) == []


@pytest.mark.slow
def test_finished_rows_are_kept_and_more_can_be_asked_for(checkout, run, tmp_path):
    assert run("--table=1", "--seeds=1")[0] == 0
    assert len(calls(checkout)) == 6
    table = tmp_path / "work" / "table1.md"
    before = table.read_bytes()
    status, stdout, _ = run("--table=1", "--seeds=1")
    assert status == 0
    assert calls(checkout) == []
    assert stdout.count("finished before") == 3
    assert table.read_bytes() == before
    assert run("--table=2", "--seeds=1")[0] == 0
    assert names(checkout) == [
        f"{script} {row}-seed0"
        for row in ("vgg16_cbam", "googlenet_cbam")
        for script in ("train", "evaluate")
    ]
    assert run("--table=1", "--seeds=2")[0] == 0
    assert {name.partition("-")[2] for name in names(checkout)} == {"seed1"}
    # Another split needs no training.
    assert run("--table=1", "--seeds=1", "--split=validation")[0] == 0
    assert json.loads(table.with_suffix(".json").read_text())["split"] == "validation"


@pytest.mark.slow
def test_one_config_can_stand_in_for_all_rows(checkout, run, tmp_path):
    base = checkout / "configs" / "mine.py"
    model = "'model': {'pretrained': None}"
    base.write_text(f"def get_config():\n    return {{'data': {{'name': 'x'}}, {model}}}\n")
    assert run("--table=1", "--seeds=1", f"--config={base}")[0] == 0
    trained = [flags for script, _, flags in calls(checkout) if script == "train"]
    assert [flags["config"] for flags in trained] == [str(base)] * 3
    assert [flags["config.model.name"] for flags in trained] == list(TABLES[1])
    [_, row, _] = json.loads((tmp_path / "work" / "table1.json").read_text())["rows"]
    assert row["config"] == f"{base} with model.name=resnet50_se"
    # From random weights, VGG16 has BatchNorm, and the table says so.
    assert run("--table=2", "--seeds=1", f"--config={base}")[0] == 0
    trained = [(name, flags) for script, name, flags in calls(checkout) if script == "train"]
    assert [(name, flags["config.model.name"]) for name, flags in trained] == [
        ("vgg16_cbam-seed0", "vgg16_bn_cbam"), ("googlenet_cbam-seed0", "googlenet_cbam")
    ]  # fmt: skip
    [row, *_] = json.loads((tmp_path / "work" / "table2.json").read_text())["rows"]
    assert row["config"] == f"{base} with model.name=vgg16_bn_cbam"
    assert row["title"] == "VGG16 with BatchNorm + CBAM"
    assert row["metrics"]["map@10"]["paper"] == 0.791
    assert run("--queries=q1", command="figures")[1].count("VGG16 with BatchNorm + CBAM") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "line"),
    [
        ("early error", "resnet50_se-seed0: data.name is wrong: mend it"),
        ("error", "resnet50_se-seed0: loss nan at step 3"),
        ("killed", r"resnet50_se-seed0 ended with signal SIGKILL: see \S+/logs/resnet50_se-seed0."),
    ],
)
def test_a_row_that_fails_is_told_and_resumed(checkout, run, fail, line):
    (checkout / "fail").write_text(f"resnet50_se-seed0 {fail}")
    status, _, stderr = run("--table=1", "--seeds=1")
    assert status == 2
    assert re.fullmatch(f"error: {line}.*\n", stderr)
    assert names(checkout)[-1] == "train resnet50_se-seed0"
    (checkout / "fail").unlink()
    assert run("--table=1", "--seeds=1")[0] == 0
    assert names(checkout)[0] == "train resnet50_se-seed0"


@pytest.mark.slow
def test_a_signal_is_handed_on_and_the_same_command_goes_on(checkout, run):
    (checkout / "fail").write_text("resnet50_cbam-seed0 parent")
    status, stdout, stderr = run("--table=1", "--seeds=1")
    assert status == 130
    assert "stopping: the step under way is saved first" in stdout
    assert (checkout / "saved").exists()
    assert stderr == "stopped: the same command goes on from here\n"
    calls(checkout)
    (checkout / "fail").unlink()
    assert run("--table=1", "--seeds=1")[0] == 0
    assert names(checkout) == ["train resnet50_cbam-seed0", "evaluate resnet50_cbam-seed0"]


@pytest.mark.slow
def test_other_settings_need_another_workdir(checkout, run, tmp_path):
    assert run("--table=1", "--seeds=1", "--config.train.steps=7")[0] == 0
    calls(checkout)
    for arguments, line in {
        ("--config.train.steps=8",): "holds rows with train.steps=7, not 8",
        (): r"holds rows with train.steps=7, not \(as in the config\)",
        ("--config.train.steps=7", "--data=a.csv"): r"data.name=\(as in the config\), not a.csv",
    }.items():
        status, _, stderr = run("--table=1", "--seeds=1", *arguments)
        assert status == 2
        assert re.search(f"^error: {tmp_path}/work .*{line}: use those settings, or a new", stderr)
    # Where the data are read from is no other setting.
    moved = "--config.data.manual_dir=/elsewhere"
    assert run("--table=1", "--seeds=1", "--config.train.steps=7", moved)[0] == 0
    assert calls(checkout) == []


@pytest.mark.slow
def test_settings_that_never_worked_bind_nobody(checkout, run):
    (checkout / "fail").write_text("resnet50-seed0 early error")
    assert run("--table=1", "--seeds=1", "--config.train.steps=-7")[0] == 2
    (checkout / "fail").unlink()
    assert run("--table=1", "--seeds=1", "--config.train.steps=7")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seeds=0"], "--seeds=0: give at least 1"),
        (["--config.seed=3"], "--config.seed=3: seed is set by --seeds"),
        (["--config.model.name=vgg16"], "model.name is set by the rows"),
        (["--config.data.name=a"], "data.name is set by --data"),
        (["--config.train.steps", "3"], "unknown argument '--config.train.steps': fields are set"),
        (["--sedes=3"], "unknown argument '--sedes=3'"),
        (["--config=none.py"], "--config=none.py: no such file"),
    ],
)
def test_mistakes_get_one_line_before_anything_runs(checkout, run, arguments, line):
    status, _, stderr = run("--table=1", *arguments)
    assert status == 2
    assert stderr.startswith("error: ")
    assert line in stderr
    assert stderr.count("\n") == 1
    assert calls(checkout) == []


def test_a_split_that_is_not_there_is_told_first(checkout, run, monkeypatch):
    def open_dataset(name, split, **options):
        assert (name, options["label"]) == ("photos.csv", "item_id")
        raise InputError(f"no split {split!r}")

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    arguments = ("--data=photos.csv", "--config.data.label=item_id", "--split=tset")
    assert run(*arguments)[::2] == (2, "error: no split 'tset'\n")
    assert calls(checkout) == []


# --- figures ---


@pytest.mark.slow
def test_figures_of_all_rows_show_the_same_queries(checkout, run, tmp_path):
    assert run("--table=1", "--seeds=2")[0] == 0
    calls(checkout)
    status, stdout, stderr = run("--seed=1", "--query=q3", "--queries=q1", command="figures")
    assert (status, stderr) == (0, "")
    made = calls(checkout)
    assert [name for _, name, _ in made] == [f"{row}-seed1" for row in TABLES[1]]
    assert [flags["query"] for _, _, flags in made] == [["q3", "q1"]] * len(made)
    # As in the paper.
    assert {flags["frames"] for _, _, flags in made} == {"red"}
    folder = tmp_path / "work" / "figures"
    shown = (folder / "figure4-resnet50_se.png").read_text()
    assert shown == "results resnet50_se-seed1 ['q3', 'q1']"
    assert (folder / "worst-resnet50.png").read_text().startswith("worst resnet50-seed1")
    assert cv2.imread(str(folder / "figure5.png")) is not None
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["queries"] == ["q3", "q1"]
    assert {Path(path).name for path in summary["figures"]} == {p.name for p in folder.iterdir()}


@pytest.mark.slow
def test_sampled_queries_are_spread_and_have_something_to_find(checkout, run):
    assert run("--table=1", "--seeds=1")[0] == 0
    _, stdout, _ = run(command="figures")
    # q7 is alone in its category, q8 no query.
    assert json.loads(stdout.splitlines()[-1])["queries"] == ["q0", "q1", "q2,", "q3", "q4", "q6"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seed=4"], "no finished row of seed 4, split test, in"),
        (["--quieres=a"], "unknown argument '--quieres=a'"),
    ],
)
def test_mistakes_to_figures(checkout, run, arguments, line):
    status, _, stderr = run(*arguments, command="figures")
    assert status == 2
    assert stderr.startswith(f"error: {line}")


# --- the real scripts, killed ---


@pytest.mark.processes
def test_tables_killed_at_random_moments_are_those_of_one_that_was_not(tmp_path):
    rng = np.random.default_rng(7)
    lines = ["path,label,split"]
    for i in range(60):
        split, label = ("train", "validation", "test")[i % 3], i // 3 % 4
        pixels = rng.integers(0, 200, (24, 24, 3), np.uint8)
        pixels[..., label % 3] //= 1 + label
        cv2.imwrite(str(tmp_path / f"{i}.png"), pixels)
        lines.append(f"{i}.png,class{label},{split}")
    (tmp_path / "photos.csv").write_text("\n".join(lines) + "\n")
    fields = {
        "data.image_size": 32, "data.classes_per_batch": 4, "data.images_per_class": 2,
        "model.embedding_dim": 8, "optimizer.warmup_steps": 1, "train.steps": 4,
        "train.log_every": 1, "train.eval_every": 2, "train.checkpoint_every": 1,
        "eval.batch_size": 8, "eval.ks": "(5,10)",
    }  # fmt: skip
    environment = {
        **os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def start(workdir):
        options = json.dumps({"rows": ["resnet18", "resnet18_cbam"]})
        command = [sys.executable, DRIVER, options, "tables", f"--workdir={workdir}"]
        command += ["--seeds=2", f"--data={tmp_path / 'photos.csv'}"]
        command += [f"--config={DRIVER.parent.parent / 'configs' / 'quickstart.py'}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(workdir):
        with start(workdir) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    output = finish(tmp_path / "whole")
    moments = random.Random(2022).sample(range(3, output.count("\n") - 30), 4)
    for moment in moments:
        with start(tmp_path / "killed") as process:
            for i, _ in enumerate(process.stdout):
                if i == moment:
                    # This process alone: what it has started ends by itself, and is waited for.
                    process.kill()
    finish(tmp_path / "killed")
    expected, actual = (
        json.loads((tmp_path / name / "table1.json").read_text()) for name in ("whole", "killed")
    )
    for table in (expected, actual):
        table.pop("command")
        for row in table["rows"]:
            row.pop("images_per_second")
    assert actual == expected
    assert len(expected["rows"][0]["metrics"]["map@10"]["values"]) == 2
