"""Search by chunks: naive twins, identities, rows, ends, NaN, mistakes."""

import functools

import jax
import jax.numpy as jnp
import naive_spans
import numpy as np
import pytest
import rewarding
import transferring as own
from transferring import KEY, PROMPTS, TABLE, TABLES, log_softmax, logits

from collab_jax import decode, law, stop, warp
from collab_jax.cooperate.transfer import chunk_search, reward, span_search

KEYS = jax.random.split(jax.random.key(11), len(PROMPTS))
NEW, EOS = 5, (6,)
WORDS = ["a", "b", "c", "bc", "d", "e", "f"]


def ratio(lm, tuned, reference, prompt, new):
    """log p_tuned - log p_reference of a continuation, term by term."""
    total = 0.0
    for t, token in enumerate(new):
        text = prompt + new[:t]
        one, other = (log_softmax(logits(lm, p, text)) for p in (tuned, reference))
        total += one[token] - other[token]
    return total


@functools.cache
def searcher(kind, beams=2, samples=3, size=2, eos=EOS):
    lm, _ = own.kinds()[kind]
    return decode.compile(
        lambda _: chunk_search.weak_to_strong_search(
            lm, lm, lm, NEW, beams, samples, size, eos=eos, chunk=2
        )
    )


@pytest.mark.parametrize("kind", ["table", "model"])
def test_weak_to_strong_search_is_its_twin(kind):
    lm, (large, tuned, reference, *_) = own.kinds()[kind]
    params = large, (tuned, reference)
    found = searcher(kind)(None, params, *decode.pad(PROMPTS), KEYS)
    for row, prompt in enumerate(PROMPTS):
        expected = naive_spans.chunk_search(
            lambda text: logits(lm, large, text),
            lambda p, new: ratio(lm, tuned, reference, p, new),
            prompt,
            KEYS[row],
            beams=2,
            lanes=3,
            size=2,
            new_tokens=NEW,
            eos=EOS,
        )
        beams = found.info.beams
        for w, (grade, text) in enumerate(expected):
            assert beams.tokens[row, w, : len(text)].tolist() == text, (row, w)
            assert beams.length[row, w] == len(text)
            np.testing.assert_allclose(beams.grade[row, w], grade, atol=2e-4)
        best = expected[0][1]
        end = int(found.length[row])
        assert found.tokens[row, :end].tolist() == prompt + best
        steps = [
            log_softmax(logits(lm, large, prompt + best[:t]))[token]
            for t, token in enumerate(best)
        ]
        np.testing.assert_allclose(found.scores[row], sum(steps), rtol=1e-4)
        np.testing.assert_allclose(
            found.info.logprob[row, len(prompt) : end], steps, atol=2e-4
        )


@pytest.mark.parametrize("kind", ["table", "model"])
def test_best_of_blocks_is_its_twin(kind):
    lm, params, values, theirs = rewarding.pairs()[kind]
    decoder = decode.compile(
        lambda _: chunk_search.best_of_blocks(
            lm, values, NEW, 3, 2, judge=reward.output(1), eos=EOS, chunk=4
        )
    )
    prompts = decode.pad(PROMPTS)
    found = decoder(None, (params, theirs), *prompts, KEYS)
    for row, prompt in enumerate(PROMPTS):
        [(grade, text)] = naive_spans.chunk_search(
            lambda text: logits(lm, params, text),
            lambda p, new: rewarding.said(values, theirs, p + new)[1],
            prompt,
            KEYS[row],
            beams=1,
            lanes=3,
            size=2,
            new_tokens=NEW,
            eos=EOS,
        )
        assert found.tokens[row, : found.length[row]].tolist() == prompt + text
        np.testing.assert_allclose(found.info.beams.grade[row, 0], grade, atol=2e-4)


def lane(c):
    """The random numbers of a lane, as those of rows."""
    return jax.vmap(jax.random.fold_in, (0, None))(KEYS, c)


def test_one_lane_is_sampling():
    params = TABLES[0], (TABLES[1], TABLES[2])
    found = searcher("table", 1, 1, 2)(None, params, *decode.pad(PROMPTS), KEYS)
    plain = decode.sample(TABLE, NEW, eos=EOS)
    plain = decode.run(plain, TABLES[0], *decode.pad(PROMPTS), lane(0))
    assert own.same_text(found, plain)
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-5)


def test_one_block_is_best_of_k():
    """The best whole sample, by the values at their ends."""
    decoder = chunk_search.best_of_blocks(TABLE, TABLE, NEW, 4, NEW, eos=EOS)
    found = decode.run(decoder, TABLES[:2], *decode.pad(PROMPTS), KEYS)
    plain = decode.compile(lambda _: decode.sample(TABLE, NEW, eos=EOS))
    samples = [plain(None, TABLES[0], *decode.pad(PROMPTS), lane(c)) for c in range(4)]
    for row in range(len(PROMPTS)):
        texts = [
            np.asarray(one.tokens)[row, : int(one.length[row])].tolist()
            for one in samples
        ]
        grades = [rewarding.said(TABLE, TABLES[1], text)[0] for text in texts]
        best = texts[int(np.argmax(grades))]
        assert found.tokens[row, : found.length[row]].tolist() == best


def test_equal_small_models_leave_the_first_lane():
    params = TABLES[0], (TABLES[1], TABLES[1])
    found = searcher("table", eos=())(None, params, *decode.pad(PROMPTS), KEYS)
    plain = decode.run(
        decode.sample(TABLE, NEW), TABLES[0], *decode.pad(PROMPTS), lane(0)
    )
    assert own.same_text(found, plain)


