"""A run's workdir without training: a small model's checkpoint, and drawn photos to evaluate."""

import json

import cv2
import jax.numpy as jnp
import numpy as np
from flax import nnx
from seeded import SmallBackbone

from cbam_jax import models
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.configs import default
from cbam_jax.experiment import build_model

CLASSES = ("coat", "dress", "hat")


def patch_tiny_models(patch):
    """Make ``tiny`` and ``tiny_cbam`` names of models: two convolutions, little to compile."""
    patch.setitem(models.BACKBONES, "tiny", SmallBackbone)
    patch.setitem(models.MODELS, "tiny", ("tiny", ""))
    patch.setitem(models.MODELS, "tiny_cbam", ("tiny", "_cbam"))


def write_photos(folder, *, splits=("test",), count=5, size=(40, 52)):
    """Photos of each class and split, PNG and JPEG by turns, and their manifest's path."""
    rng = np.random.default_rng(5)
    lines = ["path,label,split"]
    for split in splits:
        for label, name in enumerate(CLASSES):
            for i in range(count):
                height, width = size[0] + 3 * i, size[1] - 2 * label
                image = cv2.blur(rng.integers(0, 255, (height, width, 3), np.uint8), (5, 5))
                image[..., label] //= 2
                file = f"{split}_{name}_{i}.{('png', 'jpg')[i % 2]}"
                cv2.imwrite(str(folder / file), image)
                lines.append(f"{file},{name},{split}")
    path = folder / "photos.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_config(manifest, **fields):
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "data.name": str(manifest),
            "data.image_size": 32,
            "model.name": "tiny_cbam",
            "model.embedding_dim": 16,
            "eval.batch_size": 8,
            "eval.ks": (5, 10),
            **fields,
        }
    )
    return config


def drawn_model(build, seed=9):
    """A model with arrays drawn by NumPy: nothing is compiled."""
    model = nnx.eval_shape(build)
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.shape
        if len(shape) == 1:
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        variable.set_value(jnp.asarray(array.astype(np.float32)))
    return model


def write_run(workdir, config, metrics=None):
    """Write config.json and the checkpoint of step 3, all of whose arrays are drawn."""
    model = drawn_model(lambda: build_model(config))
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        checkpoints.save(
            3,
            model={"params": params, "batch_stats": batch_stats},
            optimizer={"step": np.int32(3)},
            data={"seed": 0, "next_step": 3},
            config=config.to_dict(),
        )
        checkpoints.add_metrics(3, metrics or {"map@10": 0.5})
    return model
