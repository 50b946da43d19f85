"""Self-speculation with small random transformers: the text, and what is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import new_tokens

from collab_jax import decode, lm, warp
from collab_jax.cooperate.efficient import coupled, exact
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.early_exit import Begun, early_exit, upper
from collab_jax.cooperate.efficient.ngram import ngram
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer
from collab_jax.testing import check_lm

VOCAB, EXIT = 61, 2
TAP = f"hidden.{EXIT}"
KINDS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    # windows, a tied head and scaled embeddings; learned positions
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "n_positions": 96},
}
PROMPTS = [[5, 9, 3], [7] * 11, [1, 2, 3, 4, 5, 6]]
KEY, NEW = jax.random.key(4), 20


def config_of(kind):
    if kind == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4}
    else:
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"head_dim": 8} if kind == "gemma2" else {}
    return from_hf(sizes | KINDS[kind])


def model(kind):
    """The whole model, its halves, and weights whose laws are not flat."""
    config = config_of(kind)
    params = init(jax.random.key(0), config)
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params)
    first = transformer(config, (TAP,), (0, EXIT))
    last = transformer(config, (), (EXIT, config.layers))
    return lm.language_model(transformer(config)), first, last, params


def both(params):
    return (params, Begun()), params


def check_same(found, expected):
    for row in range(len(PROMPTS)):
        assert new_tokens(found, row) == new_tokens(expected, row)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_the_model(kind):
    whole, first, last, params = model(kind)
    prompt, length = decode.pad(PROMPTS)
    plain = decode.greedy(whole, NEW)
    expected = decode.run(plain, params, prompt, length, KEY)
    eos = int(expected.tokens[0, length[0] + 7])  # ends a row inside a block
    draft = draft_lm(warp.warp(lm.language_model(first), warp.greedy()), 4, whole=True)
    target = early_exit(upper(first, last, TAP), TAP)
    ends = {"eos": (eos,)}
    decoder = speculate(target, draft, NEW, verifier=exact.greedy(), **ends)
    found = decode.run(decoder, both(params), prompt, length, KEY)
    expected = decode.run(
        decode.greedy(whole, NEW, **ends), params, prompt, length, KEY
    )
    check_same(found, expected)
    assert int(found.info.accepted.sum()) > 0  # the halves do go on from drafted tokens
    assert int(found.info.calls.sum()) < int((found.length - length).sum())


def test_samples_are_those_of_the_model_under_warps():
    whole, first, last, params = model("llama")
    prompt, length = decode.pad(PROMPTS)
    warps = warp.repetition_penalty(1.2), warp.temperature(0.9), warp.top_p(0.9)
    plain = decode.sample(warp.warp(whole, *warps), NEW)
    expected = decode.run(plain, params, prompt, length, KEY)
    draft = draft_lm(warp.warp(lm.language_model(first), *warps), 3, whole=True)
    target = early_exit(warp.warp(upper(first, last, TAP), *warps), TAP)
    decoder = speculate(target, draft, NEW, verifier=coupled.gumbel())
    check_same(decode.run(decoder, both(params), prompt, length, KEY), expected)


def test_verifying_does_not_run_the_first_layers_again():
    """They may hold NaN, and the target keeps no cache for them."""
    _, first, last, params = model("llama")
    target = early_exit(upper(first, last, TAP), TAP)
    prompt, length = decode.pad([[3, 1, 4]])
    state = target.init((params, Begun()), prompt, length, 4)
    assert state.first == ()
    assert len(state.last.k) == 1
    draft = draft_lm(lm.language_model(first), 2, whole=True)
    drafter = draft.init(params, prompt, length, 4)
    chain, _ = draft.propose(params, drafter, prompt, length, jax.random.split(KEY, 1))
    broken = dict(params)
    for layer in range(EXIT):
        nan = jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan), params[f"layers_{layer}"]
        )
        broken[f"layers_{layer}"] = nan
    pending = prompt[jnp.arange(1), length - 1]
    out, _ = target.score((broken, Begun()), state, chain, pending)
    good, _ = target.score((params, Begun()), state, chain, pending)
    np.testing.assert_array_equal(out.logits, good.logits)
    # the control: a prompt is read by all layers
    state = target.init((broken, Begun()), prompt, length, 4)
    out, _ = target.score((params, Begun()), state, chain, pending)
    assert not np.isfinite(out.logits).all()


def test_the_halves_together_are_an_lm():
    kind = "gemma2"
    _, first, last, _ = model(kind)
    # with the sharp weights of above, rounding alone goes beyond the laws' tolerance
    params = init(jax.random.key(0), config_of(kind))
    check_lm(upper(first, last, TAP), (params, Begun()), vocab=VOCAB)


def test_bad_input():
    whole, first, last, params = model("llama")
    config = config_of("llama")
    for wrong in ((2, 2), (-1, 2), (0, 4)):
        with pytest.raises(ValueError, match="0 <= first < last <= 3 is expected"):
            transformer(config, layers=wrong)
    with pytest.raises(ValueError, match=r"unknown taps \['hidden.3'\]"):
        transformer(config, ("hidden.3",), (0, 2))
    prompt, length = decode.pad([[3, 1, 4]])
    target = early_exit(upper(first, last, TAP), TAP)
    for draft, own in ((draft_lm(whole, 2, whole=True), params), (ngram(2), ())):
        decoder = speculate(target, draft, 4)
        with pytest.raises(ValueError, match=r"goes on from hidden\.2 of the draft"):
            decode.run(decoder, ((params, Begun()), own), prompt, length, KEY)
    state = target.init((params, Begun()), prompt, length, 4)
    chain = draft_lm(lm.language_model(first), 2, whole=True)
    drafter = chain.init(params, prompt, length, 4)
    made, _ = chain.propose(params, drafter, prompt, length, jax.random.split(KEY, 1))
    short = Draft(made.tokens[:, :1], made.count, None, None, made.out)
    with pytest.raises(ValueError, match=r"of \(1, 3\) tokens were handed over"):
        target.score((params, Begun()), state, short, prompt[:, 0])
