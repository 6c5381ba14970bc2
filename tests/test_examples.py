"""Files to start from on a cluster: they are what their programs read, and call ours as it is."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from beside import beside
from PIL import Image
from tiny_run import write_photos

from cbam_jax import distributed
from cbam_jax.catalogue.shards.commands import _parser, wanted
from cbam_jax.metrics import count_relevant, label_matches, ndcg, retrieval_metrics

FOLDER = Path(__file__).parent.parent / "examples" / "cluster"


def test_the_slurm_script():
    path = FOLDER / "embed.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    (last,) = re.findall(r"#SBATCH --array=0-(\d+)", text)
    (command,) = re.findall(r"^cbam-jax embed (.*)", text, re.M)
    options = _parser().parse_args(shlex.split(command))
    assert options.shards == int(last) + 1
    # One of a few that are made anew is the same shard.
    again = {f"SLURM_ARRAY_TASK_{name}": n for name, n in zip(
        ("ID", "COUNT", "MIN", "MAX"), ("7", "2", "3", "7"), strict=True)}  # fmt: skip
    assert wanted(options.shards, options.shard, again) == (64, [7])


def test_the_job_of_kubernetes():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FOLDER / "embed-job.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    options = _parser().parse_args(container["args"])
    assert container["command"] == ["cbam-jax", "embed"]
    assert options.shards == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_values_of_milvus():
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((FOLDER / "milvus-values.yaml").read_text())
    memory = int(values["queryNode"]["resources"]["requests"]["memory"].removesuffix("Gi"))
    assert values["queryNode"]["replicas"] * memory * 2**30 >= 1.25 * 10_000_000 * 1280 * 4
    assert values["service"]["type"] == "ClusterIP"
    assert yaml.safe_load(values["extraConfigFiles"]["user.yaml"])["common"]["security"]


def mteb_images():
    return beside("../examples/mteb_images.py")


def test_the_encoder_for_mteb_embeds_every_image_of_every_batch():
    module = mteb_images()
    colours = np.random.default_rng(0).integers(0, 256, (5, 3), np.uint8)
    photos = [Image.new("RGB", (4 + i, 3), tuple(map(int, c))) for i, c in enumerate(colours)]
    photos[2] = photos[2].convert("RGBA")
    embedder = SimpleNamespace(
        embed_images=lambda images: np.stack([i[0, 0] for i in images]) + 0.5
    )
    batches = [{"image": photos[:2]}, {"image": photos[2:]}]
    found = module.Encoder(embedder).encode(batches, task_metadata=None, prompt_type="query")
    expected = colours + 0.5
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mteb_measures_what_we_do(rng, monkeypatch, capsys):
    mteb = pytest.importorskip("mteb", reason="MTEB is not installed: pip install mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    photos = {
        name: rng.integers(0, 256, (n, 2, 2, 3), np.uint8) for name, n in (("q", 9), ("d", 40))
    }
    labels = {name: rng.integers(0, 4, len(x)) for name, x in photos.items()}
    columns = {
        name: {
            "id": [f"{name}{i}" for i in range(len(x))],
            "image": [Image.fromarray(a) for a in x],
        }
        for name, x in photos.items()
    }

    class Drawn(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="DrawnI2IRetrieval",
            description="Drawn here.",
            dataset={"path": "none/none", "revision": "0" * 40},
            type="Any2AnyRetrieval",
            category="i2i",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            modalities=["image"],
        )

        def load_data(self, *_, **__):
            relevant = labels["q"][:, None] == labels["d"]
            split = {
                "queries": Dataset.from_dict(columns["q"]),
                "corpus": Dataset.from_dict(columns["d"]),
                "relevant_docs": {
                    f"q{i}": {f"d{j}": 1 for j in np.flatnonzero(row)}
                    for i, row in enumerate(relevant)
                },
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    embedder = SimpleNamespace(
        embed_images=lambda images: np.stack([i.ravel() for i in images]).astype(np.float32),
        fingerprint="f" * 64,
    )
    module, results = mteb_images(), []
    monkeypatch.setattr(module.cbam_jax, "load", lambda _: embedder, raising=False)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Drawn()])
    evaluate = mteb.evaluate
    monkeypatch.setattr(
        mteb, "evaluate", lambda *a, **k: results.append(evaluate(*a, **k, cache=None))
    )
    module.main("runs/mine", "DrawnI2IRetrieval")
    (scores,) = results[0].task_results[0].scores["test"]
    x, y = (embedder.embed_images(photos[name]).astype(float) for name in "qd")
    cosine = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    matches = label_matches(np.argsort(-cosine, axis=1), labels["q"], labels["d"])
    relevant = count_relevant(labels["q"], labels["d"])
    ours = retrieval_metrics(matches, relevant, ks=(1, 10))
    graded = (labels["q"][:, None] == labels["d"]).astype(float)
    ours["ndcg@10"] = np.nanmean(ndcg(matches.astype(float), graded, 10))
    for theirs, name in {
        "map_at_10": "map_all@10", "hit_rate_at_1": "recall@1", "hit_rate_at_10": "recall@10",
        "precision_at_10": "precision@10", "mrr_at_1000": "mrr", "ndcg_at_10": "ndcg@10",
    }.items():  # fmt: skip
        assert scores[theirs] == pytest.approx(ours[name], abs=1e-5), theirs


# --- training by several processes ---


def processes_of(arguments):
    """The flags of a run of several processes, checked; the rest is the config's."""
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    options, rest = parser.parse_known_args(arguments)
    distributed.check_flags(options, {})
    assert options.distributed
    return options, rest


