"""Adaptive n-grams against a plain dictionary of counts."""

import jax
import jax.numpy as jnp
import naive_drafts as naive
import numpy as np
import pytest
from drafting import ROOM, histories, play

from collab_jax.cooperate.efficient import adaptive as ad


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("alphabet", [2, 5])
def test_tables_are_the_dictionary(order, alphabet):
    """Wherever no cell is shared, which is nearly everywhere in a large table."""
    proposer = ad.adaptive(6, order, 1 << 15)
    texts = histories(order, alphabet=alphabet)
    skipped = total = 0
    for seen, drafts in play(proposer, texts, alphabet=alphabet):
        for text, draft in zip(seen, drafts, strict=True):
            total += 1
            if collides(text, order, 1 << 15):
                skipped += 1
                continue
            assert draft == naive.adaptive(text, 6, order)
    assert skipped < 0.2 * total


def collides(text, order, slots):
    """Whether two n-grams of a length share a cell."""
    for n in range(1, order + 1):
        grams = {tuple(text[i - n : i]) for i in range(n, len(text) + 1)}
        cells = {naive.hashes([*gram], n)[-1] % slots for gram in grams}
        if len(cells) < len(grams):
            return True
    return False


def test_hashes_are_their_twin():
    text = [3, 1, 200_000, 0, 3, 1]
    found = np.asarray(ad.hashes(jnp.array(text), 4))
    for i in range(4, 7):
        assert found[:, i - 1].tolist() == naive.hashes(text[:i], 4)


def test_full_tables_lose_n_grams_and_nothing_else():
    """128 cells for up to 84 tokens: many are shared, and the tables say the same."""
    proposer = ad.adaptive(5, 4, 128)
    texts = histories(3, rows=24, alphabet=6)
    lost = 0
    for seen, drafts in play(proposer, texts, rounds=4, alphabet=6):
        for text, draft in zip(seen, drafts, strict=True):
            assert draft == naive.adaptive_tables(text, 5, 4, 128)
            lost += draft != naive.adaptive(text, 5, 4)
    assert lost > 0


def test_counts_do_not_depend_on_the_portions():
    """A run that is resumed has the tables of one that was not; cells are shared."""
    proposer = ad.adaptive(3, 4, 64)
    text = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 60)), jnp.int32)
    whole = proposer.init((), text, jnp.array([60, 51, 33, 20]), 0)
    state = proposer.init((), text[:, :20], jnp.full(4, 20), ROOM)
    propose = jax.jit(proposer.propose)
    for extra in range(0, 44, 4):
        length = 20 + jnp.minimum(extra, jnp.array([40, 31, 13, 0]))
        _, state = propose((), state, text, length, None)
    for a, b in zip(state, whole, strict=True):
        assert (a == b).all()


def test_counting_at_most_a_draft_a_round_is_enough():
    """The mistake: tokens are counted from the end, not from where counting ended."""
    proposer = ad.adaptive(2, 2, 64)
    text = jnp.array([[1, 2, 1, 3, 1, 3, 0, 0]])
    state = proposer.init((), text[:, :2], jnp.array([2]), 6)
    for length in (3, 6):
        _, state = proposer.propose((), state, text, jnp.array([length]), None)
    assert state.seen.tolist() == [6]
    assert state.grams.sum() == 5


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: ad.adaptive(0), "length = 0"),
        (lambda: ad.adaptive(-3), "length = -3"),
        (lambda: ad.adaptive(4, 1), "order = 1: at least 2"),
        (lambda: ad.adaptive(4, 3, 1000), "slots = 1000: a power of two"),
        (lambda: ad.adaptive(4, 3, 8), "slots = 8"),
        (lambda: ad.adaptive(4, 3, 1 << 25), "slots = 33554432"),
        (lambda: ad.adaptive(4, 3, 0), "slots = 0"),
    ],
)
def test_what_cannot_count_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()


def test_a_text_longer_than_the_table_is_refused():
    proposer = ad.adaptive(4, 3, 64)
    with pytest.raises(ValueError, match=r"64 cells for a text of up to 70.*slots=128"):
        proposer.init((), jnp.zeros((1, 40), jnp.int32), jnp.array([40]), 30)
