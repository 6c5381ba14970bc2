"""Prepares a dataset, checks one's own photos, or verifies a copy of DeepFashion.

``python -m cbam_jax.datasets prepare NAME``, ``python -m cbam_jax.datasets verify NAME``.
"""

import argparse
import sys

from cbam_jax import InputError
from cbam_jax.datasets import check_options, is_folder


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0, 1 where ``verify`` finds something wrong, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m cbam_jax.datasets", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="prepare a dataset, or check one's own photos")
    prepare.add_argument("name", help="a dataset, photos.csv or ./photos/")
    prepare.add_argument("--data_dir", help="where prepared datasets live")
    prepare.add_argument("--manual_dir", help="the folder of what was fetched by hand")
    prepare.add_argument("--on_bad_image", default="fail", help="fail (default) or skip")
    verify = commands.add_parser(
        "verify", help="check a copy of DeepFashion: counts, missing, unreadable, leaking images"
    )
    verify.add_argument("name", help="deepfashion_inshop[/highres], ..., as for prepare")
    verify.add_argument("--manual_dir", required=True, help="the folder of what was fetched")
    verify.add_argument("--all", action="store_true", help="print every finding, not ten of a kind")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            return _verify(options.name, options.manual_dir, options.all)
        _prepare(options.name, options.data_dir, options.manual_dir, options.on_bad_image)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _verify(name: str, manual_dir: str, show_all: bool) -> int:
    check_options(manual_dir=manual_dir, on_bad_image="fail")
    from cbam_jax.datasets.prepared import BY_HAND, make_builder

    if name.partition("/")[0] not in BY_HAND:
        raise InputError(
            f"verify does not know '{name}': it knows {', '.join(BY_HAND)}; prepare checks others"
        )
    from cbam_jax.datasets.deepfashion_verify import verify

    return verify(make_builder(name, None, manual_dir, "fail"), show_all=show_all)


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
