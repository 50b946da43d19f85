"""What the tests of rewards share: models of rewards, and their naive twins."""

import functools

import jax
import numpy as np
import transferring as own
from transferring import CONFIG, MODEL, TABLE, TABLES, last, log_softmax, logits, read

from collab_jax.models import heads, transformer
from collab_jax.models.reward import reward_model

BACKBONE = transformer.transformer(CONFIG)
HEAD = heads.linear(16, outputs=2)
REWARDS = reward_model(BACKBONE, HEAD)


@functools.cache
def rewards_of(seed=7):
    """Parameters of a model of two rewards, which differ from text to text."""
    out = HEAD.init(jax.random.key(seed))["out"]
    out = {"kernel": 0.4 * out["kernel"], "bias": 0.5 + out["bias"]}
    return own.weights(seed), {"out": out}  # mostly between 0 and 1


def pairs():
    """name -> (base, its parameters, model of rewards, its parameters)."""
    return {
        "table": (TABLE, TABLES[0], TABLE, TABLES[1]),
        "model": (MODEL, own.models()[0], REWARDS, rewards_of()),
    }


def said(rewards, params, text):
    """The outputs at the end of a text that is read alone, float64."""
    return last(read(rewards, params, text).logits, text)


def rescored(pair, text, k, score):
    """The definition: each candidate judged by a text of its own."""
    lm, params, rewards, own_params = pair
    law = log_softmax(logits(lm, params, text))
    found = np.full(len(law), -np.inf)
    for v in np.argsort(-law, kind="stable")[:k]:
        if law[v] > -np.inf:
            found[v] = score(law[v], said(rewards, own_params, [*text, int(v)]))
    return found
