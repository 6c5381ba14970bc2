"""Image files of one's own: checked when a dataset is opened, read when they are asked for."""

import dataclasses
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.datasets import decoding
from cbam_jax.foreign_files import MOST_IMAGE, MOST_TABLE, is_gone, open_regular, read_file, shown
from cbam_jax.progress import few, progress, tell

# Endings that photos have; a file of another one is looked into.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_HEADERS = 1 << 18  # Bytes at a JPEG's beginning that hold what a camera writes before the pixels.
_QUICK = 20_000  # Files whose ends are looked at in about a second: no progress is shown.


@dataclasses.dataclass(frozen=True)
class ImageFiles(Sequence):
    """Paths of image files, read when they are indexed."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return read_file(self.paths[index])
        except OSError as error:
            raise InputError(
                f"cannot read {self.paths[index]} ({error.strerror}): restore the file, or in a "
                "manifest remove its row"
            ) from error


def good_images(
    path: Path, files: Sequence[str], *, on_bad_image: str, decode: bool = False
) -> np.ndarray:
    """bool [n], which image files can be used; reports what is bad, and skips it or fails.

    Args:
        path: the manifest, for the messages and for the list of what was skipped.
        files: paths of image files.
        on_bad_image: ``"fail"`` or ``"skip"``.
        decode: decode every file now, also where ``"fail"`` would not, or ``"skip"`` has a list
            that holds for these files (same sizes and times).

    Raises:
        InputError: a bad image and ``"fail"``, or nothing left with ``"skip"``.
    """
    skip = on_bad_image == "skip"
    known = _read_skipped(path, files) if skip and not decode else None
    if known is not None:
        problems: list[str | None] = [known.get(file) for file in files]
    else:
        with ThreadPoolExecutor() as pool:
            slow = skip or decode or len(files) > _QUICK
            checked = pool.map(_decode_problem if skip or decode else _quick_problem, files)
            told = progress(checked, "checking images", total=len(files)) if slow else checked
            problems = list(told)
    bad = {file: problem for file, problem in zip(files, problems, strict=True) if problem}
    told = few([f"{shown(file)} ({problem})" for file, problem in bad.items()])
    found = f"{len(bad)} of {len(files)} images of {path} cannot be used: {told}"
    if bad and not skip:
        raise InputError(f"{found}: repair them, or leave them out with on_bad_image='skip'")
    if len(bad) == len(files):
        raise InputError(f"{found}: nothing is left; paths are relative to {path.parent}")
    if skip:
        skipped = _write_skipped(path, files, bad)
    if bad:
        tell(f"skipped: {found}; the whole list is in {skipped}")
    return np.array([not problem for problem in problems])


def tell_copies(
    dataset: str, names: Sequence[str], files: Sequence[str], splits: Sequence[str]
) -> None:
    """Says on stderr how many images are in two splits, equal to the byte, if any are.

    Args:
        dataset: its name as it was given, for the command that lists them.
        names: what messages call the images.
        files: their paths, without those that are skipped.
        splits: of each.
    """
    groups = [group for group in equal_files(files) if len({splits[i] for i in group}) > 1]
    if groups:
        count = "1 image is" if len(groups) == 1 else f"{len(groups)} images are"
        told = few([" = ".join(f"{shown(names[i])} ({splits[i]})" for i in g) for g in groups])
        tell(
            f"{shown(dataset)}: {count} in two splits, equal to the byte, so that "
            f"evaluation asks for what training has seen: {told}; "
            f"python -m cbam_jax.datasets verify {shown(shlex.quote(dataset))} lists them"
        )


def equal_files(files: Sequence[str]) -> list[list[int]]:
    """Groups of files of the same bytes, by index; only those of one length are read."""
    groups = _grouped(range(len(files)), lambda index: _length(files[index]))
    for read in (_beginning, _content):  # Most files differ by their headers.
        regrouped = (_grouped(group, lambda index: read(files[index])) for group in groups)  # noqa: B023
        groups = [group for parts in regrouped for group in parts]
    return groups


def _grouped(indices: Iterable[int], key: Callable[[int], object]) -> list[list[int]]:
    """Two and more that share a key; None is shared with nobody."""
    groups: dict[object, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    groups.pop(None, None)
    return [group for group in groups.values() if len(group) > 1]


def _length(file: str) -> int | None:
    return os.path.getsize(file) if os.path.isfile(file) else None


def _beginning(file: str) -> bytes | None:
    return _content(file, 1 << 12)


def _content(file: str, count: int = MOST_IMAGE) -> bytes | None:
    try:
        with open_regular(file, MOST_IMAGE) as opened:
            return hashlib.sha256(opened.read(count)).digest()
    except (OSError, InputError):
        return None


def good_boxes(
    path: Path, names: Sequence[str], files: Sequence[str], boxes: np.ndarray, *, on_bad_image: str
) -> np.ndarray:
    """bool [n], whose boxes hold a pixel of their image; reports the others, as `good_images`.

    Args:
        path: the manifest, for the messages.
        names: what messages call the images.
        files: their paths; what cannot be read has no bad box.
        boxes: [n, 4], ``x1, y1, x2, y2``; NaN where a row has none.
        on_bad_image: ``"fail"`` or ``"skip"``.

    Raises:
        InputError: a bad box and ``"fail"``.
    """
    with ThreadPoolExecutor() as pool:
        shapes = np.array([size or (np.inf, np.inf) for size in pool.map(_size, files)])
    x1, y1, x2, y2 = boxes.T
    outside = (x2 <= 0) | (y2 <= 0) | (x1 >= shapes[:, 1]) | (y1 >= shapes[:, 0])
    told = few(
        [
            f"{shown(names[i])} ({boxes[i].tolist()}, {shapes[i, 1]:.0f} x {shapes[i, 0]:.0f} "
            "pixels)"
            for i in np.flatnonzero(outside).tolist()
        ]
    )
    found = f"{outside.sum()} of {len(files)} boxes of {path} hold no pixel of their image: {told}"
    if outside.any() and on_bad_image == "fail":
        raise InputError(
            f"{found}: correct them, leave them out with on_bad_image='skip', or set "
            "crop_to_box=False"
        )
    if outside.any():
        tell(f"skipped: {found}")
    return ~outside


def _size(file: str) -> tuple[int, int] | None:
    """Height and width of an image file as it is decoded, from its first bytes where they tell."""
    try:
        with open_regular(file, MOST_IMAGE) as opened:
            size = decoding.jpeg_size(opened.read(_HEADERS))
        return size or decoding.image_size(read_file(file))
    except (OSError, InputError):
        return None


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file is an image by its ending or, whatever its ending, by its first bytes.

    Not one that only an extra reads, where that is not installed.
    """
    if str(path).lower().endswith(SUFFIXES):
        return True
    try:
        with open_regular(path, MOST_IMAGE) as file:
            kind = decoding.image_format(file.read(decoding.HEAD))
    except (OSError, InputError):
        return False
    return not decoding.not_installed(kind) if kind else cv2.haveImageReader(str(path))


