"""Marqo-FashionSigLIP fine-tuned on your own photos: for a GPU.

python train.py --config=configs/fashion_siglip.py --workdir=runs/siglip
python evaluate.py --workdir=runs/siglip --split=test --html

It starts from the image tower of Marqo/marqo-fashionSigLIP, 92.9 million parameters, Apache-2.0,
which leads the field's benchmark of fashion without any training; the first use fetches it from the
Hugging Face hub (pip install 'cbam_jax[hub]'). Without network: --config.model.pretrained=FOLDER,
where its files lie. Photos are cut as it was trained on them, squashed to 224 x 224 bicubically.

Blocks near the images learn slower (layer_decay), the first six not at all, and additions are left
out at random (drop_path), since few photos would else make it forget. It has not been run to its
end yet.
"""

import ml_collections

from cbam_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults, for fine-tuning a vision transformer."""
    config = default.get_config()
    config.data.name = "./photos/"
    config.data.image_size = 224
    config.data.resize = "squash"
    config.data.interpolation = "bicubic"
    config.data.crop_scale = (0.5, 1.0)
    config.data.on_bad_image = "skip"
    config.data.skip_singletons = True
    config.model.name = "marqo_fashion_siglip"
    config.model.pretrained = "hf:Marqo/marqo-fashionSigLIP"
    config.model.dtype = "bfloat16"
    config.model.normalize = True
    config.model.drop_path = 0.1
    config.loss.mining = "batch_hard"
    config.loss.soft = False
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 0.75
    config.optimizer.frozen_blocks = 6
    config.optimizer.clip_norm = 1.0
    config.train.steps = 1000
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    return config
