"""Draws a labelled overview: ``python -m cbam_jax.datasets.garments --sheet sheet.png``."""

import argparse
import os
import sys

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets.garments import DOMAINS, contact_sheet


def main(arguments: list[str] | None = None) -> int:
    """Writes a contact sheet; returns 0, or 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        "python -m cbam_jax.datasets.garments",
        description="Draws a labelled sheet of synthetic garments.",
    )
    parser.add_argument(
        "--sheet",
        required=True,
        type=os.path.expanduser,
        help="the picture to write, such as sheet.png",
    )
    parser.add_argument("--items", type=int, default=3, help="items of each category")
    parser.add_argument("--views", type=int, default=4, help="views of each item")
    parser.add_argument("--image_size", type=int, default=128, help="pixels")
    parser.add_argument("--clutter", type=float, default=0.5, help="0 to 1")
    parser.add_argument("--domain", choices=DOMAINS, help="default: both, in turns")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    path = options.pop("sheet")
    try:
        _write_image(path, contact_sheet(**options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write_image(path: str, image: np.ndarray) -> None:
    try:
        written = cv2.imwrite(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        written = False
    if not written:
        raise InputError(f"cannot write {path}: name a .png or .jpg file in a folder that exists")


if __name__ == "__main__":
    sys.exit(main())
