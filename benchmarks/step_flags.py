"""The flags of a step that is measured in both libraries."""

import argparse
from typing import Any

from cbam_jax.benchmark import DTYPES, check_classes

MODELS = ("resnet18", "resnet18_cbam", "resnet50", "resnet50_cbam")


def add_step_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--model", choices=MODELS, default="resnet50_cbam")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, help="default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--images_per_class", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns that are measured")
    parser.add_argument(
        "--steps_per_repeat", type=int, help="in a row; default: 1 on a CPU, 20 on a GPU"
    )


def complete(
    parser: argparse.ArgumentParser, options: dict[str, Any], *, on_cpu: bool
) -> dict[str, Any]:
    """The options with the platform's defaults; ends in one line where they make no batch."""
    defaults = (16, "float32", 1) if on_cpu else (256, "bfloat16", 20)
    names = ("batch_size", "dtype", "steps_per_repeat")
    given = {name: value for name, value in options.items() if value is not None}
    options = dict(zip(names, defaults, strict=True)) | given
    for name, value in options.items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    check_classes(parser, options["batch_size"], options["images_per_class"])
    return options
