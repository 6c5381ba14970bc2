"""Against torch and torchvision themselves; skipped where they are not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_backbones import (
    seeded_array,
    seeded_images,
    seeded_torchvision,
    tensors,
    torch_auxiliary,
    torch_features,
)
from seeded import jitted, torch_names

from benchmarks.torchvision_stubs import import_torchvision
from cbam_jax.attention import CBAM, SqueezeExcite
from cbam_jax.backbones.googlenet import GoogLeNet
from cbam_jax.pretrained import create_classifier, load_pretrained, read_central_square, read_torch

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", autouse=True)
def _torchvision():
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


def ported(name, torch_model, folder):
    """Our classifier with a torch model's weights, by way of a file."""
    torch.save(torch_model.state_dict(), folder / "weights.pth")
    model = nnx.eval_shape(lambda: create_classifier(name, rngs=nnx.Rngs(0)))
    report = load_pretrained(model, folder / "weights.pth")
    assert not report.fresh
    (folder / "weights.pth").unlink()
    return nnx.view(model, use_running_average=True)


def relative_error(ours, theirs):
    """Of the largest entry."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "name",
    [*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "vgg16", "vgg16_bn", "googlenet"],
)
def test_features_and_logits(name, tmp_path):
    theirs = seeded_torchvision(name)
    model = ported(name, theirs, tmp_path)
    for height, width in [(224, 224), (193, 257)]:
        images = seeded_images(height, width)
        features, logits = torch_features(name, theirs, images)
        # Not jitted: the ResNets share their layers' shapes, and so the compiled operations.
        images = jnp.asarray(images)
        backbone = model.backbone
        ours = jitted(backbone, images) if name == "googlenet" else backbone(images)
        assert relative_error(ours, features) < 1e-4
        assert relative_error(model.classify(ours), logits) < 1e-4


def test_auxiliary_classifiers_of_googlenet(tmp_path):
    theirs = seeded_torchvision("googlenet")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = nnx.eval_shape(lambda: GoogLeNet(auxiliary_classes=1000, rngs=nnx.Rngs(0)))
    report = load_pretrained(model, tmp_path / "weights.pth")
    assert not report.fresh
    assert {name.split(".")[0] for name in report.unused if "num_batches" not in name} == {"fc"}
    graph, state = nnx.split(nnx.view(model, use_running_average=True))
    images = seeded_images(193, 257)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state).with_auxiliary(images)[1])
    for ours, expected in zip(forward(state, images), torch_auxiliary(theirs, images), strict=True):
        assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_other_libraries_resnet18(library):
    module = pytest.importorskip(library)
    if library == "timm":
        theirs = module.create_model("resnet18").eval()
        forward = theirs.forward_features
    else:
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        config = module.ResNetConfig(layer_type="basic", num_labels=1000, **sizes)
        theirs = module.ResNetForImageClassification(config).eval()
        forward = lambda images: theirs.resnet(images).last_hidden_state  # noqa: E731
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    arrays = {name: np.asarray(seeded_array(name, shape)) for name, shape in shapes.items()}
    theirs.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    model = nnx.eval_shape(lambda: create_classifier("resnet18", rngs=nnx.Rngs(0)))
    load_pretrained(model, arrays)
    images = seeded_images(96, 129)
    with torch.no_grad():
        expected = forward(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    model = nnx.view(model, use_running_average=True)
    ours = model.backbone(jnp.asarray(images))
    assert relative_error(ours, expected.numpy().transpose(0, 2, 3, 1)) < 1e-4


def test_preprocessing_of_the_accuracy_check_is_torchvisions(tmp_path, rng):
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for size in [(300, 401), (517, 260), (100, 333)]:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(tmp_path / "x.png")
        np.testing.assert_array_equal(
            read_central_square(tmp_path / "x.png", 256), np.asarray(transform(image))
        )


def test_resnet50_stage_by_stage(tmp_path):
    theirs = seeded_torchvision("resnet50")
    model = ported("resnet50", theirs, tmp_path).backbone
    seen = {}
    for name in ("bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        module = getattr(theirs, name)
        module.register_forward_hook(lambda *args, name=name: seen.update({name: args[2]}))
    images = seeded_images(193, 257)
    torch_features("resnet50", theirs, images)
    seen = {name: value.numpy().transpose(0, 2, 3, 1) for name, value in seen.items()}
    # Each stage from torch's input to it, so that a difference names its stage.
    # bn1's output was overwritten by the ReLU in place.
    stem = nnx.relu(model.bn1(model.conv1(jnp.asarray(images))))
    assert relative_error(stem, seen["bn1"]) < 1e-5
    x = jnp.asarray(seen["maxpool"])
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for block in getattr(model, name):
            x = block(x)
        assert relative_error(x, seen[name]) < 1e-5
        x = jnp.asarray(seen[name])


def norm_wise_error(ours, theirs, name):
    # A ReLU that is on throughout hands its BatchNorm's bias to the next one, which takes it out:
    # such gradients are exactly zero but for rounding, and are measured by the scale's.
    norm = np.linalg.norm(theirs[name])
    if name.endswith(".bias") and name != "fc.bias":
        norm = max(norm, np.linalg.norm(theirs[name.replace(".bias", ".weight")]))
    return np.linalg.norm(ours - theirs[name]) / norm


def test_one_sgd_step_of_resnet50(tmp_path):
    theirs = seeded_torchvision("resnet50")
    # Fifty layers of ReLUs at their kinks turn float32's rounding into errors of 1 % of the
    # gradient (torch's own against its float64). With the kinks at two deviations it is 6e-6.
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias") and name != "fc.bias":
                parameter.add_(2.0)
    model = nnx.view(ported("resnet50", theirs, tmp_path), use_running_average=False)
    images = seeded_images(64, 64, batch=8)
    labels = np.random.default_rng(0).integers(0, 1000, 8)

    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    torch_loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    torch_loss.backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    optimizer.step()

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, images):
        model = nnx.merge(graph, params, rest, copy=True)
        log_probability = jax.nn.log_softmax(model(images))
        chosen = jnp.take_along_axis(log_probability, jnp.asarray(labels)[:, None], axis=1)
        return -jnp.mean(chosen), nnx.state(model, nnx.BatchStat)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (our_loss, statistics), our_gradients = step(params, rest, images)
    np.testing.assert_allclose(our_loss, torch_loss.item(), rtol=1e-5)
    for name, ours in torch_names(our_gradients).items():
        assert norm_wise_error(ours, gradients, name) < 1e-3, name
    nnx.update(model, statistics)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, our_gradients))
    after = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for name, ours in torch_names(model).items():
        assert norm_wise_error(ours, after, name) < 1e-3, name


def paper_cbam(x, w0, w1, kernel, order=("average", "maximum")):
    """The paper's equations in torch: [b, c, h, w]."""
    mlp = lambda v: torch.relu(v @ w0.T) @ w1.T  # noqa: E731
    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
    x = x * gate[:, :, None, None]
    pooled = {"average": x.mean(1, keepdim=True), "maximum": x.amax(1, keepdim=True)}
    maps = torch.cat([pooled[name] for name in order], 1)
    return x * torch.sigmoid(torch.nn.functional.conv2d(maps, kernel, padding=3))


