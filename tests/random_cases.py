"""How many cases hypothesis draws for the properties of what reads files."""

import os

from hypothesis import settings


def cases(count):
    """The same ``count`` each time, and none kept in a folder; ``$CASES`` new ones where it is set.

    CASES=20000 pytest -n 0 tests/pretrained/test_random_torch_files.py
    """
    many = os.environ.get("CASES")
    return settings(
        derandomize=many is None, deadline=None, database=None, max_examples=int(many or count)
    )
