"""Targets in which the draft takes part: ensembles, cascades, proxy tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from speculation import LM, PARAMS, PROMPTS, VOCAB, draws

from collab_jax import combine, decode, law, pool, warp
from collab_jax.cooperate.efficient import cascade, coupled
from collab_jax.cooperate.efficient.cascade import total_variation
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.reuse import (
    Drafted,
    component,
    remembered,
    reuse,
)
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table

BIG, SMALL = PARAMS
THIRD = table.init(jax.random.key(9), VOCAB, 2)
POOLS = {
    "ensemble": pool.mixture(0.6, 0.4),
    "contrast": pool.contrast(0.1, 0.5),
    "product": pool.linear(0.5, 0.5),
    "cascade": cascade.optimal(0.5),
    "cascade of tokens": cascade.token_v3(0.4),
}
WARPS = (warp.repetition_penalty(1.4), warp.temperature(0.8), warp.top_p(0.95))


def check_same(mine, theirs):
    """Plain sampling of the composite gives these very tokens, with these keys."""
    assert (mine.length == theirs.length).all()
    assert (mine.tokens == theirs.tokens).all()


@pytest.mark.parametrize("name", POOLS)
def test_reused_outputs_are_those_of_the_member(name):
    pooled = POOLS[name]
    whole = warp.warp(combine.product([LM, LM], pooled), *WARPS)
    expected = draws(decode.sample(whole, 10), (BIG, SMALL))
    shared = warp.warp(combine.product([LM, component(VOCAB)], pooled), *WARPS)
    draft = draft_lm(warp.warp(remembered(LM), *WARPS), 3, whole=True)
    decoder = speculate(reuse(shared), draft, 10, verifier=coupled.gumbel())
    check_same(draws(decoder, ((BIG, Drafted()), SMALL)), expected)


def test_raw_logits_of_a_warped_draft_are_needed():
    """The draft's own law in the member's place is another target."""
    pooled = pool.mixture(0.6, 0.4)
    whole = warp.warp(combine.product([LM, LM], pooled), *WARPS)
    expected = draws(decode.sample(whole, 10), (BIG, SMALL))
    shared = warp.warp(combine.product([LM, component(VOCAB)], pooled), *WARPS)
    draft = draft_lm(warp.warp(LM, *WARPS), 3, whole=True)
    decoder = speculate(reuse(shared), draft, 10, verifier=coupled.gumbel())
    found = draws(decoder, ((BIG, Drafted()), SMALL))
    assert not (found.tokens == expected.tokens).all()


def test_two_members_draft_together():
    """The small pair of a proxy-tuned model is the draft; the base alone is new."""
    proxy = pool.linear(1, 1, -1)
    whole = warp.warp(combine.product([LM] * 3, proxy), *WARPS)
    expected = draws(decode.sample(whole, 10), (BIG, SMALL, THIRD))
    holes = [LM, component(VOCAB), component(VOCAB)]
    shared = reuse(warp.warp(combine.product(holes, proxy), *WARPS))
    pair = combine.product([remembered(LM)] * 2, pool.linear(1, 0))
    draft = draft_lm(warp.warp(pair, *WARPS), 3, whole=True)
    decoder = speculate(shared, draft, 10, verifier=coupled.gumbel())
    params = ((BIG, Drafted(), Drafted()), (SMALL, THIRD))
    check_same(draws(decoder, params), expected)


def test_a_stacked_ensemble_is_a_target_like_any_other():
    stack = combine.stacked(LM, 3, pool.linear(1, 1, -1))
    target = warp.warp(stack, *WARPS)
    params = jnp.stack([BIG, SMALL, THIRD])
    expected = draws(decode.sample(target, 10), params)
    draft = draft_lm(warp.warp(LM, warp.temperature(0.8)), 3)
    decoder = speculate(on_lm(target), draft, 10, verifier=coupled.gumbel())
    check_same(draws(decoder, (params, SMALL)), expected)


def test_a_composite_follows_its_law():
    """Block verification, cascade, penalties: chi-square of three tokens."""
    pooled = cascade.token_v3(0.4)
    whole = warp.warp(combine.product([LM, LM], pooled), *WARPS)
    shared = warp.warp(combine.product([LM, component(VOCAB)], pooled), *WARPS)
    draft = draft_lm(warp.warp(remembered(LM), *WARPS), 3, whole=True)
    decoder = speculate(reuse(shared), draft, 3)
    drawn = spec.counts(decoder, ((BIG, Drafted()), SMALL), [1, 2], 3, 20_000)
    found, limit = spec.chi_square(
        drawn, spec.target_joint(whole, (BIG, SMALL), [1, 2], 3)
    )
    assert found < limit
    wrong, limit = spec.chi_square(drawn, spec.target_joint(LM, BIG, [1, 2], 3))
    assert wrong > limit


def laws(seed=0, count=50, vocab=6):
    z = 1.5 * jax.random.normal(jax.random.key(seed), (2, count, 1, vocab))
    return law.log_probs(z)


def kept(p, q, alpha):
    """The equations: whether the small model stays, at all or for which tokens."""
    every, distance = range(len(p)), 0.5 * abs(p - q).sum()
    return {
        "chow": q.max() >= 1 - alpha,
        "difference": q.max() >= p.max() - alpha,
        "optimal": q.max() >= p.max() - alpha * distance,
        "token_v1": [x for x in every if q[x] >= p.max() - alpha],
        "token_v2": [x for x in every if p[x] >= p.max() - alpha],
        "token_v3": [x for x in every if p[x] >= (1 - alpha) * p.max()],
    }


def naive(name, p, q, alpha):
    good = kept(p, q, alpha)[name]
    if not isinstance(good, list):
        return q if good else p
    rest = sum(q[y] for y in range(len(q)) if y not in good)
    return np.array([q[x] * (x in good) + p[x] * rest for x in range(len(p))])


@pytest.mark.parametrize("name", kept(np.ones(2) / 2, np.ones(2) / 2, 0.5))
def test_cascades_are_their_equations(name):
    p, q = laws()
    for alpha in (0.0, 0.3, 1.0):
        found = np.exp(getattr(cascade, name)(alpha)([p, q]))[:, 0]
        for row in range(len(found)):
            expected = naive(name, np.exp(p[row, 0]), np.exp(q[row, 0]), alpha)
            np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_a_cascade_rejects_no_more_than_the_large_model():
    p, q = laws(1)
    v = jnp.exp(cascade.optimal(0.5)([p, q]))
    p, q = jnp.exp(p), jnp.exp(q)
    assert (total_variation(v, q) <= total_variation(p, q)).all()
    assert (total_variation(v, q) == 0).any()
    assert (total_variation(v, p) == 0).any()


def run_with(target, draft, params):
    decoder = speculate(target, draft, 3)
    return draws(decoder, params, PROMPTS[:2])


PAIR = combine.product([LM, component(VOCAB)], pool.mixture())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: run_with(reuse(PAIR), draft_lm(LM, 2), ((BIG, Drafted()), SMALL)),
            "propose with draft_lm",
        ),
        (
            lambda: run_with(
                reuse(combine.product([LM, LM], pool.mixture())),
                draft_lm(LM, 2, whole=True),
                ((BIG, BIG), SMALL),
            ),
            "logits of 1 members, and the target's parameters have 0 places",
        ),
        (
            lambda: run_with(
                reuse(combine.product([LM, component(3)], pool.mixture())),
                draft_lm(LM, 2, whole=True),
                ((BIG, Drafted()), SMALL),
            ),
            "vocabularies of|a component over 3 tokens",
        ),
        (lambda: cascade.token_v3(1.5), "alpha = 1.5"),
        (lambda: cascade.chow(-0.5), "alpha = -0.5"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
