"""Writes gradcam.npz: the maps of pytorch-grad-cam for torchvision's models with seeded weights.

Run as ``python tests/golden/make_gradcam.py`` where torch, torchvision and grad-cam are installed.
Weights, images and references are drawn from seeds, so none need be stored.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from golden.make_backbones import seeded_images, seeded_torchvision

# The other libraries are imported where they are used, so that pytest can read this file without.

METHODS = {"grad_cam": "GradCAM", "grad_cam++": "GradCAMPlusPlus", "hires_cam": "HiResCAM"}


class Case(NamedTuple):
    """``target`` is "similarity" (to ``seeded_reference``) or "energy"."""

    model: str
    torch_layer: str
    layer: str
    method: str
    target: str
    height: int
    width: int


CASES = {
    "last": Case("resnet18", "layer4.1", "backbone", "grad_cam", "similarity", 65, 97),
    "stage": Case("resnet18", "layer2.1", "layer2", "grad_cam++", "energy", 65, 97),
    "block": Case("resnet18", "layer3.0", "layer3.0", "hires_cam", "similarity", 65, 97),
    "relu": Case("vgg16", "features.29", "features.29", "grad_cam", "similarity", 65, 97),
}


def seeded_reference(size, batch):
    """Embeddings [batch, size] to compare with: positive, as averages after a ReLU are."""
    rng = np.random.default_rng(size)
    return np.abs(rng.normal(0, 1, (batch, size))).astype(np.float32)


def torch_embedder(name):
    """torchvision's seeded model up to its averaged last feature map, in float64.

    In float32 torch gives a gradient to the other of two entries where a max-pool finds them nearly
    equal, and the map of GoogLeNet's inception4e is off by 0.15 % there.
    """
    import torch

    model = seeded_torchvision(name).double()
    if name.startswith("vgg"):
        pool = torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(model.features, pool, torch.nn.Flatten())
    model.fc = torch.nn.Identity()
    model.dropout = torch.nn.Identity()  # GoogLeNet's; it does nothing in evaluation mode.
    return model


def torch_maps(case, model, images, reference):
    """pytorch-grad-cam's map before its ReLU [b, h', w'], and its heat [b, h, w]."""
    import pytorch_grad_cam
    import torch

    raw = []

    class Kept(getattr(pytorch_grad_cam, METHODS[case.method])):
        def get_cam_image(self, *args, **kwargs):
            raw.append(super().get_cam_image(*args, **kwargs))
            return raw[-1]

    def target(row):
        if case.target == "energy":
            return lambda embedding: torch.sum(embedding**2) / 2
        other = torch.from_numpy(row).double()
        return lambda embedding: torch.nn.functional.cosine_similarity(embedding, other, dim=0)

    layer = case.torch_layer.replace("features.", "0.")  # Of the Sequential above.
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double()
    with Kept(model, [model.get_submodule(layer)]) as cam:
        heat = cam(images, [target(row) for row in reference])
    return raw[0].astype(np.float32), heat


def inputs(case):
    """Two images and their references."""
    size = {"vgg16": 512, "resnet18": 512, "resnet50": 2048, "googlenet": 1024}[case.model]
    return seeded_images(case.height, case.width, 2), seeded_reference(size, 2)


def main():
    """Write the file."""
    arrays = {}
    for key, case in CASES.items():
        raw, heat = torch_maps(case, torch_embedder(case.model), *inputs(case))
        arrays |= {f"{key}_raw": raw, f"{key}_heat": heat[:, ::4, ::4]}
    versions = {name: version(name) for name in ("torch", "torchvision", "grad-cam")}
    path = Path(__file__).parent / "gradcam.npz"
    np.savez_compressed(path, versions=str(versions), **arrays)


if __name__ == "__main__":
    main()
