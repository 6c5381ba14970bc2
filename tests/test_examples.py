"""Files to start from on a cluster: they are what their programs read, and call ours as it is."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cbam_jax.catalogue.shards.commands import _parser, wanted

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


def test_the_encoder_for_mteb_embeds_every_image_of_every_batch():
    spec = importlib.util.spec_from_file_location("mteb_images", FOLDER.parent / "mteb_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
