"""Weights from elsewhere into our models, and ours into a folder that others can load.

Strict in both directions: every tensor of the source is used or of a kind that may be left over,
every tensor of the model is set or of a kind that may start fresh, and no shape is ever bent to
fit. What can't be seen: a square kernel that was stored transposed, since its shape is the same.

    python -m cbam_jax.pretrained convert SRC.pth DST.safetensors
    python -m cbam_jax.pretrained check resnet50 --images FOLDER
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax import InputError
from cbam_jax.command_line import cache_folder
from cbam_jax.torch_files import read_torch
from cbam_jax.whole_files import written_whole

Source = str | os.PathLike | Mapping[str, Any]


class Published(NamedTuple):
    """One of torchvision's weight files; accuracies are on ImageNet's validation set, in %."""

    file: str
    top1: float
    top5: float
    resize: int  # pixels, short side before the central crop of 224


# torchvision's documentation, "Models and pre-trained weights". A file's name ends in the first
# digits of its SHA-256. V1 is what papers before 2022 used.
IMAGENET = {
    "imagenet": {
        "resnet18": Published("resnet18-f37072fd.pth", 69.758, 89.078, 256),
        "resnet34": Published("resnet34-b627a593.pth", 73.314, 91.420, 256),
        "resnet50": Published("resnet50-0676ba61.pth", 76.130, 92.862, 256),
        "resnet101": Published("resnet101-63fe2227.pth", 77.374, 93.546, 256),
        "resnet152": Published("resnet152-394f9c45.pth", 78.312, 94.046, 256),
        "vgg16": Published("vgg16-397923af.pth", 71.592, 90.382, 256),
        "vgg16_bn": Published("vgg16_bn-6c64b313.pth", 73.360, 91.516, 256),
        "googlenet": Published("googlenet-1378be20.pth", 69.778, 89.530, 256),
    },
    "imagenet_v2": {
        "resnet50": Published("resnet50-11ad3fa6.pth", 80.858, 95.434, 232),
        "resnet101": Published("resnet101-cd907fc2.pth", 81.886, 95.780, 232),
        "resnet152": Published("resnet152-f82ba261.pth", 82.284, 96.002, 232),
    },
}
# Parameters and running statistics tell the backbones apart by their number.
_BACKBONE_TENSORS = {
    100: "resnet18",
    180: "resnet34",
    265: "resnet50",
    520: "resnet101",
    775: "resnet152",
    26: "vgg16",
    78: "vgg16_bn",
    285: "googlenet",
}
_MIRROR = "https://download.pytorch.org/models"

# What a model may have and a source not, whole: it then starts fresh. aux1 and aux2 are GoogLeNet's
# auxiliary classifiers.
FRESH = ("stem_attention", "last_attention", "projection", "pool", "class_head", "aux1", "aux2")
# What a source may have and a model not, whole: it is then left over. timm's VGG has its
# classifier in pre_logits and head; class_head is of our own runs with cross-entropy.
LEFT_OVER = ("fc", "classifier", "pre_logits", "head", "class_head", "aux1", "aux2")
# Counters of torch's BatchNorm, and the attention that the original CBAM code has in every block.
_LEFT_OVER_ANYWHERE = re.compile(r"(^|\.)num_batches_tracked$|^layer\d\.\d+\.cbam\.")

# Other projects' names, in terms of torchvision's.
_RENAMES = [
    (r"^(params|batch_stats)\.", ""),  # the two parts of a run's checkpoint
    (r"^module\.", ""),  # torch's DataParallel
    # The original CBAM code.
    (r"ChannelGate\.mlp\.1\.", "channel.fc1."),
    (r"ChannelGate\.mlp\.3\.", "channel.fc2."),
    (r"SpatialGate\.spatial\.", "spatial."),
    # Hugging Face transformers' ResNet.
    (r"^resnet\.(embedder|encoder)\.", r"\1."),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"(^encoder\.stages\.\d\.layers\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
    (r"(^encoder\.stages\.\d\.layers\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
    (r"^classifier\.1\.", "fc."),
]
_TRANSFORMERS_BLOCK = re.compile(r"^encoder\.stages\.(\d)\.layers\.(\d+)\.")
_TRANSFORMERS_LAYER = re.compile(r"\.layer\.(\d)\.(convolution|normalization)\.")
# No model of images comes near these. A file of a few hundred bytes can hold dicts within dicts
# with more ways through them than there is time, and any number of views of the same numbers.
_MOST_PLACES = 100_000
_LONGEST_NAME = 1_000
_MOST_TIMES = 8
_MOST_LISTED = 10_000
# Ours on the left; a kernel is also laid out differently, see _our_layout.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


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
            backbone. Or the path of a ``.safetensors`` or torch file with torchvision's, timm's,
            Hugging Face transformers' or the original CBAM code's names; a folder of
            ``save_pretrained``; the folder of a run, whose last checkpoint is taken. Or a mapping
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
    ours = {_torch_name(".".join(map(str, path))): (path, variable) for path, variable in state}
    if isinstance(source, str) and source in IMAGENET:
        source = fetch_imagenet(_backbone_name(ours), source, cache=cache, mirror=mirror)
    label = "given arrays" if isinstance(source, Mapping) else str(source)
    theirs, in_our_layout = _named_arrays(_read_arrays(source), label)

    loaded = sorted(ours.keys() & theirs.keys())
    fresh = sorted(ours.keys() - theirs.keys())
    unused = sorted(theirs.keys() - ours.keys())
    problems = [f"missing: {name}" for name in fresh if not _may_start_fresh(name, theirs)]
    problems += [f"unexpected: {name}" for name in unused if not _may_be_left_over(name, ours)]
    updates = []
    for name in loaded:
        path, variable = ours[name]
        array, expected = theirs[name], tuple(variable.shape)
        if not in_our_layout:
            expected = _torch_shape(path[-1], expected)
        if array.shape != expected:
            problems.append(f"shape: {name} is {array.shape}, the model's is {expected}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"dtype: {name} is {array.dtype}, not a floating-point number")
        elif not problems:
            array = array if in_our_layout else _our_layout(path[-1], array)
            value = jnp.asarray(np.ascontiguousarray(array, dtype=variable.dtype))
            updates.append((path, variable.replace(value)))
    if problems:
        raise InputError(_mismatch(label, problems))
    nnx.update(model, nnx.from_flat_state(updates))
    return LoadReport(label, tuple(loaded), tuple(fresh), tuple(unused))


def _mismatch(label: str, problems: list[str]) -> str:
    kinds = [problem.partition(":")[0] for problem in problems]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    first = f"{label} does not fit the model ({counts}): nothing was loaded; choose another model"
    more = len(problems) - _MOST_LISTED
    rest = [f"and {more} more"] if more > 0 else []
    return "\n  ".join([f"{first} or source", *problems[:_MOST_LISTED], *rest])


def _may_start_fresh(name: str, theirs: Mapping[str, Any]) -> bool:
    group = name.split(".")[0]
    return group in FRESH and not any(other.startswith(f"{group}.") for other in theirs)


def _may_be_left_over(name: str, ours: Mapping[str, Any]) -> bool:
    group = name.split(".")[0]
    whole = group in LEFT_OVER and not any(other.startswith(f"{group}.") for other in ours)
    return whole or _LEFT_OVER_ANYWHERE.search(name) is not None


def _torch_name(name: str) -> str:
    """Our dotted path by torchvision's name: one rule for all models.

    >>> _torch_name("backbone.layer1.0.bn2.var")
    'layer1.0.bn2.running_var'
    """
    parent, _, leaf = name.removeprefix("backbone.").rpartition(".")
    return f"{parent}.{_LEAVES.get(leaf, leaf)}".removeprefix(".")


def _torch_shape(leaf: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which torch stores what we store as ``shape``."""
    if leaf == "kernel" and len(shape) == 4:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    return shape[::-1] if leaf == "kernel" else shape


