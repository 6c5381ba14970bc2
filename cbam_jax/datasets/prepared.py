"""Datasets of TensorFlow Datasets (TFDS), prepared as ArrayRecord and opened without TensorFlow."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds

from cbam_jax import InputError
from cbam_jax.datasets import tfds_without_tensorflow
from cbam_jax.datasets.building import SKIPPED_LIST
from cbam_jax.datasets.decoding import decode_image
from cbam_jax.datasets.retrieval import RetrievalDataset
from cbam_jax.file_locks import open_lock, take_lock
from cbam_jax.foreign_files import read_arrays, read_json, read_text, shown
from cbam_jax.progress import few, progress
from cbam_jax.whole_files import written_whole

# What users fetch by hand, having signed its agreement.
BY_HAND = ("deepfashion_inshop", "deepfashion_consumer2shop", "deepfashion_category")
OURS = {
    "clothing_dataset_small": "cbam_jax.datasets.clothing_dataset_small",
    "synthetic_garments": "cbam_jax.datasets.garments",
    **dict.fromkeys(BY_HAND, "cbam_jax.datasets.deepfashion"),
}
_SIZES = "sizes.json"  # of the files of records, in bytes
_COLUMNS = ("id", "is_query", "is_gallery", "item_id", "series", "bbox")

tfds_without_tensorflow.install()


class EncodedImages(Sequence):
    """The encoded images of a TFDS data source, by index; ``feature`` is ``image`` or ``mask``."""

    def __init__(self, source: Sequence, folder: str, feature: str = "image") -> None:
        self.source = source
        self.folder = folder
        self.feature = feature

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):
        with _damage_told(self.folder):
            return self.source[int(index)][self.feature]


def open_prepared(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    label: str = "label",
    on_bad_image: str = "fail",
) -> RetrievalDataset:
    """Opens one split of a TFDS dataset, preparing it first if necessary.

    The features ``image`` and ``label`` (any integer feature) are required; ``id``, ``is_query``,
    ``is_gallery``, ``item_id``, ``series``, ``bbox`` and ``mask`` (an image) are used where they
    exist. A ``ClassLabel`` keeps its numbers and names. Another integer column, such as
    ``item_id``, is numbered within the split; its names are the numbers of the dataset, and those
    are comparable between splits.
    Without unique ``id``s an image is called ``<split>/<index>``. The columns are read once, and
    kept in ``columns-*.npz`` in the folder of the prepared dataset.

    Raises:
        InputError: unknown dataset or split, unsuitable features, missing files.
    """
    builder = prepare(
        name, data_dir=data_dir, manual_dir=manual_dir, label=label, on_bad_image=on_bad_image
    )
    folder = os.fspath(builder.data_dir)
    with _damage_told(folder):
        source = _open_source(builder, split)
        columns = _read_columns(builder, source, split, label)
    labels, label_names = _number_labels(builder, split, label, columns["label"])
    has_masks = isinstance(_features(builder).get("mask"), tfds.features.Image)
    every = np.ones(len(labels), bool)
    return RetrievalDataset(
        name=name,
        split=split,
        label=labels,
        label_names=label_names,
        id=columns["id"],
        is_query=columns.get("is_query", every).astype(bool),
        is_gallery=columns.get("is_gallery", every).astype(bool),
        item=_as_integers(columns.get("item_id")),
        series=_as_integers(columns.get("series")),
        bbox=columns["bbox"].astype(np.float32) if "bbox" in columns else None,
        images=EncodedImages(source, folder),
        masks=EncodedImages(source, folder, "mask") if has_masks else None,
    )


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    label: str = "label",
    on_bad_image: str = "fail",
) -> tfds.core.DatasetBuilder:
    """Downloads and writes a dataset unless that is done, and returns its builder.

    The files appear all at once, when they are complete. Processes that prepare the same dataset
    wait for one another, so one of them does the work.

    Raises:
        InputError: see :func:`open_prepared`; also a dataset that was prepared with
            ``on_bad_image="skip"`` and lacks images, when ``on_bad_image="fail"``.
    """
    builder = make_builder(name, data_dir, manual_dir, on_bad_image)
    _check_features(name, builder, label)
    # A builder reads what is on disk when it is made. One without splits was made before another
    # process put the dataset into place, even if it is there by now.
    if not is_prepared(builder) or not builder.info.splits:
        with _locked(Path(builder.data_dir_root) / f".{builder.name}.lock", name):
            builder = make_builder(name, data_dir, manual_dir, on_bad_image)
            if not is_prepared(builder):
                _write(name, builder, manual_dir)
    _check_skipped(name, builder, on_bad_image)
    return builder


def make_builder(
    name: str,
    data_dir: str | os.PathLike | None,
    manual_dir: str | os.PathLike | None,
    on_bad_image: str,
) -> tfds.core.DatasetBuilder:
    """Finds the builder of ``name``, ``name/config`` or ``package.module.name``; writes nothing."""
    if not re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)*([/:].*)?", name):
        raise _unknown(name)
    module, _, plain_name = re.split("[/:]", name)[0].rpartition(".")
    builder_name = name.removeprefix(f"{module}.")
    module = OURS.get(plain_name, module)
    if data_dir is None and not os.environ.get("TFDS_DATA_DIR") and os.path.expanduser("~") == "~":
        raise InputError(
            f"this user has no home folder to prepare '{name}' in: give a folder as data_dir "
            "(--config.data.data_dir=DIR), or set TFDS_DATA_DIR=DIR"
        )
    options: dict = {"data_dir": None if data_dir is None else os.path.expanduser(data_dir)}
    if plain_name == "clothing_dataset_small" or plain_name in BY_HAND:
        options |= {"manual_dir": manual_dir, "on_bad_image": on_bad_image}
    try:
        if module:
            importlib.import_module(module)
        return tfds.builder(builder_name, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise _unknown(name) from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"dataset '{name}' needs the module '{error.name}', which is not installed: install "
            f"it, or correct the name; ours are {', '.join(OURS)}"
        ) from error
    except (ValueError, AssertionError) as error:  # TFDS's for a config and for a version
        if _is_known_config(name, plain_name):
            raise _damaged(name, data_dir, error) from error
        raise _unknown_config(name, plain_name) from error
    except Exception as error:  # of many kinds, by what is damaged beside the records
        if plain_name not in OURS:
            raise
        raise _damaged(name, data_dir, error) from error


def _is_known_config(name: str, plain_name: str) -> bool:
    config = name.partition("/")[2]
    return plain_name in OURS and config in ("", *tfds.builder_cls(plain_name).builder_configs)


def _damaged(name: str, data_dir: str | os.PathLike | None, error: Exception) -> InputError:
    where = shown(data_dir or "~/tensorflow_datasets")
    return InputError(
        f"'{name}' in {where} is damaged ({shown(' '.join(str(error).split()), 200)}): delete its "
        "folder there to prepare it again"
    )


def _unknown(name: str) -> InputError:
    if os.path.isdir(name):
        return InputError(f"unknown dataset '{name}': to mean the folder, write ./{name}")
    return InputError(
        f"unknown dataset '{name}': ours are {', '.join(OURS)}; a dataset of an installed TFDS "
        "goes by its name there; for your own photos give the path of a CSV manifest, "
        "photos.csv, with the columns path,label, or of a folder of class folders, ./photos/"
    )


def _unknown_config(name: str, plain_name: str) -> InputError:
    try:
        builder = tfds.builder_cls(plain_name)
    except (tfds.core.DatasetNotFoundError, ValueError):
        return _unknown(name)
    return InputError(
        f"dataset '{name}' cannot be made: its version is {builder.VERSION}, and its configs are "
        f"{sorted(builder.builder_configs)}"
    )


def _check_features(name: str, builder: tfds.core.DatasetBuilder, label: str) -> None:
    features = _features(builder)
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
    if not isinstance(features.get("image"), tfds.features.Image):
        raise InputError(f"dataset '{name}' has no feature image (Image): it has {found}")
    feature = features.get(label)
    dtype = getattr(feature, "np_dtype", None)
    if getattr(feature, "shape", None) != () or dtype is None or np.dtype(dtype).kind not in "iu":
        raise InputError(
            f"dataset '{name}' has no integer feature '{label}' to tell what is similar: choose "
            f"another label among {found}"
        )


def _features(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
    return dict(cast(Any, builder.info.features) or {})


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the dataset of a builder is there, whole."""
    # Not builder.is_prepared(), which warns about a folder that is not there. TFDS renames the
    # folder into place when it is complete.
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_lock(path)
    except OSError as error:
        raise InputError(
            f"cannot prepare '{name}' in {path.parent} ({error.strerror}): choose another data_dir"
        ) from error
    with file:
        if not take_lock(file):
            print(f"waiting for another process that prepares {name}", file=sys.stderr)
            take_lock(file, wait=True)
        yield  # closing the file releases the lock, also when the process is killed


