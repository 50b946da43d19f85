"""Twins of the pools of transfer: their definitions, place by place, in float64."""

import numpy as np
from transferring import jensen_shannon, log_softmax, product_of_experts

from collab_jax.cooperate.transfer import (
    context,
    contrast,
    layers,
    nudge,
    objectives,
    offset,
    reward,
)

INF = np.inf
# name -> (members, from a knob to the pool)
FORMS = {
    "contrastive": (2, lambda w: contrast.contrastive(0.05, w, 0.5)),
    "dexperts": (3, lambda w: contrast.dexperts(w, 0.8)),
    "cad": (2, context.cad),
    "adacad": (2, lambda w: context.adacad(0.02, w)),
    "dola": (3, lambda w: layers.dola(0.05 * w)),
    "sled": (3, lambda w: layers.sled(w, 3)),
    "proxy tuning": (3, offset.proxy_tuning),
    "weak to strong": (3, offset.weak_to_strong),
    "emulated": (5, lambda w: offset.emulated(w, 0.5)),
    "dera": (2, offset.dera),
    "mod": (3, lambda w: objectives.mod(w, 0.3, 0.7 - w)),
    "harmonic": (3, lambda w: objectives.power_mean(-1, w, 0.1, 0.9 - w)),
    "root": (3, lambda w: objectives.power_mean(0.5, w, 0.1, 0.9 - w)),
    "jensen-shannon": (3, lambda w: objectives.jensen_shannon_mean(w, 1 - w)),
    "genarm": (3, lambda w: reward.genarm(w, 0.5)),
    "nudging": (2, lambda w: nudge.nudging(0.5 * w)),
}


def nucleus(law, p):
    order = np.argsort(-law, kind="stable")
    mass = np.cumsum(np.exp(law[order]))
    kept = order[: int(np.searchsorted(mass, p)) + 1]
    return np.where(np.isin(np.arange(len(law)), kept), law, -INF)


def evolution(z, rate, k):
    """SLED, token by token and layer by layer."""
    last, *early = z
    top = [v for v in np.argsort(-last)[:k] if last[v] > -INF]
    evidence = np.zeros(len(last))
    for v in top:
        for layer in early:
            known = ~np.isneginf(last) & ~np.isneginf(layer)
            went = np.where(known, layer, 0) - np.where(known, last, 0)
            wrong = np.exp(log_softmax(layer)) - (np.arange(len(last)) == v)
            size = np.linalg.norm(went) * np.linalg.norm(wrong)
            evidence[v] += max(0, went @ wrong / size) ** 2 if size else 0.0
    found = np.full(len(last), -INF)
    for v in top:
        found[v] = last[v]
        if evidence.sum():
            p = np.exp(log_softmax(last))[v]
            found[v] -= rate * (p - evidence[v] / evidence.sum())
    return found


def power(exponent, factors, laws):
    found = np.zeros(len(laws[0]))
    for v in range(len(found)):
        total = 0.0
        for factor, law in zip(factors, laws, strict=True):
            p = np.exp(law[v])
            total += factor * (p**exponent if p else INF if exponent < 0 else 0.0)
        found[v] = total ** (1 / exponent)
    with np.errstate(divide="ignore"):
        return np.log(found)


def between(factors, reference, *laws):
    """The Jensen-Shannon mean: c is the root of the equation that it has to solve."""
    odds = np.full(len(reference), INF)
    for v, p in enumerate(reference):
        both = list(zip(factors, (law[v] for law in laws), strict=True))
        if p and all(q for w, q in both if w):
            odds[v] = np.prod([(1 + p / q) ** w for w, q in both if w])
    if np.isinf(odds).all():
        return np.full(len(reference), -INF)

    def law(c):
        return np.array(
            [
                p / (c * a - 1) if a < INF else 0.0
                for p, a in zip(reference, odds, strict=True)
            ]
        )

    low, high = 1 / odds.min() * (1 + 1e-13), 2 / odds.min()
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if law(c).sum() > 1 else (low, c)
    with np.errstate(divide="ignore"):
        return np.log(law(high))


def twin(name, w, z):
    """The definition at one place, from logits `[V]`, up to a constant."""
    laws = [log_softmax(member) for member in z]
    if name == "contrastive":
        amateur = log_softmax(z[1] / 0.5)
        kept = np.exp(laws[0]) >= 0.05 * np.exp(laws[0]).max()
        scores = product_of_experts((1, -w), [laws[0], amateur])
        return np.where(kept, scores, -INF)
    if name == "dexperts":
        base = log_softmax(nucleus(laws[0], 0.8))
        return product_of_experts((1, w, -w), [base, *laws[1:]])
    if name in ("cad", "adacad"):
        if name == "adacad":
            w = max(0.02, w * jensen_shannon(*np.exp(laws)))
        return product_of_experts((1 + w, -w), laws)
    if name == "dola":
        apart = [jensen_shannon(*np.exp([laws[0], law])) for law in laws[1:]]
        early = laws[1 + int(np.argmax(apart))]
        kept = np.exp(laws[0]) >= 0.05 * w * np.exp(laws[0]).max()
        return np.where(kept, product_of_experts((1, -1), [laws[0], early]), -INF)
    if name == "sled":
        return evolution(z, w, 3)
    if name in ("proxy tuning", "weak to strong"):
        return product_of_experts((1, w, -w), laws)
    if name == "emulated":
        return product_of_experts((1, w, -w, 0.5, -0.5), laws)
    if name == "dera":
        return product_of_experts((1 - w, w), laws)
    if name == "mod":
        return product_of_experts((w, 0.3, 0.7 - w), laws)
    if name == "jensen-shannon":
        return between((w, 1 - w), *np.exp(laws))
    if name == "genarm":
        return product_of_experts((1, w, 0.5), laws)
    if name in ("harmonic", "root"):
        return power(-1 if name == "harmonic" else 0.5, (w, 0.1, 0.9 - w), laws)
    return laws[0] if np.exp(laws[0]).max() >= 0.5 * w else laws[1]
