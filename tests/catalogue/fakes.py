"""An embedder without a network: means of 4 x 4 parts of a photo."""

import errno
import os
from typing import NamedTuple

import cv2
import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue
from cbam_jax.datasets import decode_image


class Embedded(NamedTuple):
    """As that of `cbam_jax.embedder`, without importing what embeds."""

    embeddings: np.ndarray
    failed: list

    @property
    def readable(self):
        return ~np.isnan(self.embeddings).any(axis=1)


class FakeEmbedder:
    """As `cbam_jax.Embedder`, with embeddings of 48 numbers; counts what it embeds."""

    def __init__(self, fingerprint="f" * 64, power=1.0):
        self.fingerprint, self.dimension, self.power = fingerprint, 48, power
        self.embedded = 0

    def embed_files(self, paths, *, boxes=None, progress=True):
        rows, failed = [], []
        for row, file in enumerate(paths):
            box = None if boxes is None else boxes[row]
            try:
                rows.append(self._embed(file, box))
            except (InputError, OSError) as error:
                rows.append(np.full(48, np.nan, np.float32))
                failed.append((f"image {row}" if isinstance(file, bytes) else file, f"{error}"))
        self.embedded += len(rows)
        return Embedded(np.array(rows, np.float32).reshape(-1, 48), failed)

    def embed_file(self, path, *, box=None):
        self.embedded += 1
        return self._embed(path, box)

    def _embed(self, file, box):
        if not isinstance(file, bytes):
            with open(file, "rb") as opened:
                file = opened.read()
        image = decode_image(file, name="image 0")
        if box is not None:
            x1, y1, x2, y2 = (int(edge) for edge in box)
            image = image[y1:y2, x1:x2]
        means = cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        return (means / 255) ** self.power


def write_photo(path, seed, size=(40, 52)):
    """A photo of smooth noise that only its seed decides."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 6, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))
    return path


def write_photos(folder, count=12):
    """Photos in two class folders, PNG and JPEG by turns."""
    return [
        write_photo(folder / ("dress", "hat")[i % 2] / f"{i:02}.{('png', 'jpg')[i % 3 > 0]}", i)
        for i in range(count)
    ]


def make_shop(folder):
    """``shop.db`` with the photos of `write_photos`, which are in ``photos``."""
    write_photos(folder / "photos")
    with Catalogue.open(folder / "shop.db", FakeEmbedder()) as shop:
        shop.add(folder / "photos", progress=False)


def lock(monkeypatch, folder):
    """As if a folder might not be entered, which root may always do; undone by ``undo``."""
    stat, scandir = os.stat, os.scandir

    def locked(function, above):
        def call(path=".", *arguments, **options):
            text = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
            if text.startswith(os.path.join(folder, "")) or text == above:
                raise PermissionError(errno.EACCES, "Permission denied", text)
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "stat", locked(stat, None))
    monkeypatch.setattr(os, "lstat", locked(os.lstat, None))
    monkeypatch.setattr(os, "scandir", locked(scandir, str(folder)))
