"""Weights from elsewhere into our models, strictly in both directions.

Every tensor of the source is used or of a kind that may be left over, every tensor of the model is
set or of a kind that may start fresh, and no shape is ever bent to fit. What can't be seen: a
square kernel that was stored transposed, since its shape is the same.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import InputError
from cbam_jax.backbones.vit import Variant, VisionTransformer
from cbam_jax.foreign_files import shown
from cbam_jax.pretrained.names import family_name, our_layout, torch_name, torch_shape
from cbam_jax.pretrained.published import IMAGENET, backbone_name, fetch_imagenet
from cbam_jax.pretrained.repositories import HUB, fetch_repository
from cbam_jax.pretrained.sources import Source, flatten, read_arrays, unwrap, without_prefix
from cbam_jax.pretrained.vit_folders import describe
from cbam_jax.pretrained.vit_names import is_left_over, vit_arrays

# What a model may have and a source not, whole: it then starts fresh. aux1 and aux2 are GoogLeNet's
# auxiliary classifiers.
FRESH = ("stem_attention", "last_attention", "projection", "pool", "class_head", "aux1", "aux2")
# What a source may have and a model not, whole: it is then left over. timm's VGG has its
# classifier in pre_logits and head; class_head is of our own runs with cross-entropy, proxies of
# those whose loss has some.
LEFT_OVER = ("fc", "classifier", "pre_logits", "head", "class_head", "aux1", "aux2", "proxies")
# Counters of torch's BatchNorm, and the attention that the original CBAM code has in every block.
_LEFT_OVER_ANYWHERE = re.compile(r"(^|\.)num_batches_tracked$|^layer\d\.\d+\.cbam\.")


# A report of a mismatch lists so many, of names that a stranger chose.
_MOST_LISTED = 10_000


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor, by torchvision's names.

    Attributes:
        source: where the weights came from.
        loaded: set from the source.
        fresh: of the model, not in the source, left as they were.
        unused: of the source, not in the model.
    """

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def summary(self) -> str:
        """One line with the counts.

        >>> LoadReport("x.pth", ("conv1.weight",), (), ("fc.weight", "fc.bias")).summary()
        'x.pth: 1 tensors loaded, 0 start fresh, 2 unused (fc)'
        """
        fresh, unused = _groups(self.fresh), _groups(self.unused)
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded, "
            f"{len(self.fresh)} start fresh{fresh}, {len(self.unused)} unused{unused}"
        )


def _groups(names: tuple[str, ...]) -> str:
    counters = {name for name in names if name.endswith("num_batches_tracked")}
    groups = sorted({name.split(".")[0] for name in names if name not in counters})
    groups += ["num_batches_tracked"] if counters else []
    return f" ({', '.join(groups)})" if groups else ""


