"""UniTE: its naive twin, the mistakes it must not make, laws and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies as voc

from collab_jax import combine, pool
from collab_jax.ensemble.vocabulary.top_union import top_union, tops
from collab_jax.testing import check_lm
from collab_jax.translate import spelled

WEIGHTS, TOP = (0.3, 0.7), 2
LM = top_union(voc.LMS, voc.BRIDGES, *WEIGHTS, top=TOP, ratio=3.0)


def naive(found, top=TOP, weights=WEIGHTS, zero=False, twice=False):
    """Words as strings; `zero`: a first token that was used before has logit 0;
    `twice`: what both members put forward is counted for both."""
    result = np.zeros((len(found), voc.V))
    for t, row in enumerate(found):
        words = []
        for z, some in zip(row, voc.WORDS, strict=True):
            words += [some[u] for u in np.argsort(-z, kind="stable")[:top]]
        words = words if twice else list(dict.fromkeys(words))
        for w, z, some in zip(weights, row, voc.WORDS, strict=True):
            first = [voc.spelled(word, some)[0] for word in words]
            score = np.array([z[u] for u in first])
            if zero:
                again = [u in first[:i] for i, u in enumerate(first)]
                score[again] = 0.0
            for word, p in zip(words, voc.softmax(score), strict=True):
                result[t, voc.UNION.index(word)] += w * p
    return result


@functools.cache
def readings():
    return voc.readings(voc.TEXT)


def test_the_law_is_the_naive_one():
    found = voc.laws(LM, voc.PARAMS)
    np.testing.assert_allclose(found, naive(readings()), atol=1e-6)
    for mistake in ({"zero": True}, {"twice": True}, {"top": 3}):
        assert abs(found - naive(readings(), **mistake)).max() > 0.01, mistake


def test_first_tokens_that_are_shared_keep_their_logit():
    """The first member lacks ba and cab, and reads both by what they begin with."""
    z = jnp.array([-9.0, 0.5, -9.0, 1.5]), jnp.array([0.0, 0.0, 0.0, 3.0, 2.5, -9.0])
    found = np.exp(np.asarray(tops(voc.BRIDGES, 1.0, 0.0, top=2)(z)))
    words = ["c", "b", "ba", "cab"]
    expected = voc.softmax([1.5, 0.5, 0.5, 1.5])
    assert found[[voc.UNION.index(w) for w in words]] == pytest.approx(expected)
    assert found.sum() == pytest.approx(1.0)


def test_the_law_of_transformers_is_the_naive_one():
    lms, params = zip(*voc.SMALL, strict=True)
    model = top_union(lms, voc.BRIDGES, *WEIGHTS, top=TOP, ratio=3.0)
    found = voc.laws(model, params, voc.TEXT[:5])
    rows = voc.model_readings(voc.TEXT[:5])
    np.testing.assert_allclose(found, naive(rows), atol=1e-5)


def test_laws():
    check_lm(LM, voc.PARAMS, voc.V, tolerance=1e-6, jit=True)


def sure(params, tokens):
    """Where no member's K-th token is tied with the next."""
    wide = True
    for n, bridge in enumerate(voc.BRIDGES):
        model = spelled(voc.SMALL[n][0], bridge, 3.0)
        state = model.init(params[n], *tokens.shape)
        out, _ = jax.jit(model.extend)(params[n], state, jnp.asarray(tokens))
        best = jnp.sort(out.logits, axis=-1)
        wide &= best[..., -TOP] - best[..., -TOP - 1] > 1e-4
    return wide


@pytest.mark.slow
def test_laws_of_transformers():
    lms, params = zip(*voc.SMALL, strict=True)
    model = top_union(lms, voc.BRIDGES, top=TOP, ratio=3.0)
    check_lm(model, params, voc.V, jit=True, decided=sure)


def test_greedy_text_is_the_same_under_speculation():
    voc.check_speculates(LM, voc.PARAMS)


def test_all_tokens_of_equal_vocabularies_are_plain_averaging():
    words = voc.WORDS[0]
    bridges = [voc.bridge(words, words)] * 2
    lms, params = (voc.LMS[0],) * 2, (voc.PARAMS[0], voc.PARAMS[0][::-1])
    text = [0, 3, 2, 1, 1, 0]
    plain = voc.laws(combine.product(lms, pool.mixture(*WEIGHTS)), params, text)
    every = top_union(lms, bridges, *WEIGHTS, top=9)
    np.testing.assert_allclose(voc.laws(every, params, text), plain, atol=1e-6)
    few = top_union(lms, bridges, *WEIGHTS, top=1)
    assert abs(voc.laws(few, params, text) - plain).max() > 0.05
    alone = (voc.PARAMS[0],) * 2
    one = voc.laws(voc.LMS[0], voc.PARAMS[0], text)
    np.testing.assert_allclose(voc.laws(every, alone, text), one, atol=1e-6)


def test_what_is_forbidden_and_what_is_no_number():
    law = tops(voc.BRIDGES, *WEIGHTS, top=3)
    first = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    second = jnp.array([-jnp.inf, -jnp.inf, 1.0, -jnp.inf, -jnp.inf, 0.0])
    found = np.exp(np.asarray(law([first, second])))
    # a is known to both, c is forbidden by the first; the second's a is its other one
    share = {"a": 0.3 * 1.0 + 0.7 * 0.0, "c": 0.7}
    for word, p in share.items():
        assert found[voc.UNION.index(word)] == pytest.approx(p, abs=1e-6)
    dead = law([jnp.full(4, -jnp.inf), jnp.full(6, -jnp.inf)])
    assert bool(jnp.isneginf(dead).all())
    lost = law([first.at[1].set(jnp.nan), second])
    assert bool(jnp.isnan(lost).any())


def test_weights_are_swept_in_one_trace():
    traces = []

    @jax.jit
    def best(weight):
        traces.append(None)
        model = top_union(voc.LMS, voc.BRIDGES, weight, 1 - weight, top=2, ratio=3.0)
        text = jnp.array([voc.TEXT])
        out, _ = model.extend(voc.PARAMS, model.init(voc.PARAMS, *text.shape), text)
        return out.logits[0].max(-1)

    one = best(0.3)
    assert not np.allclose(one, best(0.9))
    assert len(traces) == 1
    assert np.isfinite(jax.jacfwd(best)(0.3)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="top = 0"):
        tops(voc.BRIDGES, top=0)
    with pytest.raises(ValueError, match="2 bridges for 1 members"):
        top_union(voc.LMS[:1], voc.BRIDGES)
    with pytest.raises(ValueError, match="a member of 5 tokens for a bridge to 4"):
        tops(voc.BRIDGES)([jnp.zeros(5), jnp.zeros(6)])
    with pytest.raises(ValueError, match="1 weights for 2 members"):
        tops(voc.BRIDGES, 0.5)([jnp.zeros(4), jnp.zeros(6)])
