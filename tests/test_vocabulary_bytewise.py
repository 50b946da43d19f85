"""Ensembles byte by byte against sums over all ways to cut a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writing
from writing import START, WORDS

from collab_jax import combine, decode, pool
from collab_jax.ensemble.vocabulary.bytewise import best, bytewise
from collab_jax.ensemble.vocabulary.symbols import END, symbols
from collab_jax.models import table

WEIGHTS = (0.3, 0.7)
KEY = jax.random.key(0)
ALPHABET = "abc$"


def mass(read, words, text):
    """The probability that a member's text begins so, over all cuts into tokens."""
    if not text:
        return 1.0
    total, open_ = 0.0, [((), "", 1.0)]
    while open_:
        tokens, so_far, p = open_.pop()
        law = np.exp(read(tokens))
        for u, word in enumerate(words):
            whole = so_far + word
            if whole.startswith(text):
                total += p * law[u]
            elif text.startswith(whole) and word != "$":
                open_.append(((*tokens, u), whole, p * law[u]))
    return total


def law(reads, lists, text, weights=WEIGHTS):
    """The pooled law of the next symbol."""
    found = np.zeros(len(ALPHABET))
    for w, read, words in zip(weights, reads, lists, strict=True):
        before = mass(read, words, text)
        after = np.array([mass(read, words, text + c) for c in ALPHABET])
        if before:
            found += w * after / before
    return found / found.sum()


def aligned(read, words, text):
    """A mistake: the text is cut once, and the next token begins behind it."""
    tokens = []
    while text:
        u = max(
            (u for u, word in enumerate(words) if text.startswith(word)),
            key=lambda u: len(words[u]),
        )
        tokens, text = [*tokens, u], text[len(words[u]) :]
    found = np.exp(read(tuple(tokens)))
    return np.array(
        [sum(found[u] for u, w in enumerate(words) if w[0] == c) for c in ALPHABET]
    )


def check(result, laws):
    """Every symbol is the likeliest, and its log-prob the twin's."""
    for row in range(writing.ROWS):
        new = writing.string(result.tokens[row, 1 : result.length[row]].tolist())
        for at, symbol in enumerate(new):
            expected = laws(row, new[:at])
            assert ALPHABET[int(np.argmax(expected))] == symbol, (row, at)
            np.testing.assert_allclose(
                result.info.logprob[row, 1 + at],
                np.log(expected.max()),
                atol=2e-4,
            )


def greedy(lms, lists, limit, hypotheses, pooled=None):
    tables = writing.written(lists)
    pooled = pool.mixture(*WEIGHTS) if pooled is None else pooled
    return bytewise(lms, tables, limit, pooled, hypotheses=hypotheses, choose=best)


@pytest.mark.parametrize("kind", ["table", "model"])
def test_the_law_is_a_sum_over_cuts(kind):
    lms, own = writing.members(kind)
    program = decode.compile(lambda _: greedy(lms, WORDS, 6, 12))
    seeds = range(4) if kind == "table" else (0,)
    lost = 0
    for seed in seeds:
        _, own = writing.members(kind, seed=5 * seed)
        reads = [writing.readers(kind, r, seed=5 * seed) for r in range(writing.ROWS)]
        result = program(None, own, *START, KEY)
        check(result, lambda row, text, r=reads: law(r[row], WORDS, text))
        for row in range(writing.ROWS):
            new = writing.string(result.tokens[row, 1 : result.length[row]].tolist())
            for at in range(len(new)):
                right = law(reads[row], WORDS, new[:at])
                wrong = sum(
                    w * aligned(read, words, new[:at])
                    for w, read, words in zip(WEIGHTS, reads[row], WORDS, strict=True)
                )
                lost += abs(right - wrong).max() > 0.01
    assert lost


def test_few_hypotheses_lose_mass():
    """One hypothesis commits to a cut; the law is then another, and still a law."""
    unlike = 0
    few = decode.compile(lambda _: greedy(writing.members("table")[0], WORDS, 6, 1))
    for seed in range(6):
        _, own = writing.members("table", seed=3 * seed)
        result = few(None, own, *START, KEY)
        assert np.isfinite(result.scores).all()
        for row in range(writing.ROWS):
            reads = writing.readers("table", row, seed=3 * seed)
            new = writing.string(result.tokens[row, 1 : result.length[row]].tolist())
            for at, symbol in enumerate(new):
                exact = law(reads, WORDS, new[:at])[ALPHABET.index(symbol)]
                unlike += abs(np.exp(result.info.logprob[row, 1 + at]) - exact) > 0.01
    assert unlike


