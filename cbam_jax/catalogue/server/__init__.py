"""A catalogue served over HTTP: a page for colleagues, and JSON for programs.

``cbam-jax catalogue serve shop.db`` listens on this machine alone, unless ``--host`` says
otherwise. It reads and never writes. Read ``finding`` first (one thread embeds and searches, a few
requests at a time) and ``explaining`` (another says why two are alike), then ``uploads`` (what of a
request is taken), ``app`` (the addresses), ``connections`` (how long they may be silent), and
``running``. The page is ``page.html`` with its style and script: no framework, nothing fetched.
"""

from cbam_jax.catalogue.server.app import create_app
from cbam_jax.catalogue.server.finding import TOGETHER
from cbam_jax.catalogue.server.running import bound, serve

__all__ = ["TOGETHER", "bound", "create_app", "serve"]
