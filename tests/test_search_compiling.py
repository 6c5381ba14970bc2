"""Which searches compile programs: of a data set of another size, none on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import assert_same, brute_force

from cbam_jax.search import FIRST_PASSES, search


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_a_data_set_of_another_size_compiles_nothing_new(rng, caplog, first_pass):
    """On a CPU; some queries have ties, which a first pass leaves unproven."""

    def compiled(q, n, k=20):
        queries, gallery = (rng.normal(size=(m, 64)).astype(np.float32) for m in (q, n))
        gallery[:350] = queries[:5].repeat(70, axis=0)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            found = search(queries, gallery, k, first_pass=first_pass, gallery_block=512)
        assert_same(found, brute_force(queries, gallery, k))
        return [m for m in caplog.messages if m.startswith("Finished XLA compilation")]

    assert compiled(79, 903)  # One block, and a tail.
    assert not compiled(66, 1777)
    assert not compiled(75, 745)
    assert not compiled(80, 1023)  # Two blocks; one number overlaps.


@pytest.mark.slow
def test_another_number_of_queries_compiles_nothing_new(rng, caplog):
    """Nor another number of those that a pass leaves unproven: half of the queries have ties."""
    gallery = rng.normal(size=(1500, 24)).astype(np.float32)
    queries = rng.normal(size=(40, 24)).astype(np.float32)
    gallery[:800] = queries[::2].repeat(40, axis=0) + rng.normal(0, 1e-3, (800, 24))
    gallery[:60] = gallery[0]
    on_device = jnp.asarray(gallery)
    expected = brute_force(queries, gallery, 3)

    def compiled(q, block=None):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            found = search(queries[:q], on_device, 3, first_pass="bfloat16", query_block=block)
        assert_same(found, [part[:q] for part in expected])
        return [m for m in caplog.messages if m.startswith("Finished XLA compilation")]

    assert compiled(16)
    assert not any(compiled(q) for q in (1, 2, 3, 5, 7, 15))
    assert compiled(32)
    assert not any(compiled(q) for q in (17, 31))
    # Two whole tiles, and some queries in a third.
    assert not any(compiled(q, block=16) for q in (33, 39, 40))
