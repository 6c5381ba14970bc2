"""LookBench: its metrics beside loops, its files as they are written here, what is refused."""

import importlib
import json
import math
import shutil

import cv2
import numpy as np
import pytest
from test_rerank import plain_search

from cbam_jax import InputError, lookbench
from cbam_jax.datasets.lookbench import SUBSETS, Known, find_parts, read_known, words
from cbam_jax.embedder import Embedded
from cbam_jax.lookbench import KS, evaluate, format_report, grade, measure

WORDS = ("red", "blue", "long", "short", "v-neck", "striped", "denim")


@pytest.fixture(autouse=True)
def slow_search(monkeypatch):
    monkeypatch.setattr(lookbench, "search", plain_search)


def made_known(rng, count):
    """Photos with up to four attributes, some with none."""
    main = rng.choice(WORDS[:3], count)
    attributes = [
        frozenset({main[i], *rng.choice(WORDS, rng.integers(0, 4))}) if i % 9 else frozenset()
        for i in range(count)
    ]
    items = rng.integers(0, count, count).astype(str)
    return Known(
        list(rng.choice(["coat", "dress", "hat"], count)), list(main), attributes, list(items)
    )


def expected(query, gallery, index, k):
    """Each metric of each query, in float64, by loops over what was found."""
    n = len(gallery.category)

    def worth(q, g):
        if not 0 <= g < n:
            return dict.fromkeys(("coarse", "fine", "main", "item", "share"), 0.0)
        same = query.category[q] == gallery.category[g]
        asked = query.attributes[q]
        share = len(asked & gallery.attributes[g]) / len(asked) if asked else 1.0
        return {
            "coarse": float(same),
            "fine": float(same and asked <= gallery.attributes[g]),
            "main": float(same and query.main[q] == gallery.main[g]),
            "item": float(query.item[q] == gallery.item[g]),
            "share": share if same else 0.0,
        }

    def dcg(grades):
        return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades[:k]))

    rows = []
    for q in range(len(query.category)):
        found = [worth(q, g) for g in index[q, :k]]
        every = [worth(q, g) for g in range(n)]
        row = {f"{name}_recall@{k}": max(w[name] for w in found)
               for name in ("coarse", "fine", "main", "item")}  # fmt: skip
        for metric, name in (("ndcg", "share"), ("main_ndcg", "main")):
            best = dcg(sorted((w[name] for w in every), reverse=True))
            row[f"{metric}@{k}"] = dcg([w[name] for w in found]) / best if best else 0.0
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_metrics_are_those_of_loops(rng):
    query, gallery = made_known(rng, 40), made_known(rng, 70)
    index = np.array([rng.permutation(90)[:20] for _ in range(40)])  # 70 to 89 are distractors.
    index[7, 3:] = -1
    found = measure(index, grade(query, gallery))
    for k in KS:
        for name, values in expected(query, gallery, index, k).items():
            np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)
    assert set(found) == {f"{name}@{k}" for name in lookbench.METRICS for k in KS}
    assert 0 < found["fine_recall@5"].mean() < found["main_recall@5"].mean()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Red, long; V-Neck ", {"red", "long", "v-neck"}),
        ('["Red", "long"]', {"red", "long"}),
        ("[Red, long]", {"[red", "long]"}),
        ({"neck": "V", "length": None}, {"neck: v"}),
        (["", None, " Red"], {"red"}),
        (3, {"3"}),
        ("", set()),
    ],
)
def test_attributes_in_whatever_form(value, expected):
    assert words(value) == expected


class MeanEmbedder:
    """As `cbam_jax.Embedder`: the means of 2 x 2 parts; what is no image fails."""

    def embed_files(self, files, *, progress):
        rows, failed = [], []
        for row, file in enumerate(files):
            image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                failed.append((f"image {row}", "it is no image"))
                image = np.full((2, 2, 3), np.nan)
            rows.append(cv2.resize(image.astype(np.float32), (2, 2)).ravel())
        return Embedded(np.array(rows, np.float32), failed)


