"""A strict session: eight fake devices, no silent promotion, warnings are errors (setup.cfg)."""

import logging
import os

# Before jax is imported: eight devices on one CPU, so that sharding is exercised by every test; and
# programs that take less time to compile. Not at XLA's optimisation level 0, whose training steps
# came out as NaN. .ci/run compiles what depends on rounding as users do, too.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_optimization_level=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Their examples each compile a program; tests/losses compiles one for all of them.
COMPILING = ("similarity", "softmax", "ranking", "proxies", "distance_weighted")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the examples slow that compile a loss each."""
    modules = tuple(f"cbam_jax.losses.{name}." for name in COMPILING)
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name.startswith(modules):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what the commands would keep for the user's next run in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CBAM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh, seeded generator: tests draw random, asymmetric input from it."""
    return np.random.default_rng(2022)


@pytest.fixture
def passes_told(caplog):
    """A function of what the passes of a search have told since it was called last.

    Each as (pass, queries proven, of how many).
    """
    caplog.set_level(logging.DEBUG, logger="cbam_jax.search.passes")

    def read():
        done = [r.args for r in caplog.records if r.name.endswith("passes")]
        caplog.clear()
        return [(name, int(number), of) for name, number, of in done]

    return read