def _our_layout(leaf: Any, array: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if leaf == "kernel" else array


def _named_arrays(source: Mapping[str, Any], label: str) -> tuple[dict[str, np.ndarray], bool]:
    """The source's arrays by torchvision's names, and whether their layout is ours."""
    flat = _flatten(_unwrap(source), label)
    if any(name.startswith("ema.") for name in flat):  # A run evaluates its average.
        flat = {name: array for name, array in flat.items() if not name.startswith("params.")}
        flat = {name.removeprefix("ema."): array for name, array in flat.items()}
    in_our_layout = any(name.endswith(".kernel") for name in flat)
    arrays = {}
    for name, array in flat.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        name = _torch_name(name) if in_our_layout else _from_transformers(name)
        if name in arrays:
            raise InputError(f"{label}: two of its tensors are {name}; save one model alone")
        arrays[name] = array
    return arrays, in_our_layout


def _unwrap(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a training script's checkpoint, by the usual keys."""
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(saved.get(wrapper), Mapping):
            return saved[wrapper]
    return saved


def _flatten(tree: Mapping[Any, Any], label: str) -> dict[str, np.ndarray]:
    """Each entry by the keys that lead to it. A dict may stand at many places, and so they count.

    >>> _flatten({"a": {"b": np.zeros(3)}, "epoch": 2}, "x.pth")
    {'a.b': array([0., 0., 0.]), 'epoch': array(0)}
    """
    flat = {}
    for count, (name, value) in enumerate(_places(tree)):
        if count >= _MOST_PLACES:
            raise InputError(f"{label} has more than {_MOST_PLACES} entries: save one model alone")
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise InputError(f"{label} has an entry named {name[:80]!a}: too long, or no name")
        if not isinstance(value, Mapping):
            # What is no array (an epoch, a list) is known by its name alone, and refused by it.
            flat[name] = np.asarray(value if hasattr(value, "shape") else 0)
    return flat


def _places(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _places(value, f"{prefix}{key}.")


def _from_transformers(name: str) -> str:
    """Count stages and layers from one, as torchvision does.

    >>> _from_transformers("encoder.stages.0.layers.2.layer.1.normalization.bias")
    'layer1.2.bn2.bias'
    """

    def layer(match: re.Match[str]) -> str:
        kind = "conv" if match[2] == "convolution" else "bn"
        return f".{kind}{int(match[1]) + 1}."

    name, blocks = _TRANSFORMERS_BLOCK.subn(
        lambda match: f"layer{int(match[1]) + 1}.{match[2]}.", name
    )
    return _TRANSFORMERS_LAYER.sub(layer, name) if blocks else name


def _backbone_name(ours: Mapping[str, Any]) -> str:
    heads = (*FRESH, "fc", "classifier")
    count = sum(name.split(".")[0] not in heads for name in ours)
    if count not in _BACKBONE_TENSORS:
        raise InputError(
            f"no ImageNet weights for a backbone of {count} tensors: there are some for "
            f"{', '.join(_BACKBONE_TENSORS.values())}; give a file instead"
        )
    return _BACKBONE_TENSORS[count]


def _read_arrays(source: Source) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise InputError(
            f"no weights at {path}: give a file, a folder, or one of {', '.join(IMAGENET)}"
        )
    if not path.is_file():
        raise InputError(f"{path} is not a regular file: give a file of weights")
    _check_hash(path)
    saved = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(saved, Mapping):
        raise InputError(f"{path} holds a {type(saved).__name__}: save a model's state_dict()")
    return saved


def _read_folder(folder: Path) -> Mapping[str, Any]:
    if (folder / "model.safetensors").exists():
        return _read_safetensors(folder / "model.safetensors")
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} has neither model.safetensors nor checkpoints: give a file")
    # Imported late: Orbax takes a second, and only a run needs it.
    from cbam_jax.checkpoint import Checkpoints

    with Checkpoints(folder / "checkpoints", best_metric="") as checkpoints:
        return checkpoints.restore("last", optimizer=False).model


_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # Not safetensors.numpy: it has no bfloat16.
    import safetensors

    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: damaged or truncated ({error}); fetch it again") from error
    unknown = sorted({tensor["dtype"] for _, tensor in tensors} - _SAFETENSORS_DTYPES.keys())
    if unknown:
        raise InputError(
            f"{path} has tensors of dtype {', '.join(unknown)}: save it in float32, "
            "float16 or bfloat16"
        )
    return {
        name: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(
            tensor["shape"]
        )
        for name, tensor in tensors
    }


def fetch_imagenet(
    backbone: str,
    version: str = "imagenet",
    *,
    cache: Path | None = None,
    mirror: str | None = None,
) -> Path:
    """Fetch torchvision's published file into the cache, or find it there; its hash is checked.

    An interrupted download is resumed by the next call.

    Args:
        backbone: one of the names in ``IMAGENET[version]``.
        version: ``"imagenet"`` (torchvision's V1) or ``"imagenet_v2"``.
        cache: see ``load_pretrained``.
        mirror: see ``load_pretrained``.

    Returns:
        The file's path.

    Raises:
        InputError: there is none for the backbone, it can't be fetched, or its hash is wrong.
    """
    if backbone not in IMAGENET[version]:
        raise InputError(
            f"no {version} weights for {backbone}: there are some for "
            f"{', '.join(IMAGENET[version])}; use imagenet"
        )
    file = IMAGENET[version][backbone].file
    path = (cache or cache_folder()) / file
    mirror = mirror or os.environ.get("CBAM_JAX_MIRROR") or _MIRROR
    # Imported late: only a download needs it.
    from cbam_jax.datasets.download import download

    remedy = f"fetch it elsewhere and put it at {path}, or set CBAM_JAX_MIRROR to a mirror"
    download(f"{mirror.rstrip('/')}/{file}", path, remedy=remedy)
    _check_hash(path)
    return path


def _check_hash(path: Path) -> None:
    """Compare a published file with the digits of SHA-256 in its name; others have none."""
    if path.name not in {p.file for version in IMAGENET.values() for p in version.values()}:
        return
    expected = path.stem.rpartition("-")[2]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"{path}: its SHA-256 begins with {found[:8]}, not with the {expected} in its name: "
            "damaged or another file; delete it and fetch it again"
        )


def convert(source: str | os.PathLike, destination: str | os.PathLike) -> int:
    """Write a torch file's tensors as ``.safetensors``, under the names they have.

    Returns:
        The number of tensors.

    Raises:
        InputError: the source can't be read, or the destination is no ``.safetensors``.
    """
    import safetensors
    import safetensors.numpy

    if Path(destination).suffix != ".safetensors":
        raise InputError(f"the destination {destination} must end in .safetensors")
    saved = _flatten(_unwrap(_read_arrays(source)), str(source))
    _check_amount(saved, source)
    arrays = {name: np.ascontiguousarray(array) for name, array in saved.items()}
    try:
        with written_whole(destination) as partial:
            safetensors.numpy.save_file(arrays, partial)
    except safetensors.SafetensorError as error:
        raise InputError(f"{source} can't be written as .safetensors: {error}") from None
    return len(arrays)


def _check_amount(arrays: Mapping[str, np.ndarray], source: str | os.PathLike) -> None:
    # Each array is at most its storage, but any number of them may share one.
    written = sum(array.nbytes for array in arrays.values())
    if Path(source).is_file() and written > _MOST_TIMES * Path(source).stat().st_size:
        raise InputError(
            f"{source}: its tensors share storages, and apart they would take {written} bytes, "
            f"more than {_MOST_TIMES} times the file; save a state_dict() alone"
        )


def check(
    name: str, images: str | os.PathLike, *, version: str = "imagenet", source: Source | None = None
) -> dict[str, Any]:
    """Measure a backbone with published weights on ImageNet images, beside the published figures.

    Args:
        name: a backbone, one of ``IMAGENET[version]``.
        images: folder with one folder a class, named so that sorting gives the classes' numbers,
            as ImageNet's synset names do.
        version: which published figures, and which weights unless ``source`` is given.
        source: weights, as for ``load_pretrained``, with their classifier.

    Returns:
        Top-1 and top-5 accuracy in %, measured and published, and the number of images.
    """
    # Imported late: loading weights into a model that is there needs none of our models.
    from cbam_jax.classifier import class_folders, create_classifier, image_accuracy

    if name not in IMAGENET[version]:
        raise InputError(
            f"no {version} weights for {name!r}: choose one of {', '.join(IMAGENET[version])}"
        )
    class_folders(Path(images))  # Its error belongs before the download.
    published = IMAGENET[version][name]
    model = nnx.eval_shape(lambda: create_classifier(name, rngs=nnx.Rngs(0)))
    report = load_pretrained(model, version if source is None else source)
    print(report.summary(), file=sys.stderr)
    measured = image_accuracy(model, images, resize=published.resize)
    figures = {"published_top1": published.top1, "published_top5": published.top5}
    return {"model": name, "weights": report.source, **measured, **figures}


def main(arguments: list[str] | None = None) -> None:
    """Run ``convert`` or ``check``; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m cbam_jax.pretrained")
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert", help="a torch file to .safetensors")
    converting.add_argument("source")
    converting.add_argument("destination")
    checking = commands.add_parser("check", help="accuracy on a folder of ImageNet images")
    checking.add_argument("name", help="backbone, such as resnet50")
    checking.add_argument("--images", required=True, help="folder with one folder a class")
    checking.add_argument("--version", default="imagenet", choices=IMAGENET)
    checking.add_argument("--weights", help="a file instead of the published one")
    options = parser.parse_args(arguments)
    try:
        if options.command == "convert":
            tensors = convert(options.source, options.destination)
            document = {"destination": options.destination, "tensors": tensors}
        else:
            document = check(
                options.name, options.images, version=options.version, source=options.weights
            )
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(document))


if __name__ == "__main__":
    main()
