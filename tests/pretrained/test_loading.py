"""Loading weights without torch; test_loading_torch.py compares with torch itself."""

import ast
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden.make_backbones import FOLDER, NUM_CLASSES, seeded_images
from seeded import jitted, seeded_model
from tiny_resnet import tiny, values

from cbam_jax import InputError
from cbam_jax.attention import CBAM, SqueezeExcite
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.pretrained import (
    Classifier,
    load_pretrained,
)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_importing_loads_no_torch():
    code = "import sys, cbam_jax.pretrained; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    loaded = ast.literal_eval(modules.decode())
    heavy = {"torch", "torchvision", "orbax", "grain", "tensorflow_datasets", "cbam_jax.models"}
    assert "cbam_jax.pretrained" in loaded
    assert not heavy & set(loaded)