def test_letters_are_an_ensemble_of_tokens():
    """Where every token is one symbol this is a mixture of laws, token by token."""
    lists = writing.LETTERS
    lms, own = writing.members("table", lists)
    result = decode.run(greedy(lms, lists, 5, 2), own, *START, KEY)
    both = combine.product(lms, pool.mixture(*WEIGHTS))
    theirs = decode.run(decode.greedy(both, 5, eos=(3,)), own, *START, KEY)
    for row in range(writing.ROWS):
        tokens = theirs.tokens[row, 1 : theirs.length[row]].tolist()
        mine = writing.string(result.tokens[row, 1 : result.length[row]].tolist())
        assert mine == "".join(lists[0][v] for v in tokens)
    np.testing.assert_allclose(result.scores, theirs.scores, rtol=1e-5)
    drawn = bytewise(lms, writing.written(lists), 5, pool.mixture(*WEIGHTS))
    once, again = (decode.run(drawn, own, *START, KEY) for _ in range(2))
    np.testing.assert_array_equal(once.tokens, again.tokens)


def test_one_member_writes_as_it_would_alone():
    """A weight of 0, or one member, give that member's law of bytes."""
    lms, own = writing.members("table")
    tables = writing.written(WORDS)
    alone = bytewise(lms[:1], tables[:1], 6, hypotheses=12, choose=best)
    one = decode.run(alone, own[:1], *START, KEY)
    pooled = pool.mixture(1.0, 0.0)
    both = decode.run(greedy(lms, WORDS, 6, 12, pooled), own, *START, KEY)
    np.testing.assert_array_equal(one.tokens, both.tokens)
    np.testing.assert_allclose(one.scores, both.scores, rtol=1e-5)
    check(
        one,
        lambda row, text: law(writing.readers("table", row)[:1], WORDS[:1], text, (1,)),
    )


def test_a_row_does_not_depend_on_its_batch():
    lms, own = writing.members("table")
    decoder = bytewise(lms, writing.written(WORDS), 6, hypotheses=4)
    keys = jax.random.split(KEY, writing.ROWS)
    together = decode.run(decoder, own, *START, keys)
    for row in range(writing.ROWS):
        alone = tuple((p, t[row : row + 1], n[row : row + 1]) for p, t, n in own)
        one = decode.run(decoder, alone, *decode.pad([[0]]), keys[row : row + 1])
        size = int(one.length[0])
        assert size == together.length[row]
        np.testing.assert_array_equal(one.tokens[0, :size], together.tokens[row, :size])


def test_tokens_that_write_the_same_and_tokens_that_write_nothing():
    """Their mass is added; what writes nothing has none."""
    lm = combine.prefixed(table.language_model(0))
    made = symbols([b"a", b"a", b"b", b"", b""], [3])
    params = (jnp.log(jnp.array([[0.25, 0.15, 0.2, 0.2, 0.2]])), *decode.pad([[0]]))
    decoder = bytewise([lm], [made], 3, choose=best)
    found = decode.run(decoder, (params,), *decode.pad([[0]]), KEY)
    assert found.tokens[0].tolist() == [0, 97, 97, 97]
    np.testing.assert_allclose(np.exp(found.info.logprob[0, 1:]), 0.5, rtol=1e-5)
    assert END not in found.tokens[0]


def test_a_member_that_cannot_write_a_byte_drops_out():
    lm = combine.prefixed(table.language_model(0))
    tables = [symbols([b"a", b""], [1]), symbols([b"b", b""], [1])]
    laws = jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.9, 0.1]]))
    params = tuple((p, *decode.pad([[0]])) for p in laws)
    decoder = bytewise([lm] * 2, tables, 3, choose=best)
    found = decode.run(decoder, params, *decode.pad([[0]]), KEY)
    assert found.tokens[0, 1:].tolist() == [98, 98, 98]
    np.testing.assert_allclose(
        np.exp(found.info.logprob[0, 1:]), [0.45, 0.9, 0.9], rtol=1e-5
    )
    both = bytewise([lm] * 2, tables, 3, pool.linear(0.5, 0.5), choose=best)
    ended = decode.run(both, params, *decode.pad([[0]]), KEY)
    assert ended.tokens[0, 1] == END  # all that both allow
    broken = ((laws[0] * jnp.nan, *params[0][1:]), params[1])
    with pytest.raises(FloatingPointError, match="became NaN in row 0"):
        decode.run(decoder, broken, *decode.pad([[0]]), KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lms, t: bytewise(lms, t[:1], 3), "2 members and 1 tables"),
        (lambda lms, t: bytewise(lms, t, 0), "max_new_symbols = 0"),
        (lambda lms, t: bytewise(lms, t, 3, hypotheses=0), "hypotheses = 0"),
        (
            lambda lms, t: bytewise(lms, t, 3).init(None, *decode.pad([[1, 2]]), KEY),
            "prompt of 2 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    lms, _ = writing.members("table")
    with pytest.raises(ValueError, match=message):
        make(lms, writing.written(WORDS))
