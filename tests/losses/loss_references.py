"""The losses' definitions by loops, one pair at a time, in float64 and by NumPy and math alone."""

import math

import numpy as np


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def cosines(x, memory=None):
    columns = x if memory is None else np.concatenate([x, memory])
    return unit(x) @ unit(columns).T


def positives_of(i, labels):
    return [j for j in range(len(labels)) if labels[j] == labels[i] and j != i]


def negatives_of(i, labels):
    return [j for j in range(len(labels)) if labels[j] != labels[i]]


def anchors(x, labels):
    """(row of similarities, positives, negatives); labels beyond the rows are a memory's."""
    return [(i, positives_of(i, labels), negatives_of(i, labels)) for i in range(len(x))]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def multi_similarity(x, labels, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1, memory=None):
    similarity, costs = cosines(x, memory), []
    for i, positives, negatives in anchors(x, labels):
        s = similarity[i]
        if epsilon is not None:
            least = min((s[p] for p in positives), default=math.inf)
            most = max((s[n] for n in negatives), default=-math.inf)
            positives = [p for p in positives if s[p] - epsilon < most]
            negatives = [n for n in negatives if s[n] + epsilon > least]
        pull = sum(math.exp(-alpha * (s[p] - base)) for p in positives)
        push = sum(math.exp(beta * (s[n] - base)) for n in negatives)
        costs.append(math.log1p(pull) / alpha + math.log1p(push) / beta)
    return mean(costs)


def circle(x, labels, margin=0.4, scale=80.0, memory=None, fixed=None):
    """``fixed``: the embeddings whose similarities are the weights; None: x."""
    similarity, costs = cosines(x, memory), []
    weighing = similarity if fixed is None else cosines(fixed, memory)
    for i, positives, negatives in anchors(x, labels):
        s, w = similarity[i], weighing[i]
        if not positives or not negatives:
            continue
        pull = [-scale * max(1 + margin - w[p], 0) * (s[p] - 1 + margin) for p in positives]
        push = [scale * max(w[n] + margin, 0) * (s[n] - margin) for n in negatives]
        costs.append(np.logaddexp(0, np.logaddexp.reduce(pull) + np.logaddexp.reduce(push)))
    return mean(costs)


def contrastive(x, labels, margin=1.0, memory=None):
    columns = x if memory is None else np.concatenate([x, memory])
    pull, push = [], []
    for i, positives, negatives in anchors(x, labels):
        pull += [np.sum((x[i] - columns[p]) ** 2) / 2 for p in positives]
        distances = [np.linalg.norm(x[i] - columns[n]) for n in negatives]
        push += [(margin - d) ** 2 / 2 for d in distances if d < margin]
    return mean(pull) + mean(push)


def n_pair(x, labels, l2=0.002):
    firsts, seconds = [], []
    for label in sorted(set(labels)):
        images = [i for i in range(len(x)) if labels[i] == label]
        if len(images) > 1:
            firsts.append(images[0])
            seconds.append(images[1])
    products = x[firsts] @ x[seconds].T
    costs = [np.logaddexp.reduce(row) - row[i] for i, row in enumerate(products)]
    lengths = mean(np.sum(x[firsts] ** 2, axis=1) + np.sum(x[seconds] ** 2, axis=1))
    return mean(costs) + l2 / 4 * lengths


def sup_con(x, labels, temperature=0.1, memory=None):
    logits, costs = cosines(x, memory) / temperature, []
    for i, positives, negatives in anchors(x, labels):
        total = np.logaddexp.reduce([logits[i, j] for j in positives + negatives] or [0.0])
        if positives:
            costs.append(mean(total - logits[i, p] for p in positives))
    return mean(costs)


