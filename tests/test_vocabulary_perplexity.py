"""PackLLM's weights against their naive twin, and ensembles weighted row by row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
import vocabularies as voc

from collab_jax import combine, decode, pool, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.ensemble.vocabulary.lift import borrow
from collab_jax.ensemble.vocabulary.perplexity import (
    by_perplexity,
    by_search,
    prompt_loss,
)
from collab_jax.ensemble.weighted import weighted
from collab_jax.models import table
from collab_jax.testing import check_lm
from collab_jax.translate import spelled

VOCAB = 5
LMS = (table.language_model(2), table.language_model(1), table.language_model(0))
ORDERS = (2, 1, 0)
PARAMS = tuple(
    table.init(jax.random.key(n), VOCAB, order, scale=1.5)
    for n, order in enumerate(ORDERS)
)
TEXTS = [[0, 3, 2, 4, 1, 1, 0, 2, 3], [4, 2, 2, 0, 1], [1], [3, 3, 0, 1, 2, 4, 4]]
PROMPTS, LENGTH = (jnp.asarray(x) for x in decode.pad(TEXTS))


def read(text):
    """Every member's logits behind every token, `[T][N][V]`."""
    return np.array(
        [
            [
                voc.table_logits(p, order, text[: t + 1])
                for p, order in zip(PARAMS, ORDERS, strict=True)
            ]
            for t in range(len(text))
        ]
    )


def nats(text, weights, zs):
    """Loss of a text under fused logits."""
    total = 0.0
    for t, target in enumerate(text[1:]):
        total -= np.log(voc.softmax(np.tensordot(weights, zs[t], 1))[target])
    return total


def naive_search(text, zs, steps=20, backwards=False):
    count = zs.shape[1]
    alone = np.eye(count)
    order = np.argsort([nats(text, alone[n], zs) for n in range(count)], kind="stable")
    order = order[::-1] if backwards else order
    weights = alone[order[0]]
    for n in order[1:]:
        trials = [
            (i / steps) * weights + (1 - i / steps) * alone[n] for i in range(steps + 1)
        ]
        losses = [nats(text, w, zs) for w in trials]
        weights = trials[int(np.argmin(losses))]
    return weights


def test_the_loss_of_a_prompt_is_the_naive_one():
    found = np.stack(
        [
            prompt_loss(m, p, PROMPTS, LENGTH, chunk=4)
            for m, p in zip(LMS, PARAMS, strict=True)
        ],
        axis=1,
    )
    for text, row in zip(TEXTS, found, strict=True):
        expected = nats(text, np.eye(3)[0], read(text)) / max(1, len(text) - 1)
        assert row[0] == pytest.approx(expected, rel=1e-5)
    shares = by_perplexity(jnp.asarray(found), tau=0.5)
    np.testing.assert_allclose(shares, voc.softmax(-found / 0.5), rtol=1e-5)
    np.testing.assert_allclose(shares[2], 1 / 3, rtol=1e-6)
    with pytest.raises(ValueError, match="tau = 0"):
        by_perplexity(shares, 0)


def test_the_search_is_the_naive_one():
    search = jax.jit(by_search, static_argnums=(0, 4, 5))
    found = search(LMS, PARAMS, PROMPTS, LENGTH, 20, 4)
    whole = search(LMS, PARAMS, PROMPTS, LENGTH, 20, 32)
    np.testing.assert_allclose(found, whole, atol=1e-6)  # chunks change nothing
    mixed = 0
    for row, text in enumerate(TEXTS):
        if len(text) < 2:
            np.testing.assert_allclose(found[row], 1 / 3, rtol=1e-6)
            continue
        zs = read(text)
        np.testing.assert_allclose(found[row], naive_search(text, zs), atol=1e-5)
        other = naive_search(text, zs, backwards=True)
        mixed += abs(np.asarray(found[row]) - other).max() > 0.04
        best = min(nats(text, np.eye(3)[n], zs) for n in range(3))
        assert nats(text, np.asarray(found[row]), zs) <= best + 1e-5
    assert mixed  # the order counts


def test_a_model_that_forbids_the_prompt_gets_no_weight():
    barred = PARAMS[2].at[:, 3].set(-jnp.inf)
    found = by_search(LMS[1:], (PARAMS[1], barred), PROMPTS, LENGTH)
    assert found[0].tolist() == [1.0, 0.0]
    assert found[3].tolist() == [1.0, 0.0]
    assert np.isfinite(found).all()


