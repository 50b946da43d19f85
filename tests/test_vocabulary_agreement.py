"""Agreement-based ensembles against a search over strings, and their identities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writing
from writing import START, WORDS

from collab_jax import beam, combine, decode, pool
from collab_jax.ensemble.vocabulary.agreement import agreement
from collab_jax.ensemble.vocabulary.symbols import END, symbols, text
from collab_jax.models import table

WEIGHTS = (0.3, 0.7)
KEY = jax.random.key(0)


def agree(one, two):
    return one.startswith(two) or two.startswith(one)


def naive(reads, lists, weights, limit, beams, top, penalty=0.0, equal=False):
    """Lists of hypotheses and strings: `[(penalised score, text), ...]`, best first.

    `equal`: a mistake, texts that must be equal instead of agreeing.
    """
    count = len(reads)
    running, ended = [(0.0, [()] * count)], []

    def spelled(n, tokens):
        return "".join(lists[n][u] for u in tokens)

    def penalised(score, size):
        return score / size**penalty

    while running:
        grown = []
        for score, tokens in running:
            texts = [spelled(n, tokens[n]) for n in range(count)]
            longest = max(texts, key=len)
            behind = [t != longest for t in texts]
            options = []
            for n in range(count):
                if any(behind) and not behind[n]:
                    options.append([(0.0, None)])
                    continue
                law = reads[n](tokens[n])
                fits = [
                    (weights[n] * law[u], u)
                    for u, word in enumerate(lists[n])
                    if agree(texts[n] + word, longest)
                ]
                options.append(sorted(fits, key=lambda one: -one[0])[:top])
            for choice in itertools.product(*options):
                new = [
                    tokens[n] if u is None else (*tokens[n], u)
                    for n, (_, u) in enumerate(choice)
                ]
                found = [spelled(n, new[n]) for n in range(count)]
                pairs = itertools.combinations(found, 2)
                if all(a == b if equal else agree(a, b) for a, b in pairs):
                    grown.append((score + sum(s for s, _ in choice), new, found))
        grown = sorted(grown, key=lambda one: -one[0])[: 2 * beams]
        running = []
        for rank, (score, new, found) in enumerate(grown):
            longest = max(found, key=len)
            whole = all(t == longest for t in found) and longest.endswith("$")
            if whole or len(longest) >= limit:
                if rank < beams:
                    cut = longest[:limit]
                    ended.append((penalised(score, len(cut)), cut))
            else:
                running.append((score, new))
        running = running[:beams]
        ended = sorted(ended, key=lambda one: -one[0])[:beams]
        if running and len(ended) == beams:
            reach = limit if penalty > 0 else 1
            if penalised(running[0][0], reach) <= ended[-1][0]:
                break
    return ended


def found(result, row):
    texts = result.info.texts
    rows = zip(
        texts.score[row].tolist(),
        texts.length[row].tolist(),
        texts.symbols[row].tolist(),
        strict=True,
    )
    return [(s, writing.string(own[:size])) for s, size, own in rows if s > -np.inf]


def check(result, expected):
    for row, want in enumerate(expected):
        mine = found(result, row)
        assert [t for _, t in mine] == [t for _, t in want], row
        scores = [s for s, _ in mine], [s for s, _ in want]
        np.testing.assert_allclose(*scores, rtol=2e-4, atol=1e-5)
        assert np.isfinite(result.scores[row]) == bool(want)  # a search may die
        if want:
            best = result.tokens[row, 1 : result.length[row]].tolist()
            assert writing.string(best) == want[0][1]


def search(lms, lists, limit, beams, top, penalty=0.0):
    tables = writing.written(lists)
    return decode.compile(
        lambda w: agreement(
            lms,
            tables,
            limit,
            beams,
            weights=(w, 1 - w),
            top=top,
            length_penalty=penalty,
        )
    )


@pytest.mark.parametrize(
    ("beams", "top", "penalty"), [(1, 2, 0.0), (3, 9, 0.0), (3, 3, 1.0)]
)
def test_the_search_is_the_naive_one(beams, top, penalty):
    program = search(writing.members("table")[0], WORDS, 6, beams, top, penalty)
    unlike = 0
    for seed in range(6):
        _, own = writing.members("table", seed=7 * seed)
        reads = [
            writing.readers("table", r, seed=7 * seed) for r in range(writing.ROWS)
        ]
        settings = (WORDS, WEIGHTS, 6, beams, top, penalty)
        result = program(WEIGHTS[0], own, *START, KEY)
        expected = [naive(read, *settings) for read in reads]
        check(result, expected)
        wrong = [naive(read, *settings, equal=True) for read in reads]
        unlike += wrong != expected
        unlike += [naive(read, WORDS, (0.5, 0.5), *settings[2:]) for read in reads] != (
            expected
        )
    assert unlike >= 6  # texts that must be equal, or other weights, are other texts
    assert program._cache_size() == 1


def test_the_search_of_transformers_is_the_naive_one():
    lms, own = writing.members("model")
    program = search(lms, WORDS, 5, 2, 4)
    result = program(WEIGHTS[0], own, *START, KEY)
    reads = [writing.readers("model", r) for r in range(writing.ROWS)]
    check(result, [naive(read, WORDS, WEIGHTS, 5, 2, 4) for read in reads])


def test_letters_are_a_product_of_experts():
    """Where every token is one symbol, agreement is equality: beam search as ever."""
    lists = writing.LETTERS
    lms, own = writing.members("table", lists)
    result = search(lms, lists, 5, 3, 4)(WEIGHTS[0], own, *START, KEY)
    both = combine.product(lms, pool.linear(*WEIGHTS))
    plain = beam.search(both, 5, 3, eos=(3,), length_penalty=0.0, measure=lambda z: z)
    theirs = decode.run(plain, own, *START, KEY)
    for row in range(writing.ROWS):
        beams = theirs.info.beams
        texts = [
            "".join(lists[0][v] for v in tokens[:size])
            for tokens, size in zip(
                beams.tokens[row].tolist(), beams.length[row].tolist(), strict=True
            )
        ]
        mine = found(result, row)
        assert [t for _, t in mine] == texts
        np.testing.assert_allclose([s for s, _ in mine], beams.score[row], rtol=1e-5)


def test_a_weight_of_0_leaves_the_other_member():
    """The greedy text of one, which the other spells along."""
    lms, own = writing.members("table")
    program = search(lms, WORDS, 6, 1, 9)
    for weight, n in ((1.0, 0), (0.0, 1)):
        result = program(weight, own, *START, KEY)
        alone = decode.greedy(lms[n], 6, eos=(WORDS[n].index("$"),))
        theirs = decode.run(alone, own[n], *START, KEY)
        for row in range(writing.ROWS):
            mine = writing.string(result.tokens[row, 1 : result.length[row]].tolist())
            tokens = theirs.tokens[row, 1 : theirs.length[row]].tolist()
            plain = "".join(WORDS[n][v] for v in tokens)
            assert plain.startswith(mine) or mine == plain
            assert len(mine) >= min(len(plain), 6)


def test_a_row_does_not_depend_on_its_batch():
    lms, own = writing.members("table")
    program = search(lms, WORDS, 6, 3, 9)
    together = program(WEIGHTS[0], own, *START, KEY)
    for row in range(writing.ROWS):
        alone = tuple((p, t[row : row + 1], n[row : row + 1]) for p, t, n in own)
        one = program(WEIGHTS[0], alone, *decode.pad([[0]]), KEY)
        ours, theirs = found(one, 0), found(together, row)
        assert [t for _, t in ours] == [t for _, t in theirs]


def test_what_cannot_agree_and_what_is_nan():
    tables = writing.written((["a", "$"], ["b", "$"]))
    apart = [combine.prefixed(table.language_model(0))] * 2
    laws = jnp.log(jnp.array([[0.9, 0.1]])), jnp.log(jnp.array([[0.9, 0.1]]))
    given = tuple((p, *decode.pad([[0]])) for p in laws)
    decoder = agreement(apart, tables, 3, 1, top=1)
    with pytest.raises(FloatingPointError, match="forbids every token in row 0"):
        decode.run(decoder, given, *decode.pad([[0]]), KEY)
    whole = decode.run(
        agreement(apart, tables, 3, 1, top=2), given, *decode.pad([[0]]), KEY
    )
    assert text(whole.tokens[0, 1:]) == b""  # both can but end
    broken = ((laws[0] * jnp.nan, *given[0][1:]), given[1])
    with pytest.raises(FloatingPointError, match="became NaN in row 0"):
        decode.run(decoder, broken, *decode.pad([[0]]), KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lms, t: agreement(lms, t[:1], 3), "2 members, 1 tables"),
        (lambda lms, t: agreement(lms, t, 3, weights=(0.5,)), "1 weights"),
        (lambda lms, t: agreement(lms, t, 3, weights=(0.5, -1)), "weight of -1"),
        (lambda lms, t: agreement(lms, t, 0), "max_new_symbols = 0"),
        (lambda lms, t: agreement(lms, t, 3, top=0), "top = 0"),
        (lambda lms, t: agreement(lms * 4, t * 4, 3, top=6), "combinations a beam"),
        (
            lambda lms, t: agreement(lms, t, 3).init(None, *decode.pad([[1, 2]]), KEY),
            "prompt of 2 tokens",
        ),
        (lambda lms, t: symbols([b"a"], [1]), r"end tokens \[1\]"),
        (lambda lms, t: symbols([b""]), "none of 1 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    lms, _ = writing.members("table")
    with pytest.raises(ValueError, match=message):
        make(lms, writing.written(WORDS))


def test_what_tokens_write():
    made = symbols([b"a", b"", b"abc", b"x" * 9], [1], vocab=6, longest=4)
    assert made.size.tolist() == [1, 1, 3, 0, 0, 0]
    assert made.spelling[1, 0] == END
    assert text([97, 98]) == b"ab"
