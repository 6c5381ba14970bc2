import json

import pytest

from cbam_jax import benchmark


def convolution_operations(size):
    """Of VGG16's 3x3 convolutions, by loops over the widths; what falls on the padding left out."""
    total, channels = 0, 3
    for width in (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"):
        if width == "M":
            size //= 2
            continue
        taps = sum(0 <= place + tap < size for place in range(size) for tap in (-1, 0, 1))
        total += 2 * channels * width * taps**2
        channels = width
    return total


def test_embed_counts_parameters_and_operations(capsys):
    benchmark.main(["embed", "--model=vgg16", "--image_size=32", "--batch_size=2", "--repeats=1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # torchvision's vgg16 has 14,714,688 parameters in its features.
    assert result["parameters"] == 14_714_688
    # Beside the convolutions: biases, ReLUs, pooling, the norm.
    operations = convolution_operations(32)
    assert operations < result["flops"] < 1.01 * operations
    assert result["images_per_second"] == 2 / result["call"]["median"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["embed", "--batch_size=0"], "--batch_size is 0, expected at least 1"),
        (["search", "--k=0"], "--k is 0, expected at least 1"),
        (["search", "--k=9", "--gallery=8"], "--k is 9, expected at most --gallery 8"),
        (["search", "--devices=99"], "--devices is 99, there are 8"),
        (["search", "--gallery=9", "--devices=2"], "--gallery 9 is no multiple of 2 devices"),
    ],
)
def test_mistakes_get_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert line in capsys.readouterr().err.splitlines()[-1]