def load_pretrained(
    model: nnx.Module, source: Source, *, cache: Path | None = None, mirror: str | None = None
) -> LoadReport:
    """Set a model's weights in place from another's, strictly; on an error the model is untouched.

    Args:
        model: an ``EmbeddingModel``, a ``Classifier``, a backbone, or one of their parts.
        source: ``"imagenet"`` or ``"imagenet_v2"``: torchvision's published file for the model's
            backbone, or of EfficientNet-Lite0 the one in ``cbam_jax[lite]``. Or the path of a
            ``.safetensors`` or torch file with torchvision's, timm's, Hugging Face transformers',
            EfficientNet-PyTorch's or the original CBAM code's names; a vision transformer's with
            transformers', timm's, open_clip's or its authors' names; a folder of
            ``save_pretrained`` or of these libraries, or ``"hf:user/model"`` of the Hugging Face
            hub; the folder of a run, whose last checkpoint is taken. Or a mapping
            of names to arrays, ours or torch's.
        cache: folder for fetched files; None: ``$CBAM_JAX_CACHE``, or ``~/.cache/cbam_jax``.
        mirror: address in place of torchvision's; None: ``$CBAM_JAX_MIRROR``, or torchvision's.

    Returns:
        What was loaded, what starts fresh (attention, projection and pooling that the source has
        nothing of), and what is left over (classifiers that the model has nothing of, counters).

    Raises:
        InputError: the source can't be had or read, or does not fit: one error lists everything
            that is missing, unexpected or of another shape.

    >>> from cbam_jax.backbones.googlenet import BasicConv
    >>> conv = BasicConv(3, 8, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    >>> norm = dict.fromkeys(["weight", "bias", "running_mean", "running_var"], np.ones(8))
    >>> source = {"conv.weight": np.ones((8, 3, 3, 3))} | {f"bn.{k}": v for k, v in norm.items()}
    >>> load_pretrained(conv, source).summary()
    'given arrays: 5 tensors loaded, 0 start fresh, 0 unused'
    """
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    ours = {torch_name(".".join(map(str, path))): (path, variable) for path, variable in state}
    if isinstance(source, str) and source in IMAGENET:
        backbone = backbone_name(_backbone_tensors(ours))
        source = fetch_imagenet(backbone, source, cache=cache, mirror=mirror)
    if isinstance(source, str) and source.startswith(HUB):
        source = fetch_repository(source)
    label = "given arrays" if isinstance(source, Mapping) else str(source)
    own = {name.partition(".")[0] for name in ours}
    variant = _variant(model)
    if variant is not None and not isinstance(source, Mapping) and Path(source).is_dir():
        _check_variant(variant, source)
    theirs, in_our_layout = _named_arrays(read_arrays(source), label, own, variant)

    loaded = sorted(ours.keys() & theirs.keys())
    fresh = sorted(ours.keys() - theirs.keys())
    unused = sorted(theirs.keys() - ours.keys())
    new, old = _lacking(FRESH, theirs), _lacking(LEFT_OVER, ours)
    problems = [f"missing: {name}" for name in fresh if name.split(".")[0] not in new]
    problems += [
        f"unexpected: {name}"
        for name in unused
        if not (_is_left_over(name, old) or (variant is not None and is_left_over(name)))
    ]
    for name in loaded:
        problems += _misfits(name, *ours[name], theirs[name], in_our_layout)
    if problems:
        problem = _mismatch(label, problems, {"missing": ours, "unexpected": theirs})
        raise InputError(_under_prefixes(label, theirs, ours) or problem)
    updates = [
        (ours[name][0], _filled(*ours[name], theirs[name], in_our_layout)) for name in loaded
    ]
    nnx.update(model, nnx.from_flat_state(updates))
    return LoadReport(label, tuple(loaded), tuple(fresh), tuple(unused))


def _variant(model: Any) -> Variant | None:
    """Of a vision transformer, alone or in an embedding model; None: it is none."""
    backbone = getattr(model, "backbone", model)
    return backbone.variant if isinstance(backbone, VisionTransformer) else None


def _check_variant(variant: Variant, folder: str | PathLike) -> None:
    """Raise InputError where a folder's files say that the model computes something else."""
    description = describe(folder)
    if description is None:
        return
    for name in ("activation", "epsilon", "heads", "pool"):
        theirs, ours = getattr(description.variant, name), getattr(variant, name)
        if theirs != ours:
            flag = f"activation={theirs}" if name == "activation" else "name to another"
            raise InputError(
                f"{shown(folder)} is of a model with {name}={theirs}, this one has {ours}: "
                f"set --config.model.{flag}"
            )


def _misfits(
    name: str, path: tuple[Any, ...], variable: Any, array: np.ndarray, in_our_layout: bool
) -> list[str]:
    expected = tuple(variable.shape)
    if not in_our_layout:
        expected = torch_shape(path[-1], expected)
    if array.shape != expected:
        return [f"shape: {name} is {array.shape}, the model's is {expected}"]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return [f"dtype: {name} is {array.dtype}, not a floating-point number"]
    with np.errstate(over="ignore"):  # A number of eight bytes may be none of the model's.
        finite = np.all(np.isfinite(array.astype(variable.dtype, copy=False)))
    if not finite:
        return [f"value: {name} has NaN or infinity"]
    if path[-1] == "var" and np.any(array < 0):
        return [f"value: {name} has variances below zero"]
    return []


def _filled(path: tuple[Any, ...], variable: Any, array: np.ndarray, in_our_layout: bool) -> Any:
    """The model's variable with the source's numbers."""
    array = array if in_our_layout else our_layout(path[-1], array)
    return variable.replace(jnp.asarray(np.ascontiguousarray(array, dtype=variable.dtype)))


def _mismatch(label: str, problems: list[str], names: Mapping[str, Iterable[str]]) -> str:
    kinds = [problem.partition(":")[0] for problem in problems]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    first = f"{label} does not fit the model ({counts}): nothing was loaded; choose another model"
    lines = grouped(_by_whole_blocks(problems, names))
    more = len(lines) - _MOST_LISTED
    rest = [f"and {more} more"] if more > 0 else []
    return "\n  ".join([f"{first} or source", *lines[:_MOST_LISTED], *rest])