def _write(name: str, builder: tfds.core.DatasetBuilder, manual_dir) -> None:
    folder = Path(builder.data_dir)
    if folder.exists():
        raise InputError(f"{folder} is not a complete dataset: delete it, and run again")
    for stale in folder.parent.glob("incomplete.*"):  # left by a process that was killed
        shutil.rmtree(stale)
    print(f"preparing {name} in {folder}", file=sys.stderr)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    with _quiet(builder):
        builder.download_and_prepare(download_config=config, file_format="array_record")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.array_record-*")}
    with written_whole(folder / _SIZES) as partial:
        partial.write_text(json.dumps(sizes))
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    print(f"prepared {name}: {counts}", file=sys.stderr)


@contextlib.contextmanager
def _quiet(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """TFDS prints to stdout, which belongs to results; ours also show their own progress."""
    if builder.name not in OURS:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _check_skipped(name: str, builder: tfds.core.DatasetBuilder, on_bad_image: str) -> None:
    path = Path(builder.data_dir) / SKIPPED_LIST
    lines = read_text(path).splitlines() if path.exists() else []
    if not lines:
        return
    report = f"{name} was prepared with on_bad_image='skip' and is not complete ({few(lines)})"
    if on_bad_image == "fail":
        raise InputError(
            f"{report}: accept that with on_bad_image='skip', or delete {path.parent} to prepare "
            "it again"
        )
    print(f"{report}; the whole list is in {path}", file=sys.stderr)


def _open_source(builder: tfds.core.DatasetBuilder, split: str) -> Sequence:
    splits = builder.info.splits
    if split not in splits:
        try:
            splits[split]  # an expression, such as train[:10%] or train+test
        except (KeyError, ValueError) as error:
            raise InputError(
                f"dataset '{builder.name}' has no split '{split}': choose one of {list(splits)}"
            ) from error
    missing = [path for path in splits[split].filepaths if not os.path.exists(path)]
    if missing:
        raise InputError(f"{missing[0]} is missing: delete {builder.data_dir} to prepare it again")
    _check_sizes(Path(builder.data_dir), splits[split].filepaths)
    file_format = builder.info.file_format
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"{builder.data_dir} was prepared as {file_format and file_format.value}, which only "
            "TensorFlow reads: choose another data_dir, and it is prepared as array_record"
        )
    features = _features(builder).items()
    images = [key for key, feature in features if isinstance(feature, tfds.features.Image)]
    skip: dict = {key: tfds.decode.SkipDecoding() for key in images}
    return cast(Any, builder).as_data_source(split, decoders=skip)


