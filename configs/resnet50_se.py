"""ResNet50 with SE (channel attention) in CBAM's two places: a row of the paper's Table 1.

python train.py --config=configs/resnet50_se.py --workdir=runs/resnet50_se
python evaluate.py --workdir=runs/resnet50_se --split=test --figures

Paper, mAP@5/10/20 on DeepFashion: 90.1 / 85.1 / 69.4 %. What it needs, how it starts, and what has
been measured: configs/resnet50.py.
"""

import ml_collections

from cbam_jax.configs import resnet50


def get_config() -> ml_collections.ConfigDict:
    """Return the shared config of the paper's rows, with this model."""
    config = resnet50.get_config()
    config.model.name = "resnet50_se"
    return config
