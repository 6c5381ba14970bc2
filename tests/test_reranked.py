"""`evaluate.py --rerank`: what is parsed, and what is gained, against loops."""

import numpy as np
import pytest
from test_rerank import clusters, dense_k_reciprocal, plain_search, unit

from cbam_jax import InputError, reranked
from cbam_jax.evaluation import Evaluation, make_protocol
from cbam_jax.metrics import bootstrap_interval
from cbam_jax.rerank_steps import parse_steps
from cbam_jax.reranked import measure, transductive

KS = (1, 4)


@pytest.fixture
def data(rng, monkeypatch):
    for room in ("rerank.encodings", "rerank.expansion", "reranked"):
        monkeypatch.setattr(f"cbam_jax.{room}.search", plain_search)
    return clusters(rng, 60, 6), rng.integers(0, 5, 60)


def plain(embeddings, label, protocol):
    distance, index = plain_search(
        embeddings[protocol.query], embeddings[protocol.gallery], max(KS), exclude_self=protocol.own
    )
    match = label[protocol.gallery][index] == label[protocol.query][:, None]
    return Evaluation({}, protocol.query, protocol.gallery[index], distance, match, np.zeros(0))


def test_k_reciprocal_and_its_gain(data):
    embeddings, label = data
    is_query = np.arange(60) % 3 == 0
    protocol = make_protocol(is_query, ~is_query, ks=KS)
    result = plain(embeddings, label, protocol)
    steps = parse_steps("k_reciprocal:k1=7:k2=3")
    report, found = measure(embeddings, label, protocol, result, steps, ks=KS)
    joint = np.concatenate([embeddings[is_query], embeddings[~is_query]])
    dense = dense_k_reciprocal(joint, 7, 3, 0.3)[:20, 20:]
    order = np.argsort(dense.astype(np.float32), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.neighbour, np.flatnonzero(~is_query)[order])
    hits = label[found.neighbour] == label[is_query][:, None]
    gain = hits.mean(axis=1) - result.match.mean(axis=1)
    assert report["metrics"]["precision@4"] == pytest.approx(hits.mean())
    assert report["plain"]["precision@4"] == pytest.approx(result.match.mean())
    assert report["gain"]["precision@4"] == pytest.approx(bootstrap_interval(gain))
    assert report["transductive"] is True
    text = reranked.format_report(report)
    assert "transductive: other queries were used" in text
    assert f"{hits.mean() - result.match.mean():+.4f}" in text


def test_steps_follow_each_other_and_whitening_is_fitted_on_the_training_split(data, rng):
    embeddings, _ = data
    is_query = np.arange(60) % 3 == 0
    protocol = make_protocol(is_query, ~is_query, ks=KS)
    train = clusters(rng, 90, 6) @ np.diag([5, 4, 3, 2, 1, 0.5]).astype(np.float32)
    steps = parse_steps("whiten:dim=3,dba:k=4,aqe:k=5:alpha=2")
    distance, index = reranked.rank(embeddings, protocol, steps, 4, train)
    centred = train - train.mean(axis=0, dtype=float)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    turn = axes[:3].T / scale[:3]
    x = unit((embeddings - train.mean(axis=0, dtype=float)) @ turn)

    def expand(one, among, k, alpha):
        first = np.argsort(-(among @ one))[:k]
        return unit(one + np.maximum(among[first] @ one, 0) ** alpha @ among[first])

    gallery = x[~is_query]
    gallery = np.stack(
        [expand(gallery[i], np.delete(gallery, i, axis=0), 4, 3) for i in range(len(gallery))]
    )
    query = np.stack([expand(one, gallery, 5, 2) for one in x[is_query]])
    expected = np.linalg.norm(query[:, None] - gallery[None], axis=-1)
    np.testing.assert_array_equal(index, np.argsort(expected, axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(expected, axis=1)[:, :4], atol=1e-5)


def test_who_used_other_queries():
    both = np.ones(9, bool)
    apart = make_protocol(np.arange(9) < 2, np.arange(9) >= 2, ks=(1,))
    within = make_protocol(both, both, ks=(1,))
    told = {
        text: [transductive(parse_steps(text), protocol) for protocol in (apart, within)]
        for text in ("whiten", "aqe", "whiten,dba", "k_reciprocal", "aqe,k_reciprocal")
    }
    assert told == {
        "whiten": [False, False],
        "aqe": [False, True],
        "whiten,dba": [False, True],
        "k_reciprocal": [True, True],
        "aqe,k_reciprocal": [True, True],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qe", "--rerank=qe: 'qe' is no step; give whiten, dba, aqe, k_reciprocal, such as"),
        ("aqe:k1=3", "--rerank=aqe:k1=3: aqe has k, alpha, no 'k1'"),
        ("aqe:k=2.5", "k=2.5 is no whole number"),
        ("aqe:alpha=nan", "alpha=nan is not finite"),
        ("aqe:k=99999999999999999999", "k=99999999999999999999 is not finite, or too large"),
        ("aqe:k=0", "k and k1 from 1"),
        ("k_reciprocal,aqe", "k_reciprocal ranks, so it comes last"),
        ("k_reciprocal:k2=30", "k2 is from 1 to k1"),
        ("whiten:power=1", "power is from 0"),
        ("", "'' is no step"),
    ],
)
def test_wrong_steps_get_one_line(text, message):
    with pytest.raises(InputError, match=message) as told:
        parse_steps(text)
    assert "\n" not in f"{told.value}"


def test_too_few_images_and_axes(data, rng):
    with pytest.raises(InputError, match="--rerank=aqe:k=60:alpha=3: there are 59 images"):
        reranked.check_fits(parse_steps("aqe:k=60"), 59)
    embeddings, _ = data
    protocol = make_protocol(np.ones(60, bool), np.ones(60, bool), ks=KS)
    with pytest.raises(InputError, match="of the training split: dim is 4, but 3 embeddings"):
        reranked.rank(embeddings, protocol, parse_steps("whiten:dim=4"), 4, embeddings[:3])
