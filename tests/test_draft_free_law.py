"""Every proposer without a model against the law that the text has to follow."""

import functools

import jax.numpy as jnp
import pytest
import speculation as spec
from drafting import PROPOSERS
from speculation import PARAMS, WARPED

from collab_jax.cooperate.efficient.ngram import ngram
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm


@functools.cache
def joint():
    return spec.target_joint(WARPED, PARAMS[0], [1, 2, 1, 2], 4)


def chi_square(proposer, runs=10_000):
    decoder = speculate(on_lm(WARPED), proposer, 4)
    drawn = spec.counts(decoder, (PARAMS[0], ()), [1, 2, 1, 2], 4, runs)
    return spec.chi_square(drawn, joint())


@pytest.mark.parametrize("name", PROPOSERS)
def test_samples_follow_the_law(name):
    found, limit = chi_square(PROPOSERS[name](spec.VOCAB))
    assert found < limit


def test_a_copy_with_a_law_is_seen():
    """The mistake: a look-up is not random, whatever law it is given."""
    right = ngram(4)

    def propose(*arguments):
        draft, state = right.propose(*arguments)
        return draft._replace(law=jnp.zeros((*draft.tokens.shape, spec.VOCAB))), state

    found, limit = chi_square(right._replace(propose=propose))
    assert found > 2 * limit
