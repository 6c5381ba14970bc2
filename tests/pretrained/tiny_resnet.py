"""A small ResNet and its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cbam_jax.backbones.resnet import BasicBlock, ResNet
from cbam_jax.models import EmbeddingModel


def tiny(attention=None, embedding_dim=None, seed=0):
    """A small model with every tensor drawn by NumPy: no random operation need be compiled."""

    def build():
        rngs = nnx.Rngs(0)
        backbone = ResNet(
            stage_sizes=(1, 1, 1, 1), block=BasicBlock, attention=attention, rngs=rngs
        )
        return EmbeddingModel(backbone, embedding_dim=embedding_dim, rngs=rngs)

    model = nnx.eval_shape(build)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def values(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}
