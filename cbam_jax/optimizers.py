"""Optimizers and their learning rates: optax's, by name, as torch defines them."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd", "adamw", "lion", "muon")
SCHEDULES = ("cosine", "linear", "constant", "step")
# Parameters under these names are never in a pretrained backbone.
NEW_LAYERS = (
    "attention",
    "stem_attention",
    "last_attention",
    "projection",
    "pool",
    "class_head",
    "aux1",
    "aux2",
)

# What stands after the blocks of a transformer, or of an EfficientNet.
_AFTER_BLOCKS = ("norm", "map_head", "proj", "conv_head", "bn1", "last_attention")


def learning_rate_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, kind: str = "cosine"
) -> optax.Schedule:
    """Linear warm-up from 0, then by ``kind`` until ``total_steps``.

    ``"cosine"`` and ``"linear"`` end at 0, ``"constant"`` stays, and ``"step"`` is a tenth after
    each third of the steps that follow the warm-up.

    Raises:
        ValueError: on an unknown kind.

    >>> schedule = learning_rate_schedule(0.1, warmup_steps=10, total_steps=110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}")
    left = total_steps - warmup_steps
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, max(left, 1)),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, max(left, 1)),
        "constant": lambda: optax.constant_schedule(learning_rate),
        "step": lambda: optax.piecewise_constant_schedule(
            learning_rate, {left // 3: 0.1, left * 2 // 3: 0.1}
        ),
    }[kind]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    schedule = optax.join_schedules([warmup, after], [warmup_steps])
    # In float32: optax's own integer count does not pass strict dtype promotion.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def create_optimizer(
    name: str | Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    new_layer_multiple: float = 1.0,
    proxy_multiple: float = 1.0,
    is_new: str | Collection[str] | Callable[[tuple[str, ...]], bool] = NEW_LAYERS,
    clip_norm: float | None = None,
    accumulate_steps: int = 1,
    layer_decay: float = 1.0,
    frozen_blocks: int = 0,
) -> optax.GradientTransformation:
    """SGD with momentum or AdamW, as torch defines them; Lion and Muon, as optax does.

    Args:
        name: ``"sgd"`` (weight decay is added to the gradient, as in torch) or ``"adamw"``
            (decoupled), or ``"lion"`` (Chen et al. 2023, decoupled), or ``"muon"`` (Jordan et al.
            2024): kernels as matrices [inputs, outputs], biases, scales and a loss's proxies by
            Adam, both looking ahead. Or a function of the learning rate that returns optax's
            transformation; the next five are then unused.
        learning_rate: a number, or a schedule over optimizer updates.
        weight_decay: of parameters with two or more dimensions only: never of biases, BatchNorm
            or the pooling exponent.
        momentum: of SGD and Muon.
        nesterov: look ahead, of SGD.
        betas: decay of the mean gradient and of its square, of AdamW, Lion and Muon's Adam.
        eps: what AdamW adds to the root.
        new_layer_multiple: what the learning rate of freshly added layers (attention, projection,
            pooling, classes) is multiplied by, since they start from nothing beside a pretrained
            backbone.
        proxy_multiple: likewise of a loss's ``proxies``, which many classes move seldom.
        is_new: which layers those are: a name or names, of which one is a whole part of a
            parameter's path (``("backbone", "cbam", "kernel")`` is under ``"cbam"``, not under
            ``"bam"``), or a function of that path.
        clip_norm: largest global norm of the gradient; None: unlimited.
        accumulate_steps: batches whose mean gradient makes one update.
        layer_decay: of a backbone with ``blocks``, what the learning rate is multiplied by once
            for each block that stands after a parameter's own; what stands before the first block
            counts as one more (Clark et al.: ELECTRA, 2020).
        frozen_blocks: of the same, blocks from the first on that stay as they are, with all
            that stands before them.

    Raises:
        ValueError: on an unknown name.
    """
    decoupled = {"weight_decay": weight_decay, "mask": _is_matrix}
    if callable(name):
        update = name(learning_rate)
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask=_is_matrix)
        update = optax.chain(decay, optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov))
    elif name == "adamw":
        update = optax.adamw(learning_rate, *betas, eps, **decoupled)
    elif name == "lion":
        update = optax.lion(learning_rate, *betas, **decoupled)
    elif name == "muon":
        update = optax.contrib.muon(
            learning_rate,
            beta=momentum,
            weight_decay=weight_decay,
            adam_b1=betas[0],
            adam_b2=betas[1],
            muon_weight_dimension_numbers=_as_matrices,
        )
    else:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    # A name alone is also a collection, of its letters.
    is_new = (is_new,) if isinstance(is_new, str) else is_new
    # Both updates are proportional to the learning rate, so scaling them is scaling the rate.
    multiple = optax.masked(optax.scale(new_layer_multiple), partial(_new_layers, is_new))
    proxies = optax.masked(optax.scale(proxy_multiple), partial(_new_layers, ("proxies",)))
    chain = optax.chain(clip, update, multiple, proxies)
    if layer_decay != 1.0 or frozen_blocks:
        # Also of the decay of weights, which is part of the update.
        rates = partial(block_rates, layer_decay=layer_decay, frozen_blocks=frozen_blocks)
        chain = optax.chain(chain, optax.stateless(lambda updates, _: _scaled(updates, rates)))
    if accumulate_steps > 1:
        micro: Any = optax.MultiSteps(chain, accumulate_steps)
        chain = optax.GradientTransformationExtraArgs(micro.init, micro.update)
    return _promoting(chain)


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let JAX promote: optax's Adam and MultiSteps mix integer counters with floats."""
    inner = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def block_rates(params: Any, *, layer_decay: float, frozen_blocks: int) -> Any:
    """Return for each parameter what its learning rate is multiplied by: ``create_optimizer``.

    Raises:
        ValueError: there is no ``backbone.blocks``, or not so many.

    >>> params = {"backbone": {"pos": 1, "blocks": {0: 1, 1: 1}, "norm": 1}}
    >>> block_rates(params, layer_decay=0.5, frozen_blocks=1)
    {'backbone': {'blocks': {0: 0.0, 1: 1.0}, 'norm': 1.0, 'pos': 0.0}}
    """

    leaves = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    depth = len({name[2] for name in leaves if name[:2] == ("backbone", "blocks")})
    if not depth or not 0 <= frozen_blocks <= depth:
        raise ValueError(
            f"frozen_blocks={frozen_blocks}, layer_decay={layer_decay}: {depth} blocks"
        )

    def rate(path: Any, _: Any) -> float:
        name = _names(path)
        if name[0] != "backbone" or name[1] in _AFTER_BLOCKS:
            return 1.0
        block = int(name[2]) if name[1] == "blocks" else -1
        return (
            0.0 if block < frozen_blocks and frozen_blocks else layer_decay ** (depth - 1 - block)
        )

    return jax.tree_util.tree_map_with_path(rate, params)


def _scaled(updates: Any, rates: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda update, rate: rate * update, updates, rates(updates))


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _as_matrices(params: Any) -> Any:
    """How Muon looks at each parameter: [inputs, outputs], the last axis the outputs'.

    A loss's proxies are rows, each by itself, and no map: they are Adam's.
    """

    def axes(path: Any, param: Any) -> optax.contrib.MuonDimensionNumbers | None:
        inputs = () if "proxies" in _names(path) else tuple(range(param.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, param.ndim - 1) if inputs else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _new_layers(is_new: Collection[str] | Callable, params: Any) -> Any:
    def new(path: Any, _: Any) -> bool:
        names = _names(path)
        return bool(is_new(names)) if callable(is_new) else not set(names).isdisjoint(is_new)

    return jax.tree_util.tree_map_with_path(new, params)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
