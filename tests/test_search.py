import numpy as np
import pytest

from cbam_jax.search import search


def brute_force(queries, gallery, k, ignored=None):
    """Distances and indices by loops in float64, ties by gallery index."""
    distances = np.full((len(queries), k), np.inf)
    indices = np.full((len(queries), k), -1)
    for i, query in enumerate(np.asarray(queries, np.float64)):
        to = np.sqrt(np.sum((np.asarray(gallery, np.float64) - query) ** 2, axis=1))
        left = [j for j in range(len(gallery)) if ignored is None or not ignored[i, j]]
        ranked = sorted(left, key=lambda j, to=to: (to[j], j))[:k]
        distances[i, : len(ranked)], indices[i, : len(ranked)] = to[ranked], ranked
    return distances, indices


@pytest.mark.parametrize("blocks", [(1024, 8192), (4, 7), (1, 1)])
def test_matches_float64(rng, blocks):
    queries = rng.normal(size=(11, 9)).astype(np.float32)
    gallery = rng.normal(size=(31, 9)).astype(np.float32)
    gallery[[4, 20]] = gallery[9]
    queries[3] = gallery[20]
    found = search(queries, gallery, 6, query_block=blocks[0], gallery_block=blocks[1])
    expected = brute_force(queries, gallery, 6)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1][3, :3].tolist() == [4, 9, 20]
    assert found[0][3, :3].tolist() == [0.0, 0.0, 0.0]


def test_masks_and_ragged_rows(rng):
    gallery = rng.normal(size=(20, 5)).astype(np.float32)
    own = rng.permutation(20)[:8]
    query_group, gallery_group = rng.integers(0, 2, 8), rng.integers(0, 2, 20)
    ignored = query_group[:, None] == gallery_group[None, :]
    ignored |= own[:, None] == np.arange(20)[None, :]
    distances, indices = search(
        gallery[own],
        gallery,
        15,
        exclude_self=own,
        query_group=query_group,
        gallery_group=gallery_group,
        gallery_block=6,
    )
    expected = brute_force(gallery[own], gallery, 15, ignored)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-5)
    assert (indices == -1).any()


def test_wrong_arguments_are_named(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="k is 5, but the gallery has 4"):
        search(x, x, 5)
    with pytest.raises(ValueError, match="queries are 2 wide, the gallery 3"):
        search(x[:, :2], x, 1)
    with pytest.raises(ValueError, match="int64"):
        search(x.astype(np.int64), x, 1)
    with pytest.raises(ValueError, match="pass the gallery index"):
        search(x[:2], x, 1, exclude_self=True)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match="gallery have NaN or infinity in 1 rows, first in 2"):
        search(x[:1], x, 1)
