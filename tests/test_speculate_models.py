"""Speculation with small random transformers: greedy and coupled text, token for token.

Wide calls round otherwise than narrow ones, so a decision within 1e-4 may differ; the
tests show that none was so close.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import new_tokens

from collab_jax import combine, decode, law, lm, pool, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.reuse import (
    Drafted,
    component,
    remembered,
    reuse,
)
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer

VOCAB = 61
CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
MODEL = lm.language_model(transformer(CONFIG))


def sharp(seed):
    """Random weights whose laws are not flat, and depend on the text."""
    params = init(jax.random.key(seed), CONFIG)
    return jax.tree.map(lambda x: 5.0 * x if x.ndim > 1 else x, params)


BIG = sharp(0)
SMALL = jax.tree.map(lambda a, b: a + 0.04 * b, BIG, sharp(1))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (3, 17, 1, 9, 6)]
KEY = jax.random.key(4)
WARPS = (warp.repetition_penalty(1.1), warp.temperature(0.9), warp.top_p(0.9))
NEW = 24


def margin(model, params, result, keys=None):
    """The least difference between the best two scores, over all new tokens."""

    @jax.jit
    def read(params, tokens):
        state = model.init(params, *tokens.shape)
        return model.extend(params, state, tokens)[0].logits[:, :-1]

    scores = read(params, result.tokens)
    rows, width, vocab = scores.shape
    if keys is not None:
        position = jnp.tile(jnp.arange(1, width + 1), rows)
        noise = law.noise(jnp.repeat(keys, width), position, vocab)
        scores = scores + noise.reshape(scores.shape)
    best = jax.lax.top_k(scores, 2)[0]
    position = jnp.arange(1, width + 1)
    new = position >= result.prompt_length[:, None]
    new &= position < result.length[:, None]
    return float(jnp.min(jnp.where(new, best[..., 0] - best[..., 1], jnp.inf)))


def check_same(found, expected, prompts=PROMPTS):
    for row in range(len(prompts)):
        assert new_tokens(found, row) == new_tokens(expected, row)


def runs(decoder, params, prompts=PROMPTS):
    return decode.run(decoder, params, *decode.pad(prompts), KEY)


@pytest.mark.parametrize("verifier", [verify.block, verify.maximal, coupled.gumbel])
def test_greedy_text_is_that_of_plain_greedy(verifier):
    """Five ragged rows; a row ends in the middle of a block."""
    free = runs(decode.greedy(MODEL, NEW), BIG)
    assert margin(MODEL, BIG, free) > 1e-4
    texts = [new_tokens(free, row) for row in range(len(PROMPTS))]
    eos = [texts[0][5], texts[1][9]]
    expected = runs(decode.greedy(MODEL, NEW, eos=eos), BIG)
    best = warp.warp(MODEL, warp.greedy())
    decoder = speculate(
        on_lm(best, chunk=8),
        draft_lm(best, 4, chunk=8),
        NEW,
        verifier=verifier(),
        eos=eos,
    )
    found = runs(decoder, (BIG, SMALL))
    check_same(found, expected)
    new = np.asarray(found.length - found.prompt_length)
    calls, accepted = np.asarray(found.info.calls), np.asarray(found.info.accepted)
    assert len({*new}) > 2
    assert (new < accepted + calls).any()  # cut inside a block
    assert calls.sum() < 0.6 * new.sum()
    assert accepted.sum() < 0.95 * np.asarray(found.info.drafted).sum()


def test_coupled_text_is_that_of_plain_sampling():
    target = warp.warp(MODEL, *WARPS)
    expected = runs(decode.sample(target, NEW), BIG)
    assert margin(target, BIG, expected, law.row_keys(KEY, len(PROMPTS))) > 1e-4
    for draft in (draft_lm(target, 4), draft_lm(MODEL, 2)):
        decoder = speculate(on_lm(target), draft, NEW, verifier=coupled.gumbel())
        found = runs(decoder, (BIG, SMALL))
        check_same(found, expected)
        assert found.info.accepted.sum() > 0.5 * found.info.calls.sum()


def test_a_composed_target_and_a_shared_draft():
    """Penalties over a proxy-tuned model, whose expert drafts, as plain decoding."""
    proxy = pool.linear(1, 1, -1)
    third = jax.tree.map(lambda a, b: a + 0.04 * b, BIG, sharp(2))
    whole = warp.warp(combine.product([MODEL] * 3, proxy), *WARPS)
    expected = runs(decode.sample(whole, NEW), (BIG, SMALL, third))
    keys = law.row_keys(KEY, len(PROMPTS))
    assert margin(whole, (BIG, SMALL, third), expected, keys) > 1e-4
    draft = draft_lm(warp.warp(remembered(MODEL), *WARPS), 4, whole=True)
    shared = combine.product([MODEL, component(VOCAB), MODEL], proxy)
    shared = warp.warp(shared, *WARPS)
    for target, params in (
        (on_lm(whole), (BIG, SMALL, third)),
        (reuse(shared), (BIG, Drafted(), third)),
    ):
        decoder = speculate(target, draft, NEW, verifier=coupled.gumbel())
        found = runs(decoder, (params, SMALL))
        check_same(found, expected)
        assert found.info.calls.sum() < 0.8 * (NEW * len(PROMPTS))
