"""The names of vision transformers' tensors, in terms of timm's: four namings, and two layouts.

Hugging Face's of SigLIP, CLIP, DINOv2 and DINOv3; timm's, alone or as open_clip's trunk;
open_clip's own, which are those of OpenAI's CLIP; those of DINOv2's and DINOv3's authors. What none
of them knows keeps its name, so that it is told.
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from cbam_jax import InputError
from cbam_jax.backbones.vit import Variant

# The image tower of a model that has another for text, whose names are the same below; and what
# DINO's authors train, beside its heads.
_TOWER = re.compile(r"^(backbone\.|vision_model\.|visual_projection\.|visual\.(trunk\.)?|trunk\.)")
_PROJECTION = "visual_projection."
# In this order, on names without the tower's prefix.
_RENAMES = [
    (re.compile(pattern), new)
    for pattern, new in (
        # Blocks.
        (r"^(encoder\.layers?|(model\.)?layer|transformer\.resblocks)\.(\d+)\.", r"blocks.\3."),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # The authors of DINOv2, in chunks.
        (
            r"\.(self_attn|attention\.attention|attention|attn)\.(q|k|v)(_proj|uery|ey|alue)?"
            r"[._](weight|bias)$",
            r".attn.\2.\4",
        ),
        (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
        (
            r"\.(self_attn\.out_proj|attention\.output\.dense|attention\.o_proj|attn\.out_proj)\.",
            ".attn.proj.",
        ),
        (r"\.(layer_norm|ln_)([12])\.", r".norm\2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.mlp\.(up_proj|w2|fc1_x|c_fc)\.", ".mlp.fc1."),
        (r"\.mlp\.(gate_proj|w1)\.", ".mlp.fc1_g."),
        (r"\.mlp\.(down_proj|w3|weights_out|c_proj)\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        # What stands before them.
        (r"^embeddings\.", ""),
        (
            r"^(patch_embeddings\.projection|patch_embeddings|patch_embedding|patch_embed\.proj|conv1)\.",
            "patch_embed.",
        ),
        (r"^(position_embedding\.weight|position_embeddings|positional_embedding)$", "pos_embed"),
        (r"^class_embedding$", "cls_token"),
        (r"^(register_tokens|storage_tokens)$", "reg_token"),
        (r"^(pre_layrnorm|ln_pre)\.", "norm_pre."),
        # What stands after.
        (r"^(post_layernorm|layernorm|ln_post)\.", "norm."),
        (r"^attn_pool\.", "map_head."),
        (r"^head\.probe$", "map_head.latent"),
        (r"^head\.attention\.in_proj_(weight|bias)$", r"map_head.in_proj.\1"),
        (r"^head\.attention\.out_proj\.", "map_head.proj."),
        (r"^head\.layernorm\.", "map_head.norm."),
        (r"^head\.mlp\.", "map_head.mlp."),
        (r"^proj$", "proj.transposed"),
    )
]
# What a source may have and no model does: the tower for text, what training alone needs.
_LEFT_OVER = re.compile(
    r"^(text|text_model|text_projection|transformer|token_embedding|positional_embedding|ln_final|"
    r"logit_scale|logit_bias|attn_mask|mask_token|rope_embed|dino_head|ibot_head)(\.|$)"
    r"|\.position_ids$|\.bias_mask$"
)


def is_left_over(name: str) -> bool:
    """Whether a tensor, by ``vit_arrays``' name, is of no image tower, or of its training alone.

    >>> is_left_over("text_model.encoder.layers.0.mlp.fc1.weight"), is_left_over("blocks.0.x")
    (True, False)
    """
    return _LEFT_OVER.search(name) is not None


def vit_arrays(arrays: Mapping[str, np.ndarray], variant: Variant) -> dict[str, np.ndarray]:
    """Arrays of any of the four namings by ours, in torch's layout, joined and cut as ours are.

    Queries, keys and values become one tensor, the pooling's keys and values another; the class
    token gets the position embedding of its own place. A key without a bias gets one of zeros.

    Args:
        arrays: by the source's names.
        variant: of the model; timm names a projection as a classifier, and a gate as a layer.

    Raises:
        InputError: two are of one name, or have shapes that can be neither joined nor cut.
    """
    try:
        return _joined(_by_our_names(arrays), variant)
    except (ValueError, TypeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"tensors of shapes that no transformer has ({error})") from error


def _by_our_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    towers = any(_TOWER.match(name) for name in arrays)
    named: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        name = _renamed(name) if _TOWER.match(name) or not towers else name
        if name in named:
            raise InputError(f"two of its tensors are {name}; save one model alone")
        named[name] = array
    return named


def _joined(named: dict[str, np.ndarray], variant: Variant) -> dict[str, np.ndarray]:
    if variant.projection and "head.weight" in named and "proj.weight" not in named:
        named["proj.weight"] = named.pop("head.weight")
    if "proj.transposed" in named and "proj.weight" not in named:
        named["proj.weight"] = named.pop("proj.transposed").T
    for block in sorted({m[0] for m in map(re.compile(r"blocks\.\d+\.").match, named) if m}):
        _join_block(named, block)
        if variant.gated:
            _split_gate(named, block)
    _cut_pooling(named)
    _place_tokens(named, variant)
    return named


def _renamed(name: str) -> str:
    if name.startswith(_PROJECTION):
        return f"proj.{name.removeprefix(_PROJECTION)}"
    name = _TOWER.sub("", name)
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def _join_block(named: dict[str, np.ndarray], block: str) -> None:
    """Make one tensor of queries, keys and values, in place; what is there already stays."""
    parts = [f"{block}attn.{part}" for part in "qkv"]
    weight, bias = f"{block}attn.qkv.weight", f"{block}attn.qkv.bias"
    if all(f"{part}.weight" in named for part in parts) and weight not in named:
        named[weight] = np.concatenate([named.pop(f"{part}.weight") for part in parts])
    if f"{parts[0]}.bias" in named and f"{parts[2]}.bias" in named and bias not in named:
        biases = [named.pop(f"{part}.bias", None) for part in parts]
        zeros = np.zeros_like(biases[0])
        named[bias] = np.concatenate([zeros if part is None else part for part in biases])
    mask = named.get(f"{block}attn.qkv.bias_mask")
    if mask is not None and bias in named and named[bias].shape == mask.shape:
        # Not a product: its zeros stand where the bias may be anything.
        named[bias] = np.where(mask == 1, named[bias], np.zeros_like(named[bias]))


def _split_gate(named: dict[str, np.ndarray], block: str) -> None:
    """Cut what DINOv2's giant packs, gate first, in place: timm calls it as a plain layer."""
    for leaf in ("weight", "bias"):
        gate, up, both = (f"{block}mlp.{part}.{leaf}" for part in ("fc1_g", "fc1", "w12"))
        packed = both if both in named and up not in named else up
        if packed in named and gate not in named:
            named[gate], named[up] = np.array_split(named.pop(packed), 2)


def _cut_pooling(named: dict[str, np.ndarray]) -> None:
    """Cut what torch packs for the pooling's attention, in place."""
    for leaf in ("weight", "bias"):
        packed, query, rest = (f"map_head.{part}.{leaf}" for part in ("in_proj", "q", "kv"))
        if packed in named and query not in named and rest not in named:
            third = len(named[packed]) // 3
            named[query], named[rest] = np.split(named.pop(packed), [third])


def _place_tokens(named: dict[str, np.ndarray], variant: Variant) -> None:
    """Give tokens their three axes, and the class token the position of its place, in place."""
    for name in ("cls_token", "reg_token", "pos_embed", "map_head.latent"):
        if name in named and named[name].ndim in (1, 2):
            named[name] = named[name].reshape(1, -1, named[name].shape[-1])
    token, places = named.get("cls_token"), named.get("pos_embed")
    if token is None or places is None or token.ndim != 3 or places.ndim != 3:
        return
    if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (token, places)):
        return
    if token.shape[-1] == places.shape[-1] and places.shape[1] == variant.grid**2 + 1:
        named["cls_token"] = token.astype(np.float32) + places[:, :1].astype(np.float32)
        named["pos_embed"] = places[:, 1:]
