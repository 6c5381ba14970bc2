"""Drawn garments as photos in a folder, for a first try of what takes photos, without a network."""

import os
import re
from pathlib import Path

from cbam_jax import InputError
from cbam_jax.datasets.garments.builder import SyntheticGarmentsConfig, make_example
from cbam_jax.datasets.garments.drawing import CATEGORIES
from cbam_jax.foreign_files import expanded, shown
from cbam_jax.progress import progress
from cbam_jax.whole_files import written_whole


def draw_folder(
    folder: str | Path, *, number: int = 200, image_size: int = 192, seed: int = 0
) -> int:
    """Draw photos into a folder, one folder a category; those that are there stay.

    Photos are of the 16 categories in turn; each item has two photos, a shop's and a customer's.

    Args:
        folder: made where it is not there; ``~`` is one's home.
        number: of photos in all.
        image_size: side of the square photos, in pixels, at least 32.
        seed: another one draws other garments.

    Returns:
        How many were drawn now.

    Raises:
        InputError: a number out of its range, or a folder that cannot be written, or holds
            anything that was not drawn here: photos of one's own would become one class with ours.
    """
    if number < 1:
        raise InputError(f"--number={number}: give at least 1")
    config = SyntheticGarmentsConfig(name="folder", image_size=image_size, seed=seed)
    _refuse_others(expanded(folder))
    paths = [expanded(folder) / _name(row) for row in range(number)]
    left = [row for row in range(number) if not paths[row].exists()]
    try:
        for row in progress(left, "drawing", total=len(left)):
            paths[row].parent.mkdir(parents=True, exist_ok=True)
            with written_whole(paths[row]) as partial:
                partial.write_bytes(make_example(config, *_key(row))["image"])
    except OSError as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return len(left)


def _refuse_others(root: Path) -> None:
    for folder, folders, files in os.walk(root):
        # Hidden ones, such as .DS_Store, are no class and no photo.
        folders[:] = [name for name in folders if name[0] != "."]
        inside = Path(folder).relative_to(root)
        others = [f"{inside / name}/" for name in folders if f"{inside / name}" not in CATEGORIES]
        others += [
            f"{inside / name}"
            for name in files
            if name[0] != "." and not _is_drawn((inside / name).as_posix())
        ]
        if others:
            raise InputError(
                f"{root} holds {shown(min(others))}, which was not drawn here: give a new folder"
            )


def _is_drawn(file: str) -> bool:
    """Whether a file is one of ours by its name, or what an interrupted call left of one."""
    category, _, name = file.rpartition("/")
    return category in CATEGORIES and bool(re.fullmatch(r"(partial-)?\d{4,}_[01]\.jpg", name))


def _key(row: int) -> tuple[str, int, int]:
    """Category, item and view of a photo."""
    return (
        CATEGORIES[row % len(CATEGORIES)],
        row // (2 * len(CATEGORIES)),
        row // len(CATEGORIES) % 2,
    )


def _name(row: int) -> str:
    category, item, view = _key(row)
    return f"{category}/{item:04d}_{view}.jpg"
