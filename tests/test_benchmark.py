"""The command's numbers, by hand where they can be; a device's share of the work."""

import importlib
import json
import sys

import cv2
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from seeded import SmallBackbone

from cbam_jax import InputError, benchmark, models, steps
from cbam_jax.backbones import batch_norm
from cbam_jax.benchmark import __main__ as command
from cbam_jax.benchmark import (
    benchmark_search,
    compile_cold,
    galleries,
    random_batch,
    step,
    workloads,
)
from cbam_jax.benchmark import data as measuring


def convolution_operations(size):
    """Of VGG16's 3x3 convolutions, by loops over the widths; what falls on the padding left out."""
    total, channels = 0, 3
    for width in (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"):
        if width == "M":
            size //= 2
            continue
        taps = sum(0 <= place + tap < size for place in range(size) for tap in (-1, 0, 1))
        total += 2 * channels * width * taps**2
        channels = width
    return total


def run(capsys, *arguments):
    command.main([*arguments, "--repeats=2"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def undrawn(name, *, rngs=None, **options):
    """A model whose parameters are all alike: drawing them takes longer than what is tested."""
    build = lambda: models.create_model(name, rngs=nnx.Rngs(0), **options)  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), state))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Limits that take no time either: an addition in place of the product."""
    monkeypatch.setattr(step, "create_model", undrawn)
    monkeypatch.setattr(workloads, "matrix_product", lambda dtype: workloads.copy())
    monkeypatch.setattr(workloads, "_COPIED", 2**10)


def test_the_face_hands_on_what_its_rooms_have():
    for room, names in benchmark._ROOMS.items():
        for name in names:
            found = getattr(benchmark, name)
            assert found is getattr(importlib.import_module(f"cbam_jax.benchmark.{room}"), name)
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        _ = benchmark.speed


@pytest.mark.slow
def test_embed_counts_parameters_and_operations(capsys):
    result = run(capsys, "embed", "--model=vgg16", "--image_size=32", "--batch_size=2")
    # torchvision's vgg16 has 14,714,688 parameters in its features.
    assert result["parameters"] == 14_714_688
    # Beside the convolutions: biases, ReLUs, pooling, the norm.
    operations = convolution_operations(32)
    assert operations < result["flops"] < 1.01 * operations
    assert result["flops_per_device"] == 2 * result["flops"]
    assert result["images_per_second"] == 2 / result["step"]["median"]
    assert result["plain"] is result["attention_cost"] is None


@pytest.fixture
def small(monkeypatch):
    """A model that compiles in no time, by a name."""
    monkeypatch.setitem(models.BACKBONES, "resnet18", SmallBackbone)


@pytest.mark.slow
def test_embed_beside_the_plain_model(capsys, small, tmp_path):
    arguments = ("--model=resnet18_cbam", "--image_size=8", "--batch_size=8", "--devices=2")
    result = run(capsys, "embed", *arguments, "--steps_per_repeat=3", f"--trace={tmp_path}/trace")
    assert result["plain"]["model"] == "resnet18"
    low, high = result["attention_cost_range"]
    assert low <= result["attention_cost"] <= high
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    # Both devices are of one CPU: their operations together, beside its limit.
    together = 2 * result["flops_per_device"]
    assert result["flops"] == together / 8
    share = together / result["step"]["median"] / result["product_flops_per_second"]
    assert result["share_of_product"] == pytest.approx(share)


def replicated_operations():
    """Of what each device does whole: the optimizer and the gradient's norm."""
    params = nnx.state(undrawn("resnet18"), nnx.Param)
    optimizer = steps.create_optimizer("adamw", 1e-3, weight_decay=1e-4)

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    cost = compile_cold(update, params, optimizer.init(params), params)[1]
    return cost["flops_per_device"], sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_device_of_n_does_an_nth_of_the_work(capsys, small, monkeypatch):
    # Sums over slices repeat what is fused with them, which XLA does or not depending on sizes.
    monkeypatch.setattr(batch_norm, "_SLICES", 1)
    sizes = ("--model=resnet18", "--image_size=16", "--batch_size=16", "--images_per_class=4")
    with jax.numpy_dtype_promotion("standard"):  # As optax's Adam needs it.
        results = {n: run(capsys, "train", *sizes, f"--devices={n}") for n in (1, 2, 8)}
        whole, parameters = replicated_operations()
    operations = {n: result["flops_per_device"] for n, result in results.items()}
    assert whole < 0.02 * operations[1]
    assert results[1]["collectives"] == {}
    for n in (2, 8):
        # The rest: the loss, whose distances [16, 16] are in part computed on all.
        share = (operations[1] - whole) / n + whole
        assert operations[n] == pytest.approx(share, rel=0.03)
        # Every gradient is reduced over the devices; beside them BatchNorm's sums, and the loss's
        # few [16, 16], for whose pairs the embeddings [16, 16] are gathered.
        reduced = results[n]["collectives"]["all-reduce"]["bytes"]
        assert 4 * parameters < reduced < 4 * parameters + 2 * 16 * 16 * 4
        assert results[n]["collectives"]["all-gather"]["bytes"] >= 16 * 16 * 4
        # The state is donated: parameters, two moments, BatchNorm's statistics.
        assert results[n]["memory"]["donated"] > 3 * 4 * parameters


def test_random_batches_are_no_zeros_and_mixed():
    batch = random_batch(32, image_size=9, images_per_class=8)
    assert np.unique(batch["image"]).size == 256
    assert np.bincount(batch["label"]).tolist() == [8] * 4
    assert not np.array_equal(batch["label"], np.sort(batch["label"]))


