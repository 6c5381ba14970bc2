"""A trained model ready for use: photos in, embeddings out. ``cbam_jax.load`` makes one.

An image is cut as the model's preprocessing says, on the host, by threads; batches of one shape
are embedded by one jitted program, uneven ends filled up. Nothing is trained or written.
"""

import functools
import hashlib
import inspect
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from cbam_jax import InputError, data, export, hub, model_state, runs, steps
from cbam_jax.foreign_files import expanded, read_file, shown
from cbam_jax.models import FORM, EmbeddingModel, create_model
from cbam_jax.preprocessing import Preprocessing
from cbam_jax.pretrained import IMAGENET
from cbam_jax.progress import progress as telling

_AHEAD = 2  # Batches whose images are decoded while one is embedded.


class Embedded(NamedTuple):
    """Embeddings of files, and which of the files could not be read.

    Attributes:
        embeddings: [n, d] float32, a row for each path, in order; NaN where the file could not be
            read.
        failed: the path and the reason of each file that could not be read, in order.
    """

    embeddings: np.ndarray
    failed: list[tuple[str, str]]

    @property
    def readable(self) -> np.ndarray:
        """Bool [n], which rows are embeddings."""
        return ~np.any(np.isnan(self.embeddings), axis=1)


class Embedder:
    """A model in evaluation mode, how images are cut for it, and the programs that embed them.

    Args:
        model: in whatever mode; it is left as it is.
        preprocessing: how images are cut for it.
        arguments: those of ``create_model`` that built it, but ``rngs``: a part of the fingerprint.
        batch_size: images embedded at a time, rounded up to what the devices share evenly.
        devices: that share each batch; None: all of this process.

    Attributes:
        model: maps ``model.preprocess(images)`` to embeddings [b, d].
        preprocessing: as given.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        preprocessing: Preprocessing,
        *,
        arguments: Mapping[str, Any],
        batch_size: int = 64,
        devices: Sequence[Any] | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: give at least 1 image")
        self._mesh = steps.data_mesh(jax.local_devices() if devices is None else devices)
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._embed_step = steps.make_embed_step(model, self._mesh)
        _, *state, _ = model_state.split(model)
        self._state = steps.replicate(tuple(state), self._mesh)
        self.model: EmbeddingModel = model_state.merger(model)(*self._state)
        self.model.eval()
        self.preprocessing = preprocessing
        self.arguments = dict(arguments)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding, d."""
        return self.model.embedding_dim

    @functools.cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change when the embeddings may.

        SHA-256 of the weights that embeddings depend on, of what else ``create_model`` was given,
        of the preprocessing, and of the version of the code that cuts images. Equal for a run and
        what is exported of it; another batch size or device changes embeddings by rounding alone,
        and not the fingerprint.
        """
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, array in _weights(self._state):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _description(self) -> dict[str, Any]:
        parameters = inspect.signature(create_model).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        arguments = defaults | self.arguments
        del arguments["num_classes"], arguments["drop_path"]  # No embedding depends on these.
        # Arguments that came later are left out at their defaults, so that fingerprints stay.
        for name in ("activation", "attention", "transformer", *FORM):
            if arguments[name] == defaults[name]:
                del arguments[name]
        return {
            "model": arguments | {"dtype": jnp.dtype(arguments["dtype"]).name},
            "preprocessing": self.preprocessing.to_dict(),
            "version": self.preprocessing.version,
        }

    def embed_files(
        self,
        paths: Iterable[str | os.PathLike | bytes],
        *,
        boxes: ArrayLike | None = None,
        progress: bool = True,
    ) -> Embedded:
        """Embed image files, any number of them in bounded memory.

        Always in batches of ``batch_size``, so that a file's embedding is the same to the last bit
        whatever it is embedded with, and the same as ``evaluate.py`` writes with that batch size.

        Args:
            paths: of the files, ``~`` is one's home; or a file's bytes, such as an upload's.
            boxes: [n, 4], ``x1, y1, x2, y2`` of the part of each that is used, in pixels of the
                decoded image; None: all of it.
            progress: show on stderr how far it is.

        Returns:
            A row for each path; see ``Embedded``.

        Raises:
            InputError: ``boxes`` do not fit ``paths``. A file that cannot be read is no error.
        """
        if isinstance(paths, str | bytes | os.PathLike):
            raise InputError(f"one path, {str(paths)[:80]!r}, where a list belongs: give [path]")
        files = [path if isinstance(path, bytes) else str(os.fspath(path)) for path in paths]
        places = _checked_boxes(boxes, len(files))

        def cut(row: int) -> np.ndarray:
            encoded, name = _read(files[row], row)
            return data.cut_file(encoded, self.preprocessing, box=places[row], name=name)

        embeddings, failed = self._embed(cut, len(files), self._batch_size, progress)
        return Embedded(embeddings, [(_name(files[row], row), reason) for row, reason in failed])

    def embed_file(
        self, path: str | os.PathLike | bytes, *, box: ArrayLike | None = None
    ) -> np.ndarray:
        """Embed one image file at once, by a program of its own: a query that someone waits for.

        Args:
            path: of the file, or its bytes.
            box: ``x1, y1, x2, y2`` of the part that is used, in pixels; None: all of it.

        Returns:
            [d] float32: what ``embed_files`` gives, but for rounding.

        Raises:
            InputError: the file cannot be read.
        """
        file = path if isinstance(path, bytes) else str(os.fspath(path))
        (place,) = _checked_boxes(None if box is None else np.asarray(box)[None], 1)

        def cut(row: int) -> np.ndarray:
            encoded, name = _read(file, row)
            return data.cut_file(encoded, self.preprocessing, box=place, name=name)

        embeddings, failed = self._embed(cut, 1, self._mesh.size, False)
        for _, reason in failed:
            raise InputError(reason)
        return embeddings[0]

    def embed_images(
        self,
        images: Iterable[np.ndarray],
        *,
        boxes: ArrayLike | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed decoded images of any sizes.

        One image alone is embedded by a program of its own, at once, which gives what a batch gives
        but for rounding; more than one are embedded as files are. A JPEG of more than twice the
        model's size is better given as a file, or its bytes: that decodes it at a fraction of its
        size, as training did, and its pixels are others then (``data.cut_pixels``).

        Args:
            images: uint8 RGB, each [h, w, 3].
            boxes: as for ``embed_files``.
            progress: show on stderr how far it is.

        Returns:
            [n, d] float32.

        Raises:
            InputError: names the image that is not uint8 RGB, and what is meant.
        """
        if isinstance(images, np.ndarray | jax.Array) and images.ndim == 3:
            raise InputError("one image where a list belongs: give [image]")
        images = [np.asarray(x) if isinstance(x, jax.Array) else x for x in images]
        for row, image in enumerate(images):
            _check_image(image, row)
        places = _checked_boxes(boxes, len(images))

        def cut(row: int) -> np.ndarray:
            name = f"image {row}"
            return data.cut_pixels(images[row], self.preprocessing, box=places[row], name=name)

        size = self._mesh.size if len(images) == 1 else self._batch_size
        embeddings, failed = self._embed(cut, len(images), size, progress)
        if failed:
            raise InputError(failed[0][1])
        return embeddings

    def _embed(
        self, cut: Callable[[int], np.ndarray], count: int, batch_size: int, progress: bool
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Embeddings [count, d], and the rows that could not be cut, with the reason."""
        if not count:
            return np.zeros((0, self.dimension), np.float32), []
        failed: list[tuple[int, str]] = []
        batches = self._batches(cut, count, batch_size, failed)
        if progress:
            total = -(-count // batch_size)
            batches = telling(batches, "embedding", total=total, unit=f" batches of {batch_size}")
        params, batch_stats = self._state
        embeddings = steps.embed_batches(
            self._embed_step, params, batch_stats, batches, self._mesh, count
        )
        embeddings[[row for row, _ in failed]] = np.nan
        return embeddings, failed

    def _batches(
        self,
        cut: Callable[[int], np.ndarray],
        count: int,
        batch_size: int,
        failed: list[tuple[int, str]],
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches as ``data.eval_batches`` has them; threads cut the images of the next ones."""
        waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, count, batch_size):
                rows = np.arange(start, min(start + batch_size, count))
                waiting.append((rows, [pool.submit(_try, cut, int(row)) for row in rows]))
                if len(waiting) > _AHEAD:
                    rows, images = waiting.popleft()
                    yield self._batch(rows, images, batch_size, failed)
            for rows, images in waiting:
                yield self._batch(rows, images, batch_size, failed)

    def _batch(
        self, rows: np.ndarray, cut: list[Future], batch_size: int, failed: list[tuple[int, str]]
    ) -> dict[str, np.ndarray]:
        side = self.preprocessing.image_size
        images = np.zeros((batch_size, side, side, 3), np.uint8)
        for place, (row, future) in enumerate(zip(rows, cut, strict=True)):
            image = future.result()
            if isinstance(image, str):
                failed.append((int(row), image))
            else:
                images[place] = image
        mask = np.arange(batch_size) < len(rows)
        index = np.zeros(batch_size, np.int64)
        index[: len(rows)] = rows
        return {"image": images, "index": index, "mask": mask}


