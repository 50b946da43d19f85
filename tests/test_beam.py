"""Beam search against its definition, exhaustive search and its own special cases."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import naive_beam
import numpy as np
import pytest

from collab_jax import beam, combine, decode, lm, pool, stop, warp
from collab_jax.models import table

NEVER = beam.EarlyStopping.NEVER
VOCAB, ORDER, NEW = 7, 2, 5
PROMPTS = [[1], [2, 0, 3], [4, 4, 1, 6, 0]]


def laws(seed, scale=1.5):
    return table.init(jax.random.key(seed), VOCAB, ORDER, scale)


def log_probs(params, text):
    """The table's log-probs after a text, as its definition says."""
    vocab = params.shape[1]
    near = [*text[::-1], *[vocab] * ORDER][:ORDER]
    row = params[sum(token * (vocab + 1) ** k for k, token in enumerate(near))]
    row = np.asarray(row, np.float64)
    return row - np.logaddexp.reduce(row)


def naive(params, prompt, beams, penalty=1.0, early=False, eos=(), **rest):
    read = functools.partial(log_probs, params)
    return naive_beam.search(read, prompt, beams, NEW, penalty, early, eos, **rest)


@functools.cache
def program(beams, early, eos, automaton=None, new_tokens=NEW):
    model = table.language_model(ORDER)
    return decode.compile(
        lambda penalty: beam.search(
            model,
            new_tokens,
            beams,
            length_penalty=penalty,
            early_stopping=early,
            eos=eos,
            stop=automaton,
            chunk=4,
        )
    )


def found(result, row):
    """The ended beams of a row: penalised scores and new tokens."""
    beams = result.info.beams
    return [
        (score, tokens[:length])
        for score, length, tokens in zip(
            beams.score[row].tolist(),
            beams.length[row].tolist(),
            beams.tokens[row].tolist(),
            strict=True,
        )
        if score > -math.inf
    ]


def check_same(mine, theirs):
    assert [text for _, text in mine] == [text for _, text in theirs]
    scores = [score for score, _ in mine], [score for score, _ in theirs]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


KEY = jax.random.key(0)


CASES = [
    *itertools.product([1, 2, 4], [False], [()]),  # every beam ends at once: one rule
    *itertools.product([1, 2, 3, 4], [False, True, NEVER], [(0,)]),
    *itertools.product([3], [False, True, NEVER], [(0, 3)]),
]


@pytest.mark.parametrize(("beams", "early", "eos"), CASES)
def test_equals_the_definition(beams, early, eos):
    search = program(beams, early, eos)
    prompts, length = decode.pad(PROMPTS)
    for seed, penalty in itertools.product(range(6), (-1.0, 0.0, 1.0, 2.0)):
        params = laws(seed)
        result = search(penalty, params, prompts, length, KEY)
        for row, prompt in enumerate(PROMPTS):
            expected = naive(params, prompt, beams, penalty, early, eos)
            check_same(found(result, row), expected)
            best = result.tokens[row, len(prompt) : result.length[row]].tolist()
            assert best == expected[0][1]
            total = expected[0][0] * len(best) ** penalty
            np.testing.assert_allclose(result.scores[row], total, rtol=1e-5)
    assert search._cache_size() == 1  # knobs, parameters and prompts are arguments


def test_known_mistakes_are_seen():
    """The twin with a mistake differs from the search somewhere in this range."""
    search = program(3, False, (0,))
    prompts, length = decode.pad(PROMPTS)
    for mistake in ({"whole_length": True}, {"forgets_ended": True}):
        differs = 0
        for seed in range(6):
            params = laws(seed)
            result = search(1.0, params, prompts, length, KEY)
            for row, prompt in enumerate(PROMPTS):
                wrong = naive(params, prompt, 3, 1.0, False, (0,), **mistake)
                right = found(result, row)
                differs += [t for _, t in wrong] != [t for _, t in right]
        assert differs > 0, mistake


