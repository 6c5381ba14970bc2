"""Modules of tests in another folder, which is not on the path of those that use them."""

import importlib.util
from pathlib import Path


def beside(path):
    """The module in a file of tests, by its path below this folder."""
    path = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
