"""Writes efficientnet.npz: what the PyTorch package of EfficientNet-Lite0 gives on seeded weights.

Run as ``python tests/golden/make_efficientnet.py`` where torch and efficientnet-lite-pytorch are
installed. Weights are drawn by name from a seed, as those of make_backbones.py.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.make_backbones import NUM_CLASSES, seeded_array, seeded_images

FOLDER = Path(__file__).parent
# Odd and even, where the two kinds of padding differ.
HEIGHT, WIDTH = 47, 66


def torch_efficientnet(num_classes, state=None):
    """The package's model in evaluation mode, padding by the image's own size; seeded weights."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=None, num_classes=num_classes)
    if state is None:
        state = {
            name: torch.from_numpy(np.array(seeded_array(our_name(name), tensor.shape)))
            for name, tensor in model.state_dict().items()
        }
    model.load_state_dict(state)
    return model.eval()


def our_name(name):
    """Without the underscore before each submodule."""
    return name.replace("._", ".").removeprefix("_")


def torch_features(model, images):
    """The last feature map [b, h, w, c], and the logits."""
    import torch

    with torch.no_grad():
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        features, logits = model.extract_features(images), model(images)
    return features.numpy().transpose(0, 2, 3, 1), logits.numpy()


def main():
    """Write the file."""
    model = torch_efficientnet(NUM_CLASSES)
    features, logits = torch_features(model, seeded_images(HEIGHT, WIDTH))
    np.savez_compressed(FOLDER / "efficientnet.npz", features=features, logits=logits)


if __name__ == "__main__":
    main()
