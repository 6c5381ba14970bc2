import dataclasses
import json
import sys

import pytest

from cbam_jax import InputError, model_list
from cbam_jax.models import MODELS, TRANSFORMERS
from cbam_jax.pretrained import IMAGENET


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    model_list.main()
    return capsys.readouterr().out.splitlines()


def test_a_models_line_has_its_cost_and_its_weights(monkeypatch, capsys):
    lines = run(monkeypatch, capsys, "vgg16", "--image-size=64")
    document = json.loads(lines[-1])["vgg16"]
    # Convolutions alone, and of these the zeros at the border too, which are many on small maps.
    sides, widths = (64, 32, 16, 8, 4), (64, 128, 256, 512, 512)
    convolutions, before = 0, 3
    for side, width, count in zip(sides, widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            convolutions += 2 * side**2 * 9 * before * width
            before = width
    assert 0.85 * convolutions < document["flops"] < convolutions
    assert document["parameters"] == 14_714_688
    assert document["weights"] == "imagenet (BSD-3-Clause)"
    assert lines[1].split()[:5] == ["vgg16", "14.71", f"{document['flops'] / 1e9:.2f}", "59", "512"]


def test_every_published_file_is_listed():
    for version, files in IMAGENET.items():
        for backbone in files:
            assert version in model_list.weights(f"{backbone}_cbam")
            assert files[backbone].license in model_list.weights(backbone)
    assert all(model_list.weights(name) for name in MODELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "unknown model 'resnet51': choose among resnet10,"),
        (["vgg16", "--image-size=8"], "--image-size=8: give at least 32 pixels"),
    ],
)
def test_what_cannot_be_listed_is_told(arguments, message, monkeypatch, capsys):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, capsys, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in TRANSFORMERS])
def test_the_table_has_what_is_measured(name):
    measured = model_list.measure(name, model_list.default_size(name))
    told = model_list.cost(name)
    assert (told.parameters, told.dimension) == (measured.parameters, measured.dimension)
    assert told.flops == pytest.approx(measured.flops, rel=1e-6)  # XLA adds them up in float32.


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_table_has_what_one_block_and_two_tell_of_a_transformer(name, monkeypatch):
    # Tracing 40 blocks takes long; each costs as much as any other.
    variant = TRANSFORMERS[name]
    one, two = (measured_of_depth(variant, depth, monkeypatch) for depth in (1, 2))
    expected = [a + (variant.depth - 1) * (b - a) for a, b in zip(one, two, strict=True)]
    found = model_list.cost(name)
    assert [found.parameters, found.dimension] == expected[::2]
    assert found.flops == pytest.approx(expected[1], rel=1e-4)  # XLA adds them up in float32.


def measured_of_depth(variant, depth, monkeypatch):
    shallow = dataclasses.replace(variant, depth=depth)
    name = repr(shallow)  # One of its own: costs are cached by it.
    monkeypatch.setitem(TRANSFORMERS, name, shallow)
    monkeypatch.setitem(MODELS, name, (name, ""))
    return model_list.measure(name, variant.image_size)
