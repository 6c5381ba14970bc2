"""Folders of vision transformers as others publish them: what their files say of the model.

Hugging Face's ``config.json`` and ``preprocessor_config.json``, timm's ``config.json``,
open_clip's ``open_clip_config.json``. What a format leaves to its library's defaults is taken from
these; where the files leave open what the model computes, an error says which file is missing.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cbam_jax import InputError
from cbam_jax.backbones.vit import Variant
from cbam_jax.backbones.vit_published import CLIP, DINOV3, sized
from cbam_jax.foreign_files import read_json, shown
from cbam_jax.preprocessing import Preprocessing, checked_scaling
from cbam_jax.pretrained.sources import WEIGHTS


class Description(NamedTuple):
    """What a folder's files say: the transformer, and how images are cut for it."""

    variant: Variant
    preprocessing: Preprocessing

    def arguments(self) -> dict[str, Any]:
        """Those of ``create_model`` that build it; it is not normalised, as its libraries have it.

        Only fields that are not the variant's default are written.
        """
        defaults = type(self.variant).__dataclass_fields__
        fields = {
            name: getattr(self.variant, name)
            for name, field in defaults.items()
            if getattr(self.variant, name) != field.default
        }
        scaling = {"mean": self.preprocessing.mean, "std": self.preprocessing.std}
        return {"name": "vit", "normalize": False, "transformer": fields | scaling}


# Hidden activations by Hugging Face's names and timm's.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "quickgelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
# The defaults of each of transformers' classes, which its files leave out.
_TOWER = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": _TOWER
    | {
        "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6, "vision_use_head": True,
    },
    "clip_vision_model": _TOWER
    | {
        "intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": 512,
    },
    "dinov2": _TOWER
    | {
        "mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "qkv_bias": True, "use_swiglu_ffn": False,
    },
    "dinov3_vit": _TOWER
    | {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 16,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True,
        "value_bias": True, "proj_bias": True, "mlp_bias": True, "use_gated_mlp": False,
        "num_register_tokens": 0,
    },
}  # fmt: skip
_DEFAULTS["dinov2_with_registers"] = _DEFAULTS["dinov2"] | {
    "patch_size": 16,
    "num_register_tokens": 4,
}
_TOWERS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
_TIMM = re.compile(
    r"vit_(small_plus|huge_plus|giantopt|giant|small|base|large|so400m|huge)_patch(\d+)_"
    r"(siglip|clip_quickgelu|clip|dinov2|reg4_dinov2|dinov3_qkvb|dinov3)(?:_(\d+))?"
)
_FILES = "config.json (Hugging Face's or timm's) or open_clip_config.json"


def describe(folder: str | os.PathLike) -> Description | None:
    """Read what a folder's files say of a vision transformer; None: they are not another library's.

    Raises:
        InputError: they are of a model that there is no form of here, or leave open what it
            computes.
    """
    folder = Path(folder)
    try:
        return _described(folder)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{shown(folder)}: its config is of no vision transformer that can be built "
            f"({shown(str(error))}): fetch it again, or build the model by its name and load the "
            "file of weights"
        ) from error


def _described(folder: Path) -> Description | None:
    if os.path.lexists(folder / "open_clip_config.json"):
        return _open_clip(_object(folder / "open_clip_config.json"))
    if not os.path.lexists(folder / "config.json"):
        return _without_config(folder)
    config = _object(folder / "config.json")
    if "architecture" in config and "model_type" not in config:
        return _timm(config, folder)
    return _transformers(config, folder) if "model_type" in config else None


def _unknown(folder: Path, librarys: str, kind: Any, known: str) -> InputError:
    return InputError(
        f"{shown(folder)} is of {librarys} {shown(repr(kind), 80)}, which is not read as a model: "
        f"{known} are; fetch one of these"
    )


def _without_config(folder: Path) -> None:
    found = [name for name in WEIGHTS if os.path.lexists(folder / name)]
    if found and not (folder / "checkpoints").is_dir():
        raise InputError(
            f"{shown(folder)} has {found[0]} but no {_FILES}, which says what the model is: its "
            "shape, GELU, epsilon, how positions are stretched: fetch that file too, from where "
            f"the weights come from; a training that names its model takes {found[0]} itself"
        )


