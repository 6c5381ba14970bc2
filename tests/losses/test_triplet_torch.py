"""Against pytorch-metric-learning itself; skipped where it is not installed."""

import numpy as np
import pytest

from cbam_jax.losses import triplet_loss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("mining", ["batch_hard", "batch_all"])
def test_cross_batch_memory(rng, mining):
    """Theirs holds the batch too, so that it has b places more than ours."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    distance = distances.LpDistance(normalize_embeddings=False, p=2, power=1)
    hard = mining == "batch_hard"
    reducer = reducers.MeanReducer() if hard else reducers.AvgNonZeroReducer()
    theirs = losses.CrossBatchMemory(
        losses.TripletMarginLoss(margin=0.2, distance=distance, reducer=reducer),
        embedding_size=3,
        memory_size=8 + 12,
        miner=miners.BatchHardMiner(distance=distance) if hard else None,
    )
    earlier, earlier_labels = np.zeros((0, 3), np.float32), np.zeros(0, np.int32)
    for _ in range(4):
        embeddings = rng.normal(size=(8, 3)).astype(np.float32)
        labels = rng.integers(0, 3, 8).astype(np.int32)
        expected = theirs(torch.from_numpy(embeddings), torch.from_numpy(labels).long())
        memory = np.zeros((12, 3), np.float32), np.zeros(12, np.int32), np.arange(12) < len(earlier)
        memory[0][: len(earlier)], memory[1][: len(earlier)] = earlier, earlier_labels
        loss, _ = triplet_loss(embeddings, labels, 0.2, mining, memory=memory)
        np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-5)
        earlier = np.concatenate([earlier, embeddings])[-12:]
        earlier_labels = np.concatenate([earlier_labels, labels])[-12:]
