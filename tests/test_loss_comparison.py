"""The protocol of a comparison of losses: which rows, which trial, which numbers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from cbam_jax import InputError, experiment, linear_heads, loss_comparison
from cbam_jax.linear_heads import LOSSES, draw_batch, initial_head, train_head
from cbam_jax.loss_comparison import Protocol, compare, draw_trial, measure, split_classes
from cbam_jax.paper.__main__ import main as paper

PROTOCOL = Protocol(folds=2, test_classes=3, trials=3, seeds=2, steps=4, dim=3)


@pytest.fixture
def file(rng, tmp_path):
    label = rng.integers(0, 7, 80)
    path = tmp_path / "embeddings.npz"
    np.savez(path, embedding=rng.normal(size=(80, 5)).astype(np.float32), label=label)
    return path, label


@pytest.fixture
def calls(monkeypatch):
    """Trainings and measurements, which are told by what they are of."""
    made = []

    def train(features, labels, rows, loss, options, *, learning_rate, seed, **rest):
        made.append((loss, sorted(set(labels[rows].tolist())), learning_rate, seed))
        return np.float32([learning_rate, seed])

    def value(features, labels, head=None):
        rate, seed = (0.0, 0) if head is None or head.ndim == 2 else head.tolist()
        # The middle learning rate is best on validation; on the test it is another one.
        test = set(labels.tolist()) & {4, 5, 6}
        number = seed / 10 + rate if test else 1 - abs(rate - draw_trial("triplet", 1, PROTOCOL)[0])
        return dict.fromkeys(loss_comparison.MEASURED, number)

    monkeypatch.setattr(loss_comparison, "train_head", train)
    monkeypatch.setattr(loss_comparison, "measure", value)
    return made


def test_the_test_classes_are_in_no_training_and_validation_chooses(file, calls, tmp_path):
    path, _ = file
    table = compare(path, tmp_path / "out", ["triplet", "circle"], PROTOCOL)
    assert {loss for loss, *_ in calls} == {"triplet", "circle"}
    # Folds are classes 0 and 2, 1 and 3; each is trained on for the other's sake.
    assert [classes for _, classes, *_ in calls[:2]] == [[1, 3], [0, 2]]
    assert all(not {4, 5, 6} & set(classes) for _, classes, *_ in calls)
    for loss in ("triplet", "circle"):
        of = [call for call in calls if call[0] == loss]
        assert len(of) == 2 * 3 + 2 * 2
        # The same learning rates for each loss, and that of trial 1 for the seeds.
        rates = [draw_trial("triplet", number, PROTOCOL)[0] for number in range(3)]
        assert [rate for _, _, rate, _ in of] == pytest.approx(
            np.repeat([*rates, *2 * rates[1:2]], 2)
        )
        assert [seed for *_, seed in of[-4:]] == [1, 1, 2, 2]
    row = next(row for row in table["rows"] if row["loss"] == "triplet")
    values = [0.1 + rates[1], 0.2 + rates[1]]
    assert row["test"]["map@R"]["mean"] == pytest.approx(np.mean(values))
    expected = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    assert row["test"]["map@R"]["interval"] == pytest.approx(expected)
    assert "| triplet | " in (tmp_path / "out" / "compare.md").read_text()


def test_learning_rates_are_drawn_evenly_by_their_logarithm_between_the_two_that_are_given():
    protocol = PROTOCOL._replace(lowest_rate=1e-6, highest_rate=1e-3)
    drawn = [draw_trial("circle", number, protocol) for number in range(1, 400)]
    places = (np.log10([rate for rate, _ in drawn]) + 6) / 3
    assert stats.kstest(places, "uniform").pvalue > 0.01
    # Options are the same, whatever the rates.
    assert [options for _, options in drawn[:9]] == [
        draw_trial("circle", number, PROTOCOL)[1] for number in range(1, 10)
    ]
    assert draw_trial("circle", 0, protocol) == (1e-3, {})


def test_it_goes_on_where_it_stopped(file, calls, tmp_path, monkeypatch):
    path, _ = file
    whole = compare(path, tmp_path / "whole", ["triplet"], PROTOCOL)
    count = len(calls)
    calls.clear()
    write = loss_comparison.write_json

    def stop(path, document):
        write(path, document)
        if len(document.get("seeds", [])) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loss_comparison, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(path, tmp_path / "cut", ["triplet"], PROTOCOL)
    monkeypatch.setattr(loss_comparison, "write_json", write)
    assert compare(path, tmp_path / "cut", ["triplet"], PROTOCOL) == whole
    assert len(calls) == count
    with pytest.raises(InputError, match="triplet.json is of other settings or embeddings: give"):
        compare(path, tmp_path / "cut", ["triplet"], PROTOCOL._replace(steps=5))


def test_embeddings_of_the_same_photos_by_another_model_are_others(file, calls, tmp_path, rng):
    path, label = file
    compare(path, tmp_path / "out", ["triplet"], PROTOCOL)
    other = tmp_path / "other.npz"
    np.savez(other, embedding=rng.normal(size=(80, 5)).astype(np.float32), label=label)
    with pytest.raises(InputError, match="triplet.json is of other settings or embeddings"):
        compare(other, tmp_path / "out", ["triplet"], PROTOCOL)
    (tmp_path / "out" / "triplet.json").write_text("[]")
    with pytest.raises(InputError, match="triplet.json is damaged: delete it"):
        compare(path, tmp_path / "out", ["triplet"], PROTOCOL)


@pytest.mark.parametrize("rates", [("0", "1"), ("1e-2", "1e-3"), ("nan", "1"), ("1e-4", "inf")])
def test_wrong_learning_rates_get_one_line(file, tmp_path, rates):
    flags = [
        f"--{name}_rate={rate}" for name, rate in zip(("lowest", "highest"), rates, strict=True)
    ]
    given = ["compare", f"--workdir={tmp_path}", f"--embeddings={file[0]}", "--losses=triplet"]
    with pytest.raises(InputError, match="give learning rates above 0, the lower one first"):
        paper([*given, *flags])


@pytest.mark.parametrize("flag", ["--trials=0", "--batch_images=1", "--batch_classes=1"])
def test_numbers_by_which_nothing_is_trained_get_one_line(file, tmp_path, flag):
    given = ["compare", f"--workdir={tmp_path}", f"--embeddings={file[0]}", "--losses=triplet"]
    least = 2 if "batch" in flag else 1
    with pytest.raises(InputError, match=f"{flag}: give at least {least}"):
        paper([*given, flag])


def test_wrong_input_gets_one_line(file, tmp_path):
    path, label = file
    with pytest.raises(InputError, match=r"--losses has 'tripled': give some of triplet,"):
        compare(path, tmp_path / "out", ["tripled"], PROTOCOL)
    with pytest.raises(InputError, match="7 classes, of which 3 for the test, do not give"):
        split_classes(label, Protocol(folds=3))
    with pytest.raises(InputError, match="is no embeddings.npz of evaluate.py"):
        compare(Path("absent.npz"), tmp_path / "out", ["triplet"], PROTOCOL)
    (tmp_path / "text.npz").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="is no embeddings.npz of evaluate.py"):
        compare(tmp_path / "text.npz", tmp_path / "out", ["triplet"], PROTOCOL)


def test_more_numbers_than_the_embeddings_have_are_refused(file, tmp_path):
    with pytest.raises(InputError, match=r"--dim=6: --embeddings=.* has 5 numbers an image.*dim=5"):
        compare(file[0], tmp_path / "out", ["proxy_anchor"], PROTOCOL._replace(dim=6))


@pytest.mark.parametrize(("part", "classes"), [("the test", (4, 5, 6)), ("fold 1", (1, 3))])
def test_a_part_in_which_nothing_can_be_found_is_refused(part, classes):
    label = np.repeat(np.arange(7), [1 if name in classes else 4 for name in range(7)])
    with pytest.raises(InputError, match=f"no class of {part} has a second image"):
        split_classes(label, PROTOCOL)


def test_a_loss_that_is_named_twice_is_one_row(file, calls, tmp_path):
    table = compare(file[0], tmp_path / "out", ["triplet", "triplet"], PROTOCOL)
    assert [row["loss"] for row in table["rows"]] == ["before training", "triplet"]


def test_map_at_r_is_that_of_loops(rng, monkeypatch):
    from test_rerank import plain_search

    monkeypatch.setattr(loss_comparison, "search", plain_search)
    x, label = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 4, 30)
    values = []
    for i in range(30):
        order = [j for j in np.argsort(((x - x[i]) ** 2).sum(1)) if j != i]
        count = sum(label[i] == label) - 1
        hits = [label[j] == label[i] for j in order[:count]]
        values.append(sum(np.mean(hits[: r + 1]) for r in range(count) if hits[r]) / count)
    assert measure(x, label)["map@R"] == pytest.approx(np.mean(values))


def test_a_map_that_has_diverged_finds_nothing(rng):
    x, label = rng.normal(size=(6, 4)).astype(np.float32), np.repeat([0, 1], 3)
    for wrong in (np.nan, np.inf):
        found = measure(x, label, np.full((4, 2), wrong, np.float32))
        assert found == {"map@R": 0, "precision@1": 0, "r_precision": 0}


def test_batches_hold_each_class_equally_often(rng):
    label = np.repeat([0, 1, 2, 3], [9, 2, 30, 5])
    rows = draw_batch(label, 3, 4, rng)
    assert sorted(np.bincount(label[rows], minlength=4).tolist()) == [0, 4, 4, 4]
    assert len(set(rows[label[rows] == 2])) in (0, 4)


def test_every_loss_that_has_a_name_can_be_compared():
    assert LOSSES.keys() == {*experiment.LOSSES, "cross_entropy"}


def test_one_program_serves_all_trials_folds_and_seeds(rng, monkeypatch):
    """And rows that are not trained on are not looked at."""
    cost, traced = linear_heads._cost, []
    monkeypatch.setattr(linear_heads, "_cost", lambda *given: traced.append(1) or cost(*given))
    label = np.repeat(np.arange(6), [5, 9, 7, 6, 8, 5])
    features = rng.normal(size=(40, 6)).astype(np.float32)
    budget = {"learning_rate": 0.01, "steps": 2, "batch": (2, 3), "dim": 2}
    counts = []
    for seed, classes in enumerate([(0, 1, 2), (3, 4, 5), (1, 3, 5)]):
        rows = np.flatnonzero(np.isin(label, classes))
        others = np.where(np.isin(label, classes)[:, None], features, np.float32(np.nan))
        options = {"margin": 0.3} if seed else {}
        with jax.numpy_dtype_promotion("standard"):  # As optax's Adam needs it.
            head = train_head(others, label, rows, "cosface", options, seed=seed, **budget)
        assert np.isfinite(head).all()
        assert np.abs(head - initial_head(6, 2, seed)).max() > 1e-3
        counts.append(len(traced))
    assert counts == [counts[0]] * 3
    assert counts[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_pulls_classes_together(rng, loss):
    label = np.repeat(np.arange(6), 12)
    features = rng.normal(size=(6, 10))[label] + 1.5 * rng.normal(size=(72, 10))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def same_less_other(head):
        x = features @ head
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosine, same = x @ x.T, label[:, None] == label
        return cosine[same].mean() - cosine[~same].mean()

    options = {name: np.sqrt(np.prod(of)) for name, of in LOSSES[loss].options.items()}
    budget = {"learning_rate": 0.01, "steps": 40, "batch": (6, 6), "dim": 4, "seed": 3}
    with jax.numpy_dtype_promotion("standard"):  # As optax's Adam needs it.
        head = train_head(features, label, np.arange(72), loss, options, **budget)
    assert same_less_other(head) > same_less_other(initial_head(10, 4, 3)) + 0.1
