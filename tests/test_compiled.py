"""The collectives of programs, by hand; a cache that is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from cbam_jax import steps
from cbam_jax.benchmark import collectives, compile_cold, given_flops, kernels

# As a GPU's programs write them: started and waited for, operands before results.
STARTED = """
  %a = (f32[4,3]{1,0}, bf16[5]{0}) all-reduce-start(%x, %y), channel_id=1, to_apply=%add
  %b = (f32[4,3]{1,0}, bf16[5]{0}) all-reduce-done(%a)
  %c = (f32[2,6]{1,0:S(1)}, f32[16,6]{1,0}) all-gather-start(%x), dimensions={0}
  %d = f32[16,6]{1,0} all-gather-done(%c)
  %e = (u8[7]{0}, u8[7]{0}, u32[], u32[]) collective-permute-start(%x)
  %f = (pred[3]{0}, s64[2]{0}, /*index=2*/s4[3]{0}) all-to-all(%x, %y, %z)
  %g = f32[99]{0} fusion(%a, %all-reduce.3), metadata={op_name="all-gather"}
"""


def test_collectives_of_a_gpus_text():
    assert collectives(STARTED) == {
        "all-gather": {"count": 1, "bytes": 16 * 6 * 4},
        "all-reduce": {"count": 1, "bytes": 4 * 3 * 4 + 5 * 2},
        "all-to-all": {"count": 1, "bytes": 3 + 2 * 8 + 2},
        "collective-permute": {"count": 1, "bytes": 7},
    }


def test_collectives_of_a_product_over_a_sharded_axis(rng):
    mesh = steps.data_mesh()
    rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
    x = rng.normal(size=(16, 3)).astype(np.float32)
    # The sum over the rows needs the others' part of it; the rows themselves, all of theirs.
    function = jax.jit(lambda x: (x.T @ x, 2 * x), out_shardings=(whole, whole))
    program, cost = compile_cold(function, jax.device_put(x, rows))
    assert cost["collectives"] == {
        "all-gather": {"count": 1, "bytes": 16 * 3 * 4},
        "all-reduce": {"count": 1, "bytes": 3 * 3 * 4},
    }
    np.testing.assert_allclose(program(jax.device_put(x, rows))[0], x.T @ x, rtol=1e-5)


# A convolution as cuDNN's call, with its workspace; a fusion that is given one array twice.
CALLED = """
HloModule jit_step

%body (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %square = f32[2]{0} multiply(%p, %p)
}

ENTRY %main {
  %x = bf16[8,4]{1,0} parameter(0), metadata={op_name="f32[99]"}
  %w = f32[4,4]{1,0} parameter(1)
  %conv = (bf16[8,4]{1,0}, u8[1000]{0}) custom-call(%x, %w), custom_call_target="__cudnn$conv"
  %y = bf16[8,4]{1,0} get-tuple-element(%conv), index=0
  ROOT %sum = f32[] fusion(%y, %x, %y), kind=kInput, calls=%body
}
"""


def test_kernels_of_a_gpus_text():
    assert kernels(CALLED) == (2, (64 + 64 + 1000 + 64) + (64 + 64 + 4))


# The first operand is read at one pixel, seen in another shape; the second in full as well.
SLICED = """
%pixel (a: bf16[64,4], b: f32[8,4]) -> f32[1,4] {
  %b = f32[8,4]{1,0} parameter(1)
  %a = bf16[64,4]{1,0} parameter(0)
  %map = bf16[8,8,4]{2,1,0} bitcast(%a)
  %p = bf16[1,1,4]{2,1,0} slice(%map), slice={[0:1], [3:4], [0:4]}
  %q = f32[1,4]{1,0} slice(%b), slice={[0:1], [0:4]}
  ROOT %r = f32[1,4]{1,0} fancy(%p, %q, %b)
}

ENTRY %main {
  %x = bf16[64,4]{1,0} parameter(0)
  %w = f32[8,4]{1,0} parameter(1)
  ROOT %sum = f32[1,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%pixel
}
"""


def test_of_an_operand_that_is_sliced_the_slice_counts():
    assert kernels(SLICED) == (1, 8 + 8 * 4 * 4 + 4 * 4)


def test_operations_of_the_program_that_xla_is_given(rng, monkeypatch):
    """Where it counts none of its own, as on a GPU: those of all devices, shared out."""
    mesh = steps.data_mesh()
    rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
    x = jax.device_put(rng.normal(size=(16, 3)).astype(np.float32), rows)
    w = jax.device_put(rng.normal(size=(3, 5)).astype(np.float32), whole)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, cost = compile_cold(jax.jit(lambda x, w: x @ w), x, w)
    assert cost["flops_per_device"] == 2 * 16 * 3 * 5 / 8
    assert cost["bytes_per_device"] >= 4 * (2 * 3 + 3 * 5 + 2 * 5)


def test_operations_given_are_those_compiled_on_a_cpu(rng):
    """Of a convolution, whose padding counts for nothing in both."""

    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

    x, kernel = jnp.zeros((2, 9, 8, 3)), jnp.zeros((3, 3, 3, 4))
    lowered = jax.jit(convolve).lower(x, kernel)
    assert given_flops(lowered) == lowered.compile().cost_analysis()["flops"]
    # 5 x 4 places; an edge row or column has 2 of 3 taps.
    assert given_flops(lowered) == 2 * (2 * 3 * 4) * (5 * 3 - 2) * (4 * 3 - 1)


@pytest.fixture
def cache(tmp_path):
    """A persistent compilation cache of its own, for whatever takes any time to compile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path))
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()  # What ran before may have opened one elsewhere.
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_cold_compilation_leaves_the_cache_alone(cache):
    x = jnp.ones(3)
    function = jax.jit(lambda x: jnp.sin(x) * 41)
    function.lower(x).compile()  # The cache is in use, and remembers that.
    written = sorted(cache.iterdir())
    assert written
    _, cost = compile_cold(jax.jit(lambda x: jnp.sin(x) * 43), x)
    assert sorted(cache.iterdir()) == written
    assert cost["compile_seconds"] > 0
    jax.jit(lambda x: jnp.sin(x) * 47).lower(x).compile()  # And is in use again.
    assert len(list(cache.iterdir())) > len(written)
