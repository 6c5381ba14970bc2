import json
import sys

import cv2
import numpy as np
import pytest

from cbam_jax import benchmark, benchmark_data


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


def test_data_counts_cpu_and_wall_of_the_batches_taken(monkeypatch):
    """A reader that lies idle until asked: three units of CPU and five of wall time a batch."""
    clock = {"cpu": 0.0, "wall": 0.0}

    def batches():
        while True:
            clock["cpu"] += 0.003
            clock["wall"] += 0.005
            yield

    monkeypatch.setattr(benchmark_data, "cpu_seconds", lambda: clock["cpu"])
    monkeypatch.setattr(benchmark_data.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(benchmark_data.time, "sleep", lambda seconds: None)
    times = [benchmark_data.loading(batches(), count=4, ahead=3) for _ in range(3)]
    rates = benchmark_data.loading_rates(times, batch_size=16)
    assert rates["batch_ms"]["median"] == pytest.approx(5)
    assert rates["images_per_second"]["min"] == pytest.approx(16 / 0.005)
    assert rates["images_per_second_per_core"]["max"] == pytest.approx(16 / 0.003)


def test_data_needs_no_dataset_and_no_grain(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.setattr(benchmark_data, "photos", lambda count: PHOTOS * count)
    sizes = ["--image_size=16", "--batch_size=16", "--count=1", "--repeats=2"]
    benchmark.main(["data", *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["grain"] is False
    assert result["images_per_second_per_core"]["min"] > 0
    assert (result["images"], result["workers"], result["batch_size"]) == (320, 0, 16)


PHOTOS = [cv2.imencode(".jpg", np.zeros((40, 30, 3), np.uint8))[1].tobytes()]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data", "--batch_size=20"], "batch_size=20: give a multiple of 8, at least 16"),
        (["data", "--workers=-1"], "--workers is -1, expected at least 0"),
        (["data", "--data=no.csv"], "there is no manifest no.csv"),
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