def is_photo(path: str | os.PathLike) -> bool:
    """Whether what lies in a folder is one of its photos: a file, not hidden, that is an image.

    Also where it may not be looked at and is named like one: who reads it is told why not.
    """
    if os.path.basename(path).startswith("."):
        return False
    closed = not (os.path.exists(path) or is_gone(path))
    return (closed or os.path.isfile(path)) and is_image_file(path)


def is_told(entry: str | os.PathLike) -> bool:
    """Whether something passed over is told: of what is hidden, only files named like photos.

    >>> is_told("hat/notes.txt"), is_told("hat/.DS_Store"), is_told("hat/._IMG 1.JPG")
    (True, False, True)
    """
    hidden = os.path.basename(entry).startswith(".")
    return not hidden or (str(entry).lower().endswith(SUFFIXES) and not os.path.isdir(entry))


def other_kind(path: str | os.PathLike) -> str:
    """What something in a folder is counted as that is no photo.

    >>> other_kind("hat/a.TXT"), other_kind("hat/README"), other_kind("hat/._IMG 1.JPG")
    ('.txt', 'without an ending', 'hidden .jpg')
    """
    ending = Path(path).suffix.lower() or "without an ending"
    if os.path.basename(path).startswith("."):  # Other systems leave ._IMG.jpg beside IMG.jpg.
        return f"hidden {ending}"
    if os.path.isdir(path):
        return "inner folder"
    if os.path.islink(path) and is_gone(path):
        return f"{ending} that is a link to nothing"
    special = os.path.exists(path) and not os.path.isfile(path)
    return ending + " that is no regular file" * special


