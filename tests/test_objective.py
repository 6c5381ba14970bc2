"""Cross-entropy as the objective, from a folder of photos to a run that starts from its result."""

import contextlib
import dataclasses
import io
import json
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from tiny_run import patch_tiny_models

from cbam_jax import InputError, config_checks, experiment, models, runs, steps, training
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.configs import default
from cbam_jax.evaluation import classification_metrics
from cbam_jax.losses import cross_entropy_loss, deep_cross_entropy_loss
from cbam_jax.runlog import read_log

CLASSES = ("coat", "dress", "hat", "skirt")


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two convolutions on one device: little to compile."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        patch.setattr(steps, "data_mesh", lambda: mesh)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise in four colours: FOLDER/train/<class> and FOLDER/val/<class>."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    for split, size in {"train": 4, "val": 3}.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(size):
                image = rng.integers(0, 60, (36, 40, 3), np.uint8)
                image[..., :2] += np.uint8([[0, 0], [190, 0], [0, 190], [190, 190]])[label]
                cv2.imwrite(str(folder / split / name / f"{i}.png"), image)
    return folder


def make_config(photos, **fields):
    config = default.get_config()
    fields = {
        "data.name": f"{photos}/",
        "data.image_size": 32,
        "data.classes_per_batch": 4,
        "data.images_per_class": 2,
        "model.name": "tiny_cbam",
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.05,
        "optimizer.warmup_steps": 2,
        "train.steps": 12,
        "train.log_every": 4,
        "train.eval_every": 12,
        "train.checkpoint_every": 12,
        "eval.batch_size": 8,
        "eval.ks": (5, 10),
        **fields,
    }
    config.update_from_flattened_dict(fields)
    return config


CLASSIFY = {"loss.name": "cross_entropy", "model.num_classes": 4, "model.normalize": False}


