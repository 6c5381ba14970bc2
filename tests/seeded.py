"""Our models with the golden weights, which are drawn by name from a seed."""

import jax
from flax import nnx
from golden.make_backbones import seeded_array

from cbam_jax.classifier import create_classifier
from cbam_jax.models import create_model
from cbam_jax.pretrained import load_pretrained


def torch_arrays(model):
    """Seeded arrays in torchvision's names and layout, for every tensor of ours."""
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parents, leaf = [str(key) for key in path if key != "backbone"]
        shape = variable.shape
        if leaf == "kernel":
            shape = tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
        leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}.get(leaf, leaf)
        leaf = "running_var" if leaf == "var" else leaf
        name = ".".join([*parents, leaf])
        arrays[name] = seeded_array(name, shape)
    return arrays


def seeded_model(name, num_classes=None):
    """A model (a classifier, given classes) with the golden weights, in evaluation mode."""
    if num_classes:
        build = lambda: create_classifier(name, num_classes, rngs=nnx.Rngs(0))  # noqa: E731
    else:
        build = lambda: create_model(name, rngs=nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(build)
    load_pretrained(model, torch_arrays(model))
    return nnx.view(model, use_running_average=True)


def jitted(model, images):
    """One compilation of the whole is much faster than one an operation."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)
