"""Files and folders of weights, read and written anew."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden.make_backbones import FOLDER
from tiny_resnet import tiny, values
from torch_writing import doubled, push, shared_dicts, storage, tensor, zipped

from cbam_jax import InputError, pretrained
from cbam_jax.pretrained import load_pretrained, read_torch
from cbam_jax.pretrained.__main__ import main


def test_truncated_safetensors(source, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"conv1.weight": source["conv1.weight"]}, path)
    path.write_bytes(path.read_bytes()[:-100])
    model = tiny()
    before = values(model)
    with pytest.raises(InputError, match="x.safetensors: damaged or truncated"):
        load_pretrained(model, path)
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_bfloat16_safetensors(source, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(
        {k: np.asarray(a).astype(ml_dtypes.bfloat16) for k, a in source.items()}, path
    )
    model = tiny()
    load_pretrained(model, path)
    expected = source["bn1.bias"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(model.backbone.bn1.bias[...], expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.pth", "no weights at nothing.pth: .*imagenet"),
        (".", r"\(empty\) has no weights .* are model.safetensors, .* checkpoints"),
    ],
)
def test_missing_sources(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_pretrained(tiny(), path)


def test_convert_and_command_line(tmp_path, capsys):
    destination = tmp_path / "x.safetensors"
    torch_file = tmp_path / "plain.pth"
    torch_file.write_bytes((FOLDER / "torch_zip.pth").read_bytes())
    main(["convert", str(torch_file), str(destination)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tensors"] == 12
    converted, saved = safetensors.numpy.load_file(destination), read_torch(torch_file)
    for name in ("transposed", "strided", "expanded", "bfloat16"):
        np.testing.assert_array_equal(converted[name], saved[name])
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(torch_file), str(tmp_path / "x.bin")])
    assert caught.value.code == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_dicts_of_more_places_than_time_are_not_walked(tmp_path):
    for bottom in (b"N", b"}"):
        code = doubled(shared_dicts, 60).replace(push("bottom"), bottom)
        (tmp_path / "x.pth").write_bytes(zipped(code))
        with pytest.raises(InputError, match="x.pth has more than 20000 entries"):
            pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["a" * 1_001, "a\nb", "\x1b[2J"])
def test_names_that_are_none(key, tmp_path):
    with pytest.raises(InputError, match="given arrays has an entry named 'a*") as caught:
        pretrained.load_pretrained(nnx.Module(), {key: np.zeros(3)})
    assert str(caught.value).isprintable()
    deep = {}
    for _ in range(30):
        deep = {"a" * 40: deep}
    with pytest.raises(InputError, match="too long"):
        pretrained.load_pretrained(nnx.Module(), deep)


def test_views_of_one_storage_are_not_written_apart_without_end(tmp_path):
    (tmp_path / "x.pth").write_bytes(
        zipped(
            push({str(i): tensor(storage(25_000), 0, (25_000,), (1,)) for i in range(100)}),
            {"0": bytes(100_000)},
        )
    )
    with pytest.raises(InputError, match="would take 10000000 bytes, more than 8 times the file"):
        pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_numbers_that_safetensors_lacks(tmp_path):
    code = push({"a": tensor(storage(2, "ComplexDoubleStorage"), 0, (2,), (1,))})
    (tmp_path / "x.pth").write_bytes(zipped(code, {"0": bytes(32)}))
    with pytest.raises(InputError, match="x.pth can't be written as .safetensors: .*complex128"):
        pretrained.convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