def test_the_training_script_of_slurm():
    path = FOLDER / "train.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    (command,) = re.findall(r"^srun cbam-jax train (.*)", path.read_text(), re.M)
    options, rest = processes_of(shlex.split(command))
    assert (options.coordinator, rest) == (None, ["$@"])  # JAX asks SLURM.
    assert f'"$status" = {distributed.STATUS} ]' in path.read_text()


def test_the_script_of_open_mpi(tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    mpirun.chmod(0o755)
    words = subprocess.run(
        [FOLDER / "train-mpi.sh", "--config=clothing", "--workdir=/mnt/my runs"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    command = words.index("cbam-jax")
    assert words[:command] == ["--host", "node-a:8,node-b:8", "-x", "PATH"]
    assert words[command + 1] == "train"
    options, rest = processes_of(words[command + 2 :])
    assert options.coordinator == f"{os.uname().nodename}:12345"
    assert rest == ["--config=clothing", "--workdir=/mnt/my runs"]


def test_the_jobset_of_kubernetes():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((FOLDER / "train-jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    arguments = [text.replace("$(JOB_COMPLETION_INDEX)", "3") for text in container["args"]]
    options, rest = processes_of(arguments)
    assert options.num_processes == spec["completions"] == spec["parallelism"]
    host, _, port = options.coordinator.partition(":")
    assert host == "{0}-{1}-0-0.{0}".format(jobset["metadata"]["name"], job["name"])
    assert container["ports"] == [{"containerPort": int(port)}]
    assert {text.partition("=")[0] for text in rest} == {"--config", "--workdir"}


def test_the_task_of_skypilot():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((FOLDER / "train-sky.yaml").read_text())
    nodes = {"NODE_IPS": "10.0.0.5\n10.0.0.6", "NUM_NODES": "2", "NODE_RANK": "1"}
    environment = {f"SKYPILOT_{name}": value for name, value in nodes.items()}
    shown = task["run"].replace("cbam-jax train", "printf '%s\\n'")
    words = subprocess.run(
        ["bash", "-c", shown], env=os.environ | environment, capture_output=True, text=True
    ).stdout.splitlines()
    options, _ = processes_of(words)
    assert options.coordinator == "10.0.0.5:12345"
    assert (options.num_processes, options.process_id) == (task["num_nodes"], 1)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == distributed.STATUS


@pytest.mark.processes
def test_slurm_runs_its_training_script(tmp_path):
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM that answers sinfo")
    command = tmp_path / "cbam-jax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cbam_jax "$@"\n')
    command.chmod(0o755)
    fields = {
        "data.name": write_photos(tmp_path, splits=("train", "validation")),
        "data.image_size": 32, "data.classes_per_batch": 2, "data.images_per_class": 4,
        "model.name": "resnet10", "optimizer.warmup_steps": 1, "train.steps": 2,
        "train.eval_every": 2, "eval.batch_size": 8, "eval.ks": "(5,10)",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    here = ["--nodes=1", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1", "--wait"]
    script = [str(FOLDER / "train.sbatch"), "--config=quickstart", *flags]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER.parent.parent),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run(
        ["sbatch", *here, f"--output={tmp_path}/out", *script, f"--workdir={tmp_path}/run"],
        env=environment,
        check=True,
        timeout=900,
    )
    told = (tmp_path / "out").read_text()
    assert {"process 0 of 2", "process 1 of 2"} <= set(re.findall("process . of 2", told))
    (summary,) = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert summary["finished"]
