"""ResNet50 with CBAM, fine-tuned from ImageNet: the paper's method, and its best row.

python train.py --config=configs/resnet50_cbam.py --workdir=runs/resnet50_cbam
python evaluate.py --workdir=runs/resnet50_cbam --split=test --figures

Paper, mAP@5/10/20 on DeepFashion: 92.5 / 89.8 / 71.3 %. What it needs, how it starts, and what has
been measured: configs/resnet50.py.
"""

import ml_collections

from cbam_jax.configs import resnet50


def get_config() -> ml_collections.ConfigDict:
    """Return the shared config of the paper's rows, with this model."""
    config = resnet50.get_config()
    config.model.name = "resnet50_cbam"
    return config