@pytest.fixture(scope="module")
def classified(photos, tmp_path_factory):
    """A run with cross-entropy, its summary, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "classified"
    fields = {"loss.label_smoothing": 0.1, "optimizer.learning_rate": 2.0}
    config = make_config(photos, **CLASSIFY, **fields)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        summary = training.train_and_evaluate(config, workdir)
    return workdir, summary, output.getvalue()


@pytest.mark.slow
def test_cross_entropy_learns_and_says_so(classified):
    workdir, summary, output = classified
    records = read_log(workdir)
    trained = [record for record in records if "loss" in record]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.2
    assert "accuracy" in trained[0]
    assert "distance_positive" not in trained[0]
    assert summary["best"]["accuracy"] == records[-1]["validation/accuracy"]
    assert summary["untrained"]["accuracy"] < 0.8
    line = re.search(r"step +12 of 12  loss (\S+)  accuracy (\S+)  \S+ images/s", output)
    assert line is not None
    assert float(line[2]) == pytest.approx(trained[-1]["accuracy"], abs=1e-3)
    assert re.search(r"step +12  validation  map@10 .* accuracy ", output)


@pytest.mark.slow
def test_accuracy_of_evaluate_is_that_of_the_models_logits(classified, photos, capsys):
    workdir, _, _ = classified
    report = runs.evaluate(workdir, "val", "last", figures=False)
    saved = np.load(workdir / "eval" / "val" / "embeddings.npz")
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        arrays = checkpoints.restore("last", optimizer=False).model
    logits = saved["embedding"].astype(np.float64) @ arrays["params.class_head.kernel"]
    logits += arrays["params.class_head.bias"]
    expected = np.mean(np.argmax(logits, axis=1) == saved["label"])
    assert report["metrics"]["accuracy"] == pytest.approx(expected)
    assert report["metrics"]["accuracy@5"] == 1.0  # There are four classes.
    assert "largest logit" in json.loads((workdir / "eval/val/metrics.json").read_text())[
        "definitions"]["accuracy"]  # fmt: skip
    assert f"accuracy        {expected:.4f}" in capsys.readouterr().out


class Started(Exception):
    """Stops a run where its training would begin."""


@pytest.mark.slow
def test_a_retrieval_run_starts_from_it_with_its_attention(
    classified, photos, tmp_path, monkeypatch, capsys
):
    workdir, _, _ = classified

    def stop(model, *args, **kwargs):
        raise Started(nnx.to_flat_state(nnx.state(model)))

    monkeypatch.setattr(steps, "create_train_state", stop)
    config = make_config(photos, **{"model.pretrained": str(workdir)})
    with pytest.raises(Started) as caught:
        training.train_and_evaluate(config, tmp_path / "retrieval")
    started = dict(caught.value.args[0])
    assert "0 start fresh, 2 unused (class_head)" in capsys.readouterr().out
    with Checkpoints(workdir / "checkpoints", best_metric="map@10") as checkpoints:
        arrays = checkpoints.restore("last", optimizer=False).model
    assert sum("stem_attention" in path for path in started) == 3
    assert sum("last_attention" in path for path in started) == 3
    for path, variable in started.items():
        kind = "batch_stats" if path[-1] in ("mean", "var") else "params"
        name = ".".join(map(str, path))
        np.testing.assert_array_equal(variable[...], arrays[f"{kind}.{name}"])


@pytest.mark.slow
def test_gates_of_another_form_are_refused(classified, photos, tmp_path):
    workdir, _, _ = classified
    fields = {"model.pretrained": str(workdir), "model.attention_init": "identity"}
    with pytest.raises(InputError, match="attention_init='identity', but .* form 'paper': set it"):
        training.train_and_evaluate(make_config(photos, **fields), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.num_classes": 4}, "model.num_classes=4, which triplet does not train"),
        ({**CLASSIFY, "model.num_classes": None}, "cross_entropy needs the number of classes"),
        ({**CLASSIFY, "model.num_classes": 1}, "model.num_classes=1: .* at least 2"),
        ({**CLASSIFY, "model.num_classes": 5}, "num_classes=5, but split 'train' .* 4 classes"),
        ({**CLASSIFY, "model.normalize": True}, "model.normalize=True: .* set it to False"),
        ({**CLASSIFY, "loss.memory_size": 64}, "memory_size=64: cross_entropy takes no memory"),
        (
            {"loss.auxiliary_weight": -0.3},
            "loss.auxiliary_weight=-0.3: give a weight of at least 0",
        ),
        ({"loss.label_smoothing": 1.0}, r"loss.label_smoothing=1.0: give a share in \[0, 1\)"),
    ],
)
def test_mistakes_are_told_before_anything_slow(fields, message, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "build_model", lambda config: None)
    monkeypatch.setattr(config_checks, "check_blocks", lambda config, model: None)
    monkeypatch.setattr(config_checks, "check_own_model", lambda config, model: None)
    with pytest.raises(InputError, match=message) as caught:
        training.train_and_evaluate(make_config(photos, **fields), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_missing_weights_are_told_before_the_dataset_is_opened(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "open_split", None)
    config = make_config(photos, **{"model.pretrained": "runs/nowhere"})
    with pytest.raises(InputError, match=r"=\S+runs/nowhere' is not there: give a"):
        training.train_and_evaluate(config, tmp_path / "run")


def test_splits_that_number_their_labels_anew_have_no_common_classes(photos):
    config = make_config(photos, **CLASSIFY)
    training = experiment.open_split(config, "train")
    renamed = dataclasses.replace(training, label_names=("a", "b", "c", "d"))
    with pytest.raises(InputError, match="numbers 'label' anew in each split"):
        config_checks.check_labels(config, training, renamed)


def test_classification_metrics_by_loops(rng):
    logits, label = rng.normal(size=(50, 9)), rng.integers(0, 9, 50)
    logits[:7] = np.round(logits[:7])  # Ties
    hits = []
    for row, own in zip(logits, label, strict=True):
        others = [x for i, x in enumerate(row) if i != own]
        hits.append(sum(x >= row[own] for x in others))
    metrics = classification_metrics(logits, label)
    assert metrics["accuracy"] == np.mean([hit < 1 for hit in hits])
    assert metrics["accuracy@5"] == np.mean([hit < 5 for hit in hits])
    assert classification_metrics(np.zeros((4, 9)), label[:4])["accuracy@5"] == 0


def test_auxiliary_losses_count_by_their_weight(rng):
    logits, labels = rng.normal(size=(3, 6, 5)), rng.integers(0, 5, 6)
    each = []
    for rows in logits:
        probability = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        target = 0.9 * np.eye(5)[labels] + 0.1 / 5
        each.append(-np.mean(np.sum(target * np.log(probability), axis=1)))
    arrays = [jnp.asarray(rows, jnp.float32) for rows in logits]
    loss, stats = deep_cross_entropy_loss(arrays, jnp.asarray(labels), 0.1, auxiliary_weight=0.2)
    np.testing.assert_allclose(loss, each[0] + 0.2 * (each[1] + each[2]), rtol=1e-5)
    np.testing.assert_allclose(stats["accuracy"], np.mean(logits[0].argmax(1) == labels), rtol=1e-6)
    with pytest.raises(ValueError, match="auxiliary_weight is -0.1, expected at least 0"):
        deep_cross_entropy_loss(arrays, jnp.asarray(labels), auxiliary_weight=-0.1)


def test_classify_is_linear_on_the_embedding(rng):
    def model(num_classes):
        backbone = nnx.Linear(3, 7, rngs=nnx.Rngs(1))
        backbone.num_features = 7
        options = {"embedding_dim": 6, "normalize": False, "num_classes": num_classes}
        return models.EmbeddingModel(backbone, **options, rngs=nnx.Rngs(0))

    images = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    head = model(3).class_head
    expected = np.asarray(model(3)(images)) @ np.asarray(head.kernel[...]) + np.asarray(
        head.bias[...]
    )
    np.testing.assert_allclose(model(3).classify(images), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="num_classes is None"):
        model(None).classify(images)


def test_the_step_hands_logits_to_the_loss(rng):
    class Linear(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(12, 4, rngs=nnx.Rngs(0))
            self.unused = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def preprocess(self, images):
            return images.astype(jnp.float32).reshape(len(images), -1) / 255

        def classify(self, x):
            return self.layer(x)

    model, optimizer = Linear(), steps.create_optimizer("sgd", 0.5, momentum=0.0)
    state = steps.create_train_state(model, optimizer, steps.data_mesh())
    kernel = np.asarray(model.layer.kernel[...], np.float64)
    batch = {"image": rng.integers(0, 256, (5, 2, 2, 3), np.uint8), "label": np.arange(5) % 4}
    batch["label"] = batch["label"].astype(np.int32)
    step = steps.make_train_step(model, optimizer, cross_entropy_loss, forward=Linear.classify)
    state, scalars = step(state, batch)
    x = batch["image"].reshape(5, -1) / 255
    exps = np.exp(x @ kernel)
    probability = exps / exps.sum(axis=1, keepdims=True)
    expected = kernel - 0.5 * x.T @ (probability - np.eye(4)[batch["label"]]) / 5
    np.testing.assert_allclose(state.params["layer"]["kernel"][...], expected, atol=1e-5)
    loss = -np.mean(np.log(probability[np.arange(5), batch["label"]]))
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
