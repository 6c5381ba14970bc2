"""Vision transformers: SigLIP, CLIP, DINOv2 and DINOv3, one module that its variant describes.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021. Zhai et al.: Sigmoid Loss for
Language Image Pre-Training, ICCV 2023; Tschannen et al.: SigLIP 2, 2025. Radford et al.: Learning
Transferable Visual Models From Natural Language Supervision, ICML 2021. Oquab et al.: DINOv2, 2023;
Darcet et al.: Vision Transformers Need Registers, 2023; Siméoni et al.: DINOv3, 2025.

The same weights are published with different GELUs, epsilons of LayerNorm and ways to stretch the
position embedding, by their source: each is a field of ``Variant``, without a default. Parameters
carry timm's names; the class token holds the position embedding of its own place.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cbam_jax.remat import recomputable

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "silu": nnx.silu,
}
INTERPOLATIONS = ("bicubic", "bicubic_antialias", "bicubic_offset")
POOLS = ("class", "map")
POSITIONS = ("learned", "rope")
# Beyond any published model: a larger one, as a file may ask for, would not be built to its end.
_LARGEST = {
    "width": 16_384, "depth": 64, "heads": 1024, "patch_size": 4096, "image_size": 4096,
    "mlp_width": 131_072, "registers": 1024, "projection": 65_536,
}  # fmt: skip
_ROPE_BASE = 100.0
_OFFSET = 0.1  # patches, of "bicubic_offset"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What tells one vision transformer from another.

    Attributes:
        width: c, numbers of a token.
        depth: blocks.
        heads: of the attention; they divide ``width``.
        patch_size: pixels of a patch's side.
        image_size: pixels of the side whose patches the position embedding is of.
        mlp_width: numbers between the two layers of a block's MLP.
        activation: one of ``ACTIVATIONS``; of SigLIP's pooling too.
        epsilon: of LayerNorm.
        pool: ``"class"``, the class token; ``"map"``, SigLIP's attention with one learned query.
        position: ``"learned"``, or ``"rope"``: DINOv3's rotary embedding, which has no parameters.
        interpolation: how a learned position embedding is stretched over another number of patches:
            ``"bicubic"`` by torch without antialias (Hugging Face), ``"bicubic_antialias"`` (timm,
            open_clip), ``"bicubic_offset"`` (DINOv2's authors); None: not at all.
        gated: ``activation(gate(x)) * up(x)`` in place of ``activation(fc1(x))``.
        registers: tokens that stand between the class token and the patches.
        layer_scale: each block's two parts are multiplied by learned numbers.
        pre_norm: LayerNorm before the first block.
        patch_bias: of the convolution that makes tokens of patches.
        qkv_bias: of queries, keys and values.
        projection: numbers that a linear layer without bias makes of the pooled token; None: none.

    Raises:
        ValueError: for a value that is none of its choices, or out of all proportion.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    mlp_width: int
    activation: str
    epsilon: float
    pool: str = "class"
    position: str = "learned"
    interpolation: str | None = None
    gated: bool = False
    registers: int = 0
    layer_scale: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    projection: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("interpolation", (*INTERPOLATIONS, None)),
            ("pool", POOLS),
            ("position", POSITIONS),
        ):
            if getattr(self, name) not in choices:
                value = repr(getattr(self, name))[:80]
                raise ValueError(f"{name}={value}: choose one of {', '.join(map(str, choices))}")
        for name, largest in _LARGEST.items():
            value, least = getattr(self, name), 0 if name == "registers" else 1
            if name == "projection" and value is None:
                continue
            if type(value) is not int or not least <= value <= largest:
                raise ValueError(f"{name}={repr(value)[:80]}: give a number {least} to {largest}")
        for name, field in type(self).__dataclass_fields__.items():
            if type(field.default) is bool and type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={repr(getattr(self, name))[:80]}: give true or false")
        if not (isinstance(self.epsilon, float) and 0 <= self.epsilon < 1):  # Nor is NaN.
            raise ValueError(f"epsilon={repr(self.epsilon)[:80]}: give a small number")
        if self.width % self.heads or self.image_size < self.patch_size:
            raise ValueError(f"{self.heads} heads must divide {self.width}, a patch fit the image")

    @property
    def grid(self) -> int:
        """Patches along a side that the position embedding is of."""
        return self.image_size // self.patch_size


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel, whose support is 4."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, new_size: int, interpolation: str) -> np.ndarray:
    """What a row of ``size`` numbers is multiplied by to be stretched: [new_size, size] float64.

    As ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`` does it, whose
    kernel is another with antialias than without, and whose edges are repeated without and cut off
    with. ``"bicubic_offset"``: by a factor of (new_size + 0.1) / size, not by the size.

    >>> resize_matrix(2, 4, "bicubic").round(2).sum(1)
    array([1., 1., 1., 1.])
    """
    factor = (new_size + _OFFSET * (interpolation == "bicubic_offset")) / size
    centres = (np.arange(new_size) + 0.5) / factor - 0.5
    if interpolation == "bicubic_antialias":
        weights = _cubic((np.arange(size) - centres[:, None]) * min(factor, 1.0), -0.5)
        return weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((new_size, size))
    for tap in range(-1, 3):
        places = np.floor(centres).astype(int) + tap
        weights = _cubic(centres - places, -0.75)
        np.add.at(matrix, (np.arange(new_size), np.clip(places, 0, size - 1)), weights)
    return matrix


def rotations(height: int, width: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """DINOv3's rotary embedding: cosine and sine [1, height * width, 1, head_dim], float32.

    By the patches' centres in [-1, 1]; the first quarter of the angles, and the third, are of the
    height, the others of the width.
    """
    centres = [2 * (np.arange(side, dtype=np.float32) + 0.5) / side - 1 for side in (height, width)]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    frequencies = _ROPE_BASE ** -np.arange(0, 1, 4 / head_dim, dtype=np.float32)
    angles = (2 * math.pi * places * frequencies).reshape(len(places), -1)
    angles = np.tile(angles, 2)[None, :, None].astype(np.float32)
    return np.cos(angles), np.sin(angles)


def _rotate(x: jax.Array, rotation: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotate the last tokens of [b, n, h, d], which are the patches, in float32."""
    cosine, sine = (jnp.asarray(part) for part in rotation)
    before, patches = jnp.split(x, [x.shape[1] - cosine.shape[1]], axis=1)
    patches = patches.astype(jnp.float32)
    first, second = jnp.split(patches, 2, axis=-1)
    turned = patches * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return jnp.concatenate([before, turned.astype(x.dtype)], axis=1)


