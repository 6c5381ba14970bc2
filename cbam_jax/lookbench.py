"""A model measured on LookBench: ``cbam-jax lookbench FOLDER --model=MODEL``.

`datasets.lookbench` reads a copy of it, `measure` has its metrics as functions of arrays, and
`evaluate` embeds, searches and measures. What the benchmark publishes and what its paper says are
not one definition; here each has a name, see `METRICS`.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from cbam_jax import InputError, command_line
from cbam_jax.datasets import lookbench as files
from cbam_jax.datasets.lookbench import SUBSETS, Known
from cbam_jax.embedder import Embedder, load
from cbam_jax.metrics import bootstrap_interval, ndcg
from cbam_jax.progress import progress
from cbam_jax.search import search

KS = (1, 5, 10, 20)
# Each metric at K, and what counts. Of all queries: one that nothing is relevant to counts as 0.
METRICS: Mapping[str, str] = {
    "coarse_recall": "one of the first K is of the query's category",
    "fine_recall": "one of the first K is of its category and has all of its attributes",
    "main_recall": "one of the first K is of its category and has its main attribute",
    "item_recall": "one of the first K is the same item",
    "ndcg": "nDCG, linear gain; the grade is the share of the query's attributes that a photo of "
    "its category has",
    "main_ndcg": "nDCG; relevant is what main_recall counts",
}
_TABLE = ("coarse_recall@1", "fine_recall@1", "main_recall@1", "item_recall@1", "ndcg@5",
          "main_ndcg@5")  # fmt: skip


def grade(query: Known, gallery: Known) -> dict[str, np.ndarray]:
    """What each photo of a gallery is worth to each query, [q, n] float32, by five names.

    ``coarse``, ``main`` and ``item`` are 0 or 1; ``share`` is that of the query's attributes which
    a photo of its category has, ``fine`` whether it has them all. A query without attributes asks
    for its category alone; one whose item is not known is of no item.

    Example:
        >>> one = Known(["coat"], ["red"], [frozenset({"red", "long"})], ["7"])
        >>> two = Known(["coat", "hat"], ["red"] * 2, [frozenset({"red"})] * 2, ["7", "8"])
        >>> {name: value[0].tolist() for name, value in grade(one, two).items() if name != "item"}
        {'coarse': [1.0, 0.0], 'main': [1.0, 0.0], 'fine': [0.0, 0.0], 'share': [0.5, 0.0]}
    """
    coarse: np.ndarray = _equal(query.category, gallery.category)
    main = coarse * _equal(query.main, gallery.main)
    asked = np.array([[len(attributes)] for attributes in query.attributes], np.float32)
    share = _shared(query.attributes, gallery.attributes) / np.maximum(asked, 1)
    share = coarse * np.where(asked > 0, share, np.float32(1))
    item = _equal(query.item, gallery.item) * (np.array(query.item) != "")[:, None]
    fine = (share == 1).astype(np.float32)
    return {"coarse": coarse, "main": main, "fine": fine, "share": share, "item": item}


def measure(
    index: np.ndarray, grades: Mapping[str, np.ndarray], ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """Each metric of `METRICS` at each K, of each query, [q] float64.

    Args:
        index: [q, k] int, what was found, nearest first, with k at least the largest K: photos of
            the gallery from 0, distractors after them.
        grades: of `grade`.
        ks: the K.
    """
    found = {name: _taken(values, index) for name, values in grades.items()}
    values = {}
    for name in ("coarse", "fine", "main", "item"):
        for k in ks:
            values[f"{name}_recall@{k}"] = found[name][:, :k].max(axis=1).astype(np.float64)
    for metric, name in (("ndcg", "share"), ("main_ndcg", "main")):
        best = -np.sort(-grades[name], axis=1)[:, : max(ks)]
        for k in ks:
            values[f"{metric}@{k}"] = np.nan_to_num(ndcg(found[name], best, k))
    return values


def _equal(query: Sequence[str], gallery: Sequence[str]) -> np.ndarray:
    return (np.array(query)[:, None] == np.array(gallery)).astype(np.float32)


def _shared(query: Sequence[frozenset[str]], gallery: Sequence[frozenset[str]]) -> np.ndarray:
    """How many attributes each two have in common, [q, n] float32."""
    number = {word: i for i, word in enumerate(sorted(set().union(*query)))}
    rows = [_incidence(sets, number) for sets in (query, gallery)]
    return np.asarray((rows[0] @ rows[1].T).todense(), np.float32)


def _incidence(sets: Sequence[frozenset[str]], number: Mapping[str, int]) -> sparse.csr_array:
    columns = [[number[word] for word in words if word in number] for words in sets]
    ends = np.cumsum([0, *map(len, columns)])
    column = np.array([c for row in columns for c in row], np.int64)
    shape = len(sets), len(number)
    return sparse.csr_array((np.ones(len(column), np.float32), column, ends), shape=shape)


def _taken(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The grades of what was found, [q, k]; that of a distractor, or of nothing, is 0."""
    known = (index >= 0) & (index < values.shape[1])
    return np.take_along_axis(values, np.where(known, index, 0), axis=1) * known


