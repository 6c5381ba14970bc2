"""Losses under one protocol, on embeddings of an encoder that does not change.

That of Musgrave, Belongie and Lim 2020, "A Metric Learning Reality Check": classes of the test are
never trained on; the others are parted by class into folds, each the validation of a map trained on
the rest. Every loss has the same number of trials, its learning rate and options drawn at random
(they: by Bayesian optimisation), chosen by the mean MAP@R of the folds alone. Then each seed trains
a map a fold, and the mean of their MAP@R on the test classes is one measurement; intervals are over
seeds. What it says of a linear map on frozen features need not hold for a network that is trained.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import InputError
from cbam_jax.command_line import write_json, write_text
from cbam_jax.foreign_files import read_arrays, read_json, shown
from cbam_jax.linear_heads import LOSSES, embed, initial_head, train_head
from cbam_jax.metrics import count_relevant, label_matches, retrieval_metrics, t_interval
from cbam_jax.rerank import unit_rows
from cbam_jax.search import search

MEASURED = ("map@R", "precision@1", "r_precision")


class Protocol(NamedTuple):
    """Numbers that all losses share: how classes are parted, and the budget."""

    folds: int = 4
    test_classes: int = 0  # 0: half, rounded down.
    trials: int = 8
    seeds: int = 3
    steps: int = 200
    lowest_rate: float = 1e-4  # Learning rates are drawn between these two.
    highest_rate: float = 1e-1
    batch_classes: int = 8
    batch_images: int = 8
    dim: int = 128


class Split(NamedTuple):
    """Rows of the test classes, and of each fold, whose classes no other has."""

    test: np.ndarray
    folds: list[np.ndarray]


def compare(
    embeddings: Path, workdir: Path, names: Sequence[str], protocol: Protocol
) -> dict[str, Any]:
    """Tune, train and measure every loss as far as that is not done; write and return the table.

    Args:
        embeddings: an ``embeddings.npz`` of ``evaluate.py``: arrays ``embedding`` and ``label``.
        workdir: gets ``NAME.json`` a loss, and ``compare.json`` and ``compare.md``.
        names: of `cbam_jax.linear_heads.LOSSES`.
        protocol: what all share.

    Raises:
        InputError: for an unknown loss, a file that is none, too few classes, or a workdir of
            another protocol.
    """
    check_names(names)
    features, labels = read_embeddings(embeddings)
    if protocol.dim > features.shape[1]:  # Axes are orthogonal: there are no more of them.
        raise InputError(
            f"--dim={protocol.dim}: --embeddings={embeddings} has {features.shape[1]} numbers an "
            f"image, and a map has no more; give --dim={features.shape[1]} or less"
        )
    split = split_classes(labels, protocol)
    workdir.mkdir(parents=True, exist_ok=True)
    settings = {**protocol._asdict(), "images": len(labels), "width": features.shape[1]}
    settings["data"] = fingerprint(features, labels)
    rows = [_baseline(features, labels, split, protocol)]
    for name in dict.fromkeys(names):
        kept = read_kept(workdir / f"{name}.json", settings)
        rows.append(_finished(features, labels, split, name, protocol, kept, workdir))
    table = {"settings": settings, "measured": MEASURED, "rows": [_summary(row) for row in rows]}
    write_json(workdir / "compare.json", table)
    write_text(workdir / "compare.md", markdown(table))
    return table


def check_names(names: Sequence[str]) -> None:
    """InputError for a loss that cannot be compared."""
    for name in names:
        if name not in LOSSES:
            raise InputError(f"--losses has {name!r}: give some of {','.join(LOSSES)}")


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] of unit length and labels [n]; InputError where the file has none."""
    try:
        file = read_arrays(path)
        x, labels = file["embedding"], file["label"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--embeddings={shown(path)} is no embeddings.npz of evaluate.py "
            f"({shown(str(error))}): make one, such as by evaluate.py --workdir=RUN --split=all "
            "--checkpoint=untrained"
        ) from error
    x = x.astype(np.float32) if x.dtype.kind == "f" else np.full(1, np.nan)
    if x.ndim != 2 or labels.shape != x.shape[:1] or not np.isfinite(x).all():
        raise InputError(f"--embeddings={path}: expected finite embeddings [n, d] and labels [n]")
    return unit_rows(x), labels


