"""The order of ties, (float32 distance, gallery index), and float32 numbers as integers of it.

Integers sort where floats would not do: a distance and an index fit one integer, and the last bits
of a bound have room for a number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NO_BOUND, INFINITE = 2**31 - 1, 0x7F800000  # Of bounds as integers.


def packed(distances: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Integers that sort by (distance, index): uint64, the distance in the upper half."""
    bits = (distances + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    upper = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return upper.astype(np.uint64) << 32 | indices.view(np.uint32)


# The key of no item, behind all others: infinitely far, of index -1.
NOBODY = packed(np.array([np.inf], np.float32), np.array([-1], np.int32))[0]


def unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances and indices of keys."""
    upper = (keys >> 32).astype(np.uint32)
    bits = np.where(upper >> 31, upper ^ np.uint32(2**31), ~upper)
    return bits.view(np.float32), (keys & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 of the same order."""
    return reordered(jax.lax.bitcast_convert_type(x, jnp.int32))


def reordered(bits: Any) -> Any:
    """float32's bits as int32 of the same order, and back; for NumPy and JAX."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
