"""Loading weights without torch; test_pretrained_torch.py compares with torch itself."""

import ast
import hashlib
import http.server
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import types
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden.make_backbones import FOLDER, NUM_CLASSES, seeded_images
from PIL import Image
from seeded import jitted, seeded_model, torch_arrays

from cbam_jax import InputError, pretrained
from cbam_jax.attention import CBAM, SqueezeExcite
from cbam_jax.backbones.resnet import BasicBlock, ResNet
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.classifier import Classifier, create_classifier, image_accuracy
from cbam_jax.models import EmbeddingModel, create_model
from cbam_jax.pretrained import load_pretrained
from cbam_jax.torch_files import read_torch


def tiny(attention=None, embedding_dim=None, seed=0):
    """A small model with every tensor drawn by NumPy: no random operation need be compiled."""

    def build():
        rngs = nnx.Rngs(0)
        backbone = ResNet(
            stage_sizes=(1, 1, 1, 1), block=BasicBlock, attention=attention, rngs=rngs
        )
        return EmbeddingModel(backbone, embedding_dim=embedding_dim, rngs=rngs)

    model = nnx.eval_shape(build)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def source():
    """A tiny ResNet's state dict as torchvision would save it, with classifier and counters."""
    arrays = torch_arrays(nnx.eval_shape(tiny))
    arrays |= {"fc.weight": np.ones((5, 512), np.float32), "fc.bias": np.ones(5, np.float32)}
    return arrays | {"bn1.num_batches_tracked": np.int64(3)}


def values(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def test_resnet_features_and_logits_are_torchvisions():
    golden = np.load(FOLDER / "backbones.npz")
    model = seeded_model("resnet18", num_classes=NUM_CLASSES)
    images = seeded_images(65, 97)
    features = golden["resnet18_features"]
    np.testing.assert_allclose(
        jitted(model.backbone, images), features, rtol=1e-4, atol=1e-5 * np.abs(features).max()
    )
    logits = golden["resnet18_logits"]
    np.testing.assert_allclose(jitted(model, images), logits, atol=1e-4 * np.abs(logits).max())


def test_every_tensor_lands_in_our_layout(source):
    model = tiny(CBAM, embedding_dim=7)
    before = values(model)
    report = load_pretrained(model, source)
    after = values(model)
    kernel = source["layer2.0.downsample.0.weight"]
    for o, i in [(0, 0), (5, 63), (127, 2)]:
        assert after["backbone.layer2.0.downsample.0.kernel"][0, 0, i, o] == kernel[o, i, 0, 0]
    stem = source["conv1.weight"]
    np.testing.assert_array_equal(after["backbone.conv1.kernel"][2, 5, 1, 40], stem[40, 1, 2, 5])
    np.testing.assert_array_equal(after["backbone.bn1.var"], source["bn1.running_var"])
    np.testing.assert_array_equal(after["backbone.bn1.scale"], source["bn1.weight"])
    fresh = [name for name in after if "attention" in name or "projection" in name]
    for name in fresh:
        np.testing.assert_array_equal(after[name], before[name])
    assert len(report.fresh) == len(fresh) == 8
    assert set(report.unused) == {"fc.weight", "fc.bias", "bn1.num_batches_tracked"}
    assert len(report.loaded) == len(after) - 8
    assert report.summary() == (
        "given arrays: 60 tensors loaded, 8 start fresh (last_attention, projection, "
        "stem_attention), 3 unused (fc, num_batches_tracked)"
    )


def without(source, *names):
    return {name: array for name, array in source.items() if name not in names}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: without(s, "layer3.0.bn2.running_var"), "missing: layer3.0.bn2.running_var"),
        (lambda s: s | {"layer5.0.weight": s["fc.bias"]}, "unexpected: layer5.0.weight"),
        # Saved height, width, input, output: the same numbers, another shape.
        (
            lambda s: s | {"conv1.weight": s["conv1.weight"].transpose(2, 3, 1, 0)},
            r"shape: conv1.weight is \(7, 7, 3, 64\), the model's is \(64, 3, 7, 7\)",
        ),
        (lambda s: s | {"bn1.bias": np.ones(63)}, r"shape: bn1.bias is \(63,\).* is \(64,\)"),
        (lambda s: s | {"bn1.bias": np.ones(64, int)}, "dtype: bn1.bias is int64"),
        (lambda s: s | {"module.bn1.bias": np.ones(64)}, "two of its tensors are bn1.bias"),
        # Half an attention is no fresh start.
        (
            lambda s: s | {"stem_attention.channel.fc1.weight": np.ones((4, 64))},
            "missing: stem_attention.channel.fc2.weight",
        ),
    ],
)
def test_misfits_are_named_and_change_nothing(source, edit, message):
    model = tiny(CBAM)
    before = values(model)
    with pytest.raises(InputError, match=message):
        load_pretrained(model, edit(source))
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_one_error_lists_every_problem(source):
    broken = without(source, "bn1.bias", "layer1.0.conv1.weight")
    broken |= {"extra": np.ones(1), "conv1.weight": np.ones((64, 3, 3, 3))}
    with pytest.raises(InputError) as caught:
        load_pretrained(tiny(), broken)
    first, *problems = str(caught.value).splitlines()
    assert "(2 missing, 1 unexpected, 1 shape): nothing was loaded" in first
    names = ["bn1.bias", "layer1.0.conv1.weight", "extra", "conv1.weight is (64, 3, 3, 3)"]
    assert all(name in line for name, line in zip(names, problems, strict=True))