def photo(rng):
    return cv2.imencode(".png", rng.integers(0, 256, (2, 2, 3), np.uint8))[1].tobytes()


def write(path, images, known=None, bare=False):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": images if bare else [{"bytes": i, "path": "x.jpg"} for i in images]}
    if known is not None:
        columns |= {
            "category": [name.title() for name in known.category],
            "main_attribute": known.main,
            "other_attributes": [sorted(words) for words in known.attributes],
            "item_ID": known.item,
            "difficulty": ["hard"] * len(images),
        }
    parquet.write_table(pa.table(columns), path, row_group_size=7)


@pytest.fixture
def copy(rng, tmp_path):
    """A version with two subsets; what is known, and all photos, of each split."""
    version, known, images = tmp_path / "v20251201", {}, {}
    for subset in SUBSETS[:2]:
        for split, count in (("query", 9), ("gallery", 23)):
            part = made_known(rng, count)
            # The main attribute is one of the attributes of whoever has any.
            known[subset, split] = part._replace(
                attributes=[
                    words | {main} for words, main in zip(part.attributes, part.main, strict=True)
                ]
            )
            images[subset, split] = [photo(rng) for _ in range(count)]
            path = version / subset / f"{split}.parquet"
            write(path, images[subset, split], known[subset, split])
    images["noise"] = [photo(rng) for _ in range(12)]
    write(version / "noise" / "gallery-00000-of-00002.parquet", images["noise"][:5])
    write(version / "noise" / "gallery-00001-of-00002.parquet", images["noise"][5:], bare=True)
    return version, known, images


def test_a_model_is_measured_on_files(copy, tmp_path, monkeypatch, capsys):
    version, known, images = copy
    report = evaluate(MeanEmbedder(), version.parent, SUBSETS[:2])
    rows = []
    for subset in SUBSETS[:2]:
        query, gallery, noise = (
            MeanEmbedder().embed_files(images[part], progress=False).embeddings.astype(float)
            for part in ((subset, "query"), (subset, "gallery"), "noise")
        )
        among = np.concatenate([gallery, noise])
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (query, among))
        index = np.argsort(-(x @ y.T), axis=1, kind="stable")
        rows.append(expected(known[subset, "query"], known[subset, "gallery"], index, 5))
        for name, values in rows[-1].items():
            assert report[subset]["metrics"][name] == pytest.approx(values.mean(), abs=1e-6)
        assert [report[subset][n] for n in ("queries", "gallery", "noise")] == [9, 23, 12]
    together = np.concatenate([row["ndcg@5"] for row in rows])
    assert report["overall"]["metrics"]["ndcg@5"] == pytest.approx(together.mean(), abs=1e-6)
    low, high = report["overall"]["interval"]["ndcg@5"]
    assert low < together.mean() < high
    text = format_report(report)
    assert f"{100 * together.mean():.2f}" in text
    assert "fine_recall@K: one of the first K is of its category and has all" in text
    # The command; without distractors more is found.
    monkeypatch.setattr(lookbench, "load", lambda source: MeanEmbedder())
    assert lookbench.main([str(version), "--model=m", f"--subsets={SUBSETS[0]}", "--no-noise",
                           f"--json={tmp_path}/report.json"]) == 0  # fmt: skip
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["model"] == "m"
    assert written[SUBSETS[0]]["noise"] == 0
    plain, noisy = (r[SUBSETS[0]]["metrics"]["coarse_recall@1"] for r in (written, report))
    assert plain >= noisy
    assert f"{100 * plain:.2f}" in capsys.readouterr().out


