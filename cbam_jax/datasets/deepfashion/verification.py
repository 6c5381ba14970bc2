"""``python -m cbam_jax.datasets verify NAME``: is a copy of DeepFashion complete and consistent?"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from cbam_jax.datasets.building import BuilderFromFiles
from cbam_jax.datasets.deepfashion.builders import Copy, config_of, read_copy
from cbam_jax.datasets.deepfashion.images import MISSING, Look, look_at, low_size, pixel_box
from cbam_jax.datasets.deepfashion.layout import BENCHMARKS, Layout
from cbam_jax.datasets.deepfashion.lists import Photo, read_attributes
from cbam_jax.progress import progress

_SHOWN = 10  # findings of a kind, unless all are asked for


def verify(builder: BuilderFromFiles, *, show_all: bool = False) -> int:
    """Checks what a builder would read, and prints what is found; the last line is JSON.

    These count as wrong: a number of images, items, pairs, categories or attributes that is not the
    published one; a contradiction in the lists; an image that is missing or cannot be decoded; the
    same bytes twice in one split (``duplicate_images``) or in two (``leaking_images``); an item in
    two splits (``leaking_items``: for ``deepfashion_category``, whose official partition is by
    image, only with ``paper``). The official files themselves may have such images: then it is for
    the user to judge. Boxes that are outside their image, empty or missing are counted, since they
    are mended when the dataset is prepared. Nothing is written.

    Args:
        builder: of one of DeepFashion's datasets, with its ``manual_dir``.
        show_all: print every finding, not the first ten of a kind.

    Returns:
        0, or 1 where something is wrong.

    Raises:
        InputError: there is nothing to check: the layout is another one.
    """
    copy, name, config = read_copy(builder), builder.name, config_of(builder)
    counts = _counts(copy)
    photos = copy.annotations.photos
    print(f"{name}/{config.name}: {len(photos)} images in {copy.layout.images}")
    seen = look_at([copy.layout.file(photo.path) for photo in photos])
    looks = list(progress(seen, "checking images", total=len(photos)))
    # The official partition of the categories is by image, and so is one of the draws.
    by_item = name != "deepfashion_category" or (config.paper and config.by_folder)
    findings = _find(copy, looks, by_item=by_item)
    _print_findings(counts, findings, show_all)
    wrong = {"counts": sum(count["found"] != count["published"] for count in counts.values())}
    wrong |= {kind: len(lines) for kind, lines in findings.items()}
    report: dict[str, Any] = {"dataset": name, "config": config.name, "counts": counts}
    report |= {"boxes": _count_boxes(copy, looks), "wrong": wrong, "ok": not any(wrong.values())}
    if name == "deepfashion_category":
        report["folders_in_two_splits"] = len(_in_two_splits(photos))
    if copy.manifest:
        report["manifest_sha256"] = hashlib.sha256(copy.manifest.encode()).hexdigest()
    _print_report(report)
    return 0 if report["ok"] else 1


def _counts(copy: Copy) -> dict[str, dict[str, int]]:
    """Of each published count, what was found and what was published."""
    layout, annotations = copy.layout, copy.annotations
    found = dict(annotations.counts)
    if "attributes" in layout.lists:
        names, _ = read_attributes(layout, annotations.problems)
        found["attributes"] = len(names)
    published = BENCHMARKS[layout.benchmark].published
    return {
        name: {"found": found.get(name, 0), "published": count} for name, count in published.items()
    }


def _find(copy: Copy, looks: Sequence[Look], *, by_item: bool) -> dict[str, list[str]]:
    """What is wrong besides the counts, by kind."""
    layout, photos = copy.layout, copy.annotations.photos
    duplicates, leaks = _repeated_images(photos, looks)
    return {
        "lists": copy.annotations.problems,
        "missing_images": _missing(layout, photos, looks),
        "unreadable_images": _unreadable(photos, looks),
        "duplicate_images": duplicates,
        "leaking_images": leaks,
        "leaking_items": _leaking_items(photos) if by_item else [],
    }


def _print_findings(
    counts: dict[str, dict[str, int]], findings: dict[str, list[str]], show_all: bool
) -> None:
    for name, count in counts.items():
        print(_count_line(name, **count))
    for kind, lines in findings.items():
        print(f"{kind.replace('_', ' ')}: {len(lines) or 'none'}")
        shown = lines if show_all else lines[:_SHOWN]
        for line in shown:
            print(f"  {line}")
        if len(shown) < len(lines):
            print(f"  and {len(lines) - len(shown)} more: --all shows them")


def _print_report(report: dict[str, Any]) -> None:
    print("boxes, mended when prepared: {outside} outside their image, {empty} empty, "
          "{missing} missing".format(**report["boxes"]))  # fmt: skip
    if "folders_in_two_splits" in report:
        print(f"folders with images in two splits: {report['folders_in_two_splits']}")
    if "manifest_sha256" in report:
        print(f"manifest.csv: SHA-256 {report['manifest_sha256']}")
    print("everything is as it should be" if report["ok"] else "something is wrong")
    print(json.dumps(report))


def _count_line(name: str, found: int, published: int) -> str:
    return f"{name}: {found} of {published} published" + ": wrong" * (found != published)


def _missing(layout: Layout, photos: Sequence[Photo], looks: Sequence[Look]) -> list[str]:
    pairs = zip(photos, looks, strict=True)
    paths = [photo.path for photo, look in pairs if look.problem == MISSING]
    hints = _other_case(layout, paths)
    return [f"{path} {MISSING}{hints.get(path, '')}" for path in paths]


def _unreadable(photos: Sequence[Photo], looks: Sequence[Look]) -> list[str]:
    return [
        f"{photo.path} {look.problem}"
        for photo, look in zip(photos, looks, strict=True)
        if look.problem not in ("", MISSING)
    ]


def _other_case(layout: Layout, paths: Iterable[str]) -> dict[str, str]:
    """Where a missing file differs from one that is there by capitals alone, says so."""
    wanted = {str(layout.file(path).relative_to(layout.images)).lower(): path for path in paths}
    hints = {}
    for file in layout.images.rglob("*") if wanted else ():
        name = str(file.relative_to(layout.images))
        if name.lower() in wanted:
            hints[wanted[name.lower()]] = f", but there is {name}"
    return hints


def _repeated_images(photos: Sequence[Photo], looks: Sequence[Look]) -> tuple[list[str], list[str]]:
    groups: dict[bytes, list[Photo]] = {}
    for photo, look in zip(photos, looks, strict=True):
        if look.digest:
            groups.setdefault(look.digest, []).append(photo)
    duplicates, leaks = [], []
    for group in groups.values():
        by_split: dict[str, list[str]] = {}
        for photo in group:
            by_split.setdefault(photo.split, []).append(photo.path)
        duplicates += [f"{split}: {' = '.join(p)}" for split, p in by_split.items() if len(p) > 1]
        if len(by_split) > 1:
            leaks.append(" = ".join(f"{paths[0]} ({split})" for split, paths in by_split.items()))
    return duplicates, leaks


def _in_two_splits(photos: Sequence[Photo]) -> dict[int, set[str]]:
    splits: dict[int, set[str]] = {}
    for photo in photos:
        splits.setdefault(photo.item, set()).add(photo.split)
    return {item: found for item, found in splits.items() if len(found) > 1}


def _leaking_items(photos: Sequence[Photo]) -> list[str]:
    return [
        f"item {item} is in {' and '.join(sorted(splits))}"
        for item, splits in _in_two_splits(photos).items()
    ]


def _count_boxes(copy: Copy, looks: Sequence[Look]) -> dict[str, int]:
    names = {"clamped": "outside", "empty": "empty", "missing": "missing"}
    counts = dict.fromkeys(names.values(), 0)
    layout, annotations = copy.layout, copy.annotations
    for photo, look in zip(annotations.photos, looks, strict=True):
        if look.size is None:
            continue
        low = low_size(layout, photo.path, look.size)
        listed = annotations.boxes.get(photo.path)
        _, problem = pixel_box(listed, low, look.size, padded=layout.padded)
        if problem:
            counts[names[problem]] += 1
    return counts
