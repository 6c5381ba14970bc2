"""Answers ranked again, beside dense definitions in float64; nothing is compiled for them."""

import numpy as np
import pytest
from fakes import FakeEmbedder, write_photo
from test_rerank import clusters, dense_k_reciprocal, unit

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.reranking import check_effort, parsed, told


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    for room in ("encodings", "expansion"):
        monkeypatch.setattr(f"cbam_jax.rerank.{room}.search", None)


class Embedder(FakeEmbedder):
    def __init__(self):
        super().__init__()
        self.dimension = 6


def make_shop(path, embeddings, colours):
    names = [f"{i:03}.jpg" for i in range(len(embeddings))]
    with Catalogue.open(path, Embedder()) as shop:
        shop.add_embeddings(names, embeddings, [{"colour": colour} for colour in colours])


@pytest.fixture
def embeddings(rng):
    return unit(clusters(rng, 60, 6)).astype(np.float32)


@pytest.fixture
def shop(embeddings, tmp_path):
    make_shop(tmp_path / "shop.db", embeddings, ["red", "blue"] * 30)
    with Catalogue.open(tmp_path / "shop.db", Embedder()) as shop:
        yield shop


def expanded(query, among, k, alpha):
    """Alpha query expansion of one query [d], in float64."""
    x, among = query.astype(np.float64), among.astype(np.float64)
    first = np.argsort(((among - x) ** 2).sum(-1), kind="stable")[:k]
    cosine = unit(among[first]) @ unit(x)
    return unit(unit(x) + np.maximum(cosine, 0) ** alpha @ unit(among[first]))


def assert_found(found, distances, ids, k):
    """The k first of all by distance, told by their ids."""
    order = np.lexsort((ids, distances.astype(np.float32)))[:k]
    assert [n.id for n in found] == np.array(ids)[order].tolist()
    np.testing.assert_allclose([n.distance for n in found], distances[order], atol=2e-6)


def test_a_query_becomes_the_mean_of_itself_and_its_neighbours(shop, embeddings, rng):
    query = unit(rng.normal(size=6)).astype(np.float32)
    moved = expanded(query, embeddings, 4, 2.0)
    distances = np.linalg.norm(embeddings - moved, axis=1)
    found = shop.find(query, k=9, rerank="aqe:k=4:alpha=2")
    assert_found(found, distances, range(1, 61), 9)
    assert [n.id for n in found] != [n.id for n in shop.find(query, k=9)]
    limit = float(np.sort(distances)[4]) + 1e-4
    assert len(shop.find(query, k=9, rerank="aqe:k=4:alpha=2", max_distance=limit)) == 5


def test_neither_itself_nor_what_may_not_be_found_is_a_neighbour(shop, embeddings):
    shop.remove([2, 9])
    left = [i for i in range(0, 60, 2) if i not in (6, 8)]
    moved = expanded(embeddings[6], embeddings[left], 5, 3.0)
    distances = np.linalg.norm(embeddings[left] - moved, axis=1)
    found = shop.find(7, k=8, where="colour=red", rerank="aqe:k=5")
    assert_found(found, distances, [i + 1 for i in left], 8)
    assert shop.find(7, where="colour=red", rerank="aqe:k=99")  # As many as there are.


def test_embeddings_of_other_lengths_keep_theirs(embeddings, tmp_path):
    make_shop(tmp_path / "long.db", 3 * embeddings, ["red"] * 60)
    with Catalogue.open(tmp_path / "long.db", Embedder()) as long:
        found = long.find(3 * embeddings[0] + 0.1, k=5, rerank="aqe:k=4")
    x = 3 * embeddings[0] + np.float32(0.1)
    moved = expanded(x, 3 * embeddings, 4, 3.0) * np.linalg.norm(x)
    assert_found(found, np.linalg.norm(3 * embeddings - moved, axis=1), range(1, 61), 5)


@pytest.mark.parametrize("size", [2.0**-80, 2.0**40])
def test_however_short_or_long_embeddings_are_the_answer_is_the_same(
    shop, embeddings, tmp_path, size
):
    expected = [n.id for n in shop.find(7, k=9, rerank="aqe:k=4")]
    make_shop(tmp_path / "scaled.db", np.float32(size) * embeddings, ["red"] * 60)
    with Catalogue.open(tmp_path / "scaled.db", Embedder()) as scaled:
        assert [n.id for n in scaled.find(7, k=9, rerank="aqe:k=4")] == expected


