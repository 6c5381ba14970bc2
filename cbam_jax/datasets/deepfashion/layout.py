"""Where a copy of DeepFashion keeps what: the folders, the lists that each benchmark has.

Nothing of DeepFashion is fetched here: it is given to those who sign its agreement, see
https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html.
"""

from pathlib import Path
from typing import NamedTuple

from cbam_jax import InputError

SITE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion"

# Where a release keeps its lists: the old folders, the new one, a flat copy. Anno_fine is not among
# them: its lists have the same names, and hold 20,000 images and 26 attributes.
_LIST_FOLDERS = ("Eval", "Anno", "Anno_coarse", "")
_PARTITION = "list_eval_partition.txt"


class Benchmark(NamedTuple):
    """One of DeepFashion's benchmarks: what a list is for -> the names that it goes by.

    The first required list tells the benchmark. ``published`` are the counts that its authors give.
    """

    title: str
    page: str
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]
    published: dict[str, int]


BENCHMARKS = {
    "deepfashion_inshop": Benchmark(
        "In-shop Clothes Retrieval Benchmark",
        f"{SITE}/InShopRetrieval.html",
        {"boxes": ("list_bbox_inshop.txt",), "partition": (_PARTITION,)},
        {"landmarks": ("list_landmarks_inshop.txt",), "items": ("list_item_inshop.txt",)},
        {
            "images": 52_712, "items": 7_982, "train images": 25_882, "query images": 14_218,
            "gallery images": 12_612, "train items": 3_997, "test items": 3_985,
        },
    ),
    "deepfashion_consumer2shop": Benchmark(
        "Consumer-to-shop Clothes Retrieval Benchmark",
        f"{SITE}/Consumer2ShopRetrieval.html",
        {"boxes": ("list_bbox_consumer2shop.txt",), "partition": (_PARTITION,)},
        {
            "landmarks": ("list_landmarks_consumer2shop.txt",),
            "items": ("list_item_consumer2shop.txt", "list_items_consumer2shop.txt"),
        },
        {"images": 239_557, "items": 33_881, "pairs": 195_540},
    ),
    "deepfashion_category": Benchmark(
        "Category and Attribute Prediction Benchmark",
        f"{SITE}/AttributePrediction.html",
        {
            "categories": ("list_category_img.txt",),
            "category names": ("list_category_cloth.txt",),
            "boxes": ("list_bbox.txt",),
            "partition": (_PARTITION,),
        },
        {
            # Its README calls the landmarks by the name that they have in the other benchmark.
            "landmarks": ("list_landmarks.txt", "list_landmarks_consumer2shop.txt"),
            "attributes": ("list_attr_img.txt",),
            "attribute names": ("list_attr_cloth.txt",),
        },
        {
            "images": 289_222, "categories": 50, "train images": 209_222, "val images": 40_000,
            "test images": 40_000, "attributes": 1_000,
        },
    ),
}  # fmt: skip


class Layout(NamedTuple):
    """Where a copy of a benchmark keeps what."""

    benchmark: str
    root: Path
    lists: dict[str, Path]
    images: Path  # the folder that holds img/ and img_highres/
    highres: bool

    def file(self, path: str) -> Path:
        """The image that the lists call ``path``, in the resolution that was asked for."""
        return self.images / (f"img_highres{path[3:]}" if self.highres else path)

    @property
    def padded(self) -> bool:
        """Whether low-resolution images have borders that high-resolution ones have not."""
        return self.benchmark == "deepfashion_inshop"


def find_layout(name: str, manual_dir: str | Path | None, *, highres: bool = False) -> Layout:
    """Finds a benchmark in ``manual_dir``, in a folder of it, or in a folder of that.

    The lists may be in ``Anno`` or ``Anno_coarse`` and ``Eval``, or beside the images; ``img`` may
    be in ``Img`` or not.

    Args:
        name: one of :data:`BENCHMARKS`.
        manual_dir: where the user put it.
        highres: look for ``img_highres`` in place of ``img``.

    Raises:
        InputError: names what was expected and what was found.
    """
    benchmark = BENCHMARKS[name]
    if manual_dir is None:
        raise InputError(
            f"{name} is not downloaded: sign the agreement on {benchmark.page}, unpack what you "
            f"get, and give the folder '{benchmark.title}' as manual_dir"
        )
    root = _find_root(name, Path(manual_dir))
    wanted = benchmark.required | benchmark.optional
    lists = {purpose: _find_list(root, names) for purpose, names in wanted.items()}
    missing = [benchmark.required[key][0] for key in benchmark.required if lists[key] is None]
    if missing:
        raise InputError(
            f"{root} lacks {', '.join(missing)}: expected in Eval/, Anno/, Anno_coarse/ or "
            f"{root.name}/ itself; {_found(root)}"
        )
    found = {purpose: path for purpose, path in lists.items() if path is not None}
    return Layout(name, root, found, _find_images(root, highres), highres)


def _find_root(name: str, manual_dir: Path) -> Path:
    level = [manual_dir]
    for _ in range(3):
        roots = [folder for folder in level if _holds(folder, name)]
        if len(roots) > 1:
            raise InputError(
                f"{manual_dir} holds {BENCHMARKS[name].title} more than once: give one of "
                f"{', '.join(map(str, roots))} as manual_dir"
            )
        if roots:
            return roots[0]
        level = [child for folder in level for child in _folders(folder)]
    raise _no_layout(name, manual_dir)


def _no_layout(name: str, manual_dir: Path) -> InputError:
    signature = next(iter(BENCHMARKS[name].required.values()))[0]
    folders = [manual_dir, *_folders(manual_dir)]
    others = [other for other in BENCHMARKS for folder in folders if _holds(folder, other)]
    hint = f" (it holds what {others[0]} wants)" if others else ""
    if any((folder / "Anno_fine" / signature).exists() for folder in folders):
        hint = " (it is in Anno_fine, which covers a part only: unpack Anno_coarse as well)"
    return InputError(
        f"manual_dir {manual_dir} is not the {BENCHMARKS[name].title}: expected {signature} in "
        f"Anno/, Anno_coarse/ or beside the images{hint}; {_found(manual_dir)}"
    )


def _holds(folder: Path, name: str) -> bool:
    return _find_list(folder, next(iter(BENCHMARKS[name].required.values()))) is not None


def _find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    paths = (root / folder / name for folder in _LIST_FOLDERS for name in names)
    return next((path for path in paths if path.is_file()), None)


def _find_images(root: Path, highres: bool) -> Path:
    name = "img_highres" if highres else "img"
    for folder in (root / "Img", root):
        if (folder / name).is_dir():
            return folder
    other = "; without highres the low resolution is used" if highres else ""
    raise InputError(
        f"{root} has no images: expected the folder Img/{name} or {name}, unpacked from "
        f"{name}.zip{other}; {_found(root)}"
    )


def _folders(folder: Path) -> list[Path]:
    try:
        children = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        return []
    skipped = ("img", "anno_fine")  # thousands of folders; lists of the same names
    return [path for path in children if not path.name.lower().startswith(skipped)]


def _found(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    packed = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.zip"))
    packed += [name for name in names if name.endswith(".zip")]
    text = f"found {', '.join(names[:10]) or 'nothing'}" + (", ..." if len(names) > 10 else "")
    return f"{text}; not unpacked: {', '.join(packed[:5])}" if packed else text
