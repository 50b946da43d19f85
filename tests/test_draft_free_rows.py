"""Every proposer of chains without a model: a row is a function of its own text."""

import jax
import numpy as np
import pytest
from drafting import PROPOSERS
from speculation import PARAMS, PROMPTS, VOCAB, WARPED, draws, new_tokens

from collab_jax import decode
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm


def rounds(name, **rest):
    return speculate(on_lm(WARPED, chunk=3), PROPOSERS[name](VOCAB), 12, **rest)


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_row_does_not_depend_on_its_batch_or_padding(name):
    decoder = rounds(name, eos=[4])
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
    decoder = rounds("adaptive")
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