def original_cbam(x, w0, b0, w1, b1, kernel, gamma, beta, mean, var):
    """The original authors' form in evaluation: biases, [max, mean], BatchNorm."""
    mlp = lambda v: torch.relu(v @ w0.T + b0) @ w1.T + b1  # noqa: E731
    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
    x = x * gate[:, :, None, None]
    maps = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
    maps = torch.nn.functional.conv2d(maps, kernel, padding=3)
    maps = torch.nn.functional.batch_norm(maps, mean, var, gamma, beta)
    return x * torch.sigmoid(maps)


def squeeze_excite(x, w0, b0, w1, b1):
    hidden = torch.relu(x.mean((2, 3)) @ w0.T + b0)
    return x * torch.sigmoid(hidden @ w1.T + b1)[:, :, None, None]


ORDERS = {
    paper_cbam: ["channel.fc1.weight", "channel.fc2.weight", "spatial.conv.weight"],
    original_cbam: [
        *(f"channel.fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
        "spatial.conv.weight",
        *(f"spatial.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
    ],
    squeeze_excite: [f"fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")],
}


@pytest.mark.parametrize(
    ("build", "reference"),
    [
        (CBAM, paper_cbam),
        (lambda *a, **k: CBAM(*a, original=True, **k), original_cbam),
        (SqueezeExcite, squeeze_excite),
    ],
)
def test_attention_forward_and_gradients(rng, build, reference):
    module = build(32, 8, rngs=nnx.Rngs(0))
    names = torch_names(module)
    weights = {name: rng.uniform(0.2, 1, array.shape) - 0.4 for name, array in names.items()}
    weights = {k: np.abs(v) + 0.1 if k.endswith("var") else v for k, v in weights.items()}
    load_pretrained(module, weights)
    module = nnx.view(module, raise_if_not_found=False, use_running_average=True)
    x = rng.normal(size=(3, 9, 11, 32))
    upstream = rng.normal(size=x.shape)

    arguments = [torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)]
    arguments += [
        torch.tensor(weights[name], requires_grad="running" not in name)
        for name in ORDERS[reference]
    ]
    output = reference(*arguments)
    output.backward(torch.tensor(upstream.transpose(0, 3, 1, 2).copy()))

    def weighted_sum(module, x):
        return jnp.sum(module(x) * jnp.asarray(upstream, jnp.float32))

    x = jnp.asarray(x, jnp.float32)
    to_nhwc = lambda tensor: tensor.detach().numpy().transpose(0, 2, 3, 1)  # noqa: E731
    assert relative_error(module(x), to_nhwc(output)) < 1e-5
    gradient = jax.grad(weighted_sum, argnums=1)(module, x)
    assert relative_error(gradient, to_nhwc(arguments[0].grad)) < 1e-4
    ours = torch_names(nnx.grad(weighted_sum)(module, x))
    for name, argument in zip(ORDERS[reference], arguments[1:], strict=True):
        if "running" not in name:
            assert relative_error(ours[name], argument.grad.numpy()) < 1e-4, name
    if reference is paper_cbam:
        swapped = paper_cbam(*arguments, order=("maximum", "average"))
        assert relative_error(module(x), to_nhwc(swapped)) > 0.01


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex128),
)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_as_torch_reads_them(tmp_path, zipped):
    path = tmp_path / "x.pth"
    values = torch.tensor([[-2.5, 0.0, 1.0], [3.0, 100.0, 7.0]])
    every = {str(dtype): values.abs().to(dtype).t() for dtype in DTYPES}
    torch.save(tensors() | every, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = read_torch(path), torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if isinstance(tensor, torch.Tensor):
            wide = np.complex128 if tensor.is_complex() else np.float64
            expected = tensor.detach().to(torch.complex128).numpy()
            np.testing.assert_array_equal(ours[name].astype(wide), expected)
            assert str(tensor.dtype).removeprefix("torch.") == str(ours[name].dtype)
            strides = tensor.stride() if tensor.numel() else (0,) * tensor.ndim
            assert strides == tuple(s // ours[name].itemsize for s in ours[name].strides)
