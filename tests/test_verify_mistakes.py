"""Known mistakes of public implementations, made again: the joint law sees each."""

import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from test_verify import LAWS, PROMPT, RATIOS, TABLE, VERIFIERS, errors, params

from collab_jax import law, warp
from collab_jax.cooperate.efficient import verify


def discards(x, log_q):
    """The mistake: the unlikely token is thrown away."""
    halt = log_q < np.log(0.3)
    return jnp.where(halt.any(1), halt.argmax(1), x.shape[1])


@pytest.mark.parametrize("name", RATIOS)
def test_discarding_unlikely_tokens_is_seen(name):
    assert errors("plain", stop_at=discards)[name] > 1e-2


def softmax_for_argmax(q):
    return warp.greedy()(q), q


@pytest.mark.parametrize("name", RATIOS)
def test_a_softmax_for_argmax_drafts_is_seen(name):
    assert errors("plain", propose=softmax_for_argmax)[name] > 1e-2


def raw_for_warped(q):
    return warp.top_k(2)(q / 0.7), q


@pytest.mark.parametrize("name", RATIOS)
def test_a_raw_law_for_warped_drafts_is_seen(name):
    assert errors("plain", propose=raw_for_warped)[name] > 1e-2


@pytest.mark.parametrize("name", RATIOS)
def test_a_target_without_its_own_warps_is_seen(name):
    """Sampling parameters that the verification forgets."""
    assert errors("plain", target=LAWS["temperature"][0])[name] > 1e-2


def test_wrong_remainders_are_seen():
    """The target's whole law, and token verification's remainder for blocks."""
    block, maximal = VERIFIERS["block"], VERIFIERS["maximal"]

    def whole(logits, draft):
        stop = maximal(logits, draft).sum(-1, keepdims=True)
        return stop * jnp.exp(law.log_probs(logits))

    def unweighted(logits, draft):
        stop = block(logits, draft).sum(-1, keepdims=True)
        other = maximal(logits, draft)
        total = other.sum(-1, keepdims=True)
        p = jnp.exp(law.log_probs(logits))
        return stop * jnp.where(total > 0, other / jnp.where(total > 0, total, 1), p)

    mistakes = {"whole": whole, "unweighted": unweighted}
    joints = spec.speculative_joints(
        mistakes, (TABLE, TABLE), params(4), PROMPT, 3, 3, 4
    )
    expected = spec.target_joint(TABLE, params(4)[0], PROMPT, 3)
    for name in mistakes:
        assert abs(joints[name] - expected).max() > 1e-3, name


def test_a_token_of_probability_zero_is_never_accepted():
    survival = jnp.array([[0.5, 0.0]])
    zero = jnp.zeros(1)
    assert verify.count_accepted(survival, zero).tolist() == [1]
    mistake = (zero[:, None] <= survival).sum(-1)
    assert mistake.tolist() == [2]


def test_typical_is_lossy():
    outcomes = {"typical": verify.typical(0.3).outcomes}
    joint = spec.speculative_joints(
        outcomes, (TABLE, TABLE), params(4), PROMPT, 2, 2, 4
    )["typical"]
    assert abs(joint - spec.target_joint(TABLE, params(4)[0], PROMPT, 2)).max() > 1e-2
