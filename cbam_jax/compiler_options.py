"""What XLA is told for the programs whose speed counts."""

import functools

import jax


@functools.cache
def compiler_options() -> dict[str, str]:
    """Return the ``compiler_options`` of ``jax.jit`` for the backend in use, none but on a CPU.

    XLA's CPU backend computes products, convolutions and reductions by YNNPACK. Here that computes
    reductions alone, and Eigen the rest: a ResNet50's training step took 0.9 of the time so, and
    an exact search as well (benchmarks/README.md). The option is experimental: nothing is asked for
    where it is gone. JAX refuses such options in a ``jit`` within another.

    Example:
        >>> set(compiler_options()) <= {"xla_cpu_experimental_ynn_fusion_type"}
        True
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
