import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import FOLDER, NUM_CLASSES, seeded_images
from seeded import Add, torch_arrays
from test_vgg import slow_max_pool

from cbam_jax import InputError
from cbam_jax.backbones import googlenet
from cbam_jax.backbones.googlenet import GoogLeNet
from cbam_jax.models import create_model
from cbam_jax.pretrained import create_classifier, load_pretrained


@pytest.mark.slow
def test_features_and_logits_are_torchvisions():
    golden = np.load(FOLDER / "backbones.npz")
    model = nnx.eval_shape(lambda: create_classifier("googlenet", NUM_CLASSES, rngs=nnx.Rngs(0)))
    model.backbone = nnx.eval_shape(
        lambda: GoogLeNet(auxiliary_classes=NUM_CLASSES, rngs=nnx.Rngs(0))
    )
    load_pretrained(model, torch_arrays(model))
    graph, state = nnx.split(nnx.view(model, use_running_average=True).backbone)
    images = seeded_images(47, 80)
    # All from one compilation: the head of the model alone is cheap.
    features, auxiliary = jax.jit(
        lambda state, images: nnx.merge(graph, state).with_auxiliary(images)
    )(state, images)
    logits = model.fc(np.asarray(features).mean((1, 2)))
    for ours, name in ((features, "features"), (logits, "logits"), (auxiliary, "auxiliary")):
        expected = golden[f"googlenet_{name}"]
        np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_auxiliary_classifiers_are_for_training_alone(monkeypatch):
    # The blocks are cut out: what the heads get is named by their weights' width.
    monkeypatch.setattr(
        googlenet.Inception, "__call__", lambda self, x: x[..., :1] * jnp.ones((1, 1, 1, 1024))
    )
    monkeypatch.setattr(
        googlenet.AuxiliaryClassifier, "__call__", lambda self, x: self.fc2(jnp.ones((2, 1024)))
    )
    model = nnx.eval_shape(lambda: create_model("googlenet", num_classes=7, rngs=nnx.Rngs(0)))
    plain = nnx.eval_shape(lambda: create_model("googlenet", rngs=nnx.Rngs(0)))
    arrays = torch_arrays(model)
    load_pretrained(model, arrays)
    report = load_pretrained(plain, arrays)
    assert {name.split(".")[0] for name in report.unused} == {"aux1", "aux2", "class_head"}
    model = nnx.view(model, use_running_average=True)
    images = seeded_images(32, 48, batch=2)
    logits, *auxiliary = model.classify_deeply(images)
    np.testing.assert_array_equal(logits, model.classify(images))
    for name, ours in zip(("aux1", "aux2"), auxiliary, strict=True):
        weight, bias = arrays[f"{name}.fc2.weight"], arrays[f"{name}.fc2.bias"]
        np.testing.assert_allclose(ours, np.tile(weight.sum(1) + bias, (2, 1)), rtol=1e-4)
    plain = nnx.view(plain, use_running_average=True)
    np.testing.assert_array_equal(plain(images), model(images))
    with pytest.raises(ValueError, match="num_classes is None"):
        plain.classify_deeply(images)


@pytest.mark.slow
def test_auxiliary_classifiers_start_fresh_beside_other_weights():
    model = nnx.eval_shape(lambda: create_model("googlenet", num_classes=7, rngs=nnx.Rngs(0)))
    arrays = torch_arrays(model)
    source = {name: a for name, a in arrays.items() if not name.startswith(("aux", "class"))}
    fresh = load_pretrained(model, source).fresh
    assert {name.split(".")[0] for name in fresh} == {"aux1", "aux2", "class_head"}
    del source["inception5b.branch1.bn.running_var"]
    with pytest.raises(InputError, match="1 missing"):
        load_pretrained(model, source)


def test_parameter_count():
    # torchvision's published total less the classifier's; it counts no auxiliary ones.
    model = nnx.eval_shape(lambda: GoogLeNet(rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 6_624_904 - 1_025_000


@pytest.mark.slow
def test_attention_follows_conv1_and_the_last_block(monkeypatch):
    # Everything between is cut out, so that only the two places are left.
    monkeypatch.setattr(
        googlenet.Inception, "__call__", lambda self, x: x[..., :1] * jnp.ones((1, 1, 1, 1024))
    )
    model = nnx.eval_shape(lambda: GoogLeNet(attention=Add, rngs=nnx.Rngs(0)))
    load_pretrained(model, torch_arrays(model))
    model = nnx.view(model, use_running_average=True)
    graph, state = nnx.split(model)
    seen = []
    original = googlenet.max_pool
    monkeypatch.setattr(
        googlenet, "max_pool", lambda x, *a, **k: seen.append(x) or original(x, *a, **k)
    )

    def run(state, images):
        model = nnx.merge(graph, state)
        return model(images), seen[0], seen[-1], model.conv1(googlenet.transform_input(images))

    output, pooled_first, pooled_last, stem = jax.jit(run)(state, seeded_images(32, 48))
    np.testing.assert_allclose(pooled_first, stem + 64, rtol=1e-6)
    last = slow_max_pool(np.asarray(pooled_last), 2, 2, 0, True)
    np.testing.assert_allclose(output, last + 1024, rtol=1e-6)


@pytest.mark.parametrize("height_width", [(32, 32), (33, 47)])
def test_transform_input_is_to_minus_one_and_one(rng, height_width):
    pixels = rng.uniform(0, 1, (2, *height_width, 3))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = jnp.asarray((pixels - mean) / std, jnp.float32)
    np.testing.assert_allclose(googlenet.transform_input(normalised), 2 * pixels - 1, atol=1e-6)
