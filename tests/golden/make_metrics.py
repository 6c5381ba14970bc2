"""Writes metrics.npz: values of other libraries that tests compare with, where definitions agree.

Needs, in an environment of its own: torch, torchmetrics, pytorch-metric-learning (with faiss-cpu).
Run as ``python tests/golden/make_metrics.py``; the file records the versions.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np

# The other libraries are imported where they are used, so that pytest can read this file without.


def ranked_lists(rng):
    """Full rankings of 60 items for 24 queries: random hit rates, R from 1 to about 50."""
    import torch
    from torchmetrics.functional import retrieval

    matches = rng.random((24, 60)) < rng.uniform(0.02, 0.8, (24, 1))
    matches[:, 37] = True
    # Above 0 throughout: torchmetrics takes an item of score 0 for irrelevant.
    scores = torch.linspace(1.0, 0.1, 60)
    rows = [torch.from_numpy(row) for row in matches]
    values = {
        "map_all@60": [retrieval.retrieval_average_precision(scores, row) for row in rows],
        # torchmetrics divides the first K's sum by the hits among them: the paper's definition.
        "map@10": [retrieval.retrieval_average_precision(scores, row, top_k=10) for row in rows],
        "precision@10": [retrieval.retrieval_precision(scores, row, top_k=10) for row in rows],
        "recall@10": [retrieval.retrieval_hit_rate(scores, row, top_k=10) for row in rows],
        "r_precision": [retrieval.retrieval_r_precision(scores, row) for row in rows],
        "mrr": [retrieval.retrieval_reciprocal_rank(scores, row) for row in rows],
    }
    return {"matches": matches, **{name: np.array(v) for name, v in values.items()}}


def label_retrieval(rng):
    """Leave-one-out retrieval by label, 90 embeddings of 7 labels, by AccuracyCalculator."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    labels = rng.integers(0, 7, 90)
    embeddings = (rng.normal(size=(90, 8)) + rng.normal(size=(7, 8))[labels]).astype(np.float32)
    names = ("mean_average_precision_at_r", "r_precision", "mean_reciprocal_rank")
    calculator = AccuracyCalculator(include=names, k=None)
    values = calculator.get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))
    return {
        "embeddings": embeddings,
        "labels": labels,
        **{f"pml_{name}": np.float64(values[name]) for name in names},
    }


def triplet_losses(rng):
    """Batch-hard and all triplets at margin 0.2, Euclidean and not normalised, with gradients."""
    import torch
    from pytorch_metric_learning import distances, losses, miners, reducers

    labels = torch.from_numpy(rng.integers(0, 5, 24))
    embeddings = torch.from_numpy(rng.normal(size=(24, 6)).astype(np.float32)) * 0.3
    distance = distances.LpDistance(normalize_embeddings=False, p=2, power=1)
    results = {"loss_embeddings": embeddings.numpy(), "loss_labels": labels.numpy()}
    for name, miner, reducer in (
        ("batch_hard", miners.BatchHardMiner(distance=distance), reducers.MeanReducer()),
        ("batch_all", None, reducers.AvgNonZeroReducer()),
    ):
        x = embeddings.clone().requires_grad_()
        loss_function = losses.TripletMarginLoss(margin=0.2, distance=distance, reducer=reducer)
        loss = loss_function(x, labels, miner(x, labels) if miner else None)
        loss.backward()
        results[f"{name}_loss"] = loss.detach().numpy()
        results[f"{name}_gradient"] = x.grad.numpy()
    return results


if __name__ == "__main__":
    rng = np.random.default_rng(2022)
    packages = ("torch", "torchmetrics", "pytorch-metric-learning")
    versions = np.array([f"{package} {version(package)}" for package in packages])
    arrays = {**ranked_lists(rng), **label_retrieval(rng), **triplet_losses(rng)}
    np.savez_compressed(Path(__file__).with_name("metrics.npz"), versions=versions, **arrays)
