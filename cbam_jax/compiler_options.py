"""What XLA is told for the programs whose speed counts."""

import functools

import jax

_KERNELS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(*, remat: bool = False) -> dict[str, str]:
    """Return the ``compiler_options`` of ``jax.jit`` for the backend in use, none but on a CPU.

    XLA's CPU backend computes products, convolutions and reductions by YNNPACK. Here that computes
    reductions alone, and Eigen the rest: a ResNet50's training step took 0.9 of the time so, and
    an exact search as well (benchmarks/README.md). The option is experimental: nothing is asked for
    where it is gone. JAX refuses such options in a ``jit`` within another.

    With ``remat``, the barriers stay that keep what is computed again from being computed at once:
    on a CPU XLA drops them, and rematerialisation then takes more memory than it saves.

    Example:
        >>> set(compiler_options()) <= {"xla_cpu_experimental_ynn_fusion_type"}
        True
    """
    if jax.default_backend() != "cpu":
        return {}
    options = _KERNELS | (_BARRIERS if remat else {})
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