def _object(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown(path)} is damaged ({shown(str(error))}): fetch it again"
        ) from error
    if not isinstance(document, dict):
        raise InputError(f"{shown(path)} is no JSON object: fetch it again")
    return document


def _side(size: Any) -> int:
    """Of a square, as a number, a pair, or by the names of its sides."""
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ValueError(f"size {size}: not a square")
        size = size[0]
    if type(size) is not int or not 1 <= size <= 4096:
        raise ValueError(f"size {size!r}: not a number of pixels")
    return size


def _activation(name: Any) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r}: one of {', '.join(_ACTIVATIONS)} is known")
    return _ACTIVATIONS[name]


def _transformers(config: Mapping[str, Any], folder: Path) -> Description | None:
    kind = config.get("model_type")
    if kind in _TOWERS:
        config = {"model_type": _TOWERS[kind], **config["vision_config"], **_projection(config)}
        kind = config["model_type"]
    if kind not in _DEFAULTS:
        raise _unknown(folder, "transformers'", kind, ", ".join(sorted({*_TOWERS, *_DEFAULTS})))
    fields = _DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None}
    variant = _transformers_variant(kind, fields)
    cut = _image_processor(folder)
    return Description(variant, _transformers_preprocessing(cut, variant.image_size))


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """How photos are cut: of a file of its own, or of what transformers 5 writes for text too."""
    if os.path.lexists(folder / "preprocessor_config.json"):
        return _object(folder / "preprocessor_config.json")
    if os.path.lexists(folder / "processor_config.json"):
        whole = _object(folder / "processor_config.json")
        if isinstance(whole.get("image_processor"), dict):
            return whole["image_processor"]
    raise InputError(
        f"{shown(folder)} has no preprocessor_config.json, nor a processor_config.json with an "
        "image_processor, which says how photos are cut and scaled for the model: fetch it too"
    )


