"""Every proposer without a model, in the loop: the tokens of plain decoding."""

import functools

import jax
import numpy as np
import pytest
import speculation as spec
from drafting import PROPOSERS, TREES
from speculation import PARAMS, PROMPTS, WARPED, draws, new_tokens

from collab_jax import decode, lm, warp
from collab_jax.cooperate.efficient import tree
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
    verifier = tree.sampled() if name in TREES else None
    proposer = (PROPOSERS | TREES)[name](vocab)
    return speculate(on_lm(model, chunk=3), proposer, new, verifier=verifier, **rest)


@pytest.mark.parametrize("name", PROPOSERS | TREES)
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


@pytest.mark.parametrize("eos", [(), (4,)])
@pytest.mark.parametrize("name", TREES)
def test_trees_give_the_tokens_of_plain_sampling(name, eos):
    """Token for token with the same keys, in rows that end anywhere."""
    params = PARAMS[0]
    expected = draws(decode.sample(WARPED, 12, chunk=3, eos=eos), params)
    found = draws(rounds(WARPED, name, 12, spec.VOCAB, eos=eos), (params, ()))
    for row in range(len(PROMPTS)):
        assert new_tokens(found, row) == new_tokens(expected, row)
    assert found.info.accepted.sum() > 3