class _Parts:
    """Makes layers that share a variant's epsilon, the dtype and the random numbers."""

    def __init__(self, variant: Variant, dtype: DTypeLike, rngs: nnx.Rngs):
        self.variant, self.dtype, self.rngs = variant, dtype, rngs

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=nnx.initializers.truncated_normal(0.02),
            rngs=self.rngs,
        )

    def norm(self) -> "LayerNorm":
        return LayerNorm(self.variant.width, self.variant.epsilon, self.dtype)

    def tokens(self, count: int) -> nnx.Param:
        shape = (1, count, self.variant.width)
        return nnx.Param(nnx.initializers.truncated_normal(0.02)(self.rngs.params(), shape))


def _aligned(parameter: nnx.Param, x: jax.Array) -> jax.Array:
    """A parameter of the last axis, in x's dtype and of its rank."""
    return parameter[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """Less the mean, over the deviation, of the last axis, computed in float32.

    Not ``nnx.LayerNorm``: with bfloat16 it does not pass strict dtype promotion.
    """

    def __init__(self, width: int, epsilon: float, dtype: DTypeLike):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.epsilon)
        return (x * _aligned(self.scale, x) + _aligned(self.bias, x)).astype(self.dtype)


class PatchEmbed(nnx.Module):
    """A linear layer on each patch: [b, h, w, 3] to [b, h // p, w // p, c]; what is over is cut."""

    def __init__(self, parts: _Parts):
        size, width = parts.variant.patch_size, parts.variant.width
        shape = (size, size, 3, width)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(parts.rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(width)) if parts.variant.patch_bias else None
        self.size, self.dtype = size, parts.dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the patches' tokens."""
        height, width = (side // self.size for side in images.shape[1:3])
        images = images[:, : height * self.size, : width * self.size].astype(self.dtype)
        patches = images.reshape(images.shape[0], height, self.size, width, self.size, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape[0], height, width, -1)
        kernel = self.kernel[...].astype(self.dtype)
        tokens = patches @ kernel.reshape(-1, kernel.shape[-1])
        return tokens if self.bias is None else tokens + _aligned(self.bias, tokens)


class LayerScale(nnx.Module):
    """Multiplies [b, n, c] by c learned numbers, which start at 1e-5."""

    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.full(width, 1e-5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale."""
        return x * _aligned(self.gamma, x)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax of scaled products, in float32; all are [b, n, heads, d], and so is the result."""
    # It asks for the wider of two dtypes itself, which strict promotion refuses for bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value)


class Attention(nnx.Module):
    """Self-attention of several heads: [b, n, c] to [b, n, c]."""

    def __init__(self, parts: _Parts):
        width = parts.variant.width
        self.heads = parts.variant.heads
        self.qkv = parts.linear(width, 3 * width, parts.variant.qkv_bias)
        self.proj = parts.linear(width, width)

    def __call__(
        self, x: jax.Array, rotation: tuple[np.ndarray, np.ndarray] | None = None
    ) -> jax.Array:
        """Apply it; ``rotation`` turns the patches' queries and keys."""
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = (parts[:, :, i] for i in range(3))
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        return self.proj(_attend(query, key, value).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers about an activation, or three where it is gated."""

    def __init__(self, parts: _Parts, activation: str):
        variant = parts.variant
        self.activation = activation
        self.fc1_g = parts.linear(variant.width, variant.mlp_width) if variant.gated else None
        self.fc1 = parts.linear(variant.width, variant.mlp_width)
        self.fc2 = parts.linear(variant.mlp_width, variant.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers to the last axis."""
        activate = ACTIVATIONS[self.activation]
        if self.fc1_g is not None:
            return self.fc2(activate(self.fc1_g(x)) * self.fc1(x))
        return self.fc2(activate(self.fc1(x)))


class Block(nnx.Module):
    """LayerNorm and attention, LayerNorm and MLP, each added to what it came from.

    In training, for each image alone and with probability ``drop_path``, what would be added is
    left out, and else divided by 1 - ``drop_path`` (Huang et al.: Stochastic Depth, 2016).
    """

    def __init__(self, parts: _Parts, drop_path: float):
        variant = parts.variant
        self.norm1, self.attn = parts.norm(), Attention(parts)
        self.norm2, self.mlp = parts.norm(), MLP(parts, variant.activation)
        self.ls1 = LayerScale(variant.width) if variant.layer_scale else None
        self.ls2 = LayerScale(variant.width) if variant.layer_scale else None
        drop = partial(nnx.Dropout, drop_path, broadcast_dims=(1, 2), rngs=parts.rngs)
        self.drop_path = drop() if drop_path else None

    @recomputable
    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[np.ndarray, np.ndarray] | None = None,
        look: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
    ) -> jax.Array:
        """Apply the block to [b, n, c]; what is attended to passes ``look``."""
        x = x + self._added(self.attn(look(self.norm1(x)), rotation), self.ls1)
        return x + self._added(self.mlp(self.norm2(x)), self.ls2)

    def _added(self, x: jax.Array, scale: LayerScale | None) -> jax.Array:
        x = x if scale is None else scale(x)
        return x if self.drop_path is None else self.drop_path(x)


class MapHead(nnx.Module):
    """SigLIP's pooling: one learned query attends to all tokens; [b, n, c] to [b, c]."""

    def __init__(self, parts: _Parts):
        width = parts.variant.width
        self.heads = parts.variant.heads
        self.latent = parts.tokens(1)
        self.q, self.kv = parts.linear(width, width), parts.linear(width, 2 * width)
        self.proj, self.norm = parts.linear(width, width), parts.norm()
        self.mlp = MLP(parts, parts.variant.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool."""
        latent = self.latent[...].astype(x.dtype)
        query = self.q(latent).reshape(1, 1, self.heads, -1)
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape[1:]))
        parts = self.kv(x).reshape(*x.shape[:2], 2, self.heads, -1)
        pooled = _attend(query, parts[:, :, 0], parts[:, :, 1])
        pooled = self.proj(pooled.reshape(x.shape[0], 1, -1))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class TokenGrid(nnx.Module):
    """The patches' tokens as a map [b, h, w, c], unchanged: where heat maps look in."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x."""
        return x


class VisionTransformer(nnx.Module):
    """Images [b, h, w, 3] to one pooled token each, [b, num_features].

    Sides need not be those of the variant, nor multiples of the patch: what is over is cut off at
    the right and below, and the position embedding is stretched by ``variant.interpolation``.

    Args:
        variant: the shapes and conventions.
        drop_path: probability of leaving out what the last block adds; those before it less, in
            even steps from 0.
        dtype: of the computation; parameters, and the statistics of LayerNorm, are float32.
        rngs: for the parameters and ``drop_path``.

    >>> variant = Variant(32, 2, 2, 16, 64, 48, "gelu", 1e-6, interpolation="bicubic")
    >>> build = lambda: VisionTransformer(variant, rngs=nnx.Rngs(0))
    >>> images = jax.ShapeDtypeStruct((2, 64, 95, 3), jnp.float32)
    >>> nnx.eval_shape(lambda images: build()(images), images).shape
    (2, 32)
    """

    pools_itself = True

    def __init__(
        self,
        variant: Variant,
        *,
        drop_path: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        parts = _Parts(variant, dtype, rngs)
        self.variant = nnx.static(variant)
        self.num_features = variant.projection or variant.width
        self.patch_embed = PatchEmbed(parts)
        learned = variant.position == "learned"
        self.pos_embed = parts.tokens(variant.grid**2) if learned else None
        self.cls_token = parts.tokens(1) if variant.pool == "class" else None
        self.reg_token = parts.tokens(variant.registers) if variant.registers else None
        self.norm_pre = parts.norm() if variant.pre_norm else None
        rates = np.linspace(0, drop_path, variant.depth).tolist()
        self.blocks = nnx.List([Block(parts, rate) for rate in rates])
        self.grid = TokenGrid()
        self.norm = parts.norm()
        self.map_head = MapHead(parts) if variant.pool == "map" else None
        projected = variant.projection
        self.proj = None if projected is None else parts.linear(variant.width, projected, False)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the pooled token, normalised, and projected where the variant says so."""
        x = self.tokens(images)
        x = x[:, 0] if self.map_head is None else self.map_head(x)
        return x if self.proj is None else self.proj(x)

    def tokens(self, images: jax.Array) -> jax.Array:
        """Return the normalised tokens [b, n, c]: class token, registers, patches row by row."""
        patches = self.patch_embed(images)
        height, width = patches.shape[1:3]
        patches = self._with_positions(patches).reshape(images.shape[0], height * width, -1)
        before = [t for t in (self.cls_token, self.reg_token) if t is not None]
        before = [jnp.broadcast_to(t[...], (images.shape[0], *t.shape[1:])) for t in before]
        x = jnp.concatenate([*(t.astype(patches.dtype) for t in before), patches], axis=1)
        x = x if self.norm_pre is None else self.norm_pre(x)
        rope = self.variant.position == "rope"
        head_dim = self.variant.width // self.variant.heads
        rotation = rotations(height, width, head_dim) if rope else None
        for block in self.blocks[:-1]:
            x = block(x, rotation)
        look = partial(self._looked_at, sides=(height, width))
        if self.map_head is None:
            return self.norm(self.blocks[-1](x, rotation, look))
        return look(self.norm(self.blocks[-1](x, rotation)))

    def _looked_at(self, x: jax.Array, sides: tuple[int, int]) -> jax.Array:
        """Tokens [b, n, c], unchanged, of which the patches pass ``grid`` as a map.

        After a LayerNorm, and where the pooled token last attends to them: before a LayerNorm
        their lengths have no effect, so that a token times its gradient would be zero.
        """
        rest, patches = jnp.split(x, [x.shape[1] - math.prod(sides)], axis=1)
        patches = self.grid(patches.reshape(x.shape[0], *sides, -1))
        return jnp.concatenate([rest, patches.reshape(x.shape[0], math.prod(sides), -1)], axis=1)

    def _with_positions(self, patches: jax.Array) -> jax.Array:
        """Add the position embedding, stretched to [h, w] where it is of another grid."""
        if self.pos_embed is None:
            return patches
        grid, sides = self.variant.grid, (patches.shape[1], patches.shape[2])
        places = self.pos_embed[...].reshape(grid, grid, -1)
        if sides != (grid, grid):
            places = self._stretched(places, sides)
        return patches + places[None].astype(patches.dtype)

    def _stretched(self, places: jax.Array, sides: tuple[int, int]) -> jax.Array:
        interpolation = self.variant.interpolation
        if interpolation is None:
            raise ValueError(
                f"{sides[0]} x {sides[1]} patches for a position embedding of {places.shape[0]} x "
                f"{places.shape[1]}, and interpolation is None: choose one of "
                f"{', '.join(INTERPOLATIONS)}, or images of the variant's size"
            )
        down, across = (
            jnp.asarray(resize_matrix(places.shape[i], sides[i], interpolation), jnp.float32)
            for i in range(2)
        )
        precision = jax.lax.Precision.HIGHEST
        return jnp.einsum("hi,wj,ijc->hwc", down, across, places, precision=precision)
