"""The paper's tables and figures on any dataset: ``python -m cbam_jax.paper {tables,figures}``.

Each row of a table is a config, trained and measured once a seed in processes of its own. To be
read in this order:

* ``tables`` and ``queries``: what the finished runs of all rows sum up to
* ``layouts``: that as Markdown and CSV
* ``settings``: what the rows are trained with, and which overrides make them other rows
* ``processes``: running the training and the evaluation, and what is told when they fail
* ``rows``: one row trained and measured, unless that is done
* ``making`` and ``drawing``: all rows, their tables and figures; ``__main__``: the command
"""

from cbam_jax.paper.layouts import csv_text, markdown
from cbam_jax.paper.making import make_figures, make_tables
from cbam_jax.paper.queries import paired, per_query
from cbam_jax.paper.tables import ROWS, TABLES, Row, make_table

__all__ = [
    "ROWS",
    "TABLES",
    "Row",
    "csv_text",
    "make_figures",
    "make_table",
    "make_tables",
    "markdown",
    "paired",
    "per_query",
]
