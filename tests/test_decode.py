"""Plain decoding on the table LM: laws, randomness, stopping, tracing, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import combine, decode, pool, score, stop, warp
from collab_jax.models import table

VOCAB = 5
LM = table.language_model(2)
PARAMS = table.init(jax.random.key(0), VOCAB, 2, scale=1.5)
PROMPTS = [
    [1],
    [2, 3, 4, 0, 1, 1, 2],
    [0, 4, 4],
    [3, 3],
    [1, 2, 3, 4],
    [0],
    [4, 0],
    [2],
]


def new_tokens(result, row):
    begin, end = int(result.prompt_length[row]), int(result.length[row])
    return np.asarray(result.tokens)[row, begin:end].tolist()


def decoders():
    return {
        "greedy": lambda: decode.greedy(LM, 6, chunk=3),
        "sample": lambda: decode.sample(LM, 6, chunk=3),
        "warped": lambda: decode.sample(
            warp.warp(LM, warp.repetition_penalty(1.3), warp.top_p(0.9)), 6, chunk=3
        ),
    }


@pytest.mark.parametrize("name", decoders())
def test_a_row_does_not_depend_on_its_batch(name):
    decoder = decoders()[name]()
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    together = decode.run(decoder, PARAMS, *decode.pad(PROMPTS, multiple=4), keys)
    for row, prompt in enumerate(PROMPTS):
        alone = decode.run(decoder, PARAMS, *decode.pad([prompt]), keys[row : row + 1])
        assert new_tokens(together, row) == new_tokens(alone, 0)


@pytest.mark.parametrize("name", decoders())
def test_a_run_resumes_anywhere(name):
    decoder = decoders()[name]()
    keys = jax.random.split(jax.random.key(3), 2)
    whole = decode.run(decoder, PARAMS, *decode.pad(PROMPTS[1:3]), keys)
    for cut in (1, 4):
        texts = [PROMPTS[1 + b] + new_tokens(whole, b)[:cut] for b in range(2)]
        again = decode.run(decoder, PARAMS, *decode.pad(texts), keys)
        for row in range(2):
            rest = new_tokens(whole, row)[cut:]
            assert new_tokens(again, row)[: len(rest)] == rest


def test_sampling_follows_the_law():
    """Joint counts of three tokens against the enumerated law, by chi-square."""
    runs = 20_000
    prompt, length = decode.pad([[1, 2]] * runs)
    lm = warp.warp(LM, warp.temperature(0.8))
    result = decode.run(decode.sample(lm, 3), PARAMS, prompt, length, jax.random.key(1))
    drawn = np.asarray(result.tokens)[:, 2:5]
    count = np.zeros((VOCAB,) * 3)
    np.add.at(count, tuple(drawn.T), 1)
    expected = np.zeros_like(count)
    logits = np.asarray(PARAMS, np.float64) / 0.8
    law = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for path in itertools.product(range(VOCAB), repeat=3):
        a, b, p = 1, 2, 1.0
        for token in path:
            p, a, b = p * law[b + a * (VOCAB + 1), token], b, token
        expected[path] = runs * p
    assert abs(expected.sum() - runs) < 1e-6

    def chi_square(expected):
        common = expected >= 5
        rest = expected[~common].sum()
        total = ((count - expected)[common] ** 2 / expected[common]).sum()
        total += (count[~common].sum() - rest) ** 2 / max(rest, 1)
        freedom = common.sum()
        return total, freedom + 5 * np.sqrt(2 * freedom)

    found, limit = chi_square(expected)
    assert found < limit
    wrong, limit = chi_square(np.moveaxis(expected, 0, 1))  # the control
    assert wrong > limit


def test_greedy_is_the_greedy_warp():
    prompt, length = decode.pad(PROMPTS)
    key = jax.random.key(0)
    plain = decode.run(decode.greedy(LM, 6), PARAMS, prompt, length, key)
    warped = warp.warp(LM, warp.greedy())
    drawn = decode.run(decode.sample(warped, 6), PARAMS, prompt, length, key)
    assert (plain.tokens == drawn.tokens).all()
    assert (drawn.scores == 0).all()


def test_info_is_what_scoring_says():
    prompt, length = decode.pad(PROMPTS)
    key = jax.random.key(0)
    result = decode.run(decode.sample(LM, 6, eos=[4]), PARAMS, prompt, length, key)
    scores = score.score(LM, PARAMS, result.tokens, result.length, 4)
    position = jnp.arange(result.tokens.shape[1])
    new = (position >= result.prompt_length[:, None]) & (
        position < result.length[:, None]
    )
    for name in ("logprob", "entropy"):
        found = getattr(result.info, name)
        expected = jnp.where(new, getattr(scores, name), 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (result.info.calls == result.length - result.prompt_length).all()


@pytest.mark.parametrize("name", decoders())
def test_streaming_gives_the_same_tokens(name):
    decoder = decoders()[name]()
    prompt, length = decode.pad(PROMPTS)
    key = jax.random.key(5)
    result = decode.run(decoder, PARAMS, prompt, length, key)
    rows = [[] for _ in PROMPTS]
    for piece in decode.stream(decoder, PARAMS, prompt, length, key):
        for row, tokens in zip(rows, piece, strict=True):
            row.extend(tokens)
    assert rows == [new_tokens(result, row) for row in range(len(PROMPTS))]


def test_rows_end_with_eos_and_stop_strings():
    spelled = [b"a", b"b", b"c", b"ab", b""]
    automaton = stop.automaton(["abc", "cc"], spelled)
    decoder = decode.sample(LM, 30, eos=[4], stop=automaton)
    keys = jax.random.split(jax.random.key(3), 64)
    prompt, length = decode.pad([[1]] * 64)
    result = decode.run(decoder, PARAMS, prompt, length, keys)
    endings = set()
    for row in range(64):
        tokens = new_tokens(result, row)
        texts = [
            b"".join(spelled[t] for t in tokens[:n]) for n in range(1, len(tokens) + 1)
        ]
        stopped = [
            b"abc" in text or b"cc" in text or token == 4
            for text, token in zip(texts, tokens, strict=True)
        ]
        assert not any(stopped[:-1])
        assert stopped[-1] or len(tokens) == 30
        endings.add("eos" if tokens[-1] == 4 else "stop" if stopped[-1] else "limit")
    assert {"eos", "stop"} <= endings


def test_no_retrace():
    """Prompts, lengths, keys and knobs may change without a new program."""
    traces = []

    def make(knobs):
        traces.append(1)
        lm = combine.product([LM, LM], pool.mixture(knobs["w"], 1 - knobs["w"]))
        return decode.sample(warp.warp(lm, warp.temperature(knobs["t"])), 4)

    program = decode.compile(make)
    outputs = []
    for seed, knobs in enumerate([{"w": 0.3, "t": 0.5}, {"w": 0.9, "t": 2.0}]):
        for prompts in (PROMPTS, PROMPTS[::-1]):
            prompt, length = decode.pad(prompts, multiple=8)
            key = jax.random.key(seed)
            outputs.append(program(knobs, (PARAMS, PARAMS), prompt, length, key))
    assert len(traces) == 1
    assert not (outputs[0].tokens == outputs[2].tokens).all()
    program({"w": 0.3, "t": 0.5}, (PARAMS, PARAMS), *decode.pad([[1]]), key)
    assert len(traces) == 2  # the control: another shape is another program


def test_gradients_flow_through_the_knobs():
    tokens, length = decode.pad(PROMPTS)

    def loss(weight):
        lm = combine.product([LM, LM], pool.mixture(weight, 1 - weight))
        return -score.score(lm, (PARAMS, PARAMS[::-1]), tokens, length).logprob.sum()

    slope = (loss(0.4 + 1e-3) - loss(0.4 - 1e-3)) / 2e-3
    assert abs(jax.grad(loss)(0.4) - slope) < 2e-2 * abs(slope)


def test_nan_and_dead_laws_are_reported():
    prompt, length = decode.pad([[1], [2]])
    key = jax.random.key(0)
    broken = PARAMS.at[:].set(jnp.nan)
    pair = combine.product([LM, LM], pool.mixture(0.5, 0.5))
    with pytest.raises(FloatingPointError, match="row 0: NaN in 1"):
        decode.run(decode.greedy(pair, 3), (PARAMS, broken), prompt, length, key)
    nothing = warp.warp(LM, warp.forbid(range(VOCAB)))
    with pytest.raises(FloatingPointError, match="forbids every token in row 0"):
        decode.run(decode.sample(nothing, 3), PARAMS, prompt, length, key)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: decode.greedy(LM, 0), "max_new_tokens = 0, at least 1"),
        (lambda: decode.pad([[1], []]), "each of at least one token"),
        (lambda: decode.pad([]), "at least one prompt"),
        (
            lambda: decode.run(
                decode.greedy(LM, 1),
                PARAMS,
                jnp.ones((1, 2), int),
                jnp.array([3]),
                None,
            ),
            "prompt lengths from 3 to 3: 1 to 2",
        ),
        (
            lambda: decode.run(
                decode.greedy(LM, 1), PARAMS, jnp.ones(2, int), jnp.array([3]), None
            ),
            r"prompt of shape \(2,\)",
        ),
        (
            lambda: decode.run(
                decode.sample(LM, 1),
                PARAMS,
                *decode.pad([[1]]),
                jnp.zeros(2, jnp.uint32),
            ),
            "typed key is expected",
        ),
        (lambda: warp.top_p(0.0), r"top_p = 0.0 was given, a number in \(0, 1\]"),
        (lambda: warp.temperature(-1), "temperature = -1"),
        (lambda: pool.mixture(-0.1, 1.1), "a weight of -0.1"),
        (lambda: pool.contrast(2.0, 0.5), "alpha = 2.0"),
        (
            lambda: combine.product([LM], pool.linear(1, 1)).extend(
                (PARAMS,), (LM.init(PARAMS, 1, 2),), jnp.ones((1, 1), int)
            ),
            "2 weights for 1 members",
        ),
        (
            lambda: combine.product([LM, LM], pool.mixture()).extend(
                (PARAMS, PARAMS[:4, :3]),
                (LM.init(PARAMS, 1, 2),) * 2,
                jnp.ones((1, 1), int),
            ),
            r"vocabularies of \[5, 3\] tokens",
        ),
        (
            lambda: combine.product([LM, LM], pool.mixture()).init(PARAMS, 1, 2),
            "a tuple of 2 trees",
        ),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
