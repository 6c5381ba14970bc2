"""Prepares a dataset, checks, shrinks or draws photos, finds images that are there twice.

``python -m cbam_jax.datasets prepare NAME``, ``... resize NAME FOLDER``, ``... verify NAME``,
``... draw FOLDER``, ``... manifest {sop,cub,cars} FOLDER OUT.csv``.
"""

import argparse
import sys
from typing import cast

from cbam_jax import InputError
from cbam_jax.datasets import check_options, is_folder, is_manifest
from cbam_jax.foreign_files import escaped


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0, 1 where ``verify`` finds something wrong, 2 after a user's mistake."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "verify":
            return _verify(options.name, options.data_dir, options.manual_dir, options.all)
        arguments = {key: value for key, value in vars(options).items() if key != "command"}
        commands = {"prepare": _prepare, "resize": _resize, "draw": _draw, "manifest": _manifest}
        commands[options.command](**arguments)
    except InputError as error:
        # Advice is given as an argument of a program's; here that is a flag.
        told = str(error).replace("on_bad_image='skip'", "--on_bad_image=skip")
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cbam_jax.datasets", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="prepare a dataset, or check one's own photos")
    resize = commands.add_parser(
        "resize", help="copy a dataset at the size that training needs, as JPEGs and a manifest.csv"
    )
    for command in (prepare, resize):
        command.add_argument("name", help="a dataset, photos.csv or ./photos/")
        command.add_argument("--data_dir", help="where prepared datasets live")
        command.add_argument("--manual_dir", help="the folder of what was fetched by hand")
        command.add_argument("--on_bad_image", default="fail", help="fail (default) or skip")
    resize.add_argument("folder", help="where to; the same command again goes on")
    resize.add_argument(
        "--short_side", type=int, default=256, help="of the copies in pixels; default: 256"
    )
    verify = commands.add_parser(
        "verify",
        help="check the images of any dataset: unreadable, equal or nearly equal in two splits; "
        "of a copy of DeepFashion the published counts too",
    )
    verify.add_argument("name", help="a dataset, photos.csv or ./photos/")
    verify.add_argument("--data_dir", help="where prepared datasets live")
    verify.add_argument("--manual_dir", help="the folder of what was fetched; DeepFashion needs it")
    verify.add_argument("--all", action="store_true", help="print every finding, not ten of a kind")
    draw = commands.add_parser(
        "draw", help="draw garments as photos, one folder a category, to try things out with"
    )
    draw.add_argument("folder", help="where to; the same command again goes on")
    draw.add_argument("--number", type=int, default=200, help="of photos; default: 200")
    draw.add_argument("--image_size", type=int, default=192, help="in pixels; default: 192")
    draw.add_argument("--seed", type=int, default=0, help="another one draws other garments")
    manifest = commands.add_parser(
        "manifest", help="write the manifest of a copy of SOP, CUB-200-2011 or Cars-196"
    )
    manifest.add_argument("name", choices=("sop", "cub", "cars"), help="what it is a copy of")
    manifest.add_argument("folder", help="of the copy, unpacked")
    manifest.add_argument("path", metavar="OUT.csv", help="the manifest, to train and measure with")
    manifest.add_argument(
        "--validation", type=int, default=0, help="classes to keep from training, to choose by"
    )
    return parser


def _verify(name: str, data_dir: str | None, manual_dir: str | None, show_all: bool) -> int:
    check_options(manual_dir=manual_dir, on_bad_image="fail")
    if not name.startswith("deepfashion_") or is_manifest(name) or is_folder(name):
        from cbam_jax.datasets.verifying import verify

        return verify(name, data_dir=data_dir, manual_dir=manual_dir, show_all=show_all)
    if manual_dir is None:
        raise InputError(f"verify {name} needs --manual_dir=FOLDER, the copy that it checks")
    from cbam_jax.datasets.building import BuilderFromFiles
    from cbam_jax.datasets.deepfashion import verify as verify_copy
    from cbam_jax.datasets.prepared import make_builder

    builder = cast(BuilderFromFiles, make_builder(name, None, manual_dir, "fail"))
    return verify_copy(builder, show_all=show_all)


def _prepare(name: str, data_dir: str | None, manual_dir: str | None, on_bad_image: str) -> None:
    check_options(manual_dir=manual_dir, on_bad_image=on_bad_image)
    if is_manifest(name):
        from cbam_jax.datasets.manifest import check_images

        counts = check_images(name, on_bad_image=on_bad_image)
        told = ", ".join(f"{escaped(split)} {count}" for split, count in counts.items())
        print(f"{name}: {sum(counts.values())} images can be used: {told}")
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


def _resize(name: str, folder: str, **options) -> None:
    check_options(manual_dir=options["manual_dir"], on_bad_image=options["on_bad_image"])
    from cbam_jax.datasets.resizing import MANIFEST, resize_dataset

    count = resize_dataset(name, folder, **options)
    print(f"{count} images; train on them with --config.data.name={folder.rstrip('/')}/{MANIFEST}")


def _manifest(name: str, folder: str, path: str, validation: int) -> None:
    from cbam_jax.datasets.benchmarks import write_manifest

    count = write_manifest(name, folder, path, validation=validation)
    print(f"{count} images; train on them with --config.data.name={path}")


def _draw(folder: str, **options) -> None:
    from cbam_jax.datasets.garments import draw_folder

    print(f"{draw_folder(folder, **options)} photos drawn in {folder}")


if __name__ == "__main__":
    sys.exit(main())
