"""``cbam-jax export``: a model's weights, for cbam_jax, or the model as a program, for others."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import cbam_jax
from cbam_jax import InputError, command_line, export, hub, runs
from cbam_jax.foreign_files import expanded, shown
from cbam_jax.pretrained import IMAGENET, PUBLISHED, published_name

_FORMATS = ("weights", *export.FORMATS)


def parse_flags() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="cbam-jax export",
        description="Write a model as a folder: its weights, which cbam_jax.load reads and the "
        "Hugging Face hub shows; or a program, which needs none of the model's code.",
    )
    parser.add_argument("source", help="a run; for programs also a folder or name of a model")
    parser.add_argument("folder", type=_folder, help="folder to write")
    parser.add_argument("--to", choices=_FORMATS, default="weights")
    parser.add_argument(
        "--checkpoint", default="best", help="of a run: best, last, untrained or a step"
    )
    parser.add_argument(
        "--platforms", help="of StableHLO, parted by commas: cpu, cuda, rocm, tpu (cpu,cuda,tpu)"
    )
    parser.add_argument(
        "--dtype", choices=export.DTYPES, help="of the backbone; default: the model's"
    )
    parser.add_argument("--license", help="of the weights; default: that of published ones")
    return command_line.parsed(parser)


def _folder(text: str) -> Path:
    """A folder to write; nothing, as of a variable that is not set, would be the current one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: give a folder, . for this one")
    return command_line.path(text)


def main() -> None:
    """Export a model, and print a JSON line."""
    flags = parse_flags()
    checkpoint = runs.parse_checkpoint(flags.checkpoint)
    if flags.to == "weights":
        for name in ("platforms", "dtype", "license"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name} is of programs: give --to=stablehlo, or leave it out")
        _check_run(flags.source)
        hub.export(flags.source, flags.folder, checkpoint)
        found = {"folder": str(flags.folder), "run": str(expanded(flags.source))}
    else:
        command_line.keep_compiled_programs()
        found = _export_program(flags, checkpoint)
    print(command_line.to_json(found))


def _check_run(source: str) -> None:
    """Raise InputError unless the source is a run, by its config.json or its checkpoints."""
    folder = expanded(source)
    if not runs.is_run(folder) and not os.path.lexists(folder / "config.json"):
        raise InputError(
            f"{shown(source)} is no run, and weights are exported of runs alone: give the workdir "
            "of a training, or --to=stablehlo for a program of another model"
        )


def _export_program(flags: argparse.Namespace, checkpoint: str | int) -> Mapping[str, Any]:
    if flags.platforms is not None and flags.to == "onnx":
        raise InputError(f"--platforms={shown(flags.platforms, 80)}: ONNX has none; leave it out")
    typed = "cpu,cuda,tpu" if flags.platforms is None else flags.platforms
    platforms = [name.strip() for name in command_line.listed([], typed)]
    if export.is_program(flags.source):
        raise InputError(f"{shown(flags.source)} is a program already: give the model it is of")
    export.check(flags.folder, flags.to, platforms, flags.dtype)
    embedder = cbam_jax.load(flags.source, checkpoint, devices=jax.local_devices()[:1])
    model, arguments = embedder.model, embedder.arguments
    if flags.dtype is not None:
        model, arguments = hub.in_dtype(model, arguments, flags.dtype)
    contract = export.save(
        model,
        flags.folder,
        to=flags.to,
        preprocessing=embedder.preprocessing,
        arguments=arguments,
        platforms=platforms,
        license=flags.license or license_of(flags.source),
    )
    return {"folder": str(flags.folder), "source": flags.source, **_told(contract)}


def _told(contract: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: entry["bytes"] for name, entry in contract["files"].items()}
    return {"to": contract["to"], "license": contract["license"], "bytes": files}


def license_of(source: str) -> str | None:
    """Return the licence of published weights, None where it is not known here.

    >>> license_of("efficientnet_lite0"), license_of("runs/mine")
    ('Apache-2.0', None)
    """
    if os.path.exists(expanded(source)):
        return None
    if source in IMAGENET["imagenet"]:
        return IMAGENET["imagenet"][source].license
    name = published_name(source)
    return None if name is None else PUBLISHED[name].license


if __name__ == "__main__":
    sys.exit(command_line.run(main))
