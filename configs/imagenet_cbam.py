"""ResNet50 with CBAM classifying ImageNet, from scratch: the weights that retrieval starts from.

python train.py --config=configs/imagenet_cbam.py --workdir=runs/imagenet --config.data.name=FOLDER/
python train.py --config=configs/resnet50_cbam.py --workdir=runs/mine \
    --config.model.pretrained=runs/imagenet --config.model.attention_init=paper

torchvision has weights of a plain ResNet50; these bring the attention as well, so the second
command starts neither afresh. The loss's own layer (class_head) is left behind: the line at the
start says so. attention_init must be what the first run had: the form of the gate goes with it.

FOLDER/ holds FOLDER/train/<synset>/*.JPEG and FOLDER/val/<synset>/*.JPEG, the usual layout. TFDS's
imagenet2012 works too where it was prepared as array_record (its own preparation needs
TensorFlow): --config.data.name=imagenet2012 --config.data.eval_split=validation.

The recipe is the standard one: 90 epochs of 256 images, SGD with momentum 0.9, learning rate 0.1
after 5 epochs of warm-up, weight decay 1e-4, label smoothing 0.1. Two things differ from it: the
rate falls by a cosine, not in steps, and a batch is 128 classes of 2 images. For more images a step
raise classes_per_batch and the learning rate in proportion, and lower train.steps.

What it should reach: with CBAM in every block the CBAM paper reports a top-1 error of 22.66 %
(ResNet50 alone: 24.56 %); this is CBAM in two places only. The config has not been run on ImageNet:
the objective was tried on small data alone. It takes days on one GPU.

An evaluation embeds all 50,000 validation images and searches each among the others, on top of
accuracy; here that is every five epochs. With TFDS, --config.data.eval_split='validation[:20%]'
makes it a fifth; evaluate.py --split=validation still measures them all.
"""

import ml_collections

from cbam_jax.configs import default

EPOCH = 1_281_167 // 256  # steps


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults, for classification from scratch."""
    config = default.get_config()
    config.data.name = "./imagenet/"
    config.data.eval_split = "val"
    config.data.image_size = 224
    config.data.classes_per_batch = 128
    config.data.images_per_class = 2
    config.data.crop_scale = (0.08, 1.0)
    config.data.workers = 16
    config.model.name = "resnet50_cbam"
    config.model.normalize = False
    config.model.num_classes = 1000
    config.loss.name = "cross_entropy"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_steps = 5 * EPOCH
    config.optimizer.weight_decay = 1e-4
    config.train.steps = 90 * EPOCH
    config.train.log_every = 100
    config.train.eval_every = 5 * EPOCH
    config.train.checkpoint_every = EPOCH
    config.eval.batch_size = 256
    return config
