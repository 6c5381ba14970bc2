"""A model of cbam_jax in the image retrieval tasks of MTEB, for its public leaderboard.

pip install mteb
python examples/mteb_images.py MODEL [CUB200I2IRetrieval SOPI2IRetrieval ...]

MODEL is a run, an exported folder or a published model's name. Written by the protocol of encoders
in mteb 2.26, which fetches each task's images itself.
"""

import sys
from typing import Any

import numpy as np

import cbam_jax


class Encoder:
    """What MTEB asks of an encoder; ``meta`` is its ModelMeta, under which results are kept."""

    def __init__(self, embedder: Any, meta: Any = None) -> None:
        self.embedder, self.mteb_model_meta = embedder, meta

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """Embeddings [n, d] of unit length, of batches that have PIL images under ``image``."""
        images = [np.asarray(i.convert("RGB")) for batch in inputs for i in batch["image"]]
        x = self.embedder.embed_images(images)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def similarity(self, a: Any, b: Any) -> Any:
        """Cosines [a, b], a tensor."""
        import torch

        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        """Cosines [n] of pairs, a tensor."""
        import torch

        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


def main(model: str, *tasks: str) -> None:
    """Measure a model on tasks of MTEB."""
    import mteb
    from mteb.models.model_meta import ModelMeta

    embedder = cbam_jax.load(model)
    name = {
        "name": f"cbam_jax/{model.rstrip('/').split('/')[-1]}",
        "revision": embedder.fingerprint,
        "modalities": ["image"],  # It is taken for a model of texts otherwise, and refused.
    }
    encoder = Encoder(embedder, ModelMeta.create_empty(overwrites=name))
    print(mteb.evaluate(encoder, tasks=mteb.get_tasks(tasks=tasks or ["CUB200I2IRetrieval"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
