"""ResNet50 without attention, fine-tuned from ImageNet: the first row of the paper's tables.

python train.py --config=configs/resnet50.py --workdir=runs/resnet50
python evaluate.py --workdir=runs/resnet50 --split=test --figures

The paper's rows share all fields but the model's name; the others edit this file's config:

    configs/resnet50.py        mAP@5/10/20 in the paper, %   88.7 / 82.4 / 68.2
    configs/resnet50_se.py                                   90.1 / 85.1 / 69.4
    configs/resnet50_cbam.py                                 92.5 / 89.8 / 71.3
    configs/vgg16_cbam.py                                    81.5 / 79.1 / 59.2
    configs/googlenet_cbam.py                                83.6 / 81.2 / 62.4

Those are figures of DeepFashion, 30 categories. Here the data are clothing_dataset_small, 10
categories that everybody can get, so other numbers are to be expected; none of these five has been
run to its end yet. They want a GPU: 1,500 steps of 64 images of 224 pixels.

The first use downloads torchvision's weights (ResNet50 98 MB, VGG16 528 MB, GoogLeNet 50 MB) and
the photos (about 100 MB). Without network one line says where to put the file of weights; the
photos' folder is --config.data.manual_dir.

Attention starts as the identity, not as in the paper (attention_init="paper"). There CBAM's gates
start near one half each, so the one after the first convolution would hand about a quarter of the
signal to layers whose BatchNorm statistics are ImageNet's, or, in VGG and GoogLeNet, to weights
that expect the whole. As the identity the run starts from exactly the pretrained features. What is
new (attention) learns ten times as fast as what is pretrained.
"""

import ml_collections

from cbam_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults, for fine-tuning from ImageNet."""
    config = default.get_config()
    config.data.name = "clothing_dataset_small/256px"
    config.data.image_size = 224
    config.data.classes_per_batch = 8
    config.data.images_per_class = 8
    config.model.name = "resnet50"
    config.model.pretrained = "imagenet"
    config.model.attention_init = "identity"
    config.model.normalize = True
    config.loss.mining = "batch_hard"
    config.loss.soft = False
    config.loss.margin = 0.2
    config.optimizer.learning_rate = 2e-5
    config.optimizer.new_layer_multiple = 10.0
    config.train.steps = 1500
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    return config
