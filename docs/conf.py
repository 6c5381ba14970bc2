"""How the documentation is built: ``pip install -e '.[docs]' && sphinx-build -W docs site``."""

from cbam_jax import __version__

project = "cbam_jax"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["site"]
html_theme = "furo"
html_title = "cbam_jax"
# Docstrings write `name` for code, as Markdown does.
default_role = "code"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
# The docstrings say what each argument is; NumPy's ArrayLike alone is a dozen types.
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
# Once: a field in a signature and again by its docstring would be two.
napoleon_use_ivar = True
