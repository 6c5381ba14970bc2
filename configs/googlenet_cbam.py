"""GoogLeNet with CBAM, fine-tuned from ImageNet: a row of the paper's Table 2.

python train.py --config=configs/googlenet_cbam.py --workdir=runs/googlenet_cbam
python evaluate.py --workdir=runs/googlenet_cbam --split=test --figures

Paper, mAP@5/10/20 on DeepFashion: 83.6 / 81.2 / 62.4 %. What it needs, how it starts, and what has
been measured: configs/resnet50.py.
"""

import ml_collections

from cbam_jax.configs import resnet50


def get_config() -> ml_collections.ConfigDict:
    """Return the shared config of the paper's rows, with this model."""
    config = resnet50.get_config()
    config.model.name = "googlenet_cbam"
    return config
