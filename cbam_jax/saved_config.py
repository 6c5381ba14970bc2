"""The config that a run has saved: read, checked, and not trusted further than data.

A run may come from someone else. Its config decides how its model is built and which photos it is
measured on; it does not decide which code is imported, nor that anything is written outside the
run. For both the user gives the field anew.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbam_jax import InputError
from cbam_jax.config_files import Config
from cbam_jax.configs import default
from cbam_jax.datasets import is_ours, is_path, is_prepared
from cbam_jax.foreign_files import read_json, shown

# Fields of which any value of their type would be taken, and beyond which none is meant.
_RANGES = {
    "data.image_size": (1, 4096),
    "data.workers": (0, 1024),
    "eval.batch_size": (1, 65_536),
}


def read(path: Path) -> Config:
    """Read a run's config.json; see ``from_document``.

    Raises:
        ValueError: it is damaged; OSError: it cannot be read.
    """
    return from_document(read_json(path))


def from_document(document: Any) -> Config:
    """Return the default config with a saved one's fields.

    Fields that the run's version did not have are those of ``configs/default.py``.

    Raises:
        ValueError: one is of another type, or out of its range.

    >>> from_document({"data": {"image_size": 64}, "eval": {"ks": [1, 10]}}).eval.ks
    (1, 10)
    """
    config: Config = default.get_config()
    if not isinstance(document, dict) or not isinstance(document.get("data"), dict):
        raise ValueError("not the config of a run")
    _set(config, "seed", document.get("seed", config.seed))
    for section in {*config} & document.keys() - {"seed"}:
        if not isinstance(document[section], dict):
            raise ValueError(f"{section} is no object")
        for name in {*config[section]} & document[section].keys():
            value = document[section][name]
            _set(config[section], name, tuple(value) if isinstance(value, list) else value)
    _check_ranges(config)
    return config


def _set(fields: Config, name: str, value: Any) -> None:
    before = fields[name]
    try:
        fields[name] = value
    except TypeError as error:
        raise ValueError(f"{name} is {shown(repr(value), 80)}") from error
    # ConfigDict lets any tuple stand for another one.
    if isinstance(before, tuple) and not all(type(entry) in (int, float) for entry in fields[name]):
        raise ValueError(f"{name} is {shown(repr(value), 80)}, not numbers")


def _check_ranges(config: Config) -> None:
    for field, (least, most) in _RANGES.items():
        section, name = field.split(".")
        value = config[section][name]
        if not least <= value <= most:
            raise ValueError(f"{field} is {shown(repr(value), 80)}, not from {least} to {most}")


def check_trusted(config: Config, overrides: Sequence[str], workdir: Path) -> None:
    """Raise InputError where a saved config would import code, or write outside its run.

    Args:
        config: what was saved, with the overrides.
        overrides: ``--config.FIELD=VALUE`` that the user gave, who may do both.
        workdir: of the run, for the message.
    """
    given = {argument.partition("=")[0].removeprefix("--config.data.") for argument in overrides}
    name, data_dir = config.data.name, config.data.data_dir
    if is_path(name):
        return
    source = shown(workdir / "config.json")
    if "name" not in given and not re.fullmatch(r"[A-Za-z_]\w*(/[\w.-]+)?(:[\d.*]+)?", name):
        raise InputError(
            f"{source} names the dataset {shown(repr(name), 80)}, which would import code: if you "
            f"trust it, give it yourself: --data={shown(name, 80)}"
        )
    if "data_dir" in given or data_dir is None:
        return
    if not is_ours(name) or not is_prepared(name, data_dir):
        raise InputError(
            f"{source} keeps its datasets in {shown(data_dir)}, where {shown(repr(name), 80)} "
            "would be read or prepared: if that is right, give it yourself: "
            f"--config.data.data_dir={shown(data_dir)}"
        )
