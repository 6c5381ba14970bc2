"""What a config means for a dataset at hand: few photos, the K that can be measured among them."""

import types

import cv2
import jax
import numpy as np
import pytest
from tiny_run import write_photos

from cbam_jax import InputError, config_checks, evaluation, experiment, run_summary, training
from cbam_jax.configs import default
from cbam_jax.datasets import RetrievalDataset


def make_dataset(label, **columns):
    everyone = np.ones(len(label), bool)
    fields = {
        "name": "photos.csv",
        "split": "validation",
        "label": np.asarray(label, np.int32),
        "label_names": ("coat", "dress", "hat"),
        "id": np.array([f"{i}.png" for i in range(len(label))]),
        "is_query": everyone,
        "is_gallery": everyone,
        "item": None,
        "series": None,
        "bbox": None,
        "images": [b""] * len(label),
    }
    return RetrievalDataset(**fields | columns)


def make_config(**fields):
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    ("count", "expected"), [(40, (5, 10, 20)), (12, (5, 10)), (6, (5,)), (4, (3,)), (2, (1,))]
)
def test_the_default_ks_are_those_that_a_split_can_give(count, expected, capsys):
    config, dataset = make_config(), make_dataset(np.arange(count) % 2 * 0)
    fitted = experiment.with_fitting_ks(config, dataset)
    assert tuple(fitted.eval.ks) == expected
    assert tuple(config.eval.ks) == (5, 10, 20)
    told = capsys.readouterr().out
    assert told.count("\n") == (expected != (5, 10, 20))
    assert not told or f"eval.ks={expected} in place of (5, 10, 20)" in told
    experiment.split_protocol(fitted, dataset)


@pytest.mark.parametrize(
    ("classes", "devices", "expected"),
    [(9, 1, (8, 4)), (3, 1, (3, 10)), (2, 1, (2, 16)), (3, 4, (3, 8)), (1, 1, (8, 4))],
)
def test_batches_need_no_more_classes_than_there_are(
    classes, devices, expected, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = make_config(**{"data.images_per_class": 4})
    dataset = make_dataset([*range(classes), *range(classes), classes + 1])
    for alone, count in ((False, classes + 1), (True, classes)):
        config.data.skip_singletons = alone
        fitted = experiment.with_fitting_batch(config, dataset).data
        if count == classes:
            assert (fitted.classes_per_batch, fitted.images_per_class) == expected
            told = capsys.readouterr().out
            assert told.count("\n") == (expected != (8, 4))
            # One class more has a single image.
            assert not told or f"'validation' has {classes} classes of two images or more" in told
        capsys.readouterr()
    config.data.classes_per_batch = 12  # The user's own, which is refused if it cannot be.
    assert experiment.with_fitting_batch(config, dataset) is config


def test_classes_are_those_that_a_split_has_images_of():
    training_set, validation = make_dataset([0, 0, 2]), make_dataset([0, 0])
    assert run_summary.images_of(training_set, validation) == (
        "3 training images of 2 classes and 2 validation images of 1 classes (the dataset names 3)"
    )
    every = make_dataset([0, 2, 1, 1])
    assert run_summary.images_of(every, every) == "4 training and 4 validation images of 3 classes"


def test_a_mistake_in_the_config_is_told_before_the_data_is_opened(tmp_path, monkeypatch):
    config = make_config(**{"train.steps": 4, "optimizer.warmup_steps": 20})
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(experiment, "open_split", None)  # Would prepare it, which is slow.
    monkeypatch.setattr(experiment, "build_model", None)
    with pytest.raises(InputError, match=r"warmup_steps=20 must be below train\.steps=4"):
        training.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("after", "name"), [(0.7, "best"), (0.6, "trained")])
def test_what_training_made_worse_is_not_called_the_best(after, name):
    summary = {
        "step": 4, "images_seen": 64, "split": "validation", "finished": True,
        "untrained": {"map@10": 0.65}, "best": {"map@10": after}, "best_step": 4,
    }  # fmt: skip
    told = run_summary.tell(summary)
    assert f"untrained -> {name} (step 4):" in told
    assert ("made it worse" in told) == (name == "trained")


def test_few_classes_are_no_mistake_when_the_data_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    manifest = write_photos(tmp_path, splits=("train", "validation"), count=4)
    config = make_config(**{"data.name": str(manifest), "data.images_per_class": 4})
    checkpoints = types.SimpleNamespace(steps=list)
    config, opened, _, source = training.open_data(config, tmp_path, checkpoints)
    assert (config.data.classes_per_batch, config.data.images_per_class) == (3, 10)
    assert (tuple(config.eval.ks), source) == ((5, 10), None)
    batch = next(iter(experiment.train_batches(config, opened, 0)))
    assert np.bincount(batch["label"]).tolist() == [10, 10, 10]


def test_a_resumed_run_does_not_call_what_adapted_changed(capsys):
    config = make_config(**{"data.images_per_class": 4})
    fitted = experiment.with_fitting_batch(config, make_dataset([0, 0, 1, 1, 2, 2]))
    capsys.readouterr()
    config_checks.check_same_run(config, fitted)
    assert "classes_per_batch" not in capsys.readouterr().out
    fitted.data.flip = False
    config_checks.check_same_run(config, fitted)
    assert "flip" in capsys.readouterr().out


