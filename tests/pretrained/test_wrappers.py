"""Weights under the keys, and with the prefixes, of those who trained them."""

import numpy as np
import pytest
from flax import nnx

from cbam_jax import InputError
from cbam_jax.pretrained.loading import _named_arrays, load_pretrained
from cbam_jax.pretrained.sources import unwrap, without_prefix

NAMES = ("conv1.weight", "layer1.0.bn1.bias", "fc.weight")
WEIGHTS = {name: np.full(2, number, np.float32) for number, name in enumerate(NAMES)}
OWN = {"conv1", "bn1", "layer1", "layer2", "fc"}
# Of DDP, of torch.compile, of Lightning and of whatever holds a backbone.
PREFIXES = (
    "module.", "model.", "backbone.", "net.", "_orig_mod.", "module._orig_mod.", "module.model.",
    "encoder.", "a.b.c.",
)  # fmt: skip


def prefixed(prefix):
    return {prefix + name: array for name, array in WEIGHTS.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_all_names_begin_with_is_no_part_of_them(prefix):
    for given in (prefixed(prefix), {"state_dict": prefixed(prefix), "epoch": 3}):
        arrays, _ = _named_arrays(given, "x.pth", OWN)
        np.testing.assert_equal(arrays, WEIGHTS)


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict_ema": WEIGHTS, "epoch": 3},
        {"net": WEIGHTS, "acc": 91.2},
        {"model": {"state_dict": WEIGHTS}, "optimizer": {"lr": 0.1}},
        {"teacher": prefixed("module.backbone."), "epoch": 3},
        {"model": WEIGHTS, "model_ema": prefixed("other.")},
        {"student": {"zero": np.zeros(1)}, "teacher": WEIGHTS},
    ],
)
def test_the_usual_keys_of_weights(wrapped):
    arrays, _ = _named_arrays(wrapped, "x.pth", OWN)
    np.testing.assert_equal(arrays, WEIGHTS)


def test_of_two_encoders_the_one_that_is_evaluated():
    two = prefixed("module.encoder_q.") | prefixed("module.encoder_k.")
    two["module.queue"] = np.zeros(3)
    np.testing.assert_equal(_named_arrays({"state_dict": two}, "x.pth", OWN)[0], WEIGHTS)


def test_a_model_beside_something_else_is_told_with_its_prefix():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    weights = {"weight": np.ones((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    two = {
        f"{prefix}.{name}": a for prefix in ("model", "ema_model") for name, a in weights.items()
    }
    with pytest.raises(
        InputError, match=r"^given arrays has .* under 'ema_model\.', 'model\.': sav"
    ):
        load_pretrained(model, two)
    beside = {f"net.{name}": a for name, a in weights.items()} | {"criterion.centers": np.ones(4)}
    with pytest.raises(InputError, match=r"under 'net\.': save one alone, without that prefix$"):
        load_pretrained(model, beside)
    with pytest.raises(InputError, match="does not fit the model"):
        load_pretrained(model, weights | {"criterion.centers": np.ones(4)})


def test_a_prefix_that_is_the_models_own_stays():
    part = {name: array for name, array in WEIGHTS.items() if name.startswith("layer1")}
    assert without_prefix(part, OWN) == part
    mixed = prefixed("model.") | {"head.bias": np.zeros(1)}
    assert without_prefix(mixed, OWN) == mixed
    assert without_prefix({"weight": 1}, OWN) == {"weight": 1}
    assert without_prefix({}, OWN) == {}
    assert unwrap({"state_dict": 3}) == {"state_dict": 3}
