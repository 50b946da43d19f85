"""Merges in NumPy, with loops and sorts, in float64: what the recipes are held against.

A model is a dict of arrays by name; `d` is a list of N task vectors of one leaf.
"""

import numpy as np

SHAPES = {
    "embed": (4, 6),
    "layers_0/w": (4, 6),
    "layers_1/w": (4, 6),
    "layers_2/scale": (),
    "layers_2/w": (4, 6),
}


def models(count, seed=0, size=0.1):
    """A base and N models near it, float32."""
    rng = np.random.default_rng(seed)

    def draw(by):
        return {k: by * rng.standard_normal(s) for k, s in SHAPES.items()}

    def narrow(model):
        return {name: np.asarray(leaf, np.float32) for name, leaf in model.items()}

    base = draw(1.0)
    found = []
    for n in range(count):
        moved = draw(size * (n + 1))
        found.append(narrow({k: base[k] + moved[k] for k in SHAPES}))
    return narrow(base), found


def deltas(base, experts):
    """By name, the N task vectors as float32 has them, widened."""
    start = {k: np.float32(0) for k in SHAPES} if base is None else base
    return {
        k: [np.asarray(np.float32(e[k]) - start[k], np.float64) for e in experts]
        for k in SHAPES
    }


def by_leaf(base, experts, weights, rule):
    """Merges leaf by leaf: rule(d, weights, name) is what is added to the base."""
    return {
        name: (0 if base is None else np.asarray(base[name], np.float64))
        + np.asarray(rule(d, weights, name))
        for name, d in deltas(base, experts).items()
    }


def weighted_sum(d, weights, name=None):
    return sum(w * x for w, x in zip(weights, d, strict=True))


def keep_band(x, beta, gamma):
    flat = x.reshape(-1)
    order = np.argsort(abs(flat), kind="stable")
    kept = np.zeros_like(flat)
    for i in order[int(beta * flat.size) : flat.size - int(gamma * flat.size)]:
        kept[i] = flat[i]
    return kept.reshape(x.shape)


def trim_whole(base, experts, density):
    """By name, the N task vectors, each trimmed over the whole model."""
    d = deltas(base, experts)
    result = {name: [None] * len(experts) for name in d}
    for n in range(len(experts)):
        sizes = np.sort(np.concatenate([abs(d[k][n]).reshape(-1) for k in d]))[::-1]
        least = sizes[max(1, int(density * sizes.size)) - 1]
        for k in d:
            result[k][n] = np.where(abs(d[k][n]) >= least, d[k][n], 0)
    return result


def agreeing_mean(d, weights):
    """Mean over the experts whose entry has the sign of the weighted sum."""
    stacked = np.stack([np.asarray(x) for x in d])
    result = np.zeros(stacked.shape[1:])
    for at in np.ndindex(*result.shape):
        column = stacked[(slice(None), *at)]
        sign = (
            1 if sum(w * x for w, x in zip(weights, column, strict=True)) >= 0 else -1
        )
        agree = [n for n, x in enumerate(column) if weights[n] * x * sign > 0]
        if agree:
            whole = sum(weights[n] for n in agree)
            result[at] = sum(weights[n] * column[n] for n in agree) / whole
    return result


def ties(base, experts, weights, density, lam):
    trimmed = trim_whole(base, experts, density)
    return {
        k: np.asarray(base[k], np.float64) + lam * agreeing_mean(trimmed[k], weights)
        for k in SHAPES
    }


def metagpt(base, experts, weights):
    d = deltas(base, experts)
    norms = [sum((d[k][n] ** 2).sum() for k in d) for n in range(len(experts))]
    scaled = [w * norm for w, norm in zip(weights, norms, strict=True)]
    shares = [x / sum(scaled) for x in scaled]
    return by_leaf(base, experts, shares, weighted_sum)


def varm(d, weights, name=None):
    squares = [w * (x**2).mean() for w, x in zip(weights, d, strict=True)]
    return sum(s * x for s, x in zip(squares, d, strict=True)) / sum(squares)


def largest(d, weights, name=None):
    result = np.zeros(d[0].shape)
    for at in np.ndindex(*result.shape):
        best = 0
        for n in range(len(d)):
            if abs(d[n][at]) >= abs(d[best][at]):
                best = n
        result[at] = weights[best] * d[best][at]
    return result


def sce(d, weights, share):
    """Equal weights of the experts are assumed when signs are elected."""
    stacked = np.stack(d).reshape(len(d), -1)
    spread = ((stacked - stacked.mean(0)) ** 2).mean(0)
    least = np.sort(spread)[::-1][max(1, int(share * spread.size)) - 1]
    stacked = np.where(spread >= least, stacked, 0)
    shares = np.asarray(weights) * (stacked**2).mean(1)
    shares /= shares.sum()
    result = np.zeros(stacked.shape[1])
    for i in range(stacked.shape[1]):
        sign = 1 if stacked[:, i].sum() >= 0 else -1
        agree = [n for n in range(len(d)) if stacked[n, i] * sign > 0]
        if agree:
            whole = sum(shares[n] for n in agree)
            result[i] = sum(shares[n] * stacked[n, i] for n in agree) / whole
    return result.reshape(d[0].shape)


def cosine(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def model_stock(d, weights, mean_of):
    pairs = [cosine(d[i], d[j]) for i in range(len(d)) for j in range(i)]
    if mean_of == "angle":
        cos = np.cos(np.mean(np.arccos(np.clip(pairs, -1, 1))))
    else:
        cos = np.mean(pairs)
    divisor = 1 + (len(d) - 1) * cos  # 0 for angles of 0, 180 and 180 degrees
    t = len(d) * cos / divisor if divisor > 1e-6 else 0
    return t * weighted_sum(d, weights) / sum(weights)


def karcher(d, weights, name=None):
    """By its definition: log and exp in the space of the leaf."""
    shares = np.asarray(weights) / sum(weights)
    units = [x.reshape(-1) / np.linalg.norm(x) for x in d]
    mean = sum(a * u for a, u in zip(shares, units, strict=True))
    mean /= np.linalg.norm(mean)
    for _ in range(200):
        tangent = np.zeros_like(mean)
        for a, u in zip(shares, units, strict=True):
            angle = np.arccos(np.clip(u @ mean, -1, 1))
            if angle > 1e-9:
                tangent += a * angle / np.sin(angle) * (u - np.cos(angle) * mean)
        size = np.linalg.norm(tangent)
        if size < 1e-12:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
    length = sum(a * np.linalg.norm(x) for a, x in zip(shares, d, strict=True))
    return (length * mean).reshape(d[0].shape)