def test_chosen_ks_are_kept_and_refused_with_the_flag_to_type():
    config, dataset = make_config(**{"eval.ks": (1, 5, 9)}), make_dataset([0, 0, 1, 1, 2, 2])
    assert tuple(experiment.with_fitting_ks(config, dataset).eval.ks) == (1, 5, 9)
    with pytest.raises(InputError, match=r"ks=\(1, 5, 9\): .*'--config.eval.ks=\(1,5\)'$"):
        experiment.split_protocol(config, dataset)
    config.eval.ks = (8,)
    with pytest.raises(InputError, match=r"'--config.eval.ks=\(5,\)'$"):
        experiment.split_protocol(config, dataset)
    # An evaluation after training adapts whatever the run was trained with.
    fitted = experiment.with_fitting_ks(config, dataset, chosen=False)
    assert tuple(fitted.eval.ks) == (5,)


def test_without_a_query_or_a_second_image_no_ks_help():
    nobody = np.zeros(3, bool)
    for dataset in (make_dataset([0]), make_dataset([0, 0, 1], is_query=nobody)):
        fitted = experiment.with_fitting_ks(make_config(), dataset)
        with pytest.raises(InputError, match="use a split with more images$"):
            experiment.split_protocol(fitted, dataset)


def test_a_split_in_which_nothing_can_be_found_is_refused():
    config = make_config(**{"eval.ks": (1,)})
    with pytest.raises(InputError, match=r"'validation' of photos\.csv holds no two images of one"):
        experiment.split_protocol(config, make_dataset([0, 1, 2]))
    experiment.split_protocol(config, make_dataset([0, 1, 1]))
    with pytest.raises(InputError, match=r"has no images: .* needs 4 photos"):
        experiment.split_protocol(config, make_dataset([]))
    # Queries whose like is in the gallery, and queries whose like is not.
    sides = {"is_query": np.array([True, False, False]), "is_gallery": ~np.eye(3, dtype=bool)[0]}
    experiment.split_protocol(config, make_dataset([0, 0, 1], **sides))
    with pytest.raises(InputError, match="no two images of one label"):
        experiment.split_protocol(config, make_dataset([0, 1, 1], **sides))


@pytest.mark.parametrize("ks", [(5, 10, 20), (1, 5), (3,)])
def test_the_best_checkpoint_is_chosen_by_the_same_metric_everywhere(ks):
    config = make_config(**{"eval.ks": ks})
    names = [f"{family}@{k}" for k in ks for family in ("precision", "map", "map_all", "recall")]
    expected = "map@10" if 10 in ks else f"map@{max(ks)}"
    assert experiment.headline(config) == evaluation.headline([*names, "map@R"]) == expected


@pytest.mark.parametrize("counts", [(10, 10, 10), (15, 15), (12, 9, 9), (20, 20, 18), (26, 4)])
@pytest.mark.parametrize("as_folders", [True, False])
def test_thirty_photos_can_be_trained_on_and_measured(tmp_path, rng, counts, as_folders):
    lines = ["path,label"]
    for label, count in enumerate(counts):
        (tmp_path / f"class {label}").mkdir()
        for i in range(count):
            name = f"class {label}/{i}.png"
            lines.append(f"{name},class {label}")
            cv2.imwrite(str(tmp_path / name), rng.integers(0, 256, (12, 10, 3), np.uint8))
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    name = f"{tmp_path}/" if as_folders else f"{tmp_path}/photos.csv"
    config = make_config(**{"data.name": name, "data.classes_per_batch": 2})
    training = experiment.open_split(config, "train")
    experiment.train_batches(config, training, step=0).close()
    for split in ("validation", "test"):
        dataset = experiment.open_split(config, split)
        fitted = experiment.with_fitting_ks(config, dataset)
        relevant = evaluation.relevant_images(
            dataset.label, experiment.split_protocol(fitted, dataset)
        )
        assert relevant.min() >= 1


def test_resuming_with_the_default_ks_is_no_change(capsys):
    saved, config = make_config(**{"eval.ks": (3,)}), make_config()
    config_checks.check_same_run(config, saved)
    assert "eval.ks" not in capsys.readouterr().out
    config.eval.ks = (2,)
    config_checks.check_same_run(config, saved)
    assert "resuming with changed fields: eval.ks" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "left"), [(16, False), (31, False), (32, True)])
def test_images_of_which_the_poolings_leave_nothing_are_refused(size, left):
    config = make_config(**{"model.name": "vgg16", "data.image_size": size})
    if left:
        config_checks.check_image_size(config)
        return
    message = f"data.image_size={size}: vgg16's .* set --config.data.image_size=32 or more"
    with pytest.raises(InputError, match=message):
        config_checks.check_image_size(config)


def test_small_images_that_a_model_takes_are_not_refused():
    config_checks.check_image_size(make_config(**{"model.name": "resnet18", "data.image_size": 8}))