def change(version, rng, what):
    path = version / SUBSETS[0] / "gallery.parquet"
    if what == "gone":
        path.unlink()
    elif what == "text":
        path.write_text("<html>401</html>")
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "column":
        write(path, [photo(rng)] * 3)
    elif what in ("broken", "html", "none"):
        bad = {"broken": b"GIF89a no more", "html": b"<html>404", "none": None}[what]
        write(path, [photo(rng)] * 9 + [bad], made_known(rng, 10))
    elif what == "versions":
        (version.parent / "v20260601" / SUBSETS[0]).mkdir(parents=True)
    elif what == "empty":
        write(path, [], made_known(rng, 0))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "gone",
            r"real_studio_flat/gallery.parquet is missing; fetch one with `hf download srpone",
        ),
        ("text", r"gallery.parquet cannot be read as parquet \(.*; fetch one with"),
        ("cut", r"gallery.parquet cannot be read as parquet"),
        (
            "column",
            r"has no column category, main_attribute, other_attributes, item_ID, only image",
        ),
        ("broken", r"gallery.parquet: row 9: the photo cannot be read \(it is no image\)"),
        ("html", r"gallery.parquet: row 9 is no image; fetch one with"),
        ("none", r"gallery.parquet: row 9 has no image"),
        ("versions", r"has the versions v20251201, v20260601: give the folder of one"),
        ("empty", r"gallery.parquet has no photo"),
    ],
)
def test_a_copy_that_is_none_is_told_in_a_line(copy, rng, what, message):
    version = copy[0]
    change(version, rng, what)
    embedder = MeanEmbedder() if what in ("broken", "empty") else None  # Others: before it begins.
    with pytest.raises(InputError, match=message) as raised:
        evaluate(embedder, version.parent, SUBSETS[:1])
    assert "\n" not in str(raised.value)


def test_a_subset_that_is_named_twice_counts_once(copy):
    folder = copy[0].parent
    once, twice = (evaluate(MeanEmbedder(), folder, SUBSETS[1:2] * n) for n in (1, 2))
    assert once == twice


def test_one_subset_is_found_where_the_others_were_not_fetched(copy):
    version = copy[0]
    shutil.rmtree(version / SUBSETS[0])
    assert find_parts(version.parent, SUBSETS[1]) == find_parts(version, SUBSETS[1])


def test_items_are_the_same_by_their_id_in_whatever_type_and_none_is_no_item(copy):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    read = []
    for ids in ([7, 8, None], [7.0, None, float("nan")], ["7", "7.5", "x"], [7.5, 7.0, 8.0]):
        path = copy[0] / "ids.parquet"
        columns = {name: ["a"] * 3 for name in ("category", "main_attribute", "other_attributes")}
        parquet.write_table(pa.table(columns | {"item_ID": ids}), path)
        read.append(read_known([path]))
    assert [known.item for known in read] == [
        ["7", "8", ""], ["7", "", ""], ["7", "7.5", "x"], ["7.5", "7", "8"],
    ]  # fmt: skip
    assert grade(read[0], read[1])["item"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("file", "message"),
    [("nowhere/found.json", "there is no folder .*nowhere; make it"), ("", "is a folder: give")],
)
def test_where_nothing_can_be_written_is_told_before_a_model_is_loaded(
    copy, monkeypatch, file, message
):
    monkeypatch.setattr(lookbench, "load", None)
    version = copy[0]
    with pytest.raises(InputError, match=message):
        lookbench.main([str(version), "--model=m", f"--subsets={SUBSETS[0]}, {SUBSETS[1]}",
                        f"--json={version / file}"])  # fmt: skip


def test_what_is_no_copy_or_no_subset_is_told(tmp_path):
    with pytest.raises(InputError, match="--subsets has 'noise': give some of real_studio_flat,"):
        find_parts(tmp_path, "noise")
    with pytest.raises(InputError, match=r"\(empty\): there is no version of LookBench; fetch"):
        find_parts(tmp_path, SUBSETS[0])
    with pytest.raises(InputError, match="nowhere is no folder"):
        find_parts(tmp_path / "nowhere", SUBSETS[0])


def test_what_reads_parquet_is_asked_for(tmp_path, monkeypatch):
    for split in ("query", "gallery"):
        (tmp_path / SUBSETS[0]).mkdir(exist_ok=True)
        (tmp_path / SUBSETS[0] / f"{split}.parquet").touch()
    find = importlib.import_module

    def absent(name):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return find(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'cbam_jax\[lookbench\]'"):
        find_parts(tmp_path, SUBSETS[0], noise=False)
