"""Blocks that are computed again: the same numbers, in less memory, for more computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cbam_jax import model_state, remat, steps
from cbam_jax.backbones.resnet import Bottleneck
from cbam_jax.backbones.vgg import VGG16
from cbam_jax.backbones.vit import Variant, VisionTransformer
from cbam_jax.benchmark.compiled import program_memory
from cbam_jax.checkpoint import flatten


class Convolutions(nnx.Module):
    """Two bottlenecks, whose inner kernels are worth sharing, on maps of 16 x 16."""

    def __init__(self, rngs):
        widths = (3, 128)
        self.blocks = nnx.List([Bottleneck(w, 32, dtype=jnp.float32, rngs=rngs) for w in widths])
        for block in self.blocks:  # Else a block starts as its shortcut.
            block.bn3.scale[...] = jnp.ones(128)

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=(1, 2))


class Transformer(VisionTransformer):
    """Two blocks that drop paths: random numbers are drawn twice, and must be the same."""

    def __init__(self, rngs):
        variant = Variant(32, 2, 2, 4, 16, 96, "gelu", 1e-6, interpolation="bicubic")
        super().__init__(variant, drop_path=0.5, rngs=rngs)

    preprocess = Convolutions.preprocess


def loss(embeddings, labels):
    wanted = jnp.sin(jnp.arange(1.0, 1 + embeddings.shape[1])[None] * labels[:, None])
    return jnp.mean(jnp.square(embeddings - wanted)), {}


def trained(build, **options):
    """Two steps: the state, its losses, and what the program needs."""
    shared = options.get("shard_state", False)
    model, mesh = build(nnx.Rngs(0, params=1)), steps.data_mesh(jax.devices()[: 1 + shared])
    optimizer = steps.create_optimizer("sgd", 0.05, momentum=0.9)
    state = steps.create_train_state(model, optimizer, mesh, shard_state=shared)
    step = steps.make_train_step(model, optimizer, loss, mesh=mesh, **options)
    rng = np.random.default_rng(3)
    batch = {
        "image": rng.integers(0, 256, (32, 16, 16, 3), np.uint8),
        "label": rng.normal(size=32).astype(np.float32),
    }
    (batch,) = steps.to_devices([batch], mesh)
    compiled = step.lower(state, batch).compile()
    losses = []
    for _ in range(2):
        state, scalars = compiled(state, batch)
        losses.append(float(scalars["loss"]))
    cost = program_memory(compiled) | {"flops": compiled.cost_analysis()["flops"]}
    return flatten(state), losses, cost


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("build", [Convolutions, Transformer])
def test_numbers_stay_and_memory_is_less(build):
    expected, losses, cost = trained(build)
    actual, again, less = trained(build, remat=True)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    assert losses[0] != losses[1]
    same(actual, expected)
    assert 1.15 < less["flops"] / cost["flops"] < 1.5
    assert less["temporaries"] < 0.9 * cost["temporaries"]


@pytest.mark.slow
def test_blocks_gather_what_devices_share():
    expected, losses, whole = trained(Convolutions)
    actual, again, shared = trained(Convolutions, remat=True, shard_state=True)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    same(actual, expected)
    assert shared["arguments"] < 0.8 * whole["arguments"]


def test_only_models_with_blocks_can_and_only_blocks_are_left_to_themselves():
    with pytest.raises(ValueError, match="VGG has no blocks that can be computed again; embed .*"):
        remat.recomputed(nnx.eval_shape(lambda: VGG16(rngs=nnx.Rngs(0))))
    model = nnx.eval_shape(lambda: Transformer(nnx.Rngs(0)))
    view = remat.recomputed(model_state.training_view(model))
    assert not hasattr(model.blocks[0], "is_recomputed")  # The view alone.
    mesh, params = steps.data_mesh(), model_state.split(model).params
    text = str(jax.make_jaxpr(lambda p: remat.gathered_outside(view, p, mesh))(params))
    outside = [path for path, _ in nnx.to_flat_state(params) if path[0] != "blocks"]
    assert text.count("sharding_constraint[") == len(outside) > 5
