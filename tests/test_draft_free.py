"""Every proposer without a model, in the loop: greedy text, and rows."""

import functools

import jax
import numpy as np
import pytest
import speculation as spec
from drafting import PROPOSERS
from speculation import PARAMS, PROMPTS, WARPED, draws, new_tokens

from collab_jax import decode, lm, warp
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import transformer
from collab_jax.models.config import from_hf

VOCAB = 23
# the second one is in a loop, and its draft runs over the end of the text
RAGGED = [
    [5, 6, 7, 5, 6],
    [1, 16, 22, 22, 22, 22, 22],
    [3, 3, 9, 14, 2, 8, 3, 3, 9, 14, 2],
]


@functools.cache
def small():
    """A random model with grouped heads."""
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    params = jax.jit(lambda key: transformer.init(key, config))(jax.random.key(0))
    return lm.language_model(transformer.transformer(config)), params


@functools.cache
def greedy_text(eos):
    model, params = small()
    return draws(decode.greedy(model, 32, eos=eos), params, RAGGED)


def rounds(model, name, new, vocab, **rest):
    return speculate(on_lm(model, chunk=3), PROPOSERS[name](vocab), new, **rest)


@pytest.mark.parametrize("name", PROPOSERS)
def test_greedy_text_is_that_of_plain_decoding(name):
    """Ragged prompts; ends in the first block, in the middle, at the limit."""
    model, params = small()
    eos = 22, 12
    expected = greedy_text(eos)
    decoder = rounds(warp.warp(model, warp.greedy()), name, 32, VOCAB, eos=eos)
    found = draws(decoder, (params, ()), RAGGED)
    for row in range(3):
        assert new_tokens(found, row) == new_tokens(expected, row)
    new = np.asarray(found.length - found.prompt_length)
    assert new[0] == 32 > int(found.info.calls[0])
    assert new[1] == 1 < int(found.info.accepted[1])
    assert 4 < new[2] < 32


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_row_does_not_depend_on_its_batch_or_padding(name):
    decoder = rounds(WARPED, name, 12, spec.VOCAB, eos=[4])
    params = PARAMS[0], ()
    together = draws(decoder, params)
    program = decode.compile(lambda _: decoder)
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        padded = decode.pad([prompt], multiple=16)
        alone = program(None, params, *padded, keys[row : row + 1])
        assert new_tokens(together, row) == new_tokens(alone, 0)
    assert program._cache_size() == 1


def test_a_run_resumes_from_its_text():
    """The tables of a row are a function of what stands in it."""
    decoder = rounds(WARPED, "adaptive", 12, spec.VOCAB)
    params, prompts = (PARAMS[0], ()), [[1, 2, 3, 1, 2], [0, 4, 4, 0]]
    whole = draws(decoder, params, prompts)
    keys = jax.random.split(jax.random.key(5), 2)
    state = jax.jit(decoder.init)(params, *decode.pad(prompts), keys)
    step = jax.jit(decoder.step)
    state = step(params, step(params, state))
    texts = [
        np.asarray(state.tokens)[b, : int(state.length[b])].tolist() for b in range(2)
    ]
    again = draws(decoder, params, texts)
    for row in range(2):
        rest = new_tokens(whole, row)[int(state.length[row]) - len(prompts[row]) :]
        assert new_tokens(again, row)[: len(rest)] == rest
