"""Accuracy on folders of images, beside the published figures."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cbam_jax import InputError
from cbam_jax.models import pixel_scaling
from cbam_jax.pretrained import image_accuracy
from cbam_jax.pretrained.__main__ import main


class BrightestPatch(nnx.Module):
    """Six classes by where the image is bright: an exact answer without any weights."""

    num_classes = 6

    def __init__(self):
        self.zero = nnx.Param(jnp.zeros(()))
        self.scaling = nnx.static(pixel_scaling(""))

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
        main(["check", "vgg16", "--version", "imagenet_v2", "--images", "x"])
    assert "no imagenet_v2 weights for 'vgg16'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", "vgg16", "--images", "nowhere"])
    assert "no images in nowhere" in capsys.readouterr().err
