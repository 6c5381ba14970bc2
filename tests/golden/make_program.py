"""Write ``program_1/``, a tiny model as a program of format 1: tests load it for ever after.

Run once, from the checkout: ``PYTHONPATH=tests python tests/golden/make_program.py``. A new format
gets a new folder; this one is never written again, as it stands for what users have exported.
"""

from pathlib import Path

import pytest
from flax import nnx
from tiny_run import drawn_model, patch_tiny_models

from cbam_jax import export
from cbam_jax.models import create_model
from cbam_jax.preprocessing import Preprocessing

ARGUMENTS = {"name": "tiny_cbam", "embedding_dim": 16}

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        export.save(
            drawn_model(lambda: create_model(**ARGUMENTS, rngs=nnx.Rngs(0))),
            Path(__file__).parent / "program_1",
            preprocessing=Preprocessing(32),
            arguments=ARGUMENTS,
            license="CC0-1.0",
        )