def test_data_counts_cpu_and_wall_of_the_batches_taken(monkeypatch):
    """A reader that lies idle until asked: three units of CPU and five of wall time a batch."""
    clock = {"cpu": 0.0, "wall": 0.0}

    def batches():
        while True:
            clock["cpu"] += 0.003
            clock["wall"] += 0.005
            yield

    monkeypatch.setattr(measuring, "cpu_seconds", lambda: clock["cpu"])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(measuring.time, "sleep", lambda seconds: None)
    times = [measuring.loading(batches(), count=4, ahead=3) for _ in range(3)]
    rates = measuring.loading_rates(times, batch_size=16)
    assert rates["batch_ms"]["median"] == pytest.approx(5)
    assert rates["images_per_second"]["min"] == pytest.approx(16 / 0.005)
    assert rates["images_per_second_per_core"]["max"] == pytest.approx(16 / 0.003)


def test_data_needs_no_dataset_and_no_grain(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.setattr(measuring, "photos", lambda count: PHOTOS * count)
    sizes = ["--image_size=16", "--batch_size=16", "--count=1", "--repeats=2"]
    command.main(["data", *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["grain"] is False
    assert result["images_per_second_per_core"]["min"] > 0
    assert (result["images"], result["workers"], result["batch_size"]) == (320, 0, 16)


PHOTOS = [cv2.imencode(".jpg", np.zeros((40, 30, 3), np.uint8))[1].tobytes()]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data", "--batch_size=20"], "batch_size=20: give a multiple of 8, at least 16"),
        (["data", "--workers=-1"], "--workers is -1, expected at least 0"),
        (["data", "--data=no.csv"], "there is no manifest no.csv"),
        (["embed", "--batch_size=0"], "--batch_size is 0, expected at least 1"),
        (["embed", "--model=resnet51"], "argument --model: invalid choice: 'resnet51'"),
        (["embed", "--batch_size=9", "--devices=2"], "--batch_size 9 is no multiple of 2 devices"),
        (["train", "--batch_size=12"], "--batch_size 12 with --images_per_class 8: mining needs"),
        (["train", "--batch_size=8"], "--batch_size 8 with --images_per_class 8: mining needs"),
        (["train", "--images_per_class=1"], "--batch_size 64 with --images_per_class 1: mining"),
        (["train", "--devices=64"], "is 64, there are 8; XLA_FLAGS=--xla_force_host_platform_dev"),
        (["embed", "--trace=setup.cfg"], "--trace=setup.cfg: File exists; give a folder to write"),
        (["search", "--k=0"], "--k is 0, expected at least 1"),
        (["search", "--k=9", "--gallery=8"], "--k is 9, expected at most --gallery 8"),
        (["search", "--devices=99"], "--devices is 99, there are 8"),
        (["search", "--embeddings=setup.cfg"], "--embeddings=setup.cfg: no embeddings: give clust"),
        (["search", "--embeddings=clusters:wide"], "--embeddings=clusters:wide: no embeddings: gi"),
        (["search", "--embeddings=clusters:nan"], "=clusters:nan: give a spread from 0 to 1e6"),
        (["search", "--embeddings=clusters:-1"], "=clusters:-1: give a spread from 0 to 1e6"),
        (["search", "--embeddings=a", "--memmap=b"], "leave out --memmap or --embeddings"),
        (["search", "--gallery=9", "--devices=2"], "--gallery 9 is no multiple of 2 devices"),
    ],
)
def test_mistakes_get_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_searches_are_measured_on_the_embeddings_of_a_file(rng, tmp_path):
    """As many as there are; more are copies with noise, and queries are some of them."""
    x = rng.normal(size=(9, 5)).astype(np.float16)
    np.savez(tmp_path / "embeddings.npz", embedding=x, label=np.arange(9))
    np.save(tmp_path / "rows.npy", x)
    for name in "embeddings.npz", "rows.npy":
        queries, gallery = galleries.queries_and_gallery(str(tmp_path / name), 4, None, 99)
        np.testing.assert_array_equal(gallery, x.astype(np.float32))
        assert all((gallery == query).all(axis=1).any() for query in queries)
    _, more = galleries.queries_and_gallery(str(tmp_path / "rows.npy"), 4, 30, 99)
    noise = more - x[np.arange(30) % 9]
    assert 0 < np.abs(noise).max() < 0.3
    assert not np.array_equal(more[:9], more[9:18])


def test_a_damaged_file_of_embeddings_is_told_in_a_line(rng, tmp_path):
    path, x = tmp_path / "embeddings.npz", rng.normal(size=(9, 5)).astype(np.float16)
    np.savez(path, embedding=x)
    whole = path.read_bytes()
    for damaged in whole[:-30], whole[:100], b"PK\3\4":
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"embeddings\.npz: no embeddings: give clusters"):
            galleries.queries_and_gallery(str(path), 4, None, 99)
    np.savez_compressed(path, embedding=np.zeros((9, 5), np.float16))
    with pytest.raises(
        InputError, match=r"npz: it is compressed: write it anew, with np\.savez in"
    ):
        galleries.queries_and_gallery(str(path), 4, None, 99)
    x[3, 2] = np.nan
    np.savez(path, embedding=x)
    with pytest.raises(InputError, match=r"npz: NaN or infinity in it"):
        galleries.queries_and_gallery(str(path), 4, None, 99)


@pytest.mark.slow
def test_a_prepared_gallery_takes_its_turn(tmp_path):
    x = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
    np.save(tmp_path / "rows.npy", x)
    source = str(tmp_path / "rows.npy")
    result = benchmark_search(queries=5, k=3, repeats=1, embeddings=source, prepared=True)
    assert (result["gallery"], result["dim"], result["prepared_width"]) == (600, 16, 16)
    assert sum(result["proven_prepared"].values()) == sum(result["proven"].values()) == 1
    assert result["prepared"]["median"] > 0
