"""What rows are trained with: the config of each, and the fields that a command sets in all."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbam_jax import InputError, command_line
from cbam_jax.foreign_files import read_json, shown
from cbam_jax.paper.tables import FROM_SCRATCH, READING, ROWS, Row

# Fields that the command has flags of its own for.
_OWN_FLAGS = {
    "seed": "--seeds",
    "data.name": "--data",
    "model.name": "the rows, which --table chooses",
}


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Read ``--config.field=value`` flags, which train.py checks.

    >>> parse_overrides(["--config.train.steps=20"])
    {'train.steps': '20'}
    """
    fields = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise InputError(
                f"unknown argument {argument!r}: fields are set as --config.train.steps=500; see "
                "python -m cbam_jax.paper tables --help"
            )
        if name in _OWN_FLAGS:
            raise InputError(f"{argument}: {name} is set by {_OWN_FLAGS[name]}")
        fields[name] = value
    return fields


def row_config(row: str, settings: Mapping[str, str]) -> str:
    """Return the path of the config that a row is trained with."""
    from cbam_jax.config_files import find_config

    return str(find_config(settings.get("config", ROWS[row].config or row)))


def row_to_train(row: str, settings: Mapping[str, str]) -> Row:
    """Return what a row is trained as: of ``FROM_SCRATCH`` where no weights are given."""
    model = _load_config(row_config(row, settings))["model"]
    given = settings.get("model.pretrained", model["pretrained"]) is not None
    return ROWS[row] if given else FROM_SCRATCH.get(row, ROWS[row])


def check_settings(workdir: Path, settings: Mapping[str, str]) -> None:
    """Keep the settings of a workdir's runs; InputError where they were made with others."""
    path = workdir / "settings.json"
    kept = {name: value for name, value in settings.items() if name not in READING}
    # train.py writes it when all its checks have passed: before that, settings can be mended.
    if path.exists() and any(workdir.glob("runs/*/config.json")):
        saved = read_kept(path)
        for name in sorted(kept.keys() | saved.keys()):
            if kept.get(name) != saved.get(name):
                raise InputError(
                    f"{workdir} holds rows with {name}={saved.get(name, '(as in the config)')}, "
                    f"not {kept.get(name, '(as in the config)')}: use those settings, or a new "
                    "--workdir"
                )
    command_line.write_json(path, kept)


def read_kept(path: Path) -> dict[str, Any]:
    """Return what an earlier command wrote; InputError where it can't be read any more."""
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown(path)} can't be read ({shown(str(error))}): move {shown(path.parent)} away, "
            "and what it holds is made again"
        ) from error
    if not isinstance(document, dict):
        raise InputError(f"{shown(path)} holds no object: move {shown(path.parent)} away")
    return document


def check_split(config_path: str, split: str, settings: Mapping[str, str]) -> None:
    """Open the split that will be measured; InputError where there is none."""
    from cbam_jax.datasets import open_dataset  # Loads OpenCV.

    fields: dict[str, Any] = {
        name: settings.get(f"data.{name}", value)
        for name, value in _load_config(config_path)["data"].items()
        if name in ("name", "label", "data_dir", "manual_dir", "on_bad_image")
    }
    open_dataset(fields.pop("name"), split, **fields)


def _load_config(path: str) -> Mapping[str, Any]:
    """Return a config file's fields, without overrides."""
    spec = importlib.util.spec_from_file_location("row_config", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise InputError(f"--config={path}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
