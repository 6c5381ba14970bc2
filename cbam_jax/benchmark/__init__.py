"""Speed, measured: ``python -m cbam_jax.benchmark {train,embed,data,search}``.

Every run warms up first, apart from what is measured, and ends with one JSON document as the last
line on stdout. No dataset is needed. To be read in this order:

* ``timing``: functions that take turns; median and spread; whether figures hold
* ``compiled``: what a program costs; ``workloads``: the steps, and the machine's own limits
* ``environment``: what the numbers depend on
* ``galleries``: what searches are measured on
* ``step``, ``search`` and ``data``: what the commands measure
* ``flags`` and ``__main__``: the commands

A room is loaded when a name of it is first asked for: how fast batches load is measured without
JAX, and the rest without OpenCV.
"""

import importlib
from typing import Any

_ROOMS = {
    "timing": ("judged", "seconds", "spread"),
    "compiled": ("collectives", "compile_cold", "given_flops", "kernels"),
    "workloads": ("copy", "embed_step", "matrix_product", "random_batch", "train_step"),
    "environment": ("machine", "peak_memory"),
    "step": ("DTYPES", "benchmark_step"),
    "galleries": ("clustered", "embeddings", "queries_and_gallery"),
    "search": ("bare_product", "benchmark_search", "told"),
    "data": (
        *("benchmark_data", "lie_ready", "loading", "loading_rates"),
        *("our_batches", "photo_dataset", "photos"),
    ),
    "flags": ("check_classes",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