def _check_sizes(folder: Path, files: Sequence[str | os.PathLike]) -> None:
    """Raise RuntimeError where a file of records has another size than when it was written.

    Records have checksums; that a whole file is another one, such as another split's, they can't
    tell. What earlier versions prepared has no sizes.
    """
    try:
        sizes = read_json(folder / _SIZES)
    except (OSError, ValueError):
        return
    for file in map(Path, files):
        if not isinstance(sizes, dict) or sizes.get(file.name) != file.stat().st_size:
            raise RuntimeError(f"{file.name} is not the file that was written")


@contextlib.contextmanager
def _damage_told(folder: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what array_record raises
        raise InputError(
            f"the records in {folder} are damaged ({' '.join(str(error).split())[:120]}): delete "
            "that folder to prepare it again"
        ) from error


def _read_columns(
    builder: tfds.core.DatasetBuilder, source: Sequence, split: str, label: str
) -> dict[str, np.ndarray]:
    digest = hashlib.sha256(f"{split}\n{label}".encode()).hexdigest()[:12]
    path = Path(builder.data_dir) / f"columns-{digest}.npz"
    state = _state(Path(builder.data_dir))
    with contextlib.suppress(Exception):  # NumPy and zipfile raise many kinds, by the damage.
        columns = read_arrays(path)
        if str(columns.pop("state")) == _digest_of(columns, state):
            return columns
    columns = _collect_columns(builder, source, split, label)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    with contextlib.suppress(OSError):  # a read-only folder: read them again next time
        digest = np.array(_digest_of(columns, state))
        np.savez(part, allow_pickle=False, state=digest, **columns)
        part.replace(path)
    return columns


def _digest_of(columns: dict[str, np.ndarray], state: str) -> str:
    """Changes with the dataset's state and with any number of the columns."""
    digest = hashlib.sha256(state.encode())
    for key, column in sorted(columns.items()):
        digest.update(f"{key} {column.dtype} {column.shape}".encode())
        digest.update(np.ascontiguousarray(column).view(np.uint8).data)
    return digest.hexdigest()


def _state(folder: Path) -> str:
    """Changes whenever the dataset is prepared anew."""
    files = sorted(path for path in folder.iterdir() if ".npz" not in path.suffixes)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _collect_columns(
    builder: tfds.core.DatasetBuilder, source: Sequence, split: str, label: str
) -> dict[str, np.ndarray]:
    features = _features(builder)
    keys = {"label": label}
    for key in _COLUMNS:  # scalars and one box an image; anything else of that name is not ours
        if getattr(features.get(key), "shape", None) == ((4,) if key == "bbox" else ()):
            keys[key] = key
    values: dict[str, list] = {key: [] for key in keys}
    relative_box = "bbox" in keys and isinstance(features["bbox"], tfds.features.BBoxFeature)
    for record in progress(source, f"reading labels of {split}", total=len(source)):
        for key, feature in keys.items():
            values[key].append(record[feature])
        if relative_box:
            values["bbox"][-1] = _to_pixels(record["bbox"], decode_image(record["image"]))
    columns = {key: np.array(value) for key, value in values.items()}
    columns["id"] = _ids(split, len(source), values.get("id"))
    return columns


def _to_pixels(box: np.ndarray, image: np.ndarray) -> list[float]:
    # TFDS boxes are ymin, xmin, ymax, xmax in fractions of the image.
    height, width = image.shape[:2]
    return [box[1] * width, box[0] * height, box[3] * width, box[2] * height]


def _ids(split: str, count: int, values: list | None) -> np.ndarray:
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values or []]
    if len(set(texts)) < count:
        texts = [f"{split}/{index:06d}" for index in range(count)]
    return np.array(texts, dtype=np.str_)


def _as_integers(values: np.ndarray | None) -> np.ndarray | None:
    if values is None or values.dtype.kind in "iub":
        return None if values is None else values.astype(np.int64)
    return np.unique(values, return_inverse=True)[1].astype(np.int64)  # names, such as b"id_07"


def _number_labels(
    builder: tfds.core.DatasetBuilder, split: str, label: str, values: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    feature = _features(builder)[label]
    if not isinstance(feature, tfds.features.ClassLabel):
        names, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int32), tuple(str(name) for name in names)
    unlabelled = int((values < 0).sum())
    if unlabelled:
        raise InputError(
            f"{unlabelled} of {len(values)} images of '{builder.name}' have no {label} in split "
            f"'{split}': choose another split"
        )
    if len(values) and values.max() >= len(feature.names):
        raise InputError(
            f"'{builder.name}' has the {label} {values.max()} of {len(feature.names)} in split "
            f"'{split}': delete {builder.data_dir} to prepare it again"
        )
    return values.astype(np.int32), tuple(feature.names)
