"""Writes backbones.npz, torch_zip.pth and torch_legacy.pth: what torchvision and torch.save give.

Run as ``python tests/golden/make_backbones.py`` where torch and torchvision are installed. Weights
are drawn by name from a seed, so none need be stored; tests draw the same ones.
"""

import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.torchvision_stubs import import_torchvision

FOLDER = Path(__file__).parent
# Name, height, width. Odd sizes, where padding shows; GoogLeNet's such that each of its ceil-mode
# pools has a window that hangs over the edge.
CASES = (("resnet18", 65, 97), ("vgg16", 65, 97), ("googlenet", 47, 80))
NUM_CLASSES = 10


def seeded_array(name, shape):
    """Weights of one tensor by its torchvision name: signals neither die out nor explode."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.int64(0)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        array = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:  # running means and biases
        array = rng.normal(0, 0.1, shape)
    else:
        array = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    return array.astype(np.float32)


def seeded_images(height, width, batch=1):
    """Normalised images [b, h, w, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    return rng.normal(0, 1, (batch, height, width, 3)).astype(np.float32)


def seeded_torchvision(name, num_classes=1000):
    """torchvision's model in evaluation mode, with the seeded weights."""
    import torch

    torchvision = import_torchvision()
    options = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    if name.startswith("vgg"):
        options = {"init_weights": False}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=num_classes, **options)
    state = {
        key: torch.from_numpy(np.array(seeded_array(key, value.shape)))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def torch_auxiliary(model, images):
    """The logits of GoogLeNet's auxiliary classifiers; in evaluation torchvision skips them."""
    import torch

    seen = {}
    handles = [
        getattr(model, block).register_forward_hook(
            lambda *args, head=head: seen.update({head: getattr(model, head)(args[2])})
        )
        for head, block in {"aux1": "inception4a", "aux2": "inception4d"}.items()
    ]
    with torch.no_grad():
        model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for handle in handles:
        handle.remove()
    return [seen[head].numpy() for head in ("aux1", "aux2")]


def torch_features(name, model, images):
    """The last feature map [b, h, w, c], before pooling."""
    import torch

    seen = []
    module = {"resnet": "layer4", "vgg16": "features", "vgg16_bn": "features"}.get(
        "resnet" if name.startswith("resnet") else name, "inception5b"
    )
    handle = getattr(model, module).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    handle.remove()
    return seen[0].numpy().transpose(0, 2, 3, 1), logits.numpy()


def tensors():
    """Views, strides, shared storages, dtypes and containers, for the two file formats."""
    import torch

    base = torch.arange(42, dtype=torch.float32).reshape(6, 7) / 8
    return OrderedDict(
        base=base,
        transposed=base.t(),
        strided=base[1:5:2, 2:],
        expanded=base[:1].expand(3, 7),
        parameter=torch.nn.Parameter(base[0] * 2),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(5),
        half=base[2].half(),
        bfloat16=base[3].bfloat16(),
        bool=torch.tensor([True, False, True]),
        nested={"epoch": 3, "list": [1.5, "a", None, (base[5], 2)]},
    )


def main():
    """Write the three files."""
    import torch

    arrays = {}
    for name, height, width in CASES:
        model = seeded_torchvision(name, NUM_CLASSES)
        features, logits = torch_features(name, model, seeded_images(height, width))
        arrays |= {f"{name}_features": features, f"{name}_logits": logits}
        if name == "googlenet":
            arrays["googlenet_auxiliary"] = torch_auxiliary(model, seeded_images(height, width))
    versions = {"torch": torch.__version__, "torchvision": import_torchvision().__version__}
    np.savez_compressed(FOLDER / "backbones.npz", versions=str(versions), **arrays)
    torch.save(tensors(), FOLDER / "torch_zip.pth")
    torch.save(tensors(), FOLDER / "torch_legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
