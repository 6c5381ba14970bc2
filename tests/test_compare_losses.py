"""benchmarks/compare_losses.py: which runs are trained, what chooses, what is measured."""

import argparse
import json

import pytest
from beside import beside
from scipy import stats

from cbam_jax import InputError

# ml_collections loads a config's file by a method that Python 3.12 drops and it replaces there.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def script():
    return beside("../benchmarks/compare_losses.py")


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "fold1.json").write_text('["hat", "shoes"]')
    names = {"losses": ["circle", "cross_entropy"], "rates": ["1e-4", "1e-3"]}
    return argparse.Namespace(workdir=tmp_path, fold=1, seeds=2, **names)


@pytest.fixture
def trained(script, monkeypatch):
    """Trainings, each done once; circle is best at 1e-3 and cross_entropy at 1e-4."""
    done = []

    def train(config, run):
        done.append((config, run.name))
        run.mkdir(parents=True)
        return {"finished": True}

    def evaluations(config, run):
        rate = config.optimizer.learning_rate
        return {30: {"map@R": 0.4 + (rate if config.loss.name == "circle" else -rate)}}

    def evaluate(run, split, which):
        _, rate, seed = parts(run.name)
        folder = run / "eval" / (f"{split}-untrained" if which == "untrained" else split)
        folder.mkdir(parents=True)
        value = 0.1 if which == "untrained" else 0.5 + int(seed) / 10 + float(rate)
        value += 0.2 if split == "test" else 0.0
        metrics = {"map@R": value, "precision@1": value / 2, "map@10": value, "mrr": 0.0}
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(script.training, "train_and_evaluate", train)
    monkeypatch.setattr(script.runs, "recorded_evaluations", evaluations)
    monkeypatch.setattr(script.runs, "evaluate", evaluate)
    return done


def parts(name):
    """circle-1e-3-0: the loss, the learning rate and the seed."""
    loss, _, rest = name.partition("-")
    rate, _, seed = rest.rpartition("-")
    return loss, rate, seed


def test_validation_chooses_and_every_run_is_trained_once(script, flags, trained):
    [*_, rows] = script.rows(flags, ["--config.train.steps=30"])
    names = [name for _, name in trained]
    assert names == [
        *("circle-1e-4-0", "circle-1e-3-0", "cross_entropy-1e-4-0", "cross_entropy-1e-3-0"),
        *("circle-1e-3-1", "cross_entropy-1e-4-1"),
    ]
    for config, name in trained:
        loss, rate, seed = parts(name)
        assert (config.loss.name, config.seed) == (loss, int(seed))
        assert config.optimizer.learning_rate == float(rate)
        assert config.data.name == str(flags.workdir / "fold1.csv")
        assert config.model.normalize == (loss == "circle")
        assert config.model.num_classes == (None if loss == "circle" else 2)
        assert config.train.ema_decay == 0
    before, circle, entropy = rows
    assert before["seeds"][0]["unseen"]["map@R"] == pytest.approx(0.1)
    assert script.of(circle, "unseen", "map@R") == pytest.approx([0.501, 0.601])
    assert script.of(entropy, "test", "precision@1") == pytest.approx([0.35005, 0.40005])
    assert entropy["validation"] == pytest.approx({"1e-4": 0.3999, "1e-3": 0.399})
    trained.clear()
    [*_, again] = script.rows(flags, ["--config.train.steps=30"])
    assert again == rows
    assert trained == []


def test_the_table_is_sorted_by_what_was_not_seen(script):
    measured = lambda value: {"map@R": value, "precision@1": 0.9, "map@10": 0.0}  # noqa: E731
    of = lambda *pairs: [{"unseen": measured(a), "test": measured(b)} for a, b in pairs]  # noqa: E731
    rows = [
        {"loss": "before training", "seeds": of((0.5, 0.3))},
        {"loss": "triplet", "seeds": of((0.7, 0.6), (0.5, 0.8)), "validation": {"1e-4": 0.5}},
    ]
    _, _, first, second = script.markdown(rows).splitlines()
    low, high = stats.t.interval(0.95, 1, 0.6, stats.sem([0.7, 0.5]))
    assert first.startswith(f"| triplet | 0.6000 ({low:.4f} to {high:.4f}) | 0.7000 (")
    assert first.endswith("| 2 | 1e-4 |")
    assert second == "| before training | 0.5000 | 0.3000 | 0.9000 | 1 |  |"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--losses=tripled", "--losses has 'tripled': give some of triplet,"),
        ("--rates=1e-4,fast", "--rates has 'fast': give learning rates, such as"),
        ("--seeds=0", "--seeds=0: give at least 1"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_trained(script, monkeypatch, flag, message):
    monkeypatch.setattr("sys.argv", ["compare_losses.py", "--data=a.csv", flag])
    with pytest.raises(InputError, match=message):
        script.parse()


def test_a_name_that_is_given_twice_counts_once(script, monkeypatch):
    given = ["--losses=triplet, circle,triplet", "--rates=1e-3,1e-4,1e-3"]
    monkeypatch.setattr("sys.argv", ["compare_losses.py", "--data=a.csv", *given])
    flags, _ = script.parse()
    assert flags.losses == ["triplet", "circle"]
    assert flags.rates == ["1e-3", "1e-4"]


def test_trainings_of_other_photos_or_another_budget_are_not_taken_over(script, flags):
    flags.data = flags.workdir / "photos.csv"
    flags.data.write_text("path,label,split\n")
    script.check_settings(flags, ["--config.train.stepz=60"])  # Nothing is finished by that.
    script.check_settings(flags, ["--config.train.steps=60"])
    finished = flags.workdir / "fold1" / "circle-1e-4-0" / "validation.json"
    finished.parent.mkdir(parents=True)
    finished.touch()
    script.check_settings(flags, ["--config.train.steps=60"])
    with pytest.raises(InputError, match="settings1.json has another budget: give another --work"):
        script.check_settings(flags, [])
    flags.data.write_text("path,label,split\na.jpg,hat,train\n")
    with pytest.raises(InputError, match="settings1.json has another rows, budget: give"):
        script.check_settings(flags, [])
    (flags.workdir / "small").mkdir()
    flags.data = flags.data.rename(flags.workdir / "small" / "photos.csv")
    with pytest.raises(InputError, match="settings1.json has another data, rows, budget: give"):
        script.check_settings(flags, [])
    flags.fold = 0
    script.check_settings(flags, [])
    flags.data = flags.workdir / "absent.csv"
    with pytest.raises(InputError, match="absent.csv cannot be read"):
        script.check_settings(flags, [])
