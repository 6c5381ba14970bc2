"""What the tests of weights share."""

import numpy as np
import pytest
from flax import nnx
from seeded import torch_arrays
from tiny_resnet import tiny


@pytest.fixture(scope="module")
def source():
    """A tiny ResNet's state dict as torchvision would save it, with classifier and counters."""
    arrays = torch_arrays(nnx.eval_shape(tiny))
    arrays |= {"fc.weight": np.ones((5, 512), np.float32), "fc.bias": np.ones(5, np.float32)}
    return arrays | {"bn1.num_batches_tracked": np.int64(3)}
