"""Stop automata against a plain search of the text, alone and inside decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import beam, decode, stop
from collab_jax.models import table

SPELLING = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aab",
    b"",
    "é".encode(),
    "é".encode()[:1],
    b"\xa9",
]
STRINGS = [
    ["ab"],
    ["aa", "aab", "bb"],  # one is the start of another
    ["abab", "ba"],  # one lies inside another
    ["aaaa"],  # overlaps with itself
    ["é", "bab"],  # two bytes, which tokens may split
    ["b" * 4],
]
VOCAB = len(SPELLING)


def first_stop(tokens, strings):
    """How many tokens it takes to complete a stop string; None if they do not."""
    text = b""
    for count, token in enumerate(tokens, 1):
        text += SPELLING[token]
        if any(string.encode() in text for string in strings):
            return count
    return None


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_equals_a_search_of_the_text(strings):
    automaton = stop.automaton(strings, SPELLING)
    stream = np.random.default_rng(0).integers(0, VOCAB, (300, 12))

    @jax.jit
    def accepted(stream):
        def advance(state, token):
            state = automaton.advance(state, token)
            return state, automaton.accept[state]

        start = jnp.zeros(stream.shape[0], jnp.int32)
        return jax.lax.scan(advance, start, stream.T)[1].T

    found = np.asarray(accepted(jnp.asarray(stream)))
    ends = [first_stop(row, strings) for row in stream.tolist()]
    for row, end in zip(found, ends, strict=True):
        expected = np.arange(1, 13) >= (13 if end is None else end)
        np.testing.assert_array_equal(row, expected)  # accepting states are kept
    assert any(ends), "no stream stopped"


def test_a_search_inside_single_tokens_misses_some():
    """Negative control: the strings above are split by tokens."""
    stream = np.random.default_rng(0).integers(0, VOCAB, (300, 12)).tolist()
    missed = 0
    for row in stream:
        inside = [b"ab" in SPELLING[token] for token in row]
        end = first_stop(row, ["ab"])
        missed += end is not None and not any(inside[:end])
    assert missed > 10


@pytest.mark.parametrize("make", [decode.sample, decode.greedy, beam.search])
def test_decoders_stop_with_the_token_that_completes(make):
    strings = ["abab", "bb", "é"]
    automaton = stop.automaton(strings, SPELLING)
    lm = table.language_model(2)
    prompts, length = decode.pad([[0, 1], [2], [7]])  # é is half there: not counted
    stopping = decode.compile(lambda _: make(lm, 8, stop=automaton))
    stopped = 0
    for seed in range(10):
        params = table.init(jax.random.key(seed), VOCAB, 2, 2.0)
        result = stopping(None, params, prompts, length, jax.random.key(seed))
        for row in range(3):
            begin, end = int(length[row]), int(result.length[row])
            new = result.tokens[row, begin:end].tolist()
            at = first_stop(new, strings)
            assert len(new) == (8 if at is None else at)
            stopped += at is not None
    assert stopped > 5


def test_trim_takes_the_earliest():
    assert stop.trim("one; two. three", [".", ";"]) == "one"
    assert stop.trim("one", ["x"]) == "one"
    assert stop.trim("aab", ["ab", "aab"]) == ""


@pytest.mark.parametrize("strings", [[], ["a", ""]])
def test_refuses(strings):
    with pytest.raises(ValueError, match="at least one is expected, and none empty"):
        stop.automaton(strings, SPELLING)
