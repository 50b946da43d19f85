"""Text with a feature drafter: that of plain decoding, in fewer calls."""

import functools

import features as small
import jax.numpy as jnp
import pytest
import speculation as spec
from speculation import new_tokens

from collab_jax import combine, decode, pool, warp
from collab_jax.cooperate.efficient import exact, growth, tree, verify
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.cooperate.efficient.topology import grow

BACKBONE, MODEL, LAYER, BASE = small.BACKBONE, small.MODEL, small.LAYER, small.BASE
PROMPTS = small.PROMPTS
NEW = 20


@functools.cache
def plain(eos=()):
    return spec.draws(decode.greedy(MODEL, NEW, eos=eos), BASE, PROMPTS)


CASES = {
    "chain": (growth.chain(4), exact.greedy),
    "ranked": (growth.ranked(grow(8, [0.6, 0.2])), tree.sampled),
    "expanded": (growth.expanded(3, 2, 6), tree.sampled),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_that_of_plain_greedy(name):
    """Ragged rows, an end in mid-path; and the trained layer is worth its training."""
    shape, verifier = CASES[name]
    eos = (int(plain().tokens[0, 3 + 8]),)
    warps = (warp.greedy(),) if name == "chain" else ()
    drafter = feature_drafter(BACKBONE, LAYER, shape, *warps, chunk=8)
    target = on_lm(warp.warp(MODEL, warp.greedy()))
    decoder = speculate(target, drafter, NEW, verifier=verifier(), eos=eos)
    worth = []
    for own in (small.NEW_LAYER, small.trained()):
        found = spec.draws(decoder, (BASE, (own, BASE)), PROMPTS)
        lengths = found.length - found.prompt_length
        for row in range(len(PROMPTS)):
            assert new_tokens(found, row) == new_tokens(plain(eos), row)
        worth.append(float(lengths.sum() / found.info.calls.sum()))
    assert len({*lengths.tolist()}) > 1
    assert worth[1] > 1.3 * worth[0]


def test_sampled_text_is_of_the_warped_law():
    """A chain under block verification; the draft is warped as the target is."""
    warps = warp.temperature(0.5), warp.top_p(0.9)
    drafter = feature_drafter(BACKBONE, LAYER, growth.chain(3), *warps)
    target = on_lm(warp.warp(MODEL, *warps))
    decoder = speculate(target, drafter, 8, verifier=verify.block())
    found = spec.draws(decoder, (BASE, (small.trained(), BASE)), PROMPTS[:1] * 40)
    # a token that the law forbids never stands
    assert bool(jnp.isfinite(found.info.logprob).all())
    assert int(found.info.calls.sum()) < 0.75 * 8 * 40


def test_a_member_of_a_composite_drafts():
    """The target is a product; the first member's features are read."""
    other = small.model(1)
    both = warp.warp(
        combine.product([MODEL, MODEL], pool.mixture(0.8, 0.2)), warp.greedy()
    )
    drafter = feature_drafter(
        BACKBONE, LAYER, growth.chain(3), warp.greedy(), read=lambda f: f[0]
    )
    decoder = speculate(on_lm(both), drafter, NEW, verifier=exact.greedy())
    found = spec.draws(decoder, ((BASE, other), (small.trained(), BASE)), PROMPTS)
    want = spec.draws(decode.greedy(both, NEW), (BASE, other), PROMPTS)
    for row in range(len(PROMPTS)):
        assert new_tokens(found, row) == new_tokens(want, row)
    assert int(found.info.accepted.sum()) > 10
