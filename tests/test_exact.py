"""Greedy verification against any lossless verifier of one-hot laws."""

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import warp
from collab_jax.cooperate.efficient import exact, tree, verify
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.lm import Out


def drafts(seed):
    """Logits of 4 tokens and chains, many of them right for a while."""
    keys = jax.random.split(jax.random.key(seed), 4)
    logits = jax.random.normal(keys[0], (16, 4, 5))
    best = jnp.argmax(logits[:, :-1], -1)
    other = jax.random.randint(keys[1], best.shape, 0, 5)
    tokens = jnp.where(jax.random.bernoulli(keys[2], 0.8, best.shape), best, other)
    count = jax.random.randint(keys[3], (16,), 0, 4)
    return logits, Draft(tokens.astype(jnp.int32), count)


def naive(logits, tokens, count):
    best = np.argmax(logits, -1)
    kept = 0
    while kept < count and tokens[kept] == best[kept]:
        kept += 1
    return [*tokens[:kept], best[kept]]


def test_the_tokens_are_those_of_a_loop():
    for seed in range(8):
        logits, draft = drafts(seed)
        found = exact.greedy().verify(None, None, Out(logits), draft)
        for b in range(16):
            expected = naive(*(np.asarray(x[b]) for x in (logits, *draft[:2])))
            assert found.tokens[b, : found.count[b]].tolist() == expected


def test_outcomes_are_those_of_one_hot_laws():
    logits, draft = drafts(0)
    one_hot = warp.greedy()(logits)
    for other in (verify.maximal(), verify.block()):
        np.testing.assert_allclose(
            exact.greedy().outcomes(logits, draft),
            other.outcomes(one_hot, draft),
            atol=1e-6,
        )
    # the control: without the warp they are spread over many paths
    spread = verify.block().outcomes(logits, draft)
    assert float(jnp.abs(spread - exact.greedy().outcomes(logits, draft)).max()) > 0.1


def test_its_draws_are_its_outcomes():
    logits, draft = drafts(1)
    found = exact.greedy().verify(None, None, Out(logits), draft)
    paths = exact.greedy().outcomes(logits, draft)
    own = found.tokens[jnp.arange(16), found.accepted]
    assert bool((paths[jnp.arange(16), found.accepted, own] == 1).all())


def test_a_tree_is_walked_by_the_likeliest_tokens():
    """As any lossless verifier of trees does with one-hot laws; a chain is a tree."""
    logits, draft = drafts(2)
    parents = jax.random.randint(jax.random.key(9), (16, 3), -1, jnp.arange(3))
    for above in (parents, tree.tree_parents(draft)):
        hung = draft._replace(parents=above)
        expected = tree.sampled().outcomes(warp.greedy()(logits), hung)
        found = exact.greedy().outcomes(logits, hung)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        run = exact.greedy().verify(None, None, Out(logits), hung)
        own = run.tokens[jnp.arange(16), run.accepted]
        last = jnp.take_along_axis(run.path, run.accepted[:, None] - 1, 1)[:, 0] + 1
        place = jnp.where(run.accepted > 0, last, 0)
        assert bool((found[jnp.arange(16), place, own] == 1).all())
    np.testing.assert_allclose(found, exact.greedy().outcomes(logits, draft))
    assert int(jnp.abs(parents - tree.tree_parents(draft)).max()) > 0