@pytest.mark.parametrize("k1", [9, 3])
def test_the_nearest_are_ranked_by_reciprocal_neighbours(shop, embeddings, rng, k1):
    query = (embeddings[5] + 0.2 * rng.normal(size=6)).astype(np.float32)
    wide = np.argsort(np.linalg.norm(embeddings - query, axis=1), kind="stable")[: 10 * k1]
    assert len(wide) == min(10 * k1, 60)
    joint = np.concatenate([query[None], embeddings[wide]])
    dense = dense_k_reciprocal(joint, k1, 2, 0.3)[0, 1:]
    found = shop.find(query, k=9, rerank=f"k_reciprocal:k1={k1}:k2=2")
    # Equal distances come in the order of the plain answer.
    order = np.argsort(np.rint(dense * 2**24), kind="stable")[:9]
    assert [n.id for n in found] == (wide[order] + 1).tolist()
    np.testing.assert_allclose([n.distance for n in found], dense[order], atol=1e-6)
    near = shop.find(query, k=9, rerank=f"k_reciprocal:k1={k1}:k2=2", max_distance=0.9)
    assert near == [n for n in found if n.distance <= 0.9]


def test_steps_follow_each_other_and_queries_are_alone(shop, embeddings):
    steps = "aqe:k=4,k_reciprocal:k1=8:k2=2"
    moved = expanded(embeddings[3], np.delete(embeddings, 3, axis=0), 4, 3.0).astype(np.float32)
    joint = np.concatenate([moved[None], np.delete(embeddings, 3, axis=0)])
    dense = dense_k_reciprocal(joint, 8, 2, 0.3)[0, 1:]
    alone = shop.find(4, k=5, rerank=steps)
    np.testing.assert_allclose([n.distance for n in alone], np.sort(dense)[:5], atol=1e-6)
    together = shop.find_all([[20], [4], [embeddings[50]]], 5, rerank=steps)
    assert together[1] == alone


def test_a_photo_and_its_copies_count_once(tmp_path):
    folder = tmp_path / "photos"
    for seed in range(8):
        write_photo(folder / f"{seed}.png", seed)
    query = folder / "0.png"
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as shop:
        shop.add(folder, progress=False)
        once = {steps: shop.find(query, k=5, rerank=steps) for steps in ("aqe:k=3", "k_reciprocal")}
        for steps, found in once.items():  # What is asked for by its id is left out.
            others = [n.distance for n in found if not n.same]
            assert [n.distance for n in shop.find(1, k=5, rerank=steps)] == others
        (folder / "copy.png").write_bytes(query.read_bytes())
        for copy in range(3):
            (folder / f"near{copy}.png").write_bytes((folder / "3.png").read_bytes())
        shop.add(folder, progress=False)
        for steps, before in once.items():
            found = shop.find(query, k=5, rerank=steps)
            assert [n.distance for n in found] == [n.distance for n in before]
            assert sum(n.same for n in found) == 1
            assert found[0].same or steps.startswith("aqe")
        assert len(shop.find(query, k=5, rerank="k_reciprocal:k1=2:k2=1", copies=True)) == 7


def test_where_nothing_else_is_found_nothing_is_moved(tmp_path):
    make_shop(tmp_path / "one.db", np.eye(2, 6, dtype=np.float32), ["red", "blue"])
    with Catalogue.open(tmp_path / "one.db", Embedder()) as shop:
        assert shop.find(1, where="colour=red", rerank="aqe,k_reciprocal") == []
        (found,) = shop.find(1, rerank="aqe,k_reciprocal:k1=1:k2=1")
    assert found.id == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha_qe", "--rerank=alpha_qe: 'alpha_qe' is no step; give whiten, dba, aqe"),
        ("aqe:k=0", "--rerank=aqe:k=0: aqe needs options from 0 up, k and k1 from 1"),
        ("aqe:k=x", "--rerank=aqe:k=x: k=x is no whole number"),
        ("k_reciprocal,aqe", "k_reciprocal ranks, so it comes last"),
        ("dba,aqe", "--rerank=dba,aqe: dba is for evaluate.py alone, since each photo added"),
        ("whiten", "whiten is for evaluate.py alone, since a catalogue has no training split"),
    ],
)
def test_steps_that_are_none_are_told_before_anything_is_embedded(shop, text, message):
    with pytest.raises(InputError, match=message):
        shop.find("nowhere.jpg", rerank=text)


def test_a_server_takes_no_more_than_it_answers_soon():
    check_effort(None)
    check_effort("aqe:k=50,k_reciprocal:k1=50")
    for text in ("aqe:k=51", "k_reciprocal:k1=51", "aqe,aqe,aqe"):
        with pytest.raises(InputError, match="a server takes two steps, and k and k1 up to 50"):
            check_effort(text)
    assert told(parsed("aqe,k_reciprocal:k1=5")).startswith(
        "re-ranked by aqe:k=10:alpha=3,k_reciprocal:k1=5:k2=6:lambda_=0.3: distances are of k-rec"
    )
