"""The paper's 40,000 / 10,000 / 10,000 images of 30 categories, drawn from the official splits.

The paper does not say which images it used. These are a function of the annotation alone, the same
on every machine: images and folders are put into the order of the SHA-256 of their paths, and no
random generator is asked.
"""

import csv
import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from cbam_jax import InputError
from cbam_jax.datasets.deepfashion.lists import draw_key

SIZES = {"train": 40_000, "validation": 10_000, "test": 10_000}
NUM_CATEGORIES = 30
MANIFEST = "manifest.csv"
_LEAST = 2  # images of a category in a split: one alone has nothing to be compared with

Row = tuple[str, int, str]  # path, number of the category, split


def draw_paper_splits(
    rows: Iterable[Row],
    *,
    sizes: dict[str, int] = SIZES,
    num_categories: int = NUM_CATEGORIES,
    by_folder: bool = True,
) -> list[Row]:
    """Draws splits of exact sizes with the same shares of the categories, each within its official.

    The categories are those with the most images (ties: the lower number). Each gets images in
    proportion to all that it has, at least two in each split; what a category cannot supply is
    shared out among the others.

    The official partition is by image, and images of one folder are near-duplicates. ``by_folder``
    gives each folder to one split and uses only the images that are officially in it: category by
    category, folder by folder, to the split that has the least so far for its size.

    Args:
        rows: path, category and official split of every image, in any order.
        sizes: images of each split.
        num_categories: how many categories are kept.
        by_folder: keep a folder within one split; False follows the official partition by image.

    Returns:
        The drawn rows, by split in the order of ``sizes``, then by path.

    Raises:
        InputError: the annotation has too few categories or images.

    Example:
        >>> rows = [(f"img/{f}/{i}.jpg", f % 2, ("train", "test")[i % 2]) for f in range(8)
        ...         for i in range(8)]
        >>> drawn = draw_paper_splits(rows, sizes={"train": 8, "test": 4}, num_categories=2)
        >>> sorted(Counter((split, category) for _, category, split in drawn).items())
        [(('test', 0), 2), (('test', 1), 2), (('train', 0), 4), (('train', 1), 4)]
    """
    rows = list(rows)
    counts = Counter(category for _, category, _ in rows)
    kept = sorted(
        sorted(counts, key=lambda category: (-counts[category], category))[:num_categories]
    )
    rows = [row for row in rows if row[1] in kept]
    if by_folder:
        home = assign_folders(rows, sizes)
        rows = [row for row in rows if home[_folder(row[0])] == row[2]]
    pools: dict[tuple[str, int], list[str]] = {}
    for path, category, split in rows:
        pools.setdefault((split, category), []).append(path)
    supply = {split: [len(pools.get((split, c), ())) for c in kept] for split in sizes}
    _check_supply(supply, kept, sizes, num_categories, by_folder)
    drawn = []
    for split, size in sizes.items():
        shares = apportion(size, [counts[category] for category in kept], supply[split])
        for category, share in zip(kept, shares, strict=True):
            chosen = sorted(pools[split, category], key=draw_key)[:share]
            drawn += [(path, category, split) for path in chosen]
    order = list(sizes)
    return sorted(drawn, key=lambda row: (order.index(row[2]), row[0]))


def assign_folders(rows: Sequence[Row], sizes: dict[str, int]) -> dict[str, str]:
    """Gives each folder to one split, so that every category gets images in all of them.

    A folder counts for the category that most of its images have. Only images that are officially
    in a split count for it, and a folder goes to no split in which it has none.

    Args:
        rows: path, category and official split.
        sizes: images wanted of each split; their proportions matter.

    Returns:
        Folder -> split.
    """
    contents: dict[str, Counter] = {}
    for path, category, split in rows:
        contents.setdefault(_folder(path), Counter())[category, split] += 1
    members: dict[int, list[str]] = {}
    for folder, images in contents.items():
        of_category = Counter()
        for (category, _), count in images.items():
            of_category[category] += count
        main = min(of_category, key=lambda category: (-of_category[category], category))
        members.setdefault(main, []).append(folder)
    home = {}
    for category, folders in members.items():
        have = dict.fromkeys(sizes, 0)
        for folder in sorted(folders, key=draw_key):
            images = contents[folder]
            # Where none of its main category's images is in a wanted split, any split will do.
            open_to = [split for split in sizes if images[category, split]] or list(sizes)
            split = min(open_to, key=lambda split: have[split] / sizes[split])
            have[split] += images[category, split]
            home[folder] = split
    return home


def apportion(total: int, weights: Sequence[int], capacity: Sequence[int]) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights``, none above its capacity.

    Two each first; then one at a time to whoever is furthest below its part: Webster's method.

    Args:
        total: at least two for each, at most the sum of ``capacity``.
        weights: positive.
        capacity: the greatest share of each.

    Example:
        >>> apportion(100, [60, 30, 10], [100] * 3), apportion(100, [60, 30, 10], [20, 100, 9])
        ([60, 30, 10], [20, 71, 9])
    """
    shares = [min(_LEAST, most) for most in capacity]
    # Quotients of small integers are rounded alike by every machine.
    queue = [((2 * share + 1) / weights[i], i) for i, share in enumerate(shares)]
    queue = [(quotient, i) for quotient, i in queue if shares[i] < capacity[i]]
    heapq.heapify(queue)
    for _ in range(total - sum(shares)):
        _, i = heapq.heappop(queue)
        shares[i] += 1
        if shares[i] < capacity[i]:
            heapq.heappush(queue, ((2 * shares[i] + 1) / weights[i], i))
    return shares


def manifest_text(drawn: Iterable[Row], category_names: Sequence[str]) -> str:
    """The drawn rows as a CSV of ``path,label,split,item_id``, where an item is a folder.

    Put beside ``img/`` it is a manifest as :mod:`cbam_jax.datasets.manifest` reads it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split", "item_id"])
    for path, category, split in drawn:
        writer.writerow([path, category_names[category], split, _folder(path)])
    return text.getvalue()


def write_manifest(folder: Path, text: str) -> str:
    """Writes ``manifest.csv`` and ``manifest.csv.sha256``, for ``sha256sum -c``; its checksum."""
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_bytes(text.encode())
    (folder / f"{MANIFEST}.sha256").write_text(f"{checksum}  {MANIFEST}\n")
    return checksum


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _check_supply(
    supply: dict[str, list[int]],
    kept: Sequence[int],
    sizes: dict[str, int],
    num_categories: int,
    by_folder: bool,
) -> None:
    usable = sum(min(of_category) >= _LEAST for of_category in zip(*supply.values(), strict=True))
    short = any(sum(supply[split]) < size for split, size in sizes.items())
    if usable == num_categories and not short:
        return
    found = ", ".join(f"{sum(supply[split])} {split}" for split in sizes)
    wanted = ", ".join(f"{size} {split}" for split, size in sizes.items())
    how, other = "", "full"
    if by_folder:
        how, other = ", with each folder in one split", "paper_by_image or full"
    raise InputError(
        f"the paper's splits need {wanted} images of {num_categories} categories, and these lists "
        f"allow {found} images and {usable} of {len(kept)} categories with {_LEAST} images in "
        f"every split{how}: complete the lists, or use the config {other}"
    )
