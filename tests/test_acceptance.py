"""SpecDec++: the rule keeps the law, and the head learns what is accepted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import speculation as spec

from collab_jax import law
from collab_jax.cooperate.efficient.acceptance import acceptance_head, head, inputs
from collab_jax.cooperate.efficient.acceptance_training import (
    acceptance_loss,
    acceptance_tuner,
    examples,
)
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.finetune import fit
from collab_jax.lm import Backbone, Features, Out
from collab_jax.models import table, transformer
from collab_jax.models.config import from_hf
from collab_jax.packing import Batch
from collab_jax.warp import greedy, temperature

# --- the rule


WISH = head(1, 0)
# likely tokens are trusted: log-odds 2 log q + 2
TRUST = {"out": {"kernel": jnp.array([[0.0], [2.0], [0.0]]), "bias": jnp.full(1, 2.0)}}
RULE = acceptance_head(WISH, 0.45)
TABLE = table.language_model(2)
PARAMS = tuple(table.init(key, 4, 2, scale=1.5) for key in spec.KEYS)
PROMPT, SIZE, COUNT = [1, 2], 3, 3


def counts(x, log_q):
    """Drafted tokens of every row, by the steps of the rule itself."""
    rows = x.shape[0]
    state, going = RULE.init(TRUST, rows), jnp.ones(rows, bool)
    count = jnp.zeros(rows, int)
    for i in range(SIZE):
        count += going
        chosen = log_q[:, i]  # of two tokens, the first is the one that was drawn
        logits = jnp.stack([chosen, jnp.log1p(-jnp.exp(chosen))], -1)
        out = Out(logits, Features(jnp.zeros((rows, 1))))
        state, stop = RULE.step(TRUST, state, i, out, jnp.zeros(rows, int))
        going &= ~stop
    return count


def less(x, log_q):
    """The variant that throws away the token at which it stopped."""
    count = counts(x, log_q)
    stopped = count < SIZE
    return jnp.where(stopped, count - 1, count)


@functools.cache
def joints(stop_at):
    return spec.speculative_joints(
        {name: make().outcomes for name, make in spec.VERIFIERS.items()},
        (TABLE, TABLE),
        PARAMS,
        PROMPT,
        SIZE,
        COUNT,
        4,
        stop_at,
        lambda logits: (logits, logits),
    )


@pytest.mark.parametrize("name", spec.VERIFIERS)
def test_the_rule_keeps_the_law(name):
    wanted = spec.target_joint(TABLE, PARAMS[0], PROMPT, COUNT)
    assert abs(joints(counts)[name] - wanted).max() < 1e-6
    assert abs(joints(less)[name] - wanted).max() > 1e-3


def test_the_rule_stops_at_every_length():
    texts = jnp.asarray(spec.strings(4, SIZE))
    rng = np.random.default_rng(0)
    found = counts(texts, jnp.log(jnp.asarray(rng.uniform(size=texts.shape))))
    assert {*found.tolist()} == {1, 2, 3}


def test_survival_is_a_product_that_begins_anew():
    rule = acceptance_head(head(2, 0), 0.5)
    params = jax.tree.map(lambda x: x + 0.3, head(2, 0).init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), 4)
    state = rule.init(params, 3)
    for turn in range(2):
        product = np.ones(3)
        for i in range(3):
            hidden = jax.random.normal(keys[i + turn], (3, 2))
            logits = jax.random.normal(keys[3 - i], (3, 5))
            token = jnp.array([0, 3, 4])
            state, stop = rule.step(
                params, state, i, Out(logits, Features(hidden)), token
            )
            q = np.float64(jax.nn.softmax(logits))
            x = [
                [*hidden[b], np.log(q[b, token[b]]), -(q[b] * np.log(q[b])).sum()]
                for b in range(3)
            ]
            log_odds = x @ np.float64(params["out"]["kernel"]) + params["out"]["bias"]
            product *= 1 / (1 + np.exp(-log_odds[:, 0]))
            assert stop.tolist() == (1 - product > 0.5).tolist()
        np.testing.assert_allclose(jnp.exp(state), product, rtol=1e-4)


# --- the head


def model(layers, seed):
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 17,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
        }
    )
    params = transformer.init(jax.random.key(seed), config)
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)
    return transformer.transformer(config), params


BACKBONE, P = model(2, 0)
Q = jax.tree.map(lambda a, b: a + 0.3 * b, P, model(2, 1)[1])
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, 17, (3, 8)).astype(np.int32),
    (RNG.uniform(size=(3, 8)) > 0.4).astype(np.float32),
)


def read(params, tokens):
    x = BACKBONE.embed(params, tokens)
    hidden = BACKBONE.features(params, None, x)[0].hidden
    return np.asarray(hidden), np.asarray(BACKBONE.unembed(params, hidden), np.float64)


@pytest.mark.parametrize("chunk", [3, 64])
def test_examples_are_drafted_tokens_with_their_acceptance(chunk):
    """The token itself is not reported; its log-prob tells which it was."""
    x, labels, weights = examples(
        BACKBONE,
        BACKBONE,
        (Q, P),
        BATCH,
        jax.random.key(1),
        warps=[temperature(0.5)],
        mix=0.0,
        chunk=chunk,
    )
    np.testing.assert_array_equal(weights, BATCH.weights[:, 1:])
    hidden, q = read(Q, BATCH.tokens[:, :-1])
    _, p = read(P, BATCH.tokens[:, :-1])
    p, q = (np.exp(2 * z) / np.exp(2 * z).sum(-1, keepdims=True) for z in (p, q))
    np.testing.assert_allclose(x[..., :-2], hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x[..., -1], -(q * np.log(q)).sum(-1), rtol=1e-3)
    z = abs(np.log(q) - np.asarray(x[..., -2:-1])).argmin(-1)[..., None]
    found = np.minimum(1, np.take_along_axis(p / q, z, -1))[..., 0]
    np.testing.assert_allclose(labels, found, rtol=1e-3)
    assert len(np.unique(z)) > 3


def test_examples_of_greedy_drafts():
    """The best token; the head sees the law that it was the best of."""
    run = functools.partial(examples, BACKBONE, BACKBONE, (Q, P), BATCH, mix=0.0)
    _, q = read(Q, BATCH.tokens[:, :-1])
    _, p = read(P, BATCH.tokens[:, :-1])
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (p, q))
    z = q.argmax(-1)
    said = np.take_along_axis(p, z[..., None], -1)[..., 0]
    for warps, expected in ((), said), ([greedy()], z == p.argmax(-1)):
        x, labels, _ = run(jax.random.key(1), warps=warps, greedy=True)
        np.testing.assert_allclose(labels, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(x[..., -2], np.log(q.max(-1)), rtol=1e-3, atol=1e-4)
        entropy = -(q * np.log(q)).sum(-1)
        np.testing.assert_allclose(x[..., -1], entropy, rtol=1e-3)
    assert 0 < (z == p.argmax(-1)).mean() < 1


def test_mixed_text_is_text_of_the_draft():
    """Where all tokens are replaced, the hidden states are those of drawn tokens."""
    ones = Batch(BATCH.tokens, np.ones_like(BATCH.weights))
    run = functools.partial(examples, BACKBONE, BACKBONE, (Q, P))
    key = jax.random.key(1)
    plain, _, _ = run(ones, key, mix=0.0)
    whole, _, _ = run(ones, key, mix=1.0)
    none = Batch(BATCH.tokens, np.zeros_like(BATCH.weights))
    prompt, _, _ = run(none, key, mix=1.0)
    np.testing.assert_array_equal(plain[:, 0, :-2], whole[:, 0, :-2])
    assert abs(plain[:, 1:, :-2] - whole[:, 1:, :-2]).max(-1).min() > 1e-3
    np.testing.assert_array_equal(plain[..., :-2], prompt[..., :-2])


def test_the_loss_against_numpy():
    z, y, w = (
        RNG.normal(size=(3, 6)),
        RNG.uniform(size=(3, 6)),
        RNG.uniform(size=(3, 6)),
    )
    p = 1 / (1 + np.exp(-z))
    nats = -(y * np.log(p) + 6 * (1 - y) * np.log(1 - p))
    found = acceptance_loss(jnp.asarray(z), jnp.asarray(y), jnp.asarray(w))
    assert float(found) == pytest.approx((w * nats).sum() / w.sum(), rel=1e-5)


def area(score, labels):
    """Probability that an accepted token is rated above a rejected one."""
    above = score[:, None] > score[None, :]
    weight = labels[:, None] * (1 - labels)[None, :]
    return float((weight * above).sum() / weight.sum())


BIGRAM = Backbone(
    init=None,
    embed=lambda params, tokens: params["embed"][tokens],
    features=lambda params, state, x: (Features(x), state),
    unembed=lambda params, x: x @ params["head"],
    rewind=None,
    take=None,
    branch=None,
    prune=None,
)


def test_training_separates_accepted_from_rejected():
    """Both say much the same behind some tokens, and something else behind the rest."""
    keys = jax.random.split(jax.random.key(0), 3)
    ours = {
        "embed": jax.random.normal(keys[0], (17, 16)),
        "head": jax.random.normal(keys[1], (16, 17)),
    }
    other = jax.random.normal(keys[2], (17, 16))
    near = ours["embed"] + 0.2 * other
    theirs = {**ours, "embed": near.at[9:].set(other[9:])}
    text = np.random.default_rng(1).integers(0, 17, (2, 24, 20)).astype(np.int32)
    data, unseen = (Batch(x, np.ones(x.shape, np.float32)) for x in text)
    made, base = head(16, blocks=1), (ours, theirs, jax.random.key(2))
    start = made.init(jax.random.key(1))
    x, labels, _ = examples(BIGRAM, BIGRAM, base[:2], unseen, jax.random.key(3))
    x, labels = np.asarray(x).reshape(-1, 18), np.asarray(labels).reshape(-1)
    rate = labels.mean()
    constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))

    def trained(params, mismatch):
        tuner = acceptance_tuner(
            BIGRAM, BIGRAM, made, optax.adam(0.01), mismatch=mismatch
        )
        run = {"epochs": 30, "batch_size": 8, "progress": False, "base": base}
        params, _ = fit(tuner, params, data, **run)
        return np.asarray(made.apply(params, x))[:, 0], params

    before = np.asarray(made.apply(start, x))[:, 0]
    score, params = trained(start, 1.0)
    assert area(score, labels) > max(0.9, area(before, labels) + 0.15)
    ones = np.ones(len(labels))
    assert float(acceptance_loss(score, labels, ones, 1.0)) < 0.7 * constant
    # a rejection that counts six times makes the same head careful
    careful, _ = trained(params, 6.0)
    assert careful.mean() < score.mean() - 0.5


def test_it_drafts_in_the_loop():
    """Its text follows the law; the rule reads features of the draft."""
    with_hidden = TABLE._replace(extend=lambda *a: hidden_from(TABLE.extend(*a)))
    kernel = jnp.array([[0.5], [-0.5], [0.5], [-0.5], [2.0], [0.0]])
    params = {"out": {"kernel": kernel, "bias": jnp.full(1, 2.0)}}
    rule = acceptance_head(head(4, 0), 0.45)
    decoder = speculate(on_lm(TABLE), draft_lm(with_hidden, 3, stopping=rule), 3)
    both = PARAMS[0], (PARAMS[1], params)
    drawn = spec.counts(decoder, both, PROMPT, COUNT, 10_000)
    wanted = spec.target_joint(TABLE, PARAMS[0], PROMPT, COUNT)
    found, limit = spec.chi_square(drawn, wanted)
    assert found < limit
    result = spec.draws(decoder, both, [[i, j] for i in range(4) for j in range(4)])
    per_call = np.asarray(result.info.drafted / result.info.calls)
    assert len({*per_call.tolist()}) > 2


def hidden_from(result):
    out, state = result
    return Out(out.logits, Features(jnp.tanh(out.logits))), state


def test_inputs_are_finite_where_a_law_is_one_hot():
    logits = jnp.where(jnp.arange(4) == 1, 0.0, -jnp.inf)[None]
    for token in (0, 1):
        assert np.isfinite(inputs(jnp.ones((1, 2)), logits, jnp.array([token]))).all()
    assert law.entropy(logits)[0] == 0


def test_what_has_another_vocabulary_is_refused():
    wide = BACKBONE._replace(
        unembed=lambda p, x: jnp.pad(BACKBONE.unembed(p, x), ((0, 0), (0, 0), (0, 1)))
    )
    with pytest.raises(ValueError, match="18 tokens and a draft over 17"):
        examples(BACKBONE, wide, (Q, P), BATCH, jax.random.key(0))
