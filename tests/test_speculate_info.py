"""What the speculative loop measures and refuses, and the states that it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import (
    LM,
    NEAR,
    PARAMS,
    PROMPTS,
    VERIFIERS,
    VOCAB,
    WARPED,
    copies,
    draws,
    rounds,
)

from collab_jax import combine, decode, pool, score, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.stopping import confidence
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import Out


@pytest.mark.parametrize("name", VERIFIERS)
def test_info_is_what_scoring_says(name):
    result = draws(rounds(VERIFIERS[name](), eos=[4]), NEAR)
    scores = score.score(WARPED, PARAMS[0], result.tokens, result.length, 4)
    position = jnp.arange(result.tokens.shape[1])
    new = position >= result.prompt_length[:, None]
    new &= position < result.length[:, None]
    for measure in ("logprob", "entropy"):
        expected = jnp.where(new, getattr(scores, measure), 0)
        np.testing.assert_allclose(getattr(result.info, measure), expected, atol=1e-5)
    info = result.info
    assert (info.tried[:, 0] == info.calls).all()
    assert (info.tried[:, 1:] == info.taken[:, :-1]).all()
    assert (info.taken.sum(-1) == info.accepted).all()
    assert (info.drafted == 3 * info.calls).all()
    # all that was appended was accepted or the verifier's own, but for the last round
    new_count = result.length - result.prompt_length
    assert (new_count <= info.accepted + info.calls).all()
    assert (new_count >= info.accepted + info.calls - 4).all()


def forgetful(proposer):
    """The mistake: the last drafted token is never consumed."""

    def observe(params, state, verified):
        state = proposer.observe(params, state, verified)
        return state._replace(lag=jnp.zeros_like(state.lag))

    return proposer._replace(observe=observe)


@pytest.mark.parametrize("whole", [False, True])
def test_a_draft_of_the_target_is_always_accepted(whole):
    """Only if its state has every token: it counts what the draft's LM lacks."""
    proposer = draft_lm(WARPED, 3, whole=whole, chunk=3)
    shares = []
    for one in (proposer, forgetful(proposer)):
        decoder = speculate(on_lm(WARPED), one, 32, verifier=verify.block())
        info = draws(decoder, (PARAMS[0], PARAMS[0])).info
        shares.append(float(info.accepted.sum() / info.drafted.sum()))
    assert shares[0] == 1
    assert shares[1] == 1 if whole else shares[1] < 0.9


def test_a_target_that_lacks_a_token_is_seen():
    right = on_lm(WARPED, chunk=3)
    mistake = right._replace(
        rewind=lambda state, count: right.rewind(state, count + (count == 0))
    )
    expected = draws(decode.sample(WARPED, 12), PARAMS[0])
    decoders = [
        speculate(t, draft_lm(WARPED, 3), 12, verifier=coupled.gumbel())
        for t in (right, mistake)
    ]
    assert (draws(decoders[0], NEAR).tokens == expected.tokens).all()
    assert not (draws(decoders[1], NEAR).tokens == expected.tokens).all()


def test_no_retrace():
    """Prompts, lengths, keys and knobs may change without a new program."""
    traces = []

    def make(t):
        traces.append(1)
        lm = warp.warp(combine.product([LM, LM], pool.mixture()), warp.temperature(t))
        return speculate(on_lm(lm), draft_lm(LM, 2), 4)

    program = decode.compile(make)
    for seed, t in enumerate((0.5, 2.0)):
        for prompts in (PROMPTS, PROMPTS[::-1]):
            prompt, length = decode.pad(prompts, multiple=8)
            params = ((PARAMS[0], PARAMS[1]), PARAMS[1])
            program(t, params, prompt, length, jax.random.key(seed))
    assert len(traces) == 1


def test_nan_and_dead_laws_are_reported():
    prompt, length = decode.pad([[1], [2]])
    key = jax.random.key(0)
    decoder = speculate(on_lm(LM), draft_lm(LM, 2), 3)
    broken = (PARAMS[0].at[:].set(jnp.nan), PARAMS[1])
    with pytest.raises(FloatingPointError, match="row 0: NaN in 0"):
        decode.run(decoder, broken, prompt, length, key)
    nothing = warp.warp(LM, warp.forbid(range(VOCAB)))
    decoder = speculate(on_lm(nothing), draft_lm(LM, 2), 3)
    with pytest.raises(FloatingPointError, match="forbids every token in row 0"):
        decode.run(decoder, PARAMS, prompt, length, key)


def run_with(params, **rest):
    decoder = speculate(on_lm(LM), draft_lm(LM, 2, **rest), 3)
    return decode.run(decoder, params, *decode.pad([[1]]), jax.random.key(0))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: draft_lm(LM, 0), "length = 0: a draft of at least 1 token"),
        (lambda: draft_lm(LM, -1), "length = -1"),
        (lambda: speculate(on_lm(LM), copies(0), 3), "size of the proposer's drafts"),
        (lambda: speculate(on_lm(LM), copies(1), 0), "max_new_tokens = 0"),
        (lambda: run_with(PARAMS[0]), "the pair .*parameters of the target"),
        (lambda: run_with((PARAMS[0], PARAMS[1][:16, :3])), "a draft over 3 tokens"),
        (lambda: run_with(PARAMS, stopping=confidence(0.1)), "the pair .*of the rule"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_example_of_the_types():
    """A verifier sees targets' outputs as they are; the loop hands them on."""
    seen = []

    def observe(params, state, verified):
        seen.append(verified)
        return state

    proposer = copies(3)._replace(observe=observe)
    decoder = speculate(on_lm(LM), proposer, 4)
    jax.eval_shape(
        lambda *a: decoder.step((PARAMS[0], ()), decoder.init(*a)),
        (PARAMS[0], ()),
        *decode.pad(PROMPTS),
        jax.random.key(0),
    )
    rows = len(PROMPTS)
    assert seen[0].tokens.shape == (rows, 4)
    assert seen[0].path.shape == (rows, 3)
    assert isinstance(seen[0].out, Out)
    assert seen[0].out.logits.shape == (rows, 4, VOCAB)
