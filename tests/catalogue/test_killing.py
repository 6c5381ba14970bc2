"""A kill at any moment loses at most the batch under way; tests/fuzz has the campaign."""

import pytest
from killing import campaign


@pytest.mark.processes
def test_a_killed_add_leaves_whole_batches_and_ends_the_same(tmp_path):
    assert campaign(tmp_path, kills=5, seed=1, longest=0.5, photos=100) >= 1