def evaluate(
    embedder: Embedder,
    folder: str | Path,
    subsets: Sequence[str] = SUBSETS,
    *,
    noise: bool = True,
) -> dict[str, Any]:
    """Measure a model on subsets of a copy of LookBench.

    Args:
        embedder: of `cbam_jax.load`.
        folder: of the copy.
        subsets: of `SUBSETS`; one that is named twice counts once.
        noise: whether the distractors are searched as well, as the published numbers have them.

    Returns:
        A report: of each subset, and ``overall`` of all their queries, the counts, each metric's
        mean over queries, and its 95 % bootstrap interval.

    Raises:
        InputError: before anything is embedded, for a copy that is none, or what is no image;
            later, for one that is damaged.
    """
    subsets = list(dict.fromkeys(subsets))
    parts = [files.find_parts(folder, subset, noise=noise) for subset in subsets]
    own_files = [paths for part in parts for paths in (part.query, part.gallery)]
    for paths in (*own_files, parts[0].noise):
        files.check_images(paths)
    known = [(files.read_known(part.query), files.read_known(part.gallery)) for part in parts]
    own = [_both(embedder, *pair) for pair in zip(subsets, parts, strict=True)]
    others = _embedded(embedder, parts[0].noise, "noise") if noise else own[0][1][:0]
    values, report = [], {}
    for subset, pair, (query, gallery) in zip(subsets, known, own, strict=True):
        grades = grade(*pair)
        values.append(measure(_found(query, np.concatenate([gallery, others])), grades))
        lacking = int((grades["fine"].max(axis=1) == 0).sum())
        counts = {"queries": len(query), "gallery": len(gallery), "noise": len(others)}
        report[subset] = {**counts, "without_fine": lacking, **_summary(values[-1])}
    return {"definitions": METRICS, **report, "overall": _overall(report, values)}


def _overall(
    report: Mapping[str, Mapping[str, Any]], values: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """The counts and the metrics of the queries of all subsets together."""
    counts = {name: sum(report[s][name] for s in report) for name in ("queries", "without_fine")}
    together = {name: np.concatenate([value[name] for value in values]) for name in values[0]}
    return {**counts, **_summary(together)}


def _both(embedder: Embedder, subset: str, part: files.Parts) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a subset's queries and of its gallery."""
    queries = _embedded(embedder, part.query, f"{subset} queries")
    return queries, _embedded(embedder, part.gallery, subset)


def _embedded(embedder: Embedder, paths: Sequence[Path], name: str) -> np.ndarray:
    """The embeddings of the photos of some files, [n, d]."""
    total, rows = files.count_photos(list(paths)), []
    batches = files.read_images(list(paths))
    for batch in progress(batches, f"embedding {name}", total=total, size=len):
        made = embedder.embed_files(batch, progress=False)
        if made.failed:
            (row,) = np.flatnonzero(~made.readable)[:1]
            where = files.name_of(list(paths), sum(map(len, rows)) + int(row))
            reason = made.failed[0][1]
            raise InputError(f"{where}: the photo cannot be read ({reason}); fetch the file again")
        rows.append(made.embeddings)
    if not rows:
        raise InputError(f"{paths[0]} has no photo: fetch the file again")
    return np.concatenate(rows)


def _found(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The nearest by cosine, [q, K] for the largest K; -1 where a small gallery has no K photos."""
    k = min(max(KS), len(gallery))
    _, index = search(query, gallery, k, metric="cosine")
    return np.pad(index, ((0, 0), (0, max(KS) - k)), constant_values=-1)


def _summary(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "metrics": {name: float(value.mean()) for name, value in values.items()},
        "interval": {name: bootstrap_interval(values[name]) for name in _TABLE},
        "confidence": 0.95,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table, in percent, with the definitions below."""
    subsets = [name for name in report if name != "definitions"]
    lines = [" ".join([f"{'':18}{'queries':>8}", *(f"{name:>15}" for name in _TABLE)])]
    for subset in subsets:
        row = report[subset]
        cells = [f"{100 * row['metrics'][name]:>15.2f}" for name in _TABLE]
        lines.append(" ".join([f"{subset:18}{row['queries']:>8}", *cells]))
    overall = report["overall"]
    low_high = [overall["interval"][name] for name in _TABLE]
    cells = [f"{f'{100 * low:.2f} to {100 * high:.2f}':>15}" for low, high in low_high]
    lines.append(" ".join([f"{'95 % interval':26}", *cells]))
    lines += ["", *(f"{name}@K: {told}" for name, told in METRICS.items())]
    lines.append(
        f"percent of all queries; nothing is relevant to {overall['without_fine']} of them by "
        "fine_recall, and they count as 0"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    options = command_line.parsed(_parser(), argv)
    subsets = [name.strip() for name in command_line.listed([], options.subsets)] or [""]
    for subset in subsets:  # Before a model is loaded.
        files.find_parts(options.folder, subset, noise=not options.no_noise)
    if options.json:
        _check_writable(options.json)
    command_line.keep_compiled_programs()
    report = evaluate(load(options.model), options.folder, subsets, noise=not options.no_noise)
    print(format_report(report))  # First: should the disk be full, it is not lost.
    if options.json:
        command_line.write_json(options.json, {"model": options.model, **report})
    return 0


def _check_writable(path: Path) -> None:
    """InputError where a file cannot be written: before hours of embedding, not after."""
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"--json={path} is a folder: give a file")
    if not folder.is_dir():
        raise InputError(f"--json={path}: there is no folder {folder}; make it, or give another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--json={path}: {folder} may not be written to; give another folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=None if sys.argv[0].startswith("cbam-jax") else "python -m cbam_jax.lookbench",
        description="Measure a model on a copy of LookBench.",
    )
    parser.add_argument("folder", help="of the copy, with query.parquet and gallery.parquet below")
    parser.add_argument("--model", required=True, help="a run, a folder, a hub id or a backbone")
    parser.add_argument(
        "--subsets", default=",".join(SUBSETS), help="some of them, parted by commas; default: all"
    )
    parser.add_argument(
        "--no-noise", action="store_true", help="without the distractors: not as it is published"
    )
    parser.add_argument("--json", type=command_line.path, metavar="FILE", help="also write it here")
    return parser


if __name__ == "__main__":
    sys.exit(command_line.run(main))
