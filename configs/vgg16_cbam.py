"""VGG16 with CBAM, fine-tuned from ImageNet: a row of the paper's Table 2.

python train.py --config=configs/vgg16_cbam.py --workdir=runs/vgg16_cbam
python evaluate.py --workdir=runs/vgg16_cbam --split=test --figures

Paper, mAP@5/10/20 on DeepFashion: 81.5 / 79.1 / 59.2 %. What it needs, how it starts, and what has
been measured: configs/resnet50.py. From random weights its embeddings of all images start nearly
equal, having no BatchNorm, and stayed so; vgg16_bn_cbam learns (docs/guides/deepfashion.md).
"""

import ml_collections

from cbam_jax.configs import resnet50


def get_config() -> ml_collections.ConfigDict:
    """Return the shared config of the paper's rows, with this model."""
    config = resnet50.get_config()
    config.model.name = "vgg16_cbam"
    return config
