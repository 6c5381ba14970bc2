"""The flags of ``python -m cbam_jax.benchmark``; a mistake in them ends in one line."""

import argparse
import os
import tempfile
from typing import Any

import jax

from cbam_jax.benchmark.step import DTYPES
from cbam_jax.losses import MININGS
from cbam_jax.models import MODELS, POOLINGS
from cbam_jax.search import FIRST_PASSES


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of the commands ``train``, ``embed``, ``search`` and ``data``."""
    parser = argparse.ArgumentParser("python -m cbam_jax.benchmark", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the training step")
    _add_step(train)
    train.add_argument("--images_per_class", type=int, default=8)
    train.add_argument("--mining", choices=MININGS, default="batch_hard")
    _add_step(commands.add_parser("embed", help="the embedding step"))
    _add_search(commands.add_parser("search", help="exact search and its bare matrix product"))
    _add_data(commands.add_parser("data", help="images/s that are read, decoded and augmented"))
    return parser


def check(parser: argparse.ArgumentParser, command: str, options: dict[str, Any]) -> None:
    """Ends in one line where the options of a command cannot be."""
    for name, value in options.items():
        if type(value) is int and value < (name != "workers"):
            parser.error(f"--{name} is {value}, expected at least {int(name != 'workers')}")
    if command == "search":
        _check_search(parser, options)
    elif command != "data":
        _check_step(parser, options)


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=MODELS, default="resnet50_cbam", metavar="NAME")
    command.add_argument("--embedding_dim", type=int, help="of a projection; default: none")
    command.add_argument("--pooling", choices=POOLINGS, default="average")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--batch_size", type=int, default=64, help="images, on all devices")
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5, help="turns that are measured")
    command.add_argument(
        "--steps_per_repeat", type=int, help="in a row; default: 1 on a CPU, 20 elsewhere"
    )
    command.add_argument(
        "--no_plain",
        dest="plain",
        action="store_false",
        help="leave out the model without attention, which has to be compiled as well",
    )
    command.add_argument(
        "--trace",
        metavar="DIR",
        type=os.path.expanduser,
        help="folder for a profile of a few steps",
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", type=int, default=1000)
    command.add_argument("--gallery", type=int, help="default: 100,000, or those of a file")
    command.add_argument("--dim", type=int, default=512, help="of a file: as it says")
    command.add_argument(
        "--embeddings",
        metavar="FILE|clusters:0.05",
        help="embeddings.npz of an evaluation (more than it has: copies with noise), or unit "
        "vectors in 40 clusters of this spread; default: normally distributed",
    )
    command.add_argument(
        "--prepared", action="store_true", help="search a prepared gallery as well"
    )
    command.add_argument("--k", type=int, default=20)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument(
        "--first_pass", choices=FIRST_PASSES, help="default: what suits the device"
    )
    command.add_argument(
        "--memmap",
        type=os.path.expanduser,
        help="file to search in, instead of the devices' memory",
    )


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="NAME", help="as data.name; default: synthetic photos")
    command.add_argument("--split", default="train")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--batch_size", type=int, default=64, help="images, eight of a class")
    command.add_argument("--workers", type=int, default=0, help="processes; 0: threads")
    command.add_argument("--color_jitter", type=float, default=0.0, help="strength")
    command.add_argument("--count", type=int, default=8, help="batches in a repeat")
    command.add_argument("--repeats", type=int, default=5)


def _check_step(parser: argparse.ArgumentParser, options: dict) -> None:
    size, devices = options["batch_size"], options["devices"]
    _check_devices(parser, devices)
    if size % devices:
        parser.error(f"--batch_size {size} is no multiple of {devices} devices")
    if "images_per_class" in options:
        check_classes(parser, size, options["images_per_class"])
    if options["trace"] is not None:
        _check_writable(parser, options["trace"])


def _check_writable(parser: argparse.ArgumentParser, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--trace={folder}: {error.strerror}; give a folder to write to")


def _check_devices(parser: argparse.ArgumentParser, devices: int) -> None:
    found = jax.local_device_count()
    if devices <= found:
        return
    remedy = f"; XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes as many of a CPU"
    parser.error(
        f"--devices is {devices}, there are {found}"
        + (remedy if jax.default_backend() == "cpu" else "")
    )


def check_classes(parser: argparse.ArgumentParser, batch_size: int, images_per_class: int) -> None:
    """Ends in one line where a batch's classes give mining nothing to choose from."""
    if batch_size % images_per_class or batch_size == images_per_class or images_per_class == 1:
        parser.error(
            f"--batch_size {batch_size} with --images_per_class {images_per_class}: mining needs "
            "two classes or more, each of as many images, two or more"
        )


def _check_search(parser: argparse.ArgumentParser, options: dict) -> None:
    _check_devices(parser, options["devices"])
    if options["memmap"] and options["embeddings"]:
        parser.error("--memmap holds normal embeddings: leave out --memmap or --embeddings")
    gallery = options["gallery"] or 100_000
    if gallery % options["devices"]:
        parser.error(f"--gallery {gallery} is no multiple of {options['devices']} devices")
    if options["k"] > gallery:
        parser.error(f"--k is {options['k']}, expected at most --gallery {gallery}")
