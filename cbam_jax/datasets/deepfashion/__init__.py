"""DeepFashion's benchmarks as TFDS datasets, from the files that its authors hand out.

Nothing is downloaded: it is for non-commercial research by those who sign its agreement,
https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html. To be read in this order:

* ``layout``: where a copy keeps what; ``lists``: what its lists say
* ``images``: its images, and whose pixels boxes and landmarks mean
* ``paper``: the paper's 40,000 / 10,000 / 10,000 images, drawn from the official splits
* ``builders``: the datasets; ``verification``: is a copy complete and consistent?
"""

from cbam_jax.datasets.deepfashion.builders import (
    DeepfashionCategory,
    DeepfashionConfig,
    DeepfashionConsumer2shop,
    DeepfashionInshop,
)
from cbam_jax.datasets.deepfashion.layout import BENCHMARKS
from cbam_jax.datasets.deepfashion.lists import SPLITS
from cbam_jax.datasets.deepfashion.paper import draw_paper_splits
from cbam_jax.datasets.deepfashion.verification import verify

__all__ = [
    "BENCHMARKS",
    "SPLITS",
    "DeepfashionCategory",
    "DeepfashionConfig",
    "DeepfashionConsumer2shop",
    "DeepfashionInshop",
    "draw_paper_splits",
    "verify",
]
