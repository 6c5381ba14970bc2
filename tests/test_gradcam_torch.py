"""Against pytorch-grad-cam itself, on torchvision's models; skipped where it is not installed."""

import numpy as np
import pytest
from golden.make_gradcam import METHODS, Case, inputs, torch_embedder, torch_maps
from seeded import seeded_model

from benchmarks.torchvision_stubs import import_torchvision
from cbam_jax.gradcam import grad_cam

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    # Of the libraries that it imports for its other methods.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _pytorch_grad_cam():
    try:
        import_torchvision()
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize(
    "case",
    [
        *(Case("resnet50", "layer4.2", "backbone", m, "similarity", 224, 224) for m in METHODS),
        Case("resnet50", "layer3.5", "layer3", "grad_cam", "energy", 224, 224),
        Case("vgg16", "features.30", "backbone", "grad_cam", "similarity", 193, 257),
        Case("vgg16", "features.29", "features.29", "hires_cam", "similarity", 193, 257),
        Case("googlenet", "inception5b", "backbone", "grad_cam", "similarity", 193, 257),
        Case("googlenet", "inception4e", "inception4e", "hires_cam", "energy", 193, 257),
    ],
    ids=lambda case: f"{case.model}-{case.layer}-{case.method}-{case.target}",
)
def test_maps_of_torchvisions_weights(case):
    images, reference = inputs(case)
    raw, heat = torch_maps(case, torch_embedder(case.model), images, reference)
    target = None if case.target == "energy" else reference
    ours = grad_cam(seeded_model(case.model), images, target, layer=case.layer, method=case.method)
    assert not ours.empty.any()
    assert np.abs(ours.raw - raw).max() < 1e-4 * np.abs(raw).max()
    np.testing.assert_allclose(ours.heat, heat, rtol=0, atol=1e-3)
