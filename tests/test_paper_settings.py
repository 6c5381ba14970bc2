"""What the rows of the tables are trained as, and what a damaged file of a workdir says."""

import pytest

from cbam_jax import InputError
from cbam_jax.paper import processes, settings


@pytest.mark.parametrize("text", ["", '{"data": ', "[" * 5000, "[1]"])
def test_a_damaged_file_of_a_workdir_is_told_with_the_remedy(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=f"metrics.json .*: move {tmp_path} away"):
        settings.read_kept(tmp_path / "metrics.json")


def test_rows_are_trained_by_the_package():
    assert processes.script("train") == ["-m", "cbam_jax", "train"]
    assert settings.row_config("resnet50_se", {}).endswith("configs/resnet50_se.py")
    with pytest.raises(InputError, match="--config=mine.py: no such file; give one, or one of"):
        settings.row_config("resnet50_se", {"config": "mine.py"})


def test_vgg16_has_batch_norm_where_nothing_is_pretrained():
    def trained(row, **fields):
        return settings.row_to_train(row, fields).model or row

    assert trained("vgg16_cbam") == "vgg16_cbam"
    assert trained("vgg16_cbam", config="clothing") == "vgg16_bn_cbam"
    given = {"config": "clothing", "model.pretrained": "mine.pth"}
    assert trained("vgg16_cbam", **given) == "vgg16_cbam"
    assert trained("googlenet_cbam", config="clothing") == "googlenet_cbam"