def fingerprint(features: np.ndarray, labels: np.ndarray) -> str:
    """What tells embeddings of the same photos by another model from these."""
    digest = hashlib.sha256(np.ascontiguousarray(features).tobytes())
    digest.update(np.unique(labels, return_inverse=True)[1].astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def split_classes(labels: np.ndarray, protocol: Protocol) -> Split:
    """The last classes are the test's, the others dealt to the folds; InputError for too few.

    >>> split = split_classes(np.array([0, 1, 2, 3, 4, 5, 0, 1, 5]), Protocol(2, 2))
    >>> split.test.tolist(), [fold.tolist() for fold in split.folds]
    ([4, 5, 8], [[0, 2, 6], [1, 3, 7]])
    """
    classes = np.unique(labels)
    count = protocol.test_classes or len(classes) // 2
    known = classes[: len(classes) - count]
    folds = [known[i :: protocol.folds] for i in range(protocol.folds)]
    if protocol.folds < 2 or count < 2 or min(map(len, folds)) < 2:
        raise InputError(
            f"{len(classes)} classes, of which {count} for the test, do not give "
            f"--folds={protocol.folds} of two classes or more, in which there is something to "
            "confuse: give fewer --folds (at least 2) or --test_classes (at least 2)"
        )
    rows = [np.flatnonzero(np.isin(labels, some)) for some in (classes[-count:], *folds)]
    for part, of in zip(["the test", *(f"fold {i}" for i in range(len(folds)))], rows, strict=True):
        if len(np.unique(labels[of])) == len(of):
            raise InputError(
                f"no class of {part} has a second image that could be found: give fewer --folds, "
                "other --test_classes, or more images of a class"
            )
    return Split(rows[0], rows[1:])


def read_kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier command found of a loss; InputError where it had another protocol."""
    if not path.exists():
        return {"settings": dict(settings), "trials": [], "seeds": []}
    try:
        kept = read_json(path)
        found, _, _ = kept["settings"], kept["trials"], kept["seeds"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: delete it, and the loss is done again") from error
    if found != settings:
        raise InputError(f"{path} is of other settings or embeddings: give another --workdir")
    return kept


def draw_trial(name: str, number: int, protocol: Protocol) -> tuple[float, dict[str, float]]:
    """Learning rate and options of a trial: of the first the defaults, then log-uniform ones.

    The learning rates are those of every loss.
    """
    if number == 0:
        return 1e-3, {}
    rates = np.log([protocol.lowest_rate, protocol.highest_rate])
    rate = np.random.default_rng([number, 0]).uniform(*rates)
    rng = np.random.default_rng([number, 1])
    options = {
        key: float(np.exp(rng.uniform(*np.log(bounds))))
        for key, bounds in LOSSES[name].options.items()
    }
    return float(np.exp(rate)), options


def _finished(
    features: np.ndarray,
    labels: np.ndarray,
    split: Split,
    name: str,
    protocol: Protocol,
    kept: dict[str, Any],
    workdir: Path,
) -> dict[str, Any]:
    """All trials and seeds of a loss, each written as soon as it is there."""
    for number in range(len(kept["trials"]), protocol.trials):
        rate, options = draw_trial(name, number, protocol)
        heads = _heads(features, labels, split, name, rate, options, protocol, seed=0)
        folds = [
            measure(features[fold], labels[fold], head)
            for fold, head in zip(split.folds, heads, strict=True)
        ]
        trial = {"learning_rate": rate, "options": options, "validation": _mean(folds)}
        kept["trials"].append(trial)
        write_json(workdir / f"{name}.json", kept)
        print(f"{name}: trial {number}, map@R {trial['validation']['map@R']:.4f}", flush=True)
    best = max(kept["trials"], key=lambda trial: trial["validation"]["map@R"])
    for seed in range(len(kept["seeds"]), protocol.seeds):
        given = best["learning_rate"], best["options"]
        heads = _heads(features, labels, split, name, *given, protocol, seed=seed + 1)
        test = [measure(features[split.test], labels[split.test], head) for head in heads]
        kept["seeds"].append(_mean(test))
        write_json(workdir / f"{name}.json", kept)
        print(f"{name}: seed {seed}, test map@R {kept['seeds'][-1]['map@R']:.4f}", flush=True)
    return {"loss": name, "chosen": best, "seeds": kept["seeds"]}


def _heads(
    features: np.ndarray,
    labels: np.ndarray,
    split: Split,
    name: str,
    rate: float,
    options: Mapping[str, float],
    protocol: Protocol,
    *,
    seed: int,
) -> list[np.ndarray]:
    """One map a fold, trained on the other folds."""
    heads = []
    for number in range(len(split.folds)):
        others = [fold for i, fold in enumerate(split.folds) if i != number]
        rows = np.sort(np.concatenate(others))
        batch = protocol.batch_classes, protocol.batch_images
        heads.append(
            train_head(
                features, labels, rows, name, options, learning_rate=rate,
                steps=protocol.steps, batch=batch, dim=protocol.dim, seed=seed,
            )
        )  # fmt: skip
    return heads


def measure(
    features: np.ndarray, labels: np.ndarray, head: np.ndarray | None = None
) -> dict[str, float]:
    """MAP@R, precision at 1 and R-precision of images searched among themselves, leave one out.

    All are 0 of a map that has diverged, so that its trial is not chosen and the others go on.
    """
    if head is not None and not np.isfinite(head).all():
        return dict.fromkeys(MEASURED, 0.0)
    embeddings = features if head is None else embed(features, head)
    relevant = count_relevant(labels, labels, query_in_gallery=True)
    ranks = max(int(relevant.max()), 1)
    _, index = search(embeddings, embeddings, ranks, exclude_self=True)
    metrics = retrieval_metrics(label_matches(index, labels, labels), relevant, ks=(1,))
    return {name: metrics[name] for name in MEASURED}


def _baseline(
    features: np.ndarray, labels: np.ndarray, split: Split, protocol: Protocol
) -> dict[str, Any]:
    """Random orthogonal axes, where every loss begins, as though it were a loss."""
    heads = [initial_head(features.shape[1], protocol.dim, s + 1) for s in range(protocol.seeds)]
    seeds = [measure(features[split.test], labels[split.test], head) for head in heads]
    whole = measure(features[split.test], labels[split.test])
    return {"loss": "before training", "chosen": None, "seeds": seeds, "whole": whole}


def _mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([value[name] for value in values])) for name in MEASURED}


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """Mean over the seeds, and Student's interval of it."""
    of = {name: [seed[name] for seed in row["seeds"]] for name in MEASURED}
    summed = {
        name: {"mean": float(np.mean(values)), "interval": t_interval(values)}
        for name, values in of.items()
    }
    return {**row, "test": summed}


def markdown(table: Mapping[str, Any]) -> str:
    """The table, best first, with what it is."""
    settings, rows = table["settings"], table["rows"]
    whole = rows[0]["whole"]["map@R"]
    ranked = sorted(rows, key=lambda row: -row["test"]["map@R"]["mean"])
    lines = [
        "| loss | MAP@R, test | 95 % interval | precision@1 | R-precision | validation MAP@R |"
        " chosen |",
        "|---|---|---|---|---|---|---|",
        *map(_line, ranked),
    ]
    notes = (
        f"{settings['images']} images; {settings['folds']} folds, {settings['trials']} trials a "
        f"loss, {settings['seeds']} seeds, {settings['steps']} steps, {settings['dim']} numbers. "
        f"The features as they are, {settings['width']} numbers: MAP@R {whole:.4f} on the test."
    )
    return "\n".join([*lines, "", notes, ""])


def _line(row: Mapping[str, Any]) -> str:
    test, chosen = row["test"], row["chosen"]
    low, high = test["map@R"]["interval"]
    told, validation = "", ""
    if chosen is not None:
        options = {"learning rate": chosen["learning_rate"], **chosen["options"]}
        told = ", ".join(f"{name} {value:.2g}" for name, value in options.items())
        validation = f"{chosen['validation']['map@R']:.4f}"
    numbers = [f"{test[name]['mean']:.4f}" for name in ("precision@1", "r_precision")]
    cells = [row["loss"], f"{test['map@R']['mean']:.4f}", f"{low:.4f} to {high:.4f}", *numbers]
    return f"| {' | '.join([*cells, validation, told])} |"
