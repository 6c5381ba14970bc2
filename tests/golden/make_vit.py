"""Writes vit.npz: what transformers, timm and open_clip make of tiny vision transformers.

Every parameter is drawn by its name, so that the file holds names, shapes and outputs alone.
Run with PyTorch and those libraries: python tests/golden/make_vit.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cbam_jax.backbones.vit import Variant  # noqa: E402

WIDTH, DEPTH, HEADS, PATCH, SIZE, MLP = 32, 2, 2, 8, 32, 64
_BASE = {
    "width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "image_size": SIZE,
    "mlp_width": MLP,
}  # fmt: skip


def variant(**fields):
    return Variant(**_BASE | fields)


_SIGLIP = {"pool": "map", "epsilon": 1e-6}
_CLIP = {"epsilon": 1e-5, "pre_norm": True, "patch_bias": False, "projection": 24}
_DINO2 = {"epsilon": 1e-6, "layer_scale": True, "activation": "gelu"}
_DINO3 = {"epsilon": 1e-5, "layer_scale": True, "position": "rope", "registers": 4}
VARIANTS = {
    "hf_siglip": variant(**_SIGLIP, activation="gelu_tanh", interpolation="bicubic"),
    "timm_siglip": variant(**_SIGLIP, activation="gelu", interpolation="bicubic_antialias"),
    "hf_clip": variant(**_CLIP, activation="quick_gelu", interpolation="bicubic"),
    "open_clip": variant(**_CLIP, activation="quick_gelu", interpolation="bicubic_antialias"),
    "timm_clip": variant(**_CLIP, activation="gelu", interpolation="bicubic_antialias"),
    "hf_dinov2": variant(**_DINO2, interpolation="bicubic"),
    "hf_dinov2_reg": variant(**_DINO2, registers=4, interpolation="bicubic_antialias"),
    "hf_dinov2_giant": variant(
        **_DINO2 | {"activation": "silu", "gated": True, "mlp_width": 88}, interpolation="bicubic"
    ),
    "timm_dinov2": variant(**_DINO2, interpolation="bicubic_antialias"),
    "timm_dinov2_reg": variant(**_DINO2, registers=4, interpolation="bicubic_antialias"),
    "hf_dinov3": variant(**_DINO3, activation="gelu"),
    "hf_dinov3_gated": variant(**_DINO3, activation="silu", gated=True),
    "timm_dinov3": variant(**_DINO3, activation="gelu"),
    "timm_dinov3_plain": variant(**_DINO3, activation="gelu", qkv_bias=False),
}
# Of the native size; smaller and larger, not square, no multiples of the patch.
SIDES = ((32, 32), (43, 60), (24, 71))
GOLDEN = ("hf_siglip", "open_clip", "hf_dinov2", "hf_dinov3")


def parameter(name, shape):
    """Numbers of a parameter by its name and shape, of a size that shows in the output.

    Tokens are small, so that LayerNorm's epsilon shows.
    """
    rng = np.random.default_rng(list(f"{name}{tuple(shape)}".encode()))
    numbers = np.asarray(rng.normal(size=shape))
    if any(
        part in name for part in ("patch_embed", "conv1", "position", "pos_embed", "class", "cls")
    ):
        return (0.02 * numbers / np.sqrt(max(np.prod(shape[2:]), 1))).astype(np.float32)
    if len(shape) < 2:
        return np.asarray(0.6 + 0.5 * numbers, np.float32)
    return (2.0 * numbers / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)


def images(height, width):
    rng = np.random.default_rng([height, width])
    return rng.normal(size=(2, height, width, 3)).astype(np.float32)


def _transformers(name):
    import transformers as hf

    shape = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "image_size": SIZE, "patch_size": PATCH, "attn_implementation": "eager",
    }  # fmt: skip
    mlp = {"intermediate_size": MLP}
    if name == "hf_siglip":
        model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape, **mlp))
        options = {"interpolate_pos_encoding": True}
        return model, lambda x: model(x, **options)[:2]
    if name == "hf_clip":
        config = hf.CLIPVisionConfig(**shape, **mlp, projection_dim=24)
        model = hf.CLIPVisionModelWithProjection(config)
        return model, lambda x: (None, model(x, interpolate_pos_encoding=True).image_embeds)
    if name == "hf_dinov2_reg":
        config = hf.Dinov2WithRegistersConfig(**shape, mlp_ratio=MLP // WIDTH)
        model = hf.Dinov2WithRegistersModel(config)
    elif name.startswith("hf_dinov2"):
        giant = {"use_swiglu_ffn": True, "mlp_ratio": 4} if "giant" in name else {}
        model = hf.Dinov2Model(hf.Dinov2Config(**shape | {"mlp_ratio": MLP // WIDTH} | giant))
    else:
        gated = {"use_gated_mlp": True, "hidden_act": "silu"} if "gated" in name else {}
        config = hf.DINOv3ViTConfig(**shape, **mlp, num_register_tokens=4, **gated)
        model = hf.DINOv3ViTModel(config)
    return model, lambda x: model(x)[:2]


def _timm(name):
    import timm

    shape = {
        "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH,
        "mlp_ratio": MLP // WIDTH, "dynamic_img_size": True,
    }  # fmt: skip
    architecture, options = {
        "timm_siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
        "timm_clip": ("vit_base_patch16_clip_224", {"num_classes": 24}),
        "timm_dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
        "timm_dinov2_reg": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
        "timm_dinov3": ("vit_small_patch16_dinov3_qkvb", {"num_classes": 0}),
        "timm_dinov3_plain": ("vit_small_patch16_dinov3", {"num_classes": 0}),
    }[name]
    if "dinov3" in name:
        options |= {"global_pool": "token"}
    model = timm.create_model(architecture, img_size=SIZE, **shape, **options)
    if name == "timm_clip":
        import torch

        model.head = torch.nn.Linear(WIDTH, 24, bias=False)

    def run(x):
        height, width = (PATCH * (side // PATCH) for side in x.shape[2:])
        tokens = model.forward_features(x[..., :height, :width])
        return tokens, model.forward_head(tokens)

    return model, run


def _open_clip():
    import open_clip
    import torch
    from open_clip.model import resize_pos_embed

    config = {
        "embed_dim": 24, "quick_gelu": True,
        "vision_cfg": {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS,
                       "mlp_ratio": MLP // WIDTH, "patch_size": PATCH, "image_size": SIZE},
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    model = open_clip.CLIP(**config)

    def run(x):
        # open_clip stretches the embedding once, when it loads weights.
        grid = [side // PATCH for side in x.shape[2:]]
        x = x[..., : grid[0] * PATCH, : grid[1] * PATCH]
        visual, kept = model.visual, model.visual.positional_embedding
        state = {"visual.positional_embedding": kept.detach().clone()}

        class Shape:
            class visual:
                grid_size = tuple(grid)

        if grid != [SIZE // PATCH] * 2:
            resize_pos_embed(state, Shape)
        visual.positional_embedding = torch.nn.Parameter(state["visual.positional_embedding"])
        try:
            return None, model.encode_image(x)
        finally:
            visual.positional_embedding = kept

    return model, run


def torch_model(name):
    """A library's model with drawn parameters, and a function to tokens (or None), embedding."""
    import torch

    from benchmarks.torchvision_stubs import import_torchvision

    import_torchvision()

    torch.manual_seed(0)
    makers = {"hf": lambda: _transformers(name), "timm": lambda: _timm(name), "open": _open_clip}
    model, run = makers[name.split("_")[0]]()
    model.eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.from_numpy(parameter(key, tuple(tensor.shape))))

    def outputs(pixels):
        with torch.no_grad():
            found = run(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        return [None if part is None else part.numpy() for part in found]

    return model, outputs


def main():
    arrays = {}
    for name in GOLDEN:
        model, outputs = torch_model(name)
        floats = {k: t for k, t in model.state_dict().items() if t.dtype.is_floating_point}
        arrays[f"{name}/names"] = np.array([f"{k} {list(t.shape)}" for k, t in floats.items()])
        for height, width in SIDES[1:]:
            tokens, embedding = outputs(images(height, width))
            arrays[f"{name}/{height}x{width}/embedding"] = embedding
            if tokens is not None:
                arrays[f"{name}/{height}x{width}/tokens"] = tokens[:, :7]
    np.savez_compressed(Path(__file__).parent / "vit.npz", **arrays)


if __name__ == "__main__":
    main()