def test_a_classifier_is_not_left_over_where_the_model_has_one(source):
    def classifier(num_classes):
        return nnx.eval_shape(lambda: Classifier(tiny().backbone, num_classes, rngs=nnx.Rngs(0)))

    with pytest.raises(InputError, match=r"shape: fc.bias is \(5,\), the model's is \(9,\)"):
        load_pretrained(classifier(9), source)
    report = load_pretrained(classifier(5), source)
    assert "fc.weight" in report.loaded


def test_files_wrappers_and_prefixes_give_the_same_weights(source, tmp_path):
    expected = tiny()
    load_pretrained(expected, source)
    safetensors.numpy.save_file(
        {name: np.asarray(array) for name, array in source.items()}, tmp_path / "x.safetensors"
    )
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": a for name, a in source.items()}}
    run = {f"params.{name}": array for name, array in values(expected).items()}
    for given in (tmp_path / "x.safetensors", wrapped, run, nnx.to_pure_dict(nnx.state(expected))):
        model = tiny(seed=1)
        load_pretrained(model, given)
        for name, array in values(model).items():
            np.testing.assert_array_equal(array, values(expected)[name])


def test_a_run_with_an_average_gives_the_average():
    expected, model = tiny(), tiny(seed=1)
    parts = {path: array for path, array in values(expected).items()}
    run = {f"params.{name}": 0 * array for name, array in parts.items() if "var" not in name}
    run |= {f"ema.{name}": array for name, array in parts.items() if "var" not in name}
    run |= {f"batch_stats.{name}": array for name, array in parts.items() if "var" in name}
    load_pretrained(model, run)
    np.testing.assert_array_equal(
        values(model)["backbone.conv1.kernel"], parts["backbone.conv1.kernel"]
    )


def test_the_folder_of_a_run_gives_its_last_checkpoint(tmp_path):
    model = tiny(CBAM)
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    tree = {"params": params, "batch_stats": batch_stats}
    with Checkpoints(tmp_path / "checkpoints", best_metric="map@10") as checkpoints:
        for step, scale in ((1, 0.5), (2, 1.0)):
            scaled = jax.tree.map(lambda leaf, scale=scale: scale * leaf, tree)
            state = {"count": np.int32(step)}
            checkpoints.save(step, model=scaled, optimizer=state, data={}, config={})
            checkpoints.wait()
    loaded = tiny(CBAM, seed=1)
    report = load_pretrained(loaded, tmp_path)
    assert not report.fresh
    assert not report.unused
    for name, array in values(loaded).items():
        np.testing.assert_array_equal(array, values(model)[name])


