import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import FOLDER, NUM_CLASSES, seeded_images
from seeded import jitted, seeded_model, torch_arrays
from test_vgg import slow_max_pool

from cbam_jax.backbones import googlenet
from cbam_jax.backbones.googlenet import GoogLeNet
from cbam_jax.pretrained import load_pretrained


def test_features_and_logits_are_torchvisions():
    golden = np.load(FOLDER / "backbones.npz")
    model = seeded_model("googlenet", num_classes=NUM_CLASSES)
    images = seeded_images(47, 80)
    # Both from one compilation: the head of the model alone is cheap.
    features = jitted(model.backbone, images)
    expected = golden["googlenet_features"]
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())
    logits = golden["googlenet_logits"]
    pooled = np.asarray(features).mean((1, 2))
    np.testing.assert_allclose(model.fc(pooled), logits, atol=1e-5 * np.abs(logits).max())


def test_parameter_count():
    # torchvision's published total less the classifier's; it counts no auxiliary ones.
    model = nnx.eval_shape(lambda: GoogLeNet(rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 6_624_904 - 1_025_000


class Add(nnx.Module):
    """Stands where attention would: adds its width."""

    def __init__(self, features, *, rngs):
        self.features = features

    def __call__(self, x):
        assert x.shape[-1] == self.features
        return x + self.features


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
