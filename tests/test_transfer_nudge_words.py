"""Nudging by words: a twin that reads the text anew, laws, speculation, identities."""

import jax.numpy as jnp
import numpy as np
import pytest
import transferring as own
from transferring import PROMPTS, TABLE, TABLES, VOCAB, check_methods, logits

from collab_jax import combine, decode
from collab_jax.combine import prefixed
from collab_jax.cooperate.transfer import nudge
from collab_jax.cooperate.transfer.nudge_words import nudging_by_words, word_starts

STARTS = np.isin(np.arange(VOCAB), [0, 2, 5])
CHATS = [[5, 5], [1, 2, 3], [0]]


def twin(laws, text, gamma, starts=STARTS):
    """Who speaks behind a text, found from its first token on, and the law.

    Args:
      laws: from a text to the logits of both models.
    """
    small = False
    for t in range(1, len(text) + 1):
        p, q = (own.log_softmax(z) for z in laws(text[:t]))
        unsure = np.exp(p.max()) < gamma
        small = unsure or (small and not starts[int(np.argmax(q))])
    return q if small else p


def make(lms, starts=STARTS):
    return own.knobbed(
        lambda g: nudging_by_words(*lms, starts, 0.5 if g is None else g)
    )


@pytest.mark.parametrize("kind", ["table", "model"])
def test_decodes_as_its_twin(kind):
    lm, params = own.kinds()[kind]

    def behind(gamma):
        def laws(text):
            return [logits(lm, p, text) for p in params[:2]]

        return lambda text, row: twin(laws, text, gamma)

    knobs = {"seldom": 0.4, "often": 0.7}
    cases = {n: ((jnp.array(g), params[:2]), behind(g)) for n, g in knobs.items()}
    laws = ("seldom",) if kind == "table" else ()
    check_methods(make([lm, lm]), cases, laws=laws, atol=2e-4, tolerance=1e-4)


def test_prompts_of_their_own():
    """The small model has a chat prompt, and the text begins with what is written."""
    params = TABLES[0], (TABLES[1], *decode.pad(CHATS))

    def law(text, row):
        def laws(text):
            return [
                logits(TABLE, TABLES[0], text),
                logits(TABLE, TABLES[1], CHATS[row] + text[1:]),
            ]

        return twin(laws, text, 0.5)

    cases = {"chats": ((jnp.array(0.5), params), law)}
    check_methods(make([TABLE, prefixed(TABLE, 2)]), cases, [[3], [1], [0]])


def run(lm, params):
    return decode.run(decode.greedy(lm, 12), params, *decode.pad(PROMPTS), own.KEY)


def test_identities():
    words, both = [TABLE, TABLE], TABLES[:2]
    pool = combine.product(words, nudge.nudging(0.5))
    every = np.ones(VOCAB, bool)
    assert own.same_text(
        run(nudging_by_words(*words, every, 0.5), both), run(pool, both)
    )
    for gamma, alone in ((0.0, TABLES[0]), (1.0, TABLES[1])):
        found = run(nudging_by_words(*words, STARTS, gamma), both)
        assert own.same_text(found, run(TABLE, alone))
    # the control: token by token is another text
    found = run(nudging_by_words(*words, STARTS, 0.5), both)
    assert not own.same_text(found, run(pool, both))


def test_word_starts_and_refusals():
    assert word_starts([b" a", b"b", b"\tc", b""]).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="alpha = 2"):
        nudging_by_words(TABLE, TABLE, STARTS, 2)
    with pytest.raises(ValueError, match=r"starts of shape \(3,\) .* 7 tokens"):
        run(nudging_by_words(TABLE, TABLE, STARTS[:3], 0.5), TABLES[:2])