def _under_prefixes(label: str, theirs: Collection[str], ours: Collection[str]) -> str:
    """What to do with a file that holds the model, or several, beside something else; or nothing.

    >>> _under_prefixes("x.pth", ["net.fc.bias", "average.fc.bias", "step"], ["fc.bias"])
    "x.pth has the model's tensors under 'average.', 'net.': save one alone, without that prefix"
    """
    split = (name.partition(".") for name in theirs)
    counts = Counter(first for first, _, rest in split if rest in ours)
    most = sorted(first for first, count in counts.items() if 2 * count > len(ours))
    prefixes = ", ".join(f"'{first}.'" for first in most)
    found = f"{label} has the model's tensors under {prefixes}: save one alone, without that prefix"
    return found if most else ""


def _by_whole_blocks(problems: list[str], names: Mapping[str, Iterable[str]]) -> list[str]:
    """One line for a block of which nothing is there, or of which nothing is known.

    ``names`` are the model's of what is missing, the source's of what is unexpected.
    """
    sizes = Counter(
        f"{kind}: {block}" for kind, all_of in names.items() for block in map(_block, all_of)
    )
    found = Counter(map(_block, problems))
    lines: dict[str, None] = {}
    for problem in problems:
        block = _block(problem)
        whole = 1 < found[block] == sizes[block]
        lines[f"{block}.*: {found[block]} keys" if whole else problem] = None
    return list(lines)


def _block(name: str) -> str:
    """What stands up to the first number that is a part of its own; empty: there is none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def grouped(problems: Iterable[str]) -> list[str]:
    """Lines that differ in their first number alone as one, with the range of these numbers.

    >>> grouped(["missing: blocks.0.attn.qkv", "missing: norm", "missing: blocks.1.attn.qkv"])
    ['missing: blocks.0..1.attn.qkv', 'missing: norm']
    >>> grouped(["missing: blocks.3.*: 14 keys", "missing: blocks.4.*: 14 keys"])
    ['missing: blocks.3..4.*: 14 keys each']
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        before, number, after = (*re.split(r"\.(\d+)\.", problem, maxsplit=1), "", "")[:3]
        groups.setdefault((before, after), []).extend([int(number)] if number else [])
    return [line for (a, b), numbers in groups.items() for line in _lines(a, b, sorted(numbers))]


def _lines(before: str, after: str, numbers: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    each = [" each" if len(run) > 1 and after.startswith("*: ") else "" for run in runs]
    return [f"{before}.{s}.{after}{e}" for s, e in zip(spans, each, strict=True)] or [before]


def _lacking(groups: tuple[str, ...], names: Iterable[str]) -> set[str]:
    """Those of ``groups`` that have nothing among ``names``."""
    return set(groups) - {name.partition(".")[0] for name in names if "." in name}


def _is_left_over(name: str, groups: set[str]) -> bool:
    return name.split(".")[0] in groups or _LEFT_OVER_ANYWHERE.search(name) is not None


def _named_arrays(
    source: Mapping[str, Any], label: str, own: set[str], variant: Variant | None = None
) -> tuple[dict[str, np.ndarray], bool]:
    """The source's arrays by torchvision's names, and whether their layout is ours."""
    flat = without_prefix(flatten(unwrap(source), label), own)
    for average, plain in (("ema.", "params."), ("ema_batch_stats.", "batch_stats.")):
        if any(name.startswith(average) for name in flat):  # A run evaluates its average.
            flat = {name: array for name, array in flat.items() if not name.startswith(plain)}
            flat = {name.removeprefix(average): array for name, array in flat.items()}
    in_our_layout = any(name.endswith(".kernel") for name in flat)
    if variant is not None and not in_our_layout:
        try:
            return vit_arrays(flat, variant), in_our_layout
        except InputError as error:
            raise InputError(f"{label}: {error}") from error
    arrays = {}
    for name, array in flat.items():
        name = family_name(name)
        name = torch_name(name) if in_our_layout else name
        if name in arrays:
            raise InputError(f"{label}: two of its tensors are {name}; save one model alone")
        arrays[name] = array
    return arrays, in_our_layout


def _backbone_tensors(names: Iterable[str]) -> int:
    heads = (*FRESH, "fc", "classifier")
    return sum(name.split(".")[0] not in heads for name in names)
