"""Verifiers by enumeration: every draft and outcome, the joint law of three tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec

from collab_jax import combine, law, pool, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.lm import Out
from collab_jax.models import table

PROMPT = [1, 2]
TABLE = table.language_model(2)


def params(vocab):
    keys = jax.random.split(jax.random.key(3))
    return tuple(table.init(key, vocab, 2, scale=1.5) for key in keys)


LAWS = {
    "plain": (TABLE, TABLE),
    "temperature": (
        warp.warp(TABLE, warp.temperature(0.7)),
        warp.warp(TABLE, warp.temperature(1.3)),
    ),
    "top-p": (
        warp.warp(TABLE, warp.top_p(0.8)),
        warp.warp(TABLE, warp.temperature(0.8), warp.top_p(0.7)),
    ),
    "repetition": (
        warp.warp(TABLE, warp.repetition_penalty(1.8), warp.top_p(0.9)),
        warp.warp(TABLE, warp.repetition_penalty(1.4)),
    ),
    "greedy": (warp.warp(TABLE, warp.greedy()), TABLE),
    "greedy draft": (TABLE, warp.warp(TABLE, warp.greedy())),
    "equal": (TABLE, TABLE),
}
VERIFIERS = {
    "maximal": verify.maximal().outcomes,
    "block": verify.block().outcomes,
    "gumbel": coupled.gumbel().outcomes,
}
RATIOS = ("maximal", "block")  # what divides by the draft's law
EXACT = 1e-6


@functools.cache
def errors(name, size=3, vocab=4, stop_at=None, propose=None, target=None):
    """Largest error in the joint law of three tokens, by verifier."""
    both = params(vocab)
    if name == "equal":
        both = (both[0], both[0])
    lms = LAWS[name]
    joints = spec.speculative_joints(
        VERIFIERS, lms, both, PROMPT, size, 3, vocab, stop_at, propose
    )
    expected = spec.target_joint(target or lms[0], both[0], PROMPT, 3)
    return {key: abs(joint - expected).max() for key, joint in joints.items()}


@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize("name", VERIFIERS)
def test_lossless(name, law_name):
    """The outcomes of `gumbel` are the closed form of one noise in two laws."""
    assert errors(law_name)[name] < EXACT


@pytest.mark.parametrize("name", VERIFIERS)
def test_lossless_with_five_tokens(name):
    assert errors("repetition", size=2, vocab=5)[name] < EXACT


def test_coupled_law_is_what_one_noise_does():
    """Against a million draws of both tokens with the same noise."""
    keys = jax.random.split(jax.random.key(5), 3)
    z, w = (2 * jax.random.normal(key, (5,)) for key in keys[:2])
    z = z.at[3].set(-jnp.inf)
    g = jax.random.gumbel(keys[2], (1_000_000, 5))
    t, x = np.asarray(jnp.argmax(z + g, -1)), np.asarray(jnp.argmax(w + g, -1))
    both = np.zeros((5, 5))
    np.add.at(both, (x, t), 1e-6)
    p, q = jax.nn.softmax(z), jax.nn.softmax(w)
    given = coupled.coupled_law(jnp.tile(p, (5, 1)), jnp.tile(q, (5, 1)), jnp.arange(5))
    np.testing.assert_allclose(given.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(q @ given, p, atol=1e-6)
    np.testing.assert_allclose(q[:, None] * given, both, atol=2.5e-3)
    distance = 0.5 * abs(p - q).sum()
    same = (q * jnp.diag(given)).sum()
    assert (1 - distance) / (1 + distance) < same < 1 - distance


def argmax(q):
    return warp.greedy()(q), None


@pytest.mark.parametrize("name", VERIFIERS)
def test_one_hot_drafts_are_lossless(name):
    assert errors("repetition", propose=argmax)[name] < EXACT


def stops_early(x, log_q):
    """Stops behind an unlikely token, or behind token 2, which stays."""
    halt = (log_q < np.log(0.3)) | (x == 2)
    return jnp.where(halt.any(1), halt.argmax(1) + 1, x.shape[1])


@pytest.mark.parametrize("name", VERIFIERS)
def test_an_adapted_stopping_rule_is_lossless(name):
    assert errors("top-p", stop_at=stops_early)[name] < EXACT


def random_laws(seed, size=3, vocab=4):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(vocab, 0.7), size + 1).astype(np.float32)
    q = rng.dirichlet(np.full(vocab, 0.7), size).astype(np.float32)
    return p, q


def test_block_accepts_at_least_as_much():
    """At least i tokens, for every i and 40 laws; often strictly more."""
    more = 0
    token, together = (jax.jit(v.outcomes) for v in (verify.maximal(), verify.block()))
    for seed in range(40):
        p, q = random_laws(seed)
        reach = [
            np.cumsum(spec.accepted(outcomes, p, q, 3)[::-1])[::-1]
            for outcomes in (token, together)
        ]
        assert (reach[1] >= reach[0] - 1e-6).all()
        more += reach[1].sum() > reach[0].sum() + 1e-3
    assert more > 20


def test_block_law_against_its_definition():
    """`P(tau >= i | x^i) = w_i`, averaged over what is drafted behind x^i."""
    outcomes = jax.jit(VERIFIERS["block"])
    for seed in range(5):
        p, q = random_laws(seed)
        reach = np.cumsum(spec.accepted(outcomes, p, q, 3)[::-1])[::-1]
        for i in range(1, 4):
            total = 0.0
            for x in spec.strings(4, i):
                weight = 1.0
                for j, token in enumerate(x):
                    weight = min(1.0, weight * p[j, token] / q[j, token])
                total += weight * np.prod([q[j, t] for j, t in enumerate(x)])
            assert abs(reach[i] - total) < 1e-6


def test_uniform_numbers_are_fine_and_below_one():
    u = jax.vmap(verify._uniform)(jax.random.split(jax.random.key(0), 100_000))
    assert 0 <= float(u.min()) < 1e-4
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5e-3
    assert len(np.unique(np.asarray(u[u < 0.01]) * 2.0**23 % 1)) > 100


def test_equal_laws_are_always_accepted():
    """Where nothing remains, the next token follows the target and not 0 / 0."""
    z = jax.random.normal(jax.random.key(0), (1, 4, 6))
    for verifier in (verify.maximal(), verify.block(), coupled.gumbel()):
        draft = Draft(jnp.array([[0, 3, 5]]), jnp.array([3]), z[:, :3])
        outcome = jax.jit(verifier.outcomes)(z, draft)
        assert jnp.isfinite(outcome).all()
        np.testing.assert_allclose(outcome.sum(-1)[0], [0, 0, 0, 1], atol=1e-6)
        np.testing.assert_allclose(outcome[0, 3], jax.nn.softmax(z[0, 3]), atol=1e-6)


def test_nan_is_neither_accepted_nor_hidden():
    z = jnp.zeros((1, 4, 3)).at[0, 2].set(jnp.nan)
    draft = Draft(jnp.array([[0, 1, 2]]), jnp.array([3]), jnp.zeros((1, 3, 3)))
    key, length = law.row_keys(jax.random.key(0), 1), jnp.array([5])
    for verifier in (verify.maximal(), verify.block()):
        verified = jax.jit(verifier.verify)(key, length, Out(z), draft)
        assert int(verified.accepted[0]) <= 2


def test_typical_accepts_what_its_rule_says():
    p, _ = random_laws(2)
    entropy = -(p * np.log(p)).sum(-1)
    enough = np.minimum(0.2, 0.3 * np.exp(-entropy))
    x = spec.strings(4, 3)
    logits = jnp.log(jnp.tile(p[None], (len(x), 1, 1)))
    draft = Draft(jnp.asarray(x), jnp.full(len(x), 3), None)
    outcome = np.asarray(verify.typical(0.2, 0.3).outcomes(logits, draft))
    for row, text in enumerate(x):
        a = 0
        while a < 3 and p[a, text[a]] > enough[a]:
            a += 1
        expected = np.zeros((4, 4))
        expected[a, p[a].argmax()] = 1
        np.testing.assert_allclose(outcome[row], expected, atol=1e-6)


def test_ensembles_as_targets():
    """A warped product of two models, drafted by a third law."""
    target = warp.warp(
        combine.product([TABLE, TABLE], pool.linear(1.5, -0.5)),
        warp.repetition_penalty(1.3),
        warp.top_p(0.9),
    )
    both = (params(4), params(4)[1])
    joints = spec.speculative_joints(VERIFIERS, (target, TABLE), both, PROMPT, 2, 3, 4)
    expected = spec.target_joint(target, params(4), PROMPT, 3)
    for name, joint in joints.items():
        assert abs(joint - expected).max() < EXACT, name


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (
            Draft(jnp.zeros((1, 2), int), jnp.array([2]), jnp.zeros((1, 2, 7))),
            "a draft over 7 tokens for a target over 5",
        ),
        (
            Draft(
                jnp.zeros((1, 2), int),
                jnp.array([2]),
                None,
                parents=jnp.array([[-1, -1]]),
            ),
            "a tree was drafted, a chain is verified",
        ),
    ],
)
def test_bad_input(draft, message):
    for verifier in (verify.maximal(), verify.block(), coupled.gumbel()):
        with pytest.raises(ValueError, match=message):
            verifier.outcomes(jnp.zeros((1, 3, 5)), draft)