def transformers_name(name):
    """Hugging Face's name of a ResNet's tensor, from their modelling code's structure."""
    leaf = name.split(".")[-1]
    if name.startswith("fc."):
        return f"classifier.1.{leaf}"
    if not name.startswith("layer"):
        part = "convolution" if name.startswith("conv") else "normalization"
        return f"resnet.embedder.embedder.{part}.{leaf}"
    stage, block, layer, *rest = name.split(".")
    prefix = f"resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{block}"
    if layer == "downsample":
        part = "convolution" if rest[0] == "0" else "normalization"
        return f"{prefix}.shortcut.{part}.{leaf}"
    part = "convolution" if layer.startswith("conv") else "normalization"
    return f"{prefix}.layer.{int(layer[-1]) - 1}.{part}.{leaf}"


def test_transformers_names(source):
    model, expected = tiny(seed=1), tiny()
    load_pretrained(expected, source)
    load_pretrained(model, {transformers_name(name): array for name, array in source.items()})
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, values(expected)[name])


def original_cbam(features, prefix, rng):
    """One CBAM in the original code's names and shapes, with a BatchNorm in its spatial gate."""
    shapes = {
        "ChannelGate.mlp.1.weight": (features // 16, features),
        "ChannelGate.mlp.1.bias": (features // 16,),
        "ChannelGate.mlp.3.weight": (features, features // 16),
        "ChannelGate.mlp.3.bias": (features,),
        "SpatialGate.spatial.conv.weight": (1, 2, 7, 7),
        "SpatialGate.spatial.bn.weight": (1,),
        "SpatialGate.spatial.bn.bias": (1,),
        "SpatialGate.spatial.bn.running_mean": (1,),
        "SpatialGate.spatial.bn.running_var": (1,),
    }
    arrays = {prefix + name: rng.uniform(0.1, 1, shape) for name, shape in shapes.items()}
    return arrays | {f"{prefix}SpatialGate.spatial.bn.num_batches_tracked": np.int64(1)}


def test_the_original_codes_backbone_loads_and_its_block_attention_is_left(source, rng):
    arrays = source | original_cbam(64, "layer1.0.cbam.", rng)
    checkpoint = {"arch": "resnet", "state_dict": {f"module.{k}": v for k, v in arrays.items()}}
    model = tiny(SqueezeExcite)
    report = load_pretrained(model, checkpoint)
    np.testing.assert_array_equal(model.backbone.bn1.bias[...], source["bn1.bias"])
    assert "layer1.0.cbam.channel.fc1.weight" in report.unused
    assert set(report.fresh) == {
        f"{place}_attention.fc{i}.{leaf}"
        for place in ("stem", "last")
        for i in (1, 2)
        for leaf in ("weight", "bias")
    }


def test_the_original_codes_module_in_its_own_layout(rng):
    """Their forward in NumPy, read off their published code: biases, [max, mean], BatchNorm."""
    arrays = {name: np.asarray(a) for name, a in original_cbam(32, "", rng).items()}
    cbam = CBAM(32, original=True, rngs=nnx.Rngs(0))
    load_pretrained(cbam, arrays)
    x = rng.normal(size=(2, 9, 8, 32))
    w1, w2 = arrays["ChannelGate.mlp.1.weight"], arrays["ChannelGate.mlp.3.weight"]
    b1, b2 = arrays["ChannelGate.mlp.1.bias"], arrays["ChannelGate.mlp.3.bias"]
    logits = sum(np.maximum(p @ w1.T + b1, 0) @ w2.T + b2 for p in (x.mean((1, 2)), x.max((1, 2))))
    refined = x / (1 + np.exp(-logits))[:, None, None]
    padded = np.pad(np.stack([refined.max(-1), refined.mean(-1)], 1), [(0, 0)] * 2 + [(3, 3)] * 2)
    kernel = arrays["SpatialGate.spatial.conv.weight"][0]
    maps = np.array([[[(padded[n, :, i : i + 7, j : j + 7] * kernel).sum() for j in range(8)]
                      for i in range(9)] for n in range(2)])  # fmt: skip
    bn = {k: arrays[f"SpatialGate.spatial.bn.{k}"] for k in ("weight", "bias")}
    mean, var = (arrays[f"SpatialGate.spatial.bn.running_{k}"] for k in ("mean", "var"))
    maps = (maps - mean) / np.sqrt(var + 1e-5) * bn["weight"] + bn["bias"]
    expected = refined / (1 + np.exp(-maps[..., None]))
    ours = nnx.view(cbam, use_running_average=True)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_torch_files_without_torch(file):
    saved = read_torch(FOLDER / file)
    base = np.arange(42, dtype=np.float32).reshape(6, 7) / 8
    expected = {
        "base": base,
        "transposed": base.T,
        "strided": base[1:5:2, 2:],
        "expanded": np.broadcast_to(base[0], (3, 7)),
        "parameter": base[0] * 2,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.int64(5),
        "half": base[2].astype(np.float16),
        "bfloat16": base[3].astype(ml_dtypes.bfloat16),
        "bool": np.array([True, False, True]),
    }
    for name, array in expected.items():
        assert saved[name].dtype == array.dtype
        np.testing.assert_array_equal(saved[name], array, strict=name != "scalar")
    assert np.shares_memory(saved["base"], saved["strided"])
    nested = saved["nested"]
    assert nested["epoch"] == 3
    assert nested["list"][:3] == [1.5, "a", None]
    np.testing.assert_array_equal(nested["list"][3][0], base[5])


def test_parameters_of_torch_0_1(tmp_path, monkeypatch):
    """A state dict as torch pickled it in 2017: Parameter objects around views of storages."""

    def rebuild(storage, offset, size, stride):
        raise AssertionError("only pickled by name")

    class FloatStorage:
        pass

    class Parameter:
        def __getstate__(self):
            return (self.tensor, None, False, True, OrderedDict())

    class Tensor:
        def __init__(self, *state):
            self.state = state

        def __reduce__(self):
            return rebuild, self.state

    names = {rebuild: "_rebuild_tensor", FloatStorage: "FloatStorage", Parameter: "Parameter"}
    modules = {rebuild: "torch._utils", FloatStorage: "torch", Parameter: "torch.nn.parameter"}
    for item, module in modules.items():
        item.__module__, item.__qualname__ = module, names[item]
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], names[item], item)
    # setitem restores what was there, torch itself included.
    storage = np.arange(12, dtype=np.float32)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            view = ("17", 4, 8)  # The last eight of the twelve, as a view of the storage.
            return ("storage", FloatStorage, "17", "cpu", 12, view) if item is storage else None

    parameter = Parameter()
    parameter.tensor = Tensor(storage, 1, (2, 3), (3, 1))
    with open(tmp_path / "x.pth", "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        Pickler(file, protocol=2).dump(OrderedDict(weight=parameter))
        pickle.dump(["17"], file, protocol=2)
        file.write(struct.pack("<q", 12) + storage.tobytes())
    monkeypatch.undo()
    np.testing.assert_array_equal(read_torch(tmp_path / "x.pth")["weight"], [[5, 6, 7], [8, 9, 10]])


class Evil:
    """What a pickle can do: run a command when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_pickle(path, payload, kind):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", payload)
    else:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C)
        header = magic + pickle.dumps(1001) + pickle.dumps({"little_endian": True})
        path.write_bytes((header if kind == "legacy" else b"") + payload)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_pickle_that_executes_is_refused(tmp_path, kind):
    path, touched = tmp_path / "x.pth", tmp_path / "touched"
    write_pickle(path, pickle.dumps({"conv1.weight": Evil(touched)}, protocol=2), kind)
    model = tiny()
    before = values(model)
    with pytest.raises(InputError, match="x.pth: refused: the pickle asks for posix.system"):
        load_pretrained(model, path)
    assert not touched.exists()
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


# A stride beyond the storage of 21 numbers would read other memory.
@pytest.mark.parametrize(
    "view", [(0, (2, 7), (21, 1)), (40, (3,), (1,)), (19, (3,), (1,)), (0, (3,), (-1,))]
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, view):
    payload = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x15tQ"
        + b"".join(pickle.dumps(item, 2)[2:-1] for item in view)
        + b"\x89NtR."
    )
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", payload)
        archive.writestr("x/data/0", np.zeros(21, np.float32).tobytes())
    with pytest.raises(InputError, match="reaches beyond its storage of 21"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_truncated_torch_files(tmp_path, file):
    whole = (FOLDER / file).read_bytes()
    for keep in range(0, len(whole) - 1, 97):
        (tmp_path / file).write_bytes(whole[:keep])
        with pytest.raises(InputError, match=file):
            read_torch(tmp_path / file)


def test_overwritten_bytes_in_a_torch_file(tmp_path):
    whole = bytearray((FOLDER / "torch_zip.pth").read_bytes())
    place = whole.index((np.arange(42, dtype=np.float32) / 8).tobytes())
    whole[place + 5] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    with pytest.raises(InputError, match="x.pth: .*CRC-32"):
        read_torch(tmp_path / "x.pth")


def test_truncated_safetensors(source, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"conv1.weight": source["conv1.weight"]}, path)
    path.write_bytes(path.read_bytes()[:-100])
    model = tiny()
    before = values(model)
    with pytest.raises(InputError, match="x.safetensors: damaged or truncated"):
        load_pretrained(model, path)
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_bfloat16_safetensors(source, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(
        {k: np.asarray(a).astype(ml_dtypes.bfloat16) for k, a in source.items()}, path
    )
    model = tiny()
    load_pretrained(model, path)
    expected = source["bn1.bias"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(model.backbone.bn1.bias[...], expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.pth", "no weights at nothing.pth: .*imagenet"),
        (".", "neither model.safetensors nor checkpoints"),
    ],
)
def test_missing_sources(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_pretrained(tiny(), path)


@pytest.fixture
def mirror(tmp_path):
    """A local server with byte ranges, which breaks off the first answer half-way."""
    content = {"broken": True, "requests": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = content[self.path]
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            content["requests"].append(start)
            self.send_response(206 if self.headers["Range"] else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data) // 2 if content["broken"] else len(data)
            content["broken"] = False
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", content
        server.shutdown()


@pytest.fixture
def published(source, tmp_path, monkeypatch):
    """A file published under its hash, for the tiny model."""
    safetensors.numpy.save_file({"x": np.arange(999.0)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    weights = pretrained.Published(name, 0.0, 0.0, 256)
    monkeypatch.setitem(pretrained.IMAGENET, "imagenet", {"resnet18": weights})
    return name, data


def test_fetch_resumes_and_then_uses_the_cache(mirror, published, tmp_path):
    address, content = mirror
    name, data = published
    content[f"/{name}"] = data
    with pytest.raises(InputError, match="run again to resume"):
        pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address)
    path = pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address)
    assert path.read_bytes() == data
    assert content["requests"] == [0, len(data) // 2]
    assert pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address) == path
    assert len(content["requests"]) == 2


def test_a_wrong_hash_is_refused(published, tmp_path, monkeypatch):
    name, data = published
    (tmp_path / name).write_bytes(data[:-1] + b"x")
    monkeypatch.setenv("CBAM_JAX_CACHE", str(tmp_path))
    model = nnx.eval_shape(lambda: create_model("resnet18_cbam", rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nnx.state(model))
    nnx.update(model, zeros)
    before = values(model)
    for given in ("imagenet", tmp_path / name):
        with pytest.raises(InputError, match="its SHA-256 begins with .*not with the"):
            load_pretrained(model, given)
    for key, array in values(model).items():
        np.testing.assert_array_equal(array, before[key])


def test_imagenet_knows_the_backbone(monkeypatch):
    asked = []
    monkeypatch.setattr(
        pretrained, "fetch_imagenet", lambda name, *a, **k: asked.append(name) or {}
    )
    names = [*pretrained.IMAGENET["imagenet"]]
    builds = [lambda name=n: create_model(f"{name}_cbam", rngs=nnx.Rngs(0)) for n in names]
    others = {"embedding_dim": 8, "pooling": "gem"}
    builds.append(lambda: create_model("resnet18_se", **others, rngs=nnx.Rngs(0)))
    builds.append(lambda: create_classifier("vgg16", rngs=nnx.Rngs(0)))
    for build in builds:
        with pytest.raises(InputError, match="does not fit"):
            load_pretrained(nnx.eval_shape(build), "imagenet")
    assert asked == [*names, "resnet18", "vgg16"]
    with pytest.raises(InputError, match="no ImageNet weights for a backbone of 60 tensors"):
        load_pretrained(nnx.eval_shape(tiny), "imagenet")


def test_published_files_are_named_after_their_backbone():
    for version in pretrained.IMAGENET.values():
        for backbone, published in version.items():
            name, _, digits = published.file.removesuffix(".pth").rpartition("-")
            assert name == backbone
            assert len(digits) == 8
            assert 60 < published.top1 < published.top5 < 100


class BrightestPatch(nnx.Module):
    """Six classes by where the image is bright: an exact answer without any weights."""

    num_classes = 6

    def __init__(self):
        self.zero = nnx.Param(jnp.zeros(()))

    def set_view(self, use_running_average):
        assert use_running_average

    def __call__(self, images):
        patches = images.reshape(len(images), 2, 112, 2, 112, 3).mean((2, 4, 5)).reshape(-1, 4)
        return jnp.pad(patches, ((0, 0), (0, 2)), constant_values=-9.0) + self.zero[...]


def test_accuracy_on_folders(tmp_path):
    # Bright in quarter q, in the folder of class c. Quarters rank: the bright one, then 0 to 3,
    # then classes 4 and 5: the fifth best is class 4.
    images = [(0, 0), (1, 1), (2, 3), (3, 3), (4, 2), (5, 1), (5, 0)]
    for number, (label, quarter) in enumerate(images):
        image = np.zeros((300, 400, 3), np.uint8)
        row, column = divmod(quarter, 2)
        image[row * 150 : row * 150 + 150, column * 200 : column * 200 + 200] = 255
        folder = tmp_path / f"n0{label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    measured = image_accuracy(BrightestPatch(), tmp_path, resize=256, batch_size=3)
    assert measured == {"images": 7, "top1": 100 * 3 / 7, "top5": 100 * 5 / 7}
    (tmp_path / "n06").mkdir()
    with pytest.raises(InputError, match="has 7 folders, the model 6 classes"):
        image_accuracy(BrightestPatch(), tmp_path, resize=256)
    with pytest.raises(InputError, match="no images in"):
        image_accuracy(BrightestPatch(), tmp_path / "n06", resize=256)


def test_check_refuses_before_it_fetches(capsys):
    with pytest.raises(SystemExit):
        pretrained.main(["check", "vgg16", "--version", "imagenet_v2", "--images", "x"])
    assert "no imagenet_v2 weights for 'vgg16'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrained.main(["check", "vgg16", "--images", "nowhere"])
    assert "no images in nowhere" in capsys.readouterr().err


def test_convert_and_command_line(tmp_path, capsys):
    destination = tmp_path / "x.safetensors"
    torch_file = tmp_path / "plain.pth"
    torch_file.write_bytes((FOLDER / "torch_zip.pth").read_bytes())
    pretrained.main(["convert", str(torch_file), str(destination)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tensors"] == 12
    converted, saved = safetensors.numpy.load_file(destination), read_torch(torch_file)
    for name in ("transposed", "strided", "expanded", "bfloat16"):
        np.testing.assert_array_equal(converted[name], saved[name])
    with pytest.raises(SystemExit) as caught:
        pretrained.main(["convert", str(torch_file), str(tmp_path / "x.bin")])
    assert caught.value.code == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_importing_loads_no_torch():
    code = "import sys, cbam_jax.pretrained; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    loaded = ast.literal_eval(modules.decode())
    heavy = {"torch", "torchvision", "orbax", "grain", "tensorflow_datasets", "cbam_jax.models"}
    assert "cbam_jax.pretrained" in loaded
    assert not heavy & set(loaded)