def load(
    source: str | os.PathLike,
    checkpoint: str | int = "best",
    *,
    revision: str | None = None,
    batch_size: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Embedder:
    """Load a trained model, ready to embed photos, in evaluation mode whatever it comes from.

    Args:
        source: the workdir of a run, a folder of ``hub.save_pretrained`` or of ``export.save``, an
            id of the Hugging Face hub such as ``"user/model"``, or a backbone with published
            ImageNet weights, such as ``"efficientnet_lite0"`` or ``"resnet50"``: see
            ``pretrained.IMAGENET``.
        checkpoint: of a run: ``"best"`` by validation ``map@10``, ``"last"``, ``"untrained"``, or a
            step.
        revision: of a hub id: branch, tag or commit; None: its main branch.
        batch_size: images embedded at a time; None: the run's ``eval.batch_size``, else 64.
        devices: that share each batch; None: all of this process.

    Raises:
        InputError: one line that names the source and the remedy.

    Example:
        >>> import cbam_jax
        >>> embedder = cbam_jax.load("runs/mine")  # doctest: +SKIP
        >>> found = embedder.embed_files(["a.jpg", "b.png"])  # doctest: +SKIP
        >>> found.embeddings.shape, found.failed  # doctest: +SKIP
        ((2, 128), [])
    """
    folder = expanded(source)
    if os.path.isfile(folder):
        raise InputError(f"{folder} is a file: give its folder")
    if runs.is_run(folder):
        config = runs.read_config(folder)
        model, document = hub.from_run(config, folder, checkpoint)
        batch_size = config.eval.batch_size if batch_size is None else batch_size
    elif checkpoint != "best":
        raise InputError(f"checkpoint={checkpoint!r}: {source} is no run, which alone has several")
    elif export.is_program(folder):
        program = export.load(folder)
        model, document = export.as_module(program), program.contract
    elif str(source) in IMAGENET["imagenet"] and not folder.exists():
        model, document = hub.from_published(str(source))
    else:
        model, document = hub.from_pretrained(source, revision=revision)
    return Embedder(
        model,
        Preprocessing.from_dict(document["preprocessing"], mean=model.mean, std=model.std),
        arguments=document["model"],
        batch_size=64 if batch_size is None else batch_size,
        devices=devices,
    )


def _weights(state: Any) -> list[tuple[str, np.ndarray]]:
    """The arrays that embeddings depend on, by name: not those of classifiers."""
    named = [
        (".".join(map(str, path)), np.asarray(variable[...]))
        for part in state
        for path, variable in nnx.to_flat_state(part)
    ]
    unused = ("class_head", "backbone.aux1", "backbone.aux2")
    return sorted((n, a) for n, a in named if not n.startswith(unused))


def _try(cut: Callable[[int], np.ndarray], row: int) -> np.ndarray | str:
    """An image, or why there is none."""
    try:
        return cut(row)
    except (InputError, OSError, cv2.error, MemoryError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _name(file: str | bytes, row: int) -> str:
    return f"image {row}" if isinstance(file, bytes) else file


def _read(file: str | bytes, row: int) -> tuple[bytes, str]:
    """A file's bytes, and what messages call it."""
    if isinstance(file, bytes):
        return file, _name(file, row)
    path = expanded(file)
    if not os.path.isfile(path):
        raise InputError("not a file" if os.path.lexists(path) else "no such file")
    return read_file(path), shown(path.name)


def _checked_boxes(boxes: ArrayLike | None, count: int) -> list[Any]:
    """A box for each image, None for all of it."""
    if boxes is None:
        return [None] * count
    boxes = np.asarray(boxes, np.float64)
    if boxes.shape != (count, 4):
        raise InputError(f"boxes have shape {boxes.shape}, expected ({count}, 4): x1, y1, x2, y2")
    return list(boxes)


def _check_image(image: Any, row: int) -> None:
    shape, dtype = np.shape(image), getattr(image, "dtype", type(image).__name__)
    right = len(shape) == 3 and shape[2] == 3 and dtype == np.uint8
    if right and isinstance(image, np.ndarray) and image.size:
        return
    if not isinstance(image, np.ndarray):
        remedy = "give a NumPy array"
    elif len(shape) == 4:
        remedy = "give a list of single images, or iterate over the batch"
    elif len(shape) == 3 and shape[0] == 3 != shape[2]:
        remedy = "move the channels last, transpose(1, 2, 0)"
    elif len(shape) == 2:
        remedy = "repeat grey to three channels"
    elif len(shape) == 3 and shape[2] == 4:
        remedy = "lay transparency over a background first, or embed the file"
    elif right:
        remedy = "it has no pixels"
    elif dtype != np.uint8:
        remedy = "give pixels from 0 to 255 as uint8; floats in [0, 1] are multiplied by 255 first"
    else:
        remedy = "give one image"
    raise InputError(
        f"image {row} is {dtype} {list(shape)}, expected uint8 RGB [h, w, 3]: {remedy}"
    )
