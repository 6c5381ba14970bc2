"""A small window at many places of a map: convolutions, and what it sees as views to compute with.

Products and sums over views are what XLA's CPU backend runs faster than some of its convolutions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Window(NamedTuple):
    """A size x size window at height x width places, ``strides`` apart, of a padded map.

    ``padding`` is ((top, bottom), (left, right)).
    """

    size: int
    strides: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    height: int
    width: int

    @classmethod
    def over(cls, x: jax.Array, size: int, strides: int) -> "Window":
        """Return the places of an odd window over [b, h, w, c], padded by size // 2."""
        height, width = (-(-side // strides) for side in x.shape[1:3])
        border = (size // 2, size // 2)
        return cls(size, strides, (border, border), height, width)

    @classmethod
    def same(cls, x: jax.Array, size: int, strides: int) -> "Window":
        """Return as many places, padded as TensorFlow's ``"SAME"``: if unevenly, less before."""
        height, width = (-(-side // strides) for side in x.shape[1:3])
        spans = ((places - 1) * strides + size for places in (height, width))
        more = [max(span - side, 0) for span, side in zip(spans, x.shape[1:3], strict=True)]
        vertical, horizontal = ((total // 2, total - total // 2) for total in more)
        return cls(size, strides, (vertical, horizontal), height, width)


def convolution(x: jax.Array, kernel: jax.Array, window: Window, *, groups: int = 1) -> jax.Array:
    """Return the convolution of [b, h, w, c] with [k, k, c, f], [b, height, width, f]."""
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (window.strides,) * 2
    return lax.conv_general_dilated(
        x, kernel, strides, window.padding, dimension_numbers=layout, feature_group_count=groups
    )


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def views_of(x: jax.Array, window: Window, value: float) -> list[jax.Array]:
    """Return size x size shifted, strided views [b, height, width, c] of the padded map, by row."""
    size, strides, ((top, _), (left, _)), height, width = window
    # Poolings may leave no row of a small image: then the views have none either.
    rows, columns = (max(strides * (places - 1) + 1, 0) for places in (height, width))
    bottom = max(rows + size - 1 - x.shape[1] - top, 0)
    right = max(columns + size - 1 - x.shape[2] - left, 0)
    border = ((0, 0), (top, bottom), (left, right), (0, 0))
    x = jnp.pad(x, border, constant_values=value)
    # Not by indexing, which is a gather for a batch whose size is not known yet.
    steps = (1, strides, strides, 1)
    return [
        lax.slice(x, (0, i, j, 0), (x.shape[0], i + rows, j + columns, x.shape[3]), steps)
        for i in range(size)
        for j in range(size)
    ]


@views_of.defjvp
def _views_jvp(window: Window, value: float, primals: Any, tangents: Any):
    return views_of(primals[0], window, value), phased_views(tangents[0], window)


def phased_views(x: jax.Array, window: Window) -> list[jax.Array]:
    """Return the views of a map padded with zeros, in a form whose transpose is `add_views`.

    The map is split into the s^2 phases of the strides s, of which a view is a part without
    strides; backwards these are put together, where XLA's transpose of a strided view is a whole
    map of mostly zeros.
    """
    size, s, ((top, _), (left, _)), height, width = window
    rows = max(-(-(x.shape[1] + top) // s), height + (size - 1) // s)
    columns = max(-(-(x.shape[2] + left) // s), width + (size - 1) // s)
    bottom, right = rows * s - top - x.shape[1], columns * s - left - x.shape[2]
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    padded = padded.reshape(x.shape[0], rows, s, columns, s, x.shape[3])
    phases = [
        [phase[:, :, 0, :, 0] for phase in lax.split(row, (1,) * s, axis=4)]
        for row in lax.split(padded, (1,) * s, axis=2)
    ]
    return [
        phases[i % s][j % s][:, i // s : i // s + height, j // s : j // s + width]
        for i in range(size)
        for j in range(size)
    ]


def add_views(views: list[jax.Array], window: Window, like: jax.Array) -> jax.Array:
    """Add up what the views say of each pixel of ``like``: the transpose of `phased_views`."""
    (total,) = jax.linear_transpose(lambda x: phased_views(x, window), like)(views)
    return total
