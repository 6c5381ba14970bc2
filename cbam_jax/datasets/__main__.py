"""``python -m cbam_jax.datasets prepare NAME``: prepares a dataset, or checks one's own photos."""

import argparse
import sys

from cbam_jax import InputError
from cbam_jax.datasets import check_options, is_folder


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m cbam_jax.datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="prepare a dataset, or check one's own photos")
    prepare.add_argument("name", help="a dataset, photos.csv or ./photos/")
    prepare.add_argument("--data_dir", help="where prepared datasets live")
    prepare.add_argument("--manual_dir", help="the folder of what was fetched by hand")
    prepare.add_argument("--on_bad_image", default="fail", help="fail (default) or skip")
    options = parser.parse_args(arguments)
    try:
        _prepare(options.name, options.data_dir, options.manual_dir, options.on_bad_image)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(name: str, data_dir: str | None, manual_dir: str | None, on_bad_image: str) -> None:
    check_options(manual_dir=manual_dir, on_bad_image=on_bad_image)
    if name.lower().endswith(".csv"):
        from cbam_jax.datasets.manifest import check_images

        print(f"{name}: {check_images(name, on_bad_image=on_bad_image)} images can be used")
        return
    if is_folder(name):
        from cbam_jax.datasets import class_folders

        count = class_folders.check_images(name, on_bad_image=on_bad_image)
        print(f"{name}: {count} images can be used")
        return
    from cbam_jax.datasets.prepared import prepare

    builder = prepare(name, data_dir=data_dir, manual_dir=manual_dir, on_bad_image=on_bad_image)
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples} images")
    print(f"{name} is ready in {builder.data_dir}")


if __name__ == "__main__":
    sys.exit(main())
