"""Our models with the golden weights, which are drawn by name from a seed; a small backbone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden.make_backbones import seeded_array

from cbam_jax.backbones.batch_norm import BatchNorm
from cbam_jax.backbones.layers import Conv
from cbam_jax.models import create_model
from cbam_jax.pretrained import create_classifier, load_pretrained


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


def torch_names(model):
    """torchvision's name of each of our tensors, and ours, in torchvision's layout."""
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parents, leaf = [str(key) for key in path if key != "backbone"]
        array = np.asarray(variable[...])
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        leaf = {
            "kernel": "weight",
            "scale": "weight",
            "mean": "running_mean",
            "var": "running_var",
        }.get(leaf, leaf)
        arrays[".".join([*parents, leaf])] = array
    return arrays


class Add(nnx.Module):
    """Stands where attention would: adds its width."""

    def __init__(self, features, *, rngs):
        self.features = features

    def __call__(self, x):
        assert x.shape[-1] == self.features
        return x + self.features


class SmallBackbone(nnx.Module):
    """A convolution, BatchNorm, ReLU and attention, twice: what a ResNet has, in little."""

    num_features = 16

    def __init__(self, *, attention=None, dtype=jnp.float32, rngs):
        self.conv1 = Conv(3, 8, 3, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(8, rngs=rngs)
        self.stem_attention = attention and attention(8, rngs=rngs)
        self.conv2 = Conv(8, 16, 3, 2, dtype=dtype, rngs=rngs)
        self.last_attention = attention and attention(16, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.bn1(self.conv1(images)))
        x = x if self.stem_attention is None else self.stem_attention(x)
        x = nnx.relu(self.conv2(x))
        return x if self.last_attention is None else self.last_attention(x)
