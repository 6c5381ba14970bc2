"""Vision transformers against transformers, timm and open_clip; skipped where they are missing."""

import dataclasses
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_vit import SIDES, VARIANTS, images, torch_model

from cbam_jax.backbones.vit import VisionTransformer
from cbam_jax.pretrained import load_pretrained, vit_folders

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def their_model(name):
    libraries = {"hf": "transformers", "timm": "timm", "open": "open_clip"}
    if importlib.util.find_spec(libraries[name.split("_")[0]]) is None:
        pytest.skip(f"{name} is of a library that is not installed")
    return torch_model(name)


def ours(variant, source, **options):
    model = nnx.eval_shape(lambda: VisionTransformer(variant, rngs=nnx.Rngs(0)))
    report = load_pretrained(model, source)
    assert not report.fresh
    return model


def run(model, pixels):
    tokens = model.tokens(jnp.asarray(pixels))
    return np.asarray(tokens), np.asarray(model(jnp.asarray(pixels)))


def error(ours, theirs):
    """Of the largest entry."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_and_embedding(name, record_property):
    model, outputs = their_model(name)
    state = {k: t.numpy() for k, t in model.state_dict().items()}
    mine = ours(VARIANTS[name], state)
    worst = []
    for sides in SIDES:
        tokens, embedding = outputs(images(*sides))
        found = run(mine, images(*sides))
        worst.append(error(found[1], embedding))
        if tokens is not None:
            worst.append(error(found[0], tokens))
    print(f"{name}: {max(worst):.1e}")
    assert max(worst) < 1e-5


CHANGES = [
    ("hf_siglip", {"activation": "gelu"}),
    ("timm_siglip", {"activation": "gelu_tanh"}),
    ("hf_clip", {"activation": "gelu"}),
    ("hf_clip", {"epsilon": 1e-6}),
    ("hf_dinov2", {"epsilon": 1e-5}),
    ("hf_dinov2", {"interpolation": "bicubic_antialias"}),
    ("hf_dinov2", {"interpolation": "bicubic_offset"}),
    ("timm_dinov2", {"interpolation": "bicubic"}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_another_convention_shows(name, change):
    model, outputs = their_model(name)
    state = {k: t.numpy() for k, t in model.state_dict().items()}
    mine = ours(dataclasses.replace(VARIANTS[name], **change), state)
    pixels = images(*SIDES[1])
    assert error(run(mine, pixels)[1], outputs(pixels)[1]) > 3e-5


@pytest.mark.parametrize("parts", ["kqv", "vkq", "qvk"])
def test_another_order_of_queries_keys_and_values_shows(parts):
    model, outputs = their_model("timm_dinov2")
    state = {k: t.numpy() for k, t in model.state_dict().items()}
    for key in [k for k in state if "qkv" in k]:
        third = dict(zip("qkv", np.split(state[key], 3), strict=True))
        state[key] = np.concatenate([third[part] for part in parts])
    pixels = images(*SIDES[1])
    assert error(run(ours(VARIANTS["timm_dinov2"], state), pixels)[1], outputs(pixels)[1]) > 1e-3


def test_dinov2s_authors_stretch_by_a_factor():
    # As their interpolate_pos_encoding does it.
    rng = np.random.default_rng(4)
    places, (height, width) = rng.normal(size=(1, 5, 4, 4)).astype(np.float32), (7, 3)
    from cbam_jax.backbones.vit import resize_matrix

    factor = ((height + 0.1) / 4, (width + 0.1) / 4)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(places), scale_factor=factor, mode="bicubic", antialias=False
    ).numpy()
    matrices = [resize_matrix(4, side, "bicubic_offset") for side in (height, width)]
    found = np.einsum("hi,wj,bcij->bchw", *matrices, places)
    assert error(found, theirs) < 1e-5


@pytest.mark.parametrize("kind", vit_folders._DEFAULTS)
def test_what_a_config_leaves_out_is_the_librarys_default(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    ours = vit_folders._DEFAULTS[kind]
    assert {name: theirs[name] for name in ours} == ours
