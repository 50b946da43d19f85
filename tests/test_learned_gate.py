"""Co-LLM: the loss and its slope by definition, a switch that is learned, its gate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transferring as own
from transferring import KEY, MODEL, NEW, PROMPTS

from collab_jax import decode
from collab_jax.ensemble import gates, learned_gate
from collab_jax.ensemble.on_demand import counted, on_demand

TOKENS = jax.random.randint(jax.random.key(4), (3, 9), 0, own.VOCAB)
LENGTH = jnp.array([9, 2, 6])


def recorded():
    params = own.models()[:2]
    batches = learned_gate.record([MODEL] * 2, params, TOKENS, LENGTH, chunk=4)
    return params, [*batches]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def definition(weights, params, labels=False):
    """Mean of -log sum_z p(z) p_z(token), every prefix read anew; or of the labels."""
    losses = []
    for row, length in enumerate(LENGTH.tolist()):
        text = TOKENS[row].tolist()
        for at in range(1, length):
            out = own.read(MODEL, params[0], text[:at])
            state = own.last(out.features.hidden, text[:at])
            laws = [own.log_softmax(own.logits(MODEL, p, text[:at])) for p in params]
            switch = sigmoid(state @ weights)
            p = [np.exp(law[text[at]]) for law in laws]
            if labels:
                best = [int(np.argmax(law)) == text[at] for law in laws]
                losses.append(-np.log(switch if best[1] > best[0] else 1 - switch))
            else:
                losses.append(-np.log((1 - switch) * p[0] + switch * p[1]))
    return np.mean(losses)


@pytest.mark.parametrize("labels", [False, True])
def test_losses_are_their_definitions(labels):
    params, batches = recorded()
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    weights = np.random.default_rng(0).normal(size=16) * 0.3
    loss = learned_gate.cross_entropy if labels else learned_gate.nats
    found = float(loss(jnp.asarray(weights, jnp.float32), whole))
    assert found == pytest.approx(definition(weights, params, labels), rel=1e-5)
    # the first model's part and the other's are not to be exchanged
    assert abs(found - definition(-weights, params, labels)) > 0.01


def test_a_switch_is_learned():
    """Where h says which model knows the token, the switch finds out."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(256, 4)).astype(np.float32)
    right = states[:, 1] > 0  # the other model knows
    said = np.log(np.where([~right, right], 0.8, 0.1)).astype(np.float32)
    best = np.stack([~right, right], -1)
    batch = learned_gate.Recorded(
        *map(jnp.asarray, (states, *said, best, np.ones(256, np.float32)))
    )
    start = jnp.zeros(4)
    first, _ = learned_gate.fit(
        [batch] * 40, optax.adam(0.1), start, learned_gate.cross_entropy
    )
    weights, losses = learned_gate.fit([batch] * 60, optax.adam(0.1), first)
    assert losses[-1] < losses[0] < float(learned_gate.nats(start, batch))
    found = np.asarray(states @ weights) > 0
    assert (found == right).mean() > 0.95


def test_the_gate_lets_the_other_model_decide():
    """Co-LLM's decoding: the switch above a threshold, then the other's law alone."""
    params = own.models()[:2]
    weights = np.random.default_rng(1).normal(size=16) * 0.5

    def lm(threshold):
        gate = gates.learned(jnp.asarray(weights, jnp.float32), threshold)
        return on_demand([MODEL] * 2, gate, lambda zs: zs[1], width=4)

    def law(text, row):
        del row
        out = own.read(MODEL, params[0], text)
        switch = sigmoid(own.last(out.features.hidden, text) @ weights)
        return own.logits(MODEL, params[int(switch > 0.5)], text)

    program = decode.compile(lambda t: counted(decode.greedy(lm(t), NEW)))
    found = program(0.5, params, *decode.pad(PROMPTS), KEY)
    inner = found._replace(info=found.info.info)
    own.check_twin(inner, law, atol=2e-4)
    assert 0 < found.info.asked.sum() < NEW * len(PROMPTS)
    never = program(1.0, params, *decode.pad(PROMPTS), KEY)
    assert never.info.asked.tolist() == [0, 0, 0]
    assert program._cache_size() == 1


def test_what_does_not_fit_is_refused():
    out = own.read(MODEL, own.models()[0], [1, 2])
    with pytest.raises(ValueError, match=r"\(3,\) for hidden states of width 16"):
        gates.learned(jnp.ones(3))(out)
    with pytest.raises(ValueError, match="1 members"):
        next(learned_gate.record([MODEL], own.models()[:1], TOKENS, LENGTH))
    with pytest.raises(ValueError, match="no batches"):
        learned_gate.fit([], optax.sgd(1.0), jnp.zeros(2))
    barred = learned_gate.Recorded(
        jnp.ones((1, 2)), *jnp.full((2, 1), -jnp.inf), jnp.ones((1, 2)), jnp.ones(1)
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        learned_gate.fit([barred], optax.sgd(1.0), jnp.zeros(2))
