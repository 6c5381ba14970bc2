"""What a folder of a vision transformer says of itself, damaged or made to do harm."""

import json

import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.pretrained import vit_folders

DINOV2 = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
CUT = {
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 32},
    "crop_size": 28, "do_center_crop": True, "resample": 3,
}  # fmt: skip


def folder_of(tmp_path, config=None, cut=None, open_clip=None):
    files = {
        "config.json": config or DINOV2,
        "preprocessor_config.json": cut or CUT,
        "open_clip_config.json": open_clip,
    }
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        if content is not None:
            (tmp_path / name).write_text(text)
    return tmp_path


def model(**values):
    return {"config": DINOV2 | values}


def cut(**values):
    return {"cut": CUT | values}


def timm(**values):
    fields = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    cut = fields | {"interpolation": "bicubic", "crop_pct": 0.9} | values
    return {"config": {"architecture": "vit_base_patch14_dinov2", "pretrained_cfg": cut}}


def clip(fields=None, **values):
    vision = {"layers": 2, "width": 64, "patch_size": 32}
    cut = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, **(fields or {})}}
    return {"open_clip": {**cut, "preprocess_cfg": values}}


BUILT = "no vision transformer that can be built"
# What is given in place of a folder's files, and a part of the line that refuses it.
FOLDERS = {
    "a transformer cut off": ({"config": '{"model_type": "din'}, "is damaged"),
    "a transformer nested deep": ({"config": "[" * 100_000}, "is damaged"),
    "a transformer that is a list": ({"config": "[1]"}, "no JSON object"),
    "a transformer of 10**12 numbers": (model(hidden_size=10**12), BUILT),
    "a transformer of -1 numbers": (model(hidden_size=-1), BUILT),
    "a transformer of half a number": (model(hidden_size=32.5), BUILT),
    "a transformer of text": (model(hidden_size="32"), BUILT),
    "a transformer of 10**9 layers": (model(num_hidden_layers=10**9), BUILT),
    "a transformer of layers of text": (model(num_hidden_layers="2"), BUILT),
    "a transformer of no heads": (model(num_attention_heads=0), BUILT),
    "a transformer of 5 heads": (model(num_attention_heads=5), BUILT),
    "a transformer of infinite width": (model(mlp_ratio=float("inf")), BUILT),
    "a transformer of NaN": (model(mlp_ratio=float("nan")), BUILT),
    "a transformer of 10**9 pixels": (model(image_size=10**9), BUILT),
    "a transformer of patches of nothing": (model(patch_size=0), BUILT),
    "a transformer of an epsilon of NaN": (model(layer_norm_eps=float("nan")), BUILT),
    "a transformer of an epsilon below zero": (model(layer_norm_eps=-1), BUILT),
    "a transformer of a list of activations": (model(hidden_act=["gelu"]), BUILT),
    "a transformer that calls": (model(hidden_act="os.system"), BUILT),
    "a transformer that clears the screen": (model(hidden_act="\x1b[2J"), BUILT),
    "10**9 registers": (
        model(model_type="dinov2_with_registers", num_register_tokens=10**9),
        BUILT,
    ),
    "a tower that is a list": ({"config": {"model_type": "clip", "vision_config": [1]}}, BUILT),
    "a tower that is not there": ({"config": {"model_type": "clip"}}, BUILT),
    "timm's name that is none": ({"config": {"architecture": "vit_evil_patch16_clip"}}, BUILT),
    "means of digits in a text": (cut(image_mean="123"), BUILT),
    "means of 10**300": (cut(image_mean=[1e300] * 3), BUILT),
    "means that are true": (cut(image_mean=[True] * 3), BUILT),
    "means of texts": (cut(image_mean=["0.5"] * 3), BUILT),
    "means by colour": (cut(image_mean={"a": 0.5, "b": 0.5, "c": 0.5}), BUILT),
    "a deviation of 10**-300": (cut(image_std=[1e-300] * 3), BUILT),
    "a deviation below zero": (cut(image_std=[-0.5] * 3), BUILT),
    "a share of 10**-300": (timm(crop_pct=1e-300), BUILT),
    "a share of nothing": (timm(crop_pct=0), BUILT),
    "a share of NaN": (timm(crop_pct=float("nan")), BUILT),
    "a share of 10**9 pixels": (timm(crop_pct=1e-7), BUILT),
    "a share of text": (timm(crop_pct="0.9"), BUILT),
    "a share that is true": (timm(crop_pct=True), BUILT),
    "timm's means of texts": (timm(mean=["0", "0", "0"]), BUILT),
    "a crop that is text": (cut(do_center_crop="no"), BUILT),
    "biases that are text": (model(qkv_bias="false"), BUILT),
    "an epsilon of text": (model(layer_norm_eps="1e-6"), BUILT),
    "a border of text": (clip(resize_mode="longest", fill_color="black"), BUILT),
    "a border of 256": (clip(resize_mode="longest", fill_color=256), BUILT),
    "open_clip's means of NaN": (clip(mean=[float("nan")] * 3), BUILT),
    "open_clip's text in the place of true": (clip({"quick_gelu": "false"}), BUILT),
    "a means of NaN": (cut(image_mean=[float("nan")] * 3), BUILT),
    "a deviation of nothing": (cut(image_std=[0, 0, 0]), BUILT),
    "a deviation of NaN": (cut(image_std=[float("nan")] * 3), BUILT),
    "means of two colours": (cut(image_mean=[0.5, 0.5]), BUILT),
    "a cut that is a list": ({"cut": "[1]"}, "no JSON object"),
    "a cut that is cut off": ({"cut": '{"size": {"shor'}, "is damaged"),
    "a cut nested deep": ({"cut": '{"size":' * 100_000}, "is damaged"),
    "a cut of three sides": (cut(size=[28, 28, 29], do_center_crop=False), BUILT),
    "a cut without means": ({"cut": {"size": 28}}, BUILT),
    "means of text": (cut(image_mean="abc"), BUILT),
    "means that are a number": (cut(image_mean=5), BUILT),
    "a crop of 10**9": (cut(crop_size=10**9), BUILT),
    "a crop of text": (cut(crop_size="28"), BUILT),
    "a filter of 99": (cut(resample=99), BUILT),
    "a filter that is a list": (cut(resample=[3]), BUILT),
    "a factor of text": (cut(rescale_factor="1"), BUILT),
    "open_clip without a tower": ({"open_clip": {"model_cfg": {}}}, BUILT),
    "open_clip's tower that is a list": (
        {"open_clip": {"model_cfg": {"vision_cfg": [1], "embed_dim": 8}}},
        BUILT,
    ),
    "open_clip's heads of nothing": (
        {"open_clip": {"model_cfg": {"vision_cfg": {"head_width": 0}, "embed_dim": 8}}},
        BUILT,
    ),
    "open_clip that is a list": ({"open_clip": [1]}, "no JSON object"),
}


def test_a_whole_folder_is_described(tmp_path):
    described = vit_folders.describe(folder_of(tmp_path))
    assert (described.variant.width, described.variant.depth) == (32, 2)
    assert described.preprocessing.image_size == 28


@pytest.mark.parametrize(
    "given", [timm(), clip(), clip(fill_color=[1, 2, 3]), cut(image_mean=[0] * 3)]
)
def test_what_the_hostile_ones_are_changed_from_is_described(given, tmp_path):
    assert vit_folders.describe(folder_of(tmp_path, **given)).preprocessing.image_size in (28, 224)


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_is_refused_in_one_line(what, tmp_path):
    given, message = FOLDERS[what]
    with pytest.raises(InputError, match=message) as caught:
        vit_folders.describe(folder_of(tmp_path, **given))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000
