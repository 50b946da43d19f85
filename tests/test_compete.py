"""PCB-Merging against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax import mesh
from collab_jax.merge import compete
from collab_jax.merge.memory import merge
from collab_jax.merge.stack import chain, where

SHAPES = {"a": (16, 8), "b": (7,)}


def trees(count, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda size: {  # noqa: E731
        name: np.float32(size * rng.standard_normal(shape))
        for name, shape in SHAPES.items()
    }
    base = draw(1.0)
    experts = []
    for n in range(count):
        delta = draw(0.1 * (n + 1))
        experts.append({name: base[name] + delta[name] for name in SHAPES})
    return base, experts


def flat(tree):
    return np.concatenate([np.ravel(np.float64(tree[name])) for name in SHAPES])


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def norm(x):
    return (x - x.min()) / (x.max() - x.min())


def naive_weights(taus):
    count = len(taus)
    found = []
    for own in taus:
        inside = softmax(count * norm(own * own))
        between = sum(softmax(norm(own * other)) for other in taus)
        found.append(inside * between)
    return np.stack(found)


def naive_pcb(taus, weights, density, lam, scores=naive_weights):
    beta = scores(taus)
    kept = max(1, int(density * taus.shape[1]))
    least = np.sort(beta, 1)[:, -kept][:, None]
    beta = np.where(beta >= least, beta, 0)
    whole = beta.sum(0)
    moved = (beta * np.asarray(weights)[:, None] * taus).sum(0)
    return lam * moved / np.where(whole > 0, whole, 1)


def their_code(taus):
    """The authors' script scores otherwise than the paper."""
    own = np.stack([norm(abs(tau)) ** 2 for tau in taus])
    return np.exp(len(taus) * own) * np.tanh(taus * taus.sum(0))


def deltas(base, experts):
    return np.stack([
        flat({name: np.float32(e[name] - base[name]) for name in SHAPES})
        for e in experts
    ])  # fmt: skip


@pytest.mark.parametrize(("count", "density"), [(1, 0.5), (2, 0.1), (3, 0.5)])
def test_pcb(count, density):
    base, experts = trees(count)
    weights, taus = (1.0, 0.8, 1.3)[:count], deltas(base, experts)
    found = merge(compete.pcb(density, 1.2), base, experts, weights)
    expected = naive_pcb(taus, weights, density, 1.2)
    np.testing.assert_allclose(flat(found) - flat(base), expected, atol=2e-6)
    if count > 1:
        wrong = naive_pcb(taus, weights, density, 1.2, their_code)
        assert abs(wrong - expected).max() > 0.05
        local = where("a", compete.pcb(density, 1.2))  # statistics of one leaf
        part = merge(local, base, experts, weights)["a"] - base["a"]
        assert abs(part - (found["a"] - base["a"])).max() > 1e-3


def test_the_weights():
    base, experts = trees(3, seed=1)
    found = []
    for n in range(3):  # the deltas of the others come with weight zero
        weights = [float(n == m) for m in range(3)]
        merged = merge(compete.compete(), base, experts, weights)
        found.append(flat(merged) - flat(base))
    taus = deltas(base, experts)
    expected = naive_weights(taus) * taus.shape[1] ** 2 * taus
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_jit_and_sharding_change_nothing():
    base, experts = trees(3)
    part = compete.pcb(0.3)
    plain = flat(merge(part, base, experts))
    rows = NamedSharding(mesh.make_mesh(model=8), PartitionSpec("model"))
    everywhere = NamedSharding(mesh.make_mesh(model=8), PartitionSpec())
    place = lambda x: jax.device_put(x, rows if x.ndim == 2 else everywhere)  # noqa: E731
    placed = jax.tree.map(place, (base, experts))
    jitted = jax.jit(lambda b, e: merge(part, b, e))
    for other in (merge(part, *placed), jitted(base, experts)):
        np.testing.assert_allclose(flat(other), plain, atol=1e-6)


def test_identities():
    base, experts = trees(2)
    whole, some = compete.pcb(1.0), compete.pcb(0.4)
    one = merge(whole, base, experts[:1])
    np.testing.assert_allclose(flat(one), flat(experts[0]), atol=1e-6)
    same = merge(whole, base, [experts[0]] * 2)
    np.testing.assert_allclose(flat(same), flat(experts[0]), atol=1e-6)
    order = merge(some, base, experts[::-1])
    straight = merge(some, base, experts)
    np.testing.assert_allclose(flat(order), flat(straight), atol=1e-6)
    still = merge(some, base, [base, base])
    np.testing.assert_array_equal(flat(still), flat(base))


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"density = 0 was given, a number in \(0, 1\]"
    ):
        compete.pcb(0)
    zero = {"a": jnp.zeros(2)}
    assert merge(chain(compete.share), zero, [zero])["a"].tolist() == [0, 0]
