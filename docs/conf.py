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
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# A signature says `ArrayLike`, not the dozen types that this stands for.
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
python_use_unqualified_type_names = True
napoleon_use_ivar = True