def passed_over(others: Iterable[tuple[str, str]]) -> str:
    """Counts what is no photo by its kind; of those named like photos the first has its name.

    Args:
        others: a kind, see `other_kind`, and a name for each.

    >>> passed_over([(".txt", "hat/a.txt"), ("hidden .jpg", "hat/._b.jpg"), (".txt", "hat/c.TXT")])
    '2 .txt, 1 hidden .jpg (hat/._b.jpg)'
    """
    names: dict[str, list[str]] = {}
    for kind, name in others:
        names.setdefault(kind, []).append(name)
    remedy = {kind: f" ({decoding.HEIC_REMEDY})" for kind in (".heic", ".heif", ".hif")}
    remedy["inner folder"] = " (photos lie directly in the class folders)"
    for kind, (first, *more) in names.items():
        if set(kind.split()) & set(SUFFIXES):
            remedy[kind] = f" ({shown(first)}{', ...' * bool(more)})"
    kinds = sorted(names, key=lambda kind: (-len(names[kind]), kind))
    return ", ".join(f"{len(names[kind])} {kind}{remedy.get(kind, '')}" for kind in kinds)


def _quick_problem(file: str) -> str | None:
    """What is wrong with a file by its name and its two ends; half-copied ones lack the second."""
    if problem := name_problem(file):
        return problem
    try:
        with open_regular(file, MOST_IMAGE) as opened:
            kind = decoding.image_format(opened.read(decoding.HEAD))
            cut_off = decoding.is_cut_off(opened)
    except (OSError, InputError) as error:
        return _reason(error, file)
    if kind is None and not cv2.haveImageReader(file):
        return "not an image"
    if decoding.not_installed(kind):
        return decoding.HEIC_REMEDY
    if cut_off is None:
        return _decode_problem(file)
    return "cut off" if cut_off else None


def _decode_problem(file: str) -> str | None:
    if problem := name_problem(file):
        return problem
    try:
        encoded = read_file(file)
    except (OSError, InputError) as error:
        return _reason(error, file)
    if decoding.not_installed(decoding.image_format(encoded)):
        return decoding.HEIC_REMEDY
    return None if decoding.is_decodable(encoded) else "cannot be decoded"


def name_problem(file: str) -> str | None:
    r"""What is wrong with an image's name, if anything is: results are lines of text, and name it.

    >>> name_problem("photos/hat/a.jpg"), name_problem("a\tb.jpg")
    (None, 'its name holds control characters or is not UTF-8')
    """
    return "its name holds control characters or is not UTF-8" if _NO_TEXT.search(file) else None


def _reason(error: OSError | InputError, file: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, InputError):
        large = os.path.isfile(file)
        return f"larger than {MOST_IMAGE >> 20} MiB" if large else "not a regular file"
    return error.strerror or "cannot be read"


def _skipped_path(path: Path) -> Path:
    return path.with_suffix(".skipped.txt")


def _files_line(files: Sequence[str]) -> str:
    # The list holds as long as no file appears, disappears or changes.
    def state(file: str) -> str:
        stat = os.stat(file) if os.path.isfile(file) else None
        return f"{file} {stat.st_size} {stat.st_mtime_ns}" if stat else file

    return f"# checked: {_digest(chr(10).join(map(state, files))).hex()}"


def _read_skipped(path: Path, files: Sequence[str]) -> dict[str, str] | None:
    try:
        text = read_file(_skipped_path(path), MOST_TABLE).decode(errors="backslashreplace")
        first, *lines = text.splitlines()
    except (OSError, ValueError):
        return None
    if first != _files_line(files):
        return None
    bad = dict(line.rsplit("\t", 1) for line in lines if "\t" in line)
    return bad | {file: problem for file in files if (problem := name_problem(file))}


def _write_skipped(path: Path, files: Sequence[str], bad: dict[str, str]) -> str:
    text = "".join(f"{file}\t{problem}\n" for file, problem in bad.items())
    part = Path(f"{_skipped_path(path)}.{os.getpid()}")
    try:
        text = f"{_files_line(files)}\n{text}"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(_skipped_path(path))
    except OSError as error:  # a read-only folder is no reason to stop
        return f"{_skipped_path(path)}, which could not be written ({error.strerror})"
    return str(_skipped_path(path))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
