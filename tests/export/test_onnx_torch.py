"""ONNX beside the model, by ONNX Runtime: what jax2onnx writes, for each family."""

import json

import numpy as np
import pytest
from flax import nnx
from test_programs import FAMILIES
from tiny_run import drawn_model, patch_tiny_models

from cbam_jax import InputError, export, models
from cbam_jax.export import lowering, onnx
from cbam_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", autouse=True)
def _installed():
    for name in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX is written and run by libraries of others")


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def test_every_convolution_stays_one(tmp_path):
    import onnx as written

    build = lambda: models.create_model("efficientnet_lite0", rngs=nnx.Rngs(0))  # noqa: E731
    embed, weights = lowering.split(drawn_model(build))
    onnx.write(tmp_path / "model.onnx", embed, weights, 32)
    nodes = written.load(tmp_path / "model.onnx").graph.node
    kernels = [weight for weight in weights.values() if weight.ndim == 4]
    assert sum(node.op_type == "Conv" for node in nodes) == len(kernels) == 49


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_gives_what_the_model_gives(family, tmp_path, rng):
    arguments = {"name": family, **FAMILIES[family]}
    model = drawn_model(lambda: models.create_model(**arguments, rngs=nnx.Rngs(0)))
    cut = Preprocessing(64, mean=model.mean, std=model.std)
    export.save(model, tmp_path, to="onnx", preprocessing=cut, arguments=arguments)
    run = session(tmp_path / "model.onnx").run
    with np.load(tmp_path / "check.npz") as check:
        images, expected = check["images"], check["embeddings"]
    for batch in (1, 3, 17):  # The three, over and over.
        (found,) = run(["embeddings"], {"images": np.resize(images, (batch, 64, 64, 3))})
        wanted = np.resize(expected, (batch, expected.shape[1]))
        # Of an embedding's length: single numbers of Lite0's differ by 1.4e-5 of the largest also
        # between our own forms for CPUs and GPUs, which round otherwise.
        difference = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        np.testing.assert_array_less(difference, 1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3


def test_a_folder_of_onnx_says_what_it_is(tmp_path, monkeypatch):
    patch_tiny_models(monkeypatch)
    arguments = {"name": "tiny_cbam", "embedding_dim": 16}
    model = drawn_model(lambda: models.create_model(**arguments, rngs=nnx.Rngs(0)))
    told = export.save(
        model, tmp_path, to="onnx", preprocessing=Preprocessing(32), arguments=arguments
    )
    contract = json.loads((tmp_path / "contract.json").read_text())
    assert contract == told
    assert set(contract["files"]) == {"model.onnx", "check.npz"}
    (given,), (taken,) = (
        getattr(session(tmp_path / "model.onnx"), f"get_{end}")() for end in ("inputs", "outputs")
    )
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert (taken.name, taken.type, taken.shape[1:]) == ("embeddings", "tensor(float)", [16])
    with pytest.raises(InputError, match="is onnx, which ONNX Runtime runs; for this, export"):
        export.load(tmp_path)
    before = (tmp_path / "model.onnx").read_bytes()
    split, model.normalize = lowering.split, False

    def other(model):
        embed, weights = split(model)
        return embed, {
            n: np.asarray(w) * (1 + (n == "projection.kernel")) for n, w in weights.items()
        }

    write = onnx.write
    monkeypatch.setattr(onnx, "write", lambda path, *rest: write(path, *split(model), rest[-1]))
    monkeypatch.setattr(lowering, "split", other)
    with pytest.raises(InputError, match="gives other embeddings, by .* nothing was written"):
        export.save(model, tmp_path, to="onnx", preprocessing=Preprocessing(32), arguments={})
    assert (tmp_path / "model.onnx").read_bytes() == before
