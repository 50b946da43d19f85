"""DistillSpec: divergences against numpy, the frozen teacher, and what it is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import decode, lm
from collab_jax.cooperate.efficient import distill
from collab_jax.cooperate.efficient.distill import distill_loss, distiller, on_policy
from collab_jax.finetune import fit
from collab_jax.models import transformer
from collab_jax.models.config import from_hf
from collab_jax.packing import Batch

RNG = np.random.default_rng(0)
VOCAB = 13


def model(layers, seed, vocab=VOCAB):
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
        }
    )
    params = transformer.init(jax.random.key(seed), config)
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)
    return transformer.transformer(config), params


TEACHER, P = model(2, 0)
STUDENT, Q = model(1, 1)
BATCH = Batch(
    RNG.integers(0, VOCAB, (3, 8)).astype(np.int32),
    (RNG.uniform(size=(3, 8)) * (RNG.uniform(size=(3, 8)) > 0.3)).astype(np.float32),
)


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(beta):
    def naive(p, q):
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return naive


DIVERGENCES = {
    "forward": (distill.forward_kl, kl),
    "reverse": (distill.reverse_kl, lambda p, q: kl(q, p)),
    "jsd 0.5": (distill.jensen_shannon(), jsd(0.5)),
    "jsd 0.1": (distill.jensen_shannon(0.1), jsd(0.1)),
    "tv": (distill.total_variation, lambda p, q: np.abs(p - q).sum() / 2),
}
MUTUAL = ("jsd 0.5", "jsd 0.1", "tv")  # finite where a law lacks what the other has


def log(p):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(p), jnp.float32)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_against_numpy(name):
    function, naive = DIVERGENCES[name]
    p, q = RNG.dirichlet(np.ones(5), (2, 20))
    if name in MUTUAL:
        p[:5, 0] = q[3:8, 1] = p[4, 2] = q[4, 2] = 0
    elif name == "forward":
        p[:5, 0] = p[5, 1] = q[5, 1] = 0
    else:
        q[:5, 0] = p[5, 1] = q[5, 1] = 0
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    found = function(log(p), log(q))
    wanted = [naive(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert abs(function(log(p), log(p))).max() < 1e-6
    gradient = jax.grad(lambda q: function(log(p), q).sum())(log(q))
    assert np.isfinite(gradient).all()


def test_a_forbidden_token_has_an_infinite_forward_kl():
    p, q = log(np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert distill.forward_kl(p, q) == np.inf
    assert distill.reverse_kl(p, q) == pytest.approx(np.log(2))


def laws(backbone, params, tokens):
    x = backbone.embed(params, tokens)
    logits = backbone.unembed(params, backbone.features(params, None, x)[0].hidden)
    return np.asarray(jax.nn.softmax(logits), np.float64)


@pytest.mark.parametrize("name", ["forward", "tv"])
def test_the_loss_is_the_mean_over_positions(name):
    function, naive = DIVERGENCES[name]
    p, q = laws(TEACHER, P, BATCH.tokens), laws(STUDENT, Q, BATCH.tokens)
    total = sum(
        BATCH.weights[b, t] * naive(p[b, t - 1], q[b, t - 1])
        for b in range(3)
        for t in range(1, 8)
    )
    wanted = total / BATCH.weights[:, 1:].sum()
    for chunk in (1, 3, 64):
        found = distill_loss(STUDENT, TEACHER, Q, P, BATCH, function, chunk)
        assert float(found) == pytest.approx(wanted, rel=1e-4)
    shifted = Batch(BATCH.tokens, np.roll(BATCH.weights, 1, axis=1))
    found = distill_loss(STUDENT, TEACHER, Q, P, shifted, function)
    assert float(found) != pytest.approx(wanted, rel=1e-3)
    none = Batch(BATCH.tokens, 0 * BATCH.weights)
    assert distill_loss(STUDENT, TEACHER, Q, P, none, function) == 0


def test_no_gradient_reaches_the_teacher():
    def loss(params, base):
        return distill_loss(STUDENT, TEACHER, params, base, BATCH, chunk=3)

    ours, theirs = jax.jit(jax.grad(loss, (0, 1)))(Q, P)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(theirs))
    assert all((abs(leaf) > 0).any() for leaf in jax.tree.leaves(ours))


def test_chunks_do_not_change_the_gradient():
    grad = jax.jit(
        lambda chunk: jax.grad(
            lambda q: distill_loss(STUDENT, TEACHER, q, P, BATCH, chunk=chunk)
        )(Q),
        static_argnums=0,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad(2), grad(64)
    )


PROMPTS = [[3], [1, 2, 5], [4, 4], [7, 8], [9], [11, 0], [2, 6, 1, 3]]


def acceptance(params, data):
    """Mean of sum_v min(p, q) over new tokens."""
    rejected = distill_loss(STUDENT, TEACHER, params, P, data, distill.total_variation)
    return 1 - float(rejected)


@pytest.mark.parametrize("name", ["forward", "tv"])
def test_acceptance_rises_on_text_of_the_student(name):
    student = decode.sample(lm.language_model(STUDENT), 12)
    before = on_policy(student, Q, PROMPTS, jax.random.key(0), 4)
    tuner, params = (
        distiller(STUDENT, TEACHER, optax.adam(0.01), DIVERGENCES[name][0]),
        Q,
    )
    for turn in range(2):
        data = on_policy(student, params, PROMPTS, jax.random.key(turn), 4)
        params, history = fit(
            tuner, params, data, base=P, epochs=30, batch_size=7, progress=False
        )
    held_out = on_policy(student, params, PROMPTS, jax.random.key(9), 4)
    assert acceptance(params, held_out) > acceptance(Q, before) + 0.1
    assert history[-1] < history[0]


def test_text_on_policy_is_that_of_the_decoder():
    """In batches, the last of them filled up; the keys are those of one run."""
    decoder = decode.sample(lm.language_model(STUDENT), 6, eos=[2])
    key = jax.random.key(3)
    data = on_policy(decoder, Q, PROMPTS, key, 3)
    result = decode.run(decoder, Q, *decode.pad(PROMPTS), key)
    assert data.tokens.shape == (7, 4 + 6)
    for row, prompt in enumerate(PROMPTS):
        end = int(result.length[row])
        assert data.tokens[row, :end].tolist() == result.tokens[row, :end].tolist()
        where = [len(prompt) <= t < end for t in range(10)]
        assert data.weights[row].tolist() == where
        assert not data.tokens[row, end:].any()


def test_what_cannot_be_distilled_is_refused():
    other, params = model(1, 0, vocab=14)
    with pytest.raises(ValueError, match="13 tokens and a student over 14"):
        distill_loss(other, TEACHER, params, P, BATCH)
    with pytest.raises(ValueError, match="beta = 1"):
        distill.jensen_shannon(1)