def test_more_lanes_never_grade_lower():
    params = TABLES[0], (TABLES[1], TABLES[2])
    prompts = decode.pad(PROMPTS)
    one = searcher("table", 1, 1, NEW, ())(None, params, *prompts, KEYS)
    many = searcher("table", 1, 8, NEW, ())(None, params, *prompts, KEYS)
    assert (many.info.beams.grade >= one.info.beams.grade).all()
    assert (many.info.beams.grade > one.info.beams.grade).any()
    assert one.info.calls.tolist() == many.info.calls.tolist() == [NEW] * 3


def test_a_row_does_not_depend_on_its_batch():
    params = TABLES[0], (TABLES[1], TABLES[2])
    search = searcher("table")
    together = search(None, params, *decode.pad(PROMPTS), KEYS)
    for row, prompt in enumerate(PROMPTS):
        alone = search(
            None, params, *decode.pad([prompt], multiple=5), KEYS[row : row + 1]
        )
        end = int(alone.length[0])
        assert together.tokens[row, :end].tolist() == alone.tokens[0, :end].tolist()
        assert together.info.calls[row] == alone.info.calls[0]


def test_one_trace_for_all_knobs_and_streaming():
    def make(strength):
        hot = warp.warp(TABLE, warp.temperature(strength))
        return chunk_search.best_of_blocks(hot, TABLE, NEW, 3, 2, eos=EOS)

    compiled, prompts = decode.compile(make), decode.pad(PROMPTS)
    for t in (0.7, 1.3):
        result = compiled(t, TABLES[:2], *prompts, KEYS)
    assert compiled._cache_size() == 1
    pieces = list(decode.streaming(make)(1.3, TABLES[:2], *prompts, KEYS))
    assert max(len(row) for row in pieces[0]) == 2
    for row, prompt in enumerate(PROMPTS):
        text = prompt + [token for piece in pieces for token in piece[row]]
        assert text == result.tokens[row, : result.length[row]].tolist()


def test_a_stop_string_ends_a_beam():
    automaton = stop.automaton(["bc"], [word.encode() for word in WORDS])
    params = TABLES[0], (TABLES[1], TABLES[2])
    search = chunk_search.weak_to_strong_search(
        TABLE, TABLE, TABLE, 12, 2, 2, 3, stop=automaton
    )
    keys = jax.random.split(KEY, 8)
    found = decode.run(search, params, *decode.pad([[1]] * 8), keys)
    assert any(found.length < 13)
    for row, length in zip(np.asarray(found.tokens), found.length, strict=True):
        text = "".join(WORDS[v] for v in row[1 : int(length)])
        assert "bc" not in text[:-1]
        assert length == 13 or text.endswith("bc")


def test_forbidden_and_broken_laws():
    prompts = decode.pad([[0], [1], [2]])
    # behind a 1 nothing may follow: lanes that reach it die, and a row that begins so
    dead = TABLES[0].at[jnp.array([1 + 8 * t for t in range(8)])].set(-jnp.inf)
    search = searcher("table", 2, 3, 2, ())
    found = search(None, (dead, TABLES[1:3]), *prompts, KEYS)
    assert jnp.isneginf(found.scores).tolist() == [False, True, False]
    for row in (0, 2):
        assert 1 not in found.tokens[row, 1 : found.length[row] - 1].tolist()
    broken = TABLES[0].at[1 + 8 * 7].set(jnp.nan)
    found = search(None, (broken, TABLES[1:3]), *prompts, KEYS)
    assert jnp.isnan(found.scores).tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match="row 1"):
        decode.check_finite(found, broken)
    judge = TABLES[1].at[1 + 8 * 7].set(jnp.nan)
    found = search(None, (TABLES[0], (judge, TABLES[2])), *prompts, KEYS)
    assert jnp.isnan(found.scores).tolist() == [False, True, False]


def forgetful(tuned, reference):
    """A grade of the last chunk alone."""
    whole = chunk_search.summed(
        chunk_search.product([tuned, reference], chunk_search.linear(1, -1))
    )

    def grade(params, state, before, span):
        return whole.grade(params, state, before * 0, span)

    return whole._replace(grade=grade)


def shared_numbers():
    """Lanes that draw alike."""

    def choose(i, z, key, position):
        del i
        batch, lanes, vocab = z.shape
        key = jnp.repeat(key.reshape(batch, lanes)[:, 0], lanes)
        token = law.draw(z.reshape(-1, vocab), key, position).reshape(batch, lanes)
        return token, jnp.ones((batch, lanes), bool)

    return span_search.drawn()._replace(choose=choose)


@pytest.mark.parametrize("mistake", ["a grade that forgets", "lanes that draw alike"])
def test_mistakes_are_seen(mistake):
    params = TABLES[0], (TABLES[1], TABLES[2])
    prompts, keys = decode.pad([[n % 7] for n in range(12)]), jax.random.split(KEY, 12)
    right = searcher("table", eos=())(None, params, *prompts, keys)
    grader, growth = forgetful(TABLE, TABLE), span_search.drawn()
    if mistake == "lanes that draw alike":
        whole = chunk_search.product([TABLE] * 2, chunk_search.linear(1, -1))
        grader, growth = chunk_search.summed(whole), shared_numbers()
    wrong = span_search.span_search(
        TABLE, grader, growth, NEW, beams=2, lanes=3, size=2
    )
    wrong = decode.run(wrong, params, *prompts, keys)
    assert not own.same_text(right, wrong)


@pytest.mark.parametrize("name", ["max_new_tokens", "beams", "samples", "size"])
def test_refuses(name):
    given = {"max_new_tokens": 4, "beams": 1, "samples": 1, "size": 1, name: 0}
    name = "lanes" if name == "samples" else name
    with pytest.raises(ValueError, match=f"{name} = 0"):
        chunk_search.weak_to_strong_search(TABLE, TABLE, TABLE, **given)