def test_the_rules_of_stopping_differ():
    """Otherwise the comparison above would not tell them apart."""
    texts = []
    for early in (False, True, NEVER):
        texts.append(
            [
                text
                for seed in range(6)
                for prompt in PROMPTS
                for _, text in naive(laws(seed), prompt, 3, 1.0, early, (0, 3))
            ]
        )
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_enough_is_exhaustive(penalty):
    """With V ** (N - 1) beams nothing is pruned: the best text of all is found."""
    params = table.init(jax.random.key(3), 3, ORDER, 1.5)
    search = beam.search(table.language_model(ORDER), 3, 9, length_penalty=penalty)
    result = decode.run(search, params, *decode.pad([[1, 2]]), KEY)

    def score(text):
        steps = [log_probs(params, [1, 2, *text[:i]])[text[i]] for i in range(3)]
        return sum(steps) / 3**penalty

    best = max(itertools.product(range(3), repeat=3), key=score)
    assert result.tokens[0, 2:5].tolist() == list(best)
    np.testing.assert_allclose(found(result, 0)[0][0], score(best), rtol=1e-5)


def test_one_beam_is_greedy():
    model = table.language_model(ORDER)
    prompts, length = decode.pad(PROMPTS)
    searching = decode.compile(lambda _: beam.search(model, NEW, 1))
    greedily = decode.compile(lambda _: decode.greedy(model, NEW))
    for seed in range(10):
        arguments = None, laws(seed), prompts, length, KEY
        mine, theirs = searching(*arguments), greedily(*arguments)
        np.testing.assert_array_equal(mine.length, theirs.length)
        for row, end in enumerate(theirs.length.tolist()):
            assert (mine.tokens[row, :end] == theirs.tokens[row, :end]).all()
        for name in ("logprob", "entropy", "calls"):
            pair = getattr(mine.info, name), getattr(theirs.info, name)
            np.testing.assert_allclose(*pair, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mine.scores, theirs.scores, rtol=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    together = program(3, False, (0,))
    for seed in range(4):
        params = laws(seed)
        whole = together(1.0, params, *decode.pad(PROMPTS), KEY)
        for row, prompt in enumerate(PROMPTS):
            alone = together(1.0, params, *decode.pad([prompt]), KEY)
            assert found(whole, row) == found(alone, 0)
            assert whole.info.calls[row] == alone.info.calls[0]


def test_equal_scores_are_ranked_by_token():
    """A uniform law is one great tie: the first tokens win, in order."""
    params = jnp.zeros(((VOCAB + 1) ** ORDER, VOCAB))
    result = program(3, False, ())(1.0, params, *decode.pad([[1]]), KEY)
    assert [text for _, text in found(result, 0)] == [
        [0] * 5,
        [0] * 4 + [1],
        [0] * 4 + [2],
    ]


def test_stop_strings_follow_their_beams():
    spelling = [b"a", b"b", b"ab", b"ba", b"c", b"bc", b""]
    strings = ["bb", "cab"]
    automaton = stop.automaton(strings, spelling)

    def ends(new):
        text = b"".join(spelling[token] for token in new).decode()
        return any(string in text for string in strings)

    search = decode.compile(
        lambda penalty: beam.search(
            table.language_model(ORDER), NEW, 3, length_penalty=penalty, stop=automaton
        )
    )
    stopped = 0
    for seed, penalty in itertools.product(range(12), (0.0, 1.0)):
        params = laws(seed)
        result = search(penalty, params, *decode.pad(PROMPTS), KEY)
        for row, prompt in enumerate(PROMPTS):
            expected = naive(params, prompt, 3, penalty, ends=ends)
            check_same(found(result, row), expected)
            stopped += sum(len(text) < NEW for _, text in expected)
    assert stopped > 10


def composites():
    model = table.language_model(ORDER)
    both = jnp.stack([laws(0), laws(1)])
    prompts = jnp.array([[1, 2], [3, 0], [5, 5]]), jnp.array([2, 1, 2])
    aware = combine.stacked(
        combine.prefixed(model), 2, pool.linear(1.5, -0.5), (None, 0, 0)
    )
    contexts = jnp.stack([prompts[0], prompts[0][::-1]]), jnp.ones((2, 3), jnp.int32)
    penalised = warp.warp(model, warp.repetition_penalty(3.0), warp.temperature(0.7))
    return {
        "product": (
            combine.product([model, penalised], pool.mixture(0.3, 0.7)),
            (laws(0), laws(1)),
        ),
        "stacked": (combine.stacked(model, 2, pool.linear(0.5, 0.5)), both),
        "prefixed": (combine.prefixed(model), (laws(0), *prompts)),
        "context-aware": (aware, (laws(0), *contexts)),
        "penalty": (penalised, laws(0)),
        "penalty over rows": (lm.branch_by_rows(penalised), laws(0)),
    }


def rescorer(model, params, batch, width=16):
    """Log-probs of a continuation, read by one plain extend of the whole text."""

    @jax.jit
    def read(text):
        state = model.init(params, batch, width)
        logits = model.extend(params, state, text)[0].logits
        return jax.nn.log_softmax(logits)

    def rescore(row, prompt, new):
        text = np.zeros((batch, width), np.int32)
        text[:, : len(prompt) + len(new)] = prompt + new
        log_p = np.asarray(read(text))[row]
        at = np.arange(len(prompt), len(prompt) + len(new))
        return log_p[at - 1, new]

    return rescore


@pytest.mark.parametrize("name", list(composites()))
def test_composes(name):
    """Every beam's log-probs are those of its own text: its state came with it."""
    model, params = composites()[name]
    search = decode.compile(
        lambda penalty: beam.search(model, 4, 3, length_penalty=penalty, eos=(6,))
    )
    result = search(1.0, params, *decode.pad(PROMPTS), KEY)
    rescore = rescorer(model, params, len(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        for place, (score, new) in enumerate(found(result, row)):
            expected = rescore(row, prompt, new)
            mine = result.info.beams.logprob[row, place, : len(new)]
            np.testing.assert_allclose(mine, expected, atol=1e-5)
            np.testing.assert_allclose(score, expected.mean(), atol=1e-5)


def test_beams_that_leave_their_state_behind_are_seen():
    """Negative control of `test_composes`: a `take` that moves nothing."""
    model, params = composites()["penalty"]

    def take(state, rows):
        stays = rows.shape[0] == state.length.shape[0]
        return state if stays else model.take(state, rows)

    wrong = beam.search(model._replace(take=take), 4, 3)
    result = decode.run(wrong, params, *decode.pad(PROMPTS), KEY)
    rescore = rescorer(model, params, len(PROMPTS))
    gap = [
        abs(result.info.beams.logprob[row, place] - rescore(row, prompt, new)).max()
        for row, prompt in enumerate(PROMPTS)
        for place, (_, new) in enumerate(found(result, row))
    ]
    assert max(gap) > 1e-2


def test_streams_the_best_beam_when_it_is_done():
    params, prompts = laws(1), decode.pad(PROMPTS)
    search = beam.search(table.language_model(ORDER), NEW, 3, eos=(0,))
    whole = decode.run(search, params, *prompts, KEY)
    streamed = [[], [], []]
    for step in decode.stream(search, params, *prompts, KEY):
        for row, new in enumerate(step):
            streamed[row] += new
    for row, new in enumerate(streamed):
        assert new == found(whole, row)[0][1]


def test_forbidden_tokens_and_dead_laws():
    model, params = table.language_model(ORDER), laws(0)
    only = warp.warp(model, warp.forbid([t for t in range(VOCAB) if t != 3]))
    result = decode.run(beam.search(only, 3, 4), params, *decode.pad([[1]]), KEY)
    assert found(result, 0) == [(0.0, [3, 3, 3])]
    dead = warp.warp(model, warp.forbid(range(VOCAB)))
    with pytest.raises(FloatingPointError, match="forbids every token in row 0"):
        decode.run(beam.search(dead, 3, 4), params, *decode.pad([[1]]), KEY)


def test_nan_is_named():
    model, params = table.language_model(ORDER), {"table": laws(0).at[:].set(jnp.nan)}
    named = model._replace(
        init=lambda p, *a: model.init(p["table"], *a),
        extend=lambda p, *a: model.extend(p["table"], *a),
    )
    with pytest.raises(FloatingPointError, match="NaN in table"):
        decode.run(beam.search(named, 3, 2), params, *decode.pad([[1]]), KEY)


@pytest.mark.parametrize("block", [1, 3, 8, 1000])
@pytest.mark.parametrize("width", [8, 24, 25])
def test_largest_is_the_stable_sort(block, width):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, width)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.4] = -np.inf
    values, index = beam.largest(jnp.asarray(scores), 8, block)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :8]
    expected = np.take_along_axis(scores, order, 1)
    np.testing.assert_array_equal(values, expected)
    real = np.isfinite(expected)
    np.testing.assert_array_equal(np.asarray(index)[real], order[real])


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"beams": 0},
        {"length_penalty": float("nan")},
        {"early_stopping": "sometimes"},
    ],
)
def test_refuses(bad):
    arguments = {"max_new_tokens": 4, **bad}
    with pytest.raises(ValueError, match=next(iter(bad))):
        beam.search(table.language_model(1), **arguments)
