"""Modules that are not on the path of the tests that use them: other tests, scripts, examples."""

import importlib.util
from pathlib import Path


def beside(path):
    """The module in a file, by its path from this folder."""
    path = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
