"""A model as a function of its weights and a batch of pixels, and that as StableHLO.

Weights are arguments: a program is some tens of kilobytes whatever the model's size, and the
weights stay a file that other tools read. The batch is symbolic, height and width are fixed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.platforms import compiled_for

# A program computes, and calls nothing outside of itself; this one checks the shape of a batch.
_CALLED = {"shape_assertion"}
_REACHES_OUT = re.compile(r"\b(custom_call|infeed|outfeed|send|recv)\b(?: @(\w+))?")
# Layers of no part in an embedding.
_UNUSED = ("class_head", "backbone.aux1", "backbone.aux2")


def split(model: Any) -> tuple[Callable[..., jax.Array], dict[str, jax.Array]]:
    """Return a model in evaluation mode as ``embed(weights, images)``, and its weights by name.

    Args:
        model: a module with ``preprocess``, such as ``models.EmbeddingModel``.

    Returns:
        ``embed``, which maps weights and uint8 RGB [b, s, s, 3] to float32 [b, d], and the
        parameters and statistics that it depends on: ``{"backbone.conv1.kernel": ...}``.
    """
    from flax import nnx

    from cbam_jax import model_state  # Late, as all that knows modules: programs load without.

    parts = model_state.split(model)
    merge = model_state.merger(model_state.evaluation_view(model))
    states = (parts.params, parts.batch_stats)
    arrays = {_name(p): v[...] for state in states for p, v in nnx.to_flat_state(state)}

    def embed(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
        given = {**arrays, **weights}
        filled = (
            nnx.from_flat_state([(p, v.replace(given[_name(p)])) for p, v in nnx.to_flat_state(s)])
            for s in states
        )
        merged = merge(*filled)
        return merged(merged.preprocess(images))

    return embed, {name: arrays[name] for name in sorted(arrays) if not name.startswith(_UNUSED)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def lower(
    embed: Callable[..., jax.Array], weights: Mapping[str, jax.Array], size: int, platform: str
) -> Any:
    """Return ``jax.export``'s program for a platform, whose form of each layer it has.

    Args:
        embed: as ``split`` returns it.
        weights: likewise; their shapes are asked for alone.
        size: height and width of the images, in pixels.
        platform: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``; the machine need not have it.
    """
    from jax import export

    (batch,) = export.symbolic_shape("b")
    shapes = {n: jax.ShapeDtypeStruct(np.shape(w), w.dtype) for n, w in weights.items()}
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)

    # A function of its own: JAX keeps what it has traced, of another platform as well.
    def program(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
        with compiled_for(platform):
            return embed(weights, images)

    with _no_folders():
        return export.export(jax.jit(program), platforms=[platform])(shapes, images)


def outside_call(text: str) -> str | None:
    """Return what a program's text calls outside of itself, None for nothing.

    >>> outside_call("stablehlo.custom_call @run_me(%0)"), outside_call("stablehlo.add %0, %1")
    ('run_me', None)
    """
    for found in _REACHES_OUT.finditer(text):
        if found[2] not in _CALLED:
            return found[2] or found[1]
    return None


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
    """Leave out of a program in which folder of this machine its source lies."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)