def test_members_of_other_vocabularies_are_weighed_as_they_read():
    """Logits borrowed by a map, on text in the first member's tokens."""
    words = voc.WORDS[0]
    made = voc.bridge(words, voc.WORDS[1])
    index = jnp.array([1, 0, 3, 2])  # ab borrows from ba
    other = warp.warp(spelled(voc.LMS[1], made, 3.0), borrow(index, 6))
    text = [words.index(w) for w in ("ab", "c", "a", "b", "ab", "c")]
    rows = voc.readings(text, every=words)
    zs = np.array([[one, two[np.asarray(index)]] for one, two in rows])
    found = by_search(
        (voc.LMS[0], other), voc.PARAMS, jnp.array([text]), jnp.array([len(text)])
    )
    np.testing.assert_allclose(found[0], naive_search(text, zs), atol=1e-5)


ROWS = jnp.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])


@pytest.mark.parametrize("form", [pool.linear, pool.mixture])
def test_every_row_has_its_weights(form):
    model = weighted(LMS, form)
    text = jnp.array([[0, 1, 2], [3, 1, 4], [2, 2, 0]])

    @jax.jit
    def law(weights):
        own = PARAMS, weights
        return model.extend(own, model.init(own, 3, 4), text)[0].logits

    found = law(ROWS)
    for row, weights in enumerate(np.asarray(ROWS)):
        plain = combine.product(LMS, form(*weights))
        one, _ = plain.extend(PARAMS, plain.init(PARAMS, 1, 4), text[row : row + 1])
        np.testing.assert_allclose(found[row], one.logits[0], atol=1e-5)
    assert abs(law(ROWS[::-1]) - found).max() > 0.1


def test_laws():
    check_lm(weighted(LMS), (PARAMS, ROWS), VOCAB, tolerance=1e-6, jit=True)


def test_weights_move_with_their_rows():
    model = weighted(LMS)
    own = PARAMS, ROWS
    state = model.take(model.init(own, 3, 4), jnp.array([2, 2, 0]))
    np.testing.assert_array_equal(state.weights, ROWS[jnp.array([2, 2, 0])])


def test_rows_of_weights_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 3\) for 2 rows and 3 members"):
        weighted(LMS).init((PARAMS, ROWS), 2, 4)
    with pytest.raises(ValueError, match="2 trees of parameters for 3 members"):
        by_search(LMS, PARAMS[:2], PROMPTS, LENGTH)
    with pytest.raises(ValueError, match="steps = 0"):
        by_search(LMS, PARAMS, PROMPTS, LENGTH, 0)
    with pytest.raises(ValueError, match="weight of"):
        pool.mixture(ROWS[:, 0], -ROWS[:, 1])


def test_greedy_text_is_the_same_under_speculation():
    """As target and as draft, with other weights in every row."""
    best, model, plain = warp.greedy(), weighted(LMS), table.language_model(2)
    own = table.init(jax.random.key(9), VOCAB, 2)
    prompts = [[0], [4, 1, 2, 0], [3, 3]]
    trees = {model: (PARAMS, ROWS), plain: own}
    for target, draft in itertools.permutations((model, plain)):
        decoder = speculate(
            on_lm(warp.warp(target, best), chunk=4),
            draft_lm(warp.warp(draft, best), 2, chunk=4),
            8,
        )
        found = spec.draws(decoder, (trees[target], trees[draft]), prompts)
        expected = spec.draws(decode.greedy(target, 8), trees[target], prompts)
        for row in range(3):
            one = spec.new_tokens(found, row)
            assert one == spec.new_tokens(expected, row)


def test_transformers_are_searched_like_tables():
    """The fused loss of a random transformer and a table, recomputed."""
    model, params = voc.small(VOCAB, 5)
    text = TEXTS[0]
    found = by_search((model, LMS[1]), (params, PARAMS[1]), PROMPTS[:1], LENGTH[:1], 10)
    zs = []
    for t in range(len(text)):
        out, _ = model.extend(
            params, model.init(params, 1, t + 1), jnp.array([text[: t + 1]])
        )
        other = voc.table_logits(PARAMS[1], 1, text[: t + 1])
        zs.append([np.asarray(out.logits[0, -1], np.float64), other])
    np.testing.assert_allclose(
        found[0], naive_search(text, np.array(zs), steps=10), atol=1e-5
    )
