"""Every proposer of chains without a model: a row is a function of its own text."""

import jax
import pytest
from drafting import PROPOSERS
from speculation import (
    PARAMS,
    PROMPTS,
    VOCAB,
    WARPED,
    check_resumes,
    draws,
    new_tokens,
)

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
    check_resumes(decoder, params, prompts)
