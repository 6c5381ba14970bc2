"""Models' files from the Hugging Face hub, by its own client."""

import re
from pathlib import Path

from cbam_jax import InputError
from cbam_jax.foreign_files import shown
from cbam_jax.pretrained.sources import WEIGHTS

# What an id begins with where a path, or a name, could be meant.
HUB = "hf:"
_FILES = [
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "model-*-of-*.safetensors", "config.json", "open_clip_config.json", "preprocessor_config.json",
    "processor_config.json", "README.md",
]  # fmt: skip


def fetch_repository(source: str, revision: str | None = None) -> Path:
    """Fetch a model's files from the Hugging Face hub into its cache, and return their folder.

    Args:
        source: ``"user/model"`` or ``"hf:user/model"``.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        InputError: it is no such id, ``huggingface_hub`` is not installed, or it cannot be fetched.
    """
    source = source.removeprefix(HUB)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise InputError(f"no folder {shown(source, 80)}, and no id of the hub either (user/model)")
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"no folder {source}; to fetch it from the hub: pip install 'cbam_jax[hub]'"
        ) from None
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
        if not any((folder / name).exists() for name in _FILES[:3]):
            others = [*_FILES, *WEIGHTS]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=others))
        return folder
    except Exception as error:  # It raises its own, its HTTP library's, and the system's.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(
            f"cannot fetch {source} from the hub ({type(error).__name__}: {cause}): check the "
            "name, the network, or fetch the folder elsewhere and give its path"
        ) from error