def _projection(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole CLIP, whose own field counts: its towers' may have been left at the default."""
    return {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}


def _transformers_variant(kind: str, fields: Mapping[str, Any]) -> Variant:
    width = fields["hidden_size"]
    options: dict[str, Any] = {"interpolation": "bicubic"}
    mlp_width = fields.get("intermediate_size") or int(width * fields["mlp_ratio"])
    if kind == "siglip_vision_model":
        options["pool"] = "map"
        if not _flag(fields, "vision_use_head"):
            raise ValueError("vision_use_head is false: without it there is no embedding")
    elif kind == "clip_vision_model":
        options |= CLIP | {"projection": fields["projection_dim"]}
    elif kind.startswith("dinov2"):
        options |= {"layer_scale": True, "qkv_bias": _flag(fields, "qkv_bias")}
        if kind == "dinov2_with_registers":
            options |= {"registers": fields["num_register_tokens"]}
            options["interpolation"] = "bicubic_antialias"
        if _flag(fields, "use_swiglu_ffn"):
            options |= {"gated": True}
            mlp_width = (int(mlp_width * 2 / 3) + 7) // 8 * 8
    else:
        options = _dinov3_options(fields)
    gated_silu = kind.startswith("dinov2") and options.get("gated")
    return Variant(
        width=width,
        depth=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        patch_size=_side(fields["patch_size"]),
        image_size=_side(fields["image_size"]),
        mlp_width=mlp_width,
        activation="silu" if gated_silu else _activation(fields["hidden_act"]),
        epsilon=options.pop("epsilon", fields["layer_norm_eps"]),
        **options,
    )


def _dinov3_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["rope_theta"] != 100.0 or not (
        _flag(fields, "proj_bias") and _flag(fields, "mlp_bias")
    ):
        raise ValueError("rope_theta is not 100, or proj_bias or mlp_bias is false: not built here")
    if _flag(fields, "query_bias") != _flag(fields, "value_bias"):
        raise ValueError("query_bias and value_bias differ: not built here")
    return DINOV3 | {
        "epsilon": fields["layer_norm_eps"],
        "registers": fields["num_register_tokens"],
        "gated": _flag(fields, "use_gated_mlp"),
        "qkv_bias": fields["query_bias"],
    }


def _transformers_preprocessing(fields: Mapping[str, Any], image_size: int) -> Preprocessing:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not _flag(fields, step, True):
            raise ValueError(f"{step} is false: photos are always resized and scaled here")
    if not math.isclose(fields.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise ValueError(f"rescale_factor {fields['rescale_factor']}: not 1 / 255")
    size = fields.get("size", image_size)
    cropped = _flag(fields, "do_center_crop", "crop_size" in fields)
    side = _side(fields["crop_size"]) if cropped else _side(size)
    short = isinstance(size, Mapping) and "shortest_edge" in size
    short = short or (cropped and not isinstance(size, Mapping))
    if cropped and not short and side != _side(size):
        raise ValueError(f"photos squashed to {_side(size)} and cut to {side}: not built here")
    resample = fields.get("resample", 3)
    if resample not in (2, 3):
        raise ValueError(f"resample {resample!r}: 2 (bilinear) and 3 (bicubic) are known")
    return _preprocessing(
        side,
        side / _side(size) if short else 1.0,
        fields["image_mean"],
        fields["image_std"],
        resize="crop" if short else "squash",
        interpolation="bilinear" if resample == 2 else "bicubic",
    )


def _preprocessing(side: int, fraction: float, mean: Any, std: Any, **how: Any) -> Preprocessing:
    """Raise a ValueError, to which the folder's name is added, for what is out of range."""
    try:
        return Preprocessing(side, fraction, *checked_scaling(mean, std), **how)
    except InputError as error:
        raise ValueError(str(error)) from error


def _flag(fields: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """A field that is true or false: of other values Python takes most for true."""
    value = fields[name] if default is None else fields.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{name} {value!r}: neither true nor false")
    return value


def timm_variant(name: str) -> Variant:
    """Return what timm builds under a name.

    Raises:
        ValueError: it is none of those that can be built here.

    >>> timm_variant("vit_base_patch16_siglip_224").activation
    'gelu'
    >>> timm_variant("vit_base_patch14_dinov2.lvd142m").grid
    37
    """
    architecture = name.partition(".")[0]
    match = _TIMM.fullmatch(architecture)
    if match is None:
        raise ValueError(f"timm's {architecture!r}: of SigLIP, CLIP, DINOv2 and DINOv3 alone")
    size, patch, family, side = match[1], int(match[2]), match[3], match[4]
    options: dict[str, Any] = {"interpolation": "bicubic_antialias", "activation": "gelu"}
    if family == "siglip":
        tanh = (size, patch, side) in (("base", 32, "256"), ("large", 16, "512"))
        tanh = tanh or size == "giantopt" or (size == "so400m" and patch == 16)
        options |= {"pool": "map", "epsilon": 1e-6} | ({"activation": "gelu_tanh"} if tanh else {})
    elif family.startswith("clip"):
        options |= CLIP | {"epsilon": 1e-5}
        options |= {"activation": "quick_gelu"} if "quick" in family else {}
    elif family.endswith("dinov2"):
        options |= {
            "epsilon": 1e-6,
            "layer_scale": True,
            "registers": 4 * family.startswith("reg4"),
        }
        options |= {"gated": True, "activation": "silu"} if size == "giant" else {}
    else:
        options |= DINOV3 | {"interpolation": None, "qkv_bias": family.endswith("qkvb")}
        options |= {"gated": True, "activation": "silu"} if size.endswith("plus") else {}
    default = 518 if "dinov2" in family else 224
    return sized(size.removesuffix("_plus"), patch, int(side or default), **options)


def _timm(config: Mapping[str, Any], folder: Path) -> Description:
    name, cut = str(config["architecture"]), config.get("pretrained_cfg", config)
    if not name.startswith("vit_"):
        raise _unknown(folder, "timm's", name, "its vit_ of SigLIP, CLIP, DINOv2 and DINOv3")
    variant = timm_variant(name)
    if "clip" in name:
        projected = config.get("num_classes", cut.get("num_classes"))
        variant = dataclasses.replace(variant, projection=projected or None)
    variant = dataclasses.replace(
        variant, **_timm_arguments(config.get("model_args") or {}, variant)
    )
    side = _side(cut["input_size"][1:])
    mode = cut.get("crop_mode") or "center"
    resize = {"center": "crop", "squash": "squash", "border": "letterbox"}[mode]
    share = cut.get("crop_pct", 1.0)
    if type(share) not in (int, float):
        raise ValueError(f"crop_pct {share!r}: no number")
    short = math.floor(side / share)
    interpolation = {"bicubic": "bicubic", "bilinear": "bilinear"}[cut["interpolation"]]
    return Description(
        variant,
        _preprocessing(
            side,
            side / short if resize == "crop" else 1.0,
            cut["mean"],
            cut["std"],
            resize=resize,
            interpolation=interpolation,
        ),
    )


def _timm_arguments(arguments: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """A timm model's own arguments as fields; any that is not known is an error."""
    names = {"img_size": "image_size", "embed_dim": "width", "num_heads": "heads"}
    names |= {"patch_size": "patch_size", "depth": "depth", "act_layer": "activation"}
    changed: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "mlp_ratio":
            changed["mlp_width"] = int(arguments.get("embed_dim", variant.width) * value)
        elif name in names:
            changed[names[name]] = _activation(value) if name == "act_layer" else value
        elif name not in ("dynamic_img_size", "num_classes", "global_pool"):
            raise ValueError(f"model_args has {name!r}, which is not built here")
    return changed


_OPEN_CLIP_KNOWN = {
    "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout",
    "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop",
    "timm_drop_path", "output_tokens", "norm_kwargs", "act_kwargs",
}  # fmt: skip


def _open_clip(config: Mapping[str, Any]) -> Description:
    model, cut = config["model_cfg"], config.get("preprocess_cfg", {})
    vision = model["vision_cfg"]
    unknown = sorted(
        name for name in vision.keys() - _OPEN_CLIP_KNOWN if vision[name] not in (None, False)
    )
    if unknown:
        raise ValueError(f"vision_cfg has {unknown[0]!r}, which is not built here")
    if vision.get("timm_model_name"):
        if vision.get("timm_proj", "linear") not in ("none", "", None):
            raise ValueError(f"timm_proj {vision.get('timm_proj', 'linear')!r} is not built here")
        variant = timm_variant(vision["timm_model_name"])
        if vision.get("timm_pool", "avg") != ("map" if variant.pool == "map" else "token"):
            raise ValueError(f"timm_pool {vision.get('timm_pool', 'avg')!r} is not built here")
        variant = dataclasses.replace(variant, image_size=_side(vision.get("image_size", 224)))
    else:
        variant = _open_clip_variant(model, vision)
    side = variant.image_size if "size" not in cut else _side(cut["size"])
    return Description(variant, _open_clip_preprocessing(cut, side))


def _open_clip_variant(model: Mapping[str, Any], vision: Mapping[str, Any]) -> Variant:
    width = vision.get("width", 768)
    if vision.get("act_kwargs"):
        raise ValueError("vision_cfg has act_kwargs, which is not built here")
    return Variant(
        width=width,
        depth=vision.get("layers", 12),
        heads=width // vision.get("head_width", 64),
        patch_size=_side(vision.get("patch_size", 16)),
        image_size=_side(vision.get("image_size", 224)),
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        activation="quick_gelu" if _flag(model, "quick_gelu", False) else "gelu",
        epsilon=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        interpolation="bicubic_antialias",
        projection=model["embed_dim"],
        **CLIP,
    )


def _open_clip_preprocessing(cut: Mapping[str, Any], side: int) -> Preprocessing:
    mean = cut.get("mean", (0.48145466, 0.4578275, 0.40821073))
    std = cut.get("std", (0.26862954, 0.26130258, 0.27577711))
    mode = cut.get("resize_mode") or "shortest"
    fill = cut.get("fill_color", 0)
    return _preprocessing(
        side,
        1.0,
        mean,
        std,
        resize={"shortest": "crop", "squash": "squash", "longest": "letterbox"}[mode],
        interpolation=cut.get("interpolation", "bicubic"),
        pad_color=tuple(fill) if isinstance(fill, list) else (fill,) * 3,
    )
