"""Converts a torch file, or measures published weights on ImageNet's images.

``python -m cbam_jax.pretrained convert SRC.pth DST.safetensors``, ``... check NAME --images DIR``.
"""

import argparse
import json
import sys

from cbam_jax import InputError
from cbam_jax.pretrained import IMAGENET, convert


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
            # Imported late: converting needs none of our models.
            from cbam_jax.pretrained import check

            document = check(
                options.name, options.images, version=options.version, source=options.weights
            )
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(document))


if __name__ == "__main__":
    main()
