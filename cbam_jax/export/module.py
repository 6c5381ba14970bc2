"""A program in the place of a model: what ``Embedder`` takes, and so a catalogue."""

from typing import Any

from cbam_jax.export.loading import Program
from cbam_jax.preprocessing import check_images


def as_module(program: Program) -> Any:
    """Return a module that holds a program's weights, under their names, and calls it.

    It has what ``models.EmbeddingModel`` has to embed; there are no feature maps to look at.
    """
    from flax import nnx  # Late: programs load without.

    class Exported(nnx.Module):
        def __init__(self):
            self.mean, self.std = program.preprocessing.mean, program.preprocessing.std
            self.embedding_dim = program.dimension
            for name, array in program.weights.items():
                # The whole name, points and all, so that the fingerprint is that of the model.
                setattr(self, name, nnx.Param(array))

        def preprocess(self, images: Any) -> Any:
            check_images(images)
            return images

        def __call__(self, images: Any) -> Any:
            weights = {name: getattr(self, name)[...] for name in program.weights}
            return program.exported.call(weights, images)

    return Exported()