def nt_xent(x, labels, temperature=0.1, memory=None):
    logits, costs = cosines(x, memory) / temperature, []
    for i, positives, negatives in anchors(x, labels):
        for p in positives:
            own = logits[i, p]
            costs.append(np.logaddexp.reduce([own, *logits[i, negatives]]) - own)
    return mean(costs)


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def soft_ranks(s, images, others, temperature):
    """1 plus how many of the others are before each image, an image not before itself."""
    return [1 + sum(sigmoid((s[z] - s[p]) / temperature) for z in others if z != p) for p in images]


def recall_at_k_surrogate(
    x, labels, ks=(1, 2, 4, 8, 16), temperature=0.01, rank_temperature=1.0, memory=None
):
    similarity, costs = cosines(x, memory), []
    for i, positives, negatives in anchors(x, labels):
        if positives:
            ranks = soft_ranks(similarity[i], positives, positives + negatives, temperature)
            recalls = [
                sum(sigmoid((k - rank) / rank_temperature) for rank in ranks)
                / min(k, len(positives))
                for k in ks
            ]
            costs.append(1 - mean(recalls))
    return mean(costs)


def smooth_ap(x, labels, temperature=0.01, memory=None):
    similarity, costs = cosines(x, memory), []
    for i, positives, negatives in anchors(x, labels):
        if positives:
            ranks = soft_ranks(similarity[i], positives, positives + negatives, temperature)
            among = soft_ranks(similarity[i], positives, positives, temperature)
            costs.append(1 - mean(a / r for a, r in zip(among, ranks, strict=True)))
    return mean(costs)


def central_differences(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (f(up) - f(down)) / (2 * step)
    return gradient


# --- with vectors of the classes ---


def classified(logits, labels):
    """Mean cross-entropy."""
    return mean(np.logaddexp.reduce(row) - row[y] for row, y in zip(logits, labels, strict=True))


def proxy_anchor(x, labels, proxies, margin=0.1, scale=32.0):
    similarity = unit(x) @ unit(proxies).T
    pull, push = [], []
    for c in range(len(proxies)):
        s, is_own = similarity[:, c], np.asarray(labels) == c
        own = [math.exp(-scale * (s - margin)) for s in s[is_own]]
        rest = [math.exp(scale * (s + margin)) for s in s[~is_own]]
        pull += [math.log1p(sum(own))] if own else []
        push.append(math.log1p(sum(rest)))
    return mean(pull) + mean(push)


def proxy_nca(x, labels, proxies, temperature=1 / 9):
    squares = np.sum((unit(x)[:, None] - unit(proxies)[None]) ** 2, axis=-1)
    return classified(-squares / temperature, labels)


def cosface(x, labels, proxies, margin=0.35, scale=64.0):
    logits = scale * (unit(x) @ unit(proxies).T)
    for i, y in enumerate(labels):
        logits[i, y] -= scale * margin
    return classified(logits, labels)


def arcface(x, labels, proxies, margin=0.5, scale=64.0):
    logits = unit(x) @ unit(proxies).T
    for i, y in enumerate(labels):
        angle = math.acos(min(max(logits[i, y], -1), 1))
        inside = angle + margin < math.pi
        logits[i, y] = (
            math.cos(angle + margin) if inside else (logits[i, y] - margin * math.sin(margin))
        )
    return classified(scale * logits, labels)


def soft_triple(x, labels, proxies, margin=0.01, scale=20.0, gamma=0.1, tau=0.2):
    n, k, _ = proxies.shape
    similarity, apart = np.zeros((len(x), n)), 0.0
    for c in range(n):
        to_centers = unit(x) @ unit(proxies[c]).T
        weights = np.exp(to_centers / gamma)
        weights /= weights.sum(axis=1, keepdims=True)
        similarity[:, c] = np.sum(weights * to_centers, axis=1)
        products = unit(proxies[c]) @ unit(proxies[c]).T
        apart += sum(math.sqrt(2 + 1e-5 - 2 * products[s, t]) for t in range(k) for s in range(t))
    for i, y in enumerate(labels):
        similarity[i, y] -= margin
    return classified(scale * similarity, labels) + tau * apart / (n * k * (k - 1))
