"""The peer of the benchmarks is the same model and step; skipped where torch is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from seeded import seeded_model, torch_names

from benchmarks.torchvision_stubs import import_torchvision
from cbam_jax import benchmark, steps
from cbam_jax.losses import triplet_loss
from cbam_jax.pretrained import load_pretrained

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def torch_peer():
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from benchmarks import torch_peer

    yield torch_peer
    torch.set_flush_denormal(False)


def smooth(arrays):
    """BatchNorm's biases up by two deviations: most ReLUs are away from their kinks.

    At them float32's rounding becomes an error of 1 % of the gradient.
    """
    return {n: a + 2.0 * n.endswith(".bias") for n, a in arrays.items()}


def test_our_weights_in_the_peer_give_our_embeddings_and_step(torch_peer):
    model = seeded_model("resnet18_cbam")
    arrays = smooth(torch_names(model))
    load_pretrained(model, arrays)
    theirs = torch_peer.Embedder("resnet18_cbam")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)

    batch = benchmark.random_batch(16, image_size=64, images_per_class=4)
    mesh = steps.data_mesh(jax.devices()[:1])
    optimizer = steps.create_optimizer("adamw", 1e-3, weight_decay=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        state = steps.create_train_state(model, optimizer, mesh)
        (sharded,) = steps.to_devices([batch], mesh)
        embed_step = steps.make_embed_step(model, mesh)
        ours = embed_step(state.params, state.batch_stats, {"image": sharded["image"]})
        train_step = steps.make_train_step(model, optimizer, triplet_loss)
        state, scalars = train_step(state, sharded)
        after = embed_step(state.params, state.batch_stats, {"image": sharded["image"]})

    device = torch_peer.best_setting()
    embed = torch_peer.create_step("embed", theirs, batch, "float32", device)
    # Rounding of float32 through all layers: 1.2e-5 on a CPU without AVX-512.
    np.testing.assert_allclose(embed(1).cpu().numpy(), ours["embedding"], atol=3e-5)
    loss = torch_peer.create_step("train", theirs, batch, "float32", device)(1)
    norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
    assert float(loss) == pytest.approx(float(scalars["loss"]), rel=1e-4)
    assert float(scalars["loss"]) > 0.01
    assert float(norm) == pytest.approx(float(scalars["gradient_norm"]), rel=1e-3)
    # AdamW's first step is the sign of the gradient, nearly: some of it is rounding's.
    theirs.eval()
    moved = np.linalg.norm(after["embedding"] - ours["embedding"])
    apart = np.linalg.norm(embed(1).cpu().numpy() - after["embedding"])
    assert apart < 0.05 * moved


@pytest.mark.slow
def test_the_gpu_check_runs_to_its_end(torch_peer, tmp_path):
    settings = {"SMOKE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    environment = {**os.environ, **settings, "SECONDS_IN_ALL": "1800"}
    done = subprocess.run(
        [BENCHMARKS / "gpu_check.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    kinds = ("train", "embed")
    assert found.keys() == {
        *kinds,
        *(f"compare_{kind}" for kind in kinds),
        "search",
        "torch_search",
    }
    for kind in kinds:
        result = found[f"compare_{kind}"]
        for library in ("ours", "torch"):
            per_second = result["images_per_second"][library]
            assert per_second == pytest.approx(16 / result[library]["step"]["median"])
        assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
        assert found[kind]["plain"]["model"] == "resnet18"
    assert 'failures="0"' in (tmp_path / "tests.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--batch_size=12"],
            "--batch_size 12 with --images_per_class 8: mining needs two classes",
        ),
        (["--repeats=0"], "--repeats is 0, expected at least 1"),
        (["--model=resnet19"], "argument --model: invalid choice: 'resnet19'"),
        (["--output=setup.cfg/x"], "--output=setup.cfg/x: File exists; give a file to write to"),
    ],
)
def test_mistakes_get_one_line(arguments, line, torch_peer):
    command = [sys.executable, BENCHMARKS / "compare.py", "embed", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
