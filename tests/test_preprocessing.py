"""How a photo becomes a model's square, by plain reference implementations."""

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from seeded import SmallBackbone

from cbam_jax import InputError, data
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.models import EmbeddingModel, pixel_scaling
from cbam_jax.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def cubic(x):
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(length, new):
    """Of each old pixel in each new one, [new, old]: the kernel, as wide as a new pixel is."""
    scale = max(length / new, 1)
    centres = (np.arange(new) + 0.5) * length / new - 0.5
    raw = cubic((np.arange(length) - centres[:, None]) / scale)
    return raw / raw.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(11, 17), (40, 9), (61, 80)])
def test_bicubic_is_the_antialiased_kernel_within_a_grey_level(rng, size):
    image = rng.integers(0, 256, (37, 52, 3), dtype=np.uint8)
    rows, columns = weights(37, size[0]), weights(52, size[1])
    # Rounded to bytes between the two passes.
    across = np.rint(np.clip(np.einsum("jw,hwc->hjc", columns, image), 0, 255))
    expected = np.rint(np.clip(np.einsum("ih,hjc->ijc", rows, across), 0, 255))
    assert np.abs(data.resize(image, *size, "bicubic") - expected).max() <= 1
    mask = data.resize(image[..., 1], *size, "bicubic")
    np.testing.assert_array_equal(mask, data.resize(image, *size, "bicubic")[..., 1])


@pytest.mark.parametrize(("height", "width"), [(411, 400), (400, 411), (300, 500), (123, 457)])
def test_a_bicubic_crop_is_torchvisions(rng, height, width):
    """Whose long side is int(size * long / short): a pixel less, where ours alone would round."""
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = min(height, width)
    size = int(64 * width / short), int(64 * height / short)
    resized = PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC)
    top, left = (size[1] - 64) // 2, (size[0] - 64) // 2
    expected = np.asarray(resized, int)[top : top + 64, left : left + 64]
    how = Preprocessing(64, 1.0, interpolation="bicubic")
    assert np.abs(data.cut_pixels(image, how) - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("shape", "inside"), [((40, 30), (16, 12, 0, 2)), ((9, 27), (5, 16, 5, 0))]
)
def test_letterbox_shows_all_of_a_photo_on_a_border(rng, shape, inside, interpolation):
    image = rng.integers(0, 100, (*shape, 3), dtype=np.uint8)
    color = (200, 210, 220)
    how = Preprocessing(16, resize="letterbox", interpolation=interpolation, pad_color=color)
    height, width, top, left = inside
    expected = np.full((16, 16, 3), color, np.uint8)
    expected[top : top + height, left : left + width] = data.resize(
        image, height, width, interpolation
    )
    np.testing.assert_array_equal(data.cut_pixels(image, how), expected)
    np.testing.assert_array_equal(data.cut_file(png(image), how), expected)
    mask = data.cut_pixels(np.full(shape, 255, np.uint8), how)
    np.testing.assert_array_equal(mask, 255 * (expected < 150).any(2))


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_squash_resizes_both_sides(rng):
    image = rng.integers(0, 256, (40, 29, 3), dtype=np.uint8)
    how = Preprocessing(12, resize="squash")
    np.testing.assert_array_equal(data.cut_pixels(image, how), data.resize(image, 12, 12))
    np.testing.assert_array_equal(data.cut_file(png(image), how), data.resize(image, 12, 12))


def test_a_sliver_keeps_a_pixel():
    how = Preprocessing(8, resize="letterbox", pad_color=(1, 2, 3))
    square = data.cut_pixels(np.full((2, 900, 3), 9, np.uint8), how)
    assert (square == 9).all(2).sum() == 8


def one_photo(image):
    everyone = np.ones(1, bool)
    return RetrievalDataset(
        name="toy", split="train", label=np.array([0]), label_names=("coat",), id=np.array(["a"]),
        is_query=everyone, is_gallery=everyone, item=None, series=None, bbox=None,
        images=[png(image)])  # fmt: skip


def test_training_pads_its_crops_as_evaluation_does(rng):
    image = rng.integers(0, 100, (20, 10, 3), dtype=np.uint8)
    dataset, how = one_photo(image), {"resize": "letterbox", "pad_color": (200, 200, 200)}
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (0.5, 0.5), "crop_to_box": False}
    plain = {"flip": False, "color_jitter": 0.0, "random_erasing": 0.0}
    random = np.random.default_rng(0)
    found = data.train_image(dataset, 0, random, image_size=8, **whole, **plain, **how)
    (batch,) = data.eval_batches(dataset, image_size=8, batch_size=1, **how)
    np.testing.assert_array_equal(found, batch["image"][0])
    assert (found[:, [0, 1, 6, 7]] == 200).all()
    squashed = data.train_image(dataset, 0, random, image_size=8, **whole, **plain)
    np.testing.assert_array_equal(squashed, data.resize(image, 8, 8))


def test_what_was_written_before_is_the_same_still():
    before = {
        "image_size": 64, "crop_fraction": 0.8, "mean": IMAGENET_MEAN, "std": IMAGENET_STD
    }  # fmt: skip
    assert Preprocessing.from_dict(before) == Preprocessing(64, 0.8)
    assert Preprocessing(64, 0.8).to_dict() == before
    how = Preprocessing(8, resize="letterbox", interpolation="bicubic", pad_color=(1, 2, 3))
    assert Preprocessing.from_dict({**how.to_dict(), "pad_color": [1, 2, 3]}) == how


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": "pad"}, "resize='pad': choose one of crop, squash, letterbox"),
        ({"interpolation": "area"}, "interpolation='area': choose one of bilinear, bicubic"),
        ({"pad_color": (0, 0)}, r"pad_color=\(0, 0\): give red, green and blue"),
        ({"pad_color": (0, 0, 256)}, "each from 0 to 255"),
        ({"mean": [0.5, 0.5, 0.5]}, r"with mean \(0.5, 0.5, 0.5\) .*: the model expects \(0.485"),
    ],
)
def test_a_value_out_of_range_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict({"image_size": 8} | fields)


def test_a_model_takes_out_the_mean_that_its_backbone_expects(rng):
    pixels = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    scaling = pixel_scaling("efficientnet_lite0")
    build = lambda: EmbeddingModel(SmallBackbone(rngs=rngs()), scaling=scaling, rngs=rngs())  # noqa: E731
    model = nnx.eval_shape(build)
    found = model.preprocess(jnp.asarray(pixels))
    np.testing.assert_allclose(found, (np.float64(pixels) - 127) / 128, atol=1e-6)


def rngs():
    return nnx.Rngs(0)
