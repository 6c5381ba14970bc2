"""A small ResNet and its numbers."""

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
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        drawn = rng.normal(size=variable.shape)
        drawn = np.abs(drawn) if path[-1] == "var" else drawn
        variable.set_value(jnp.asarray(drawn, jnp.float32))
    return model


def values(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}
