"""What the tests of transfer share: members, texts, and twins that compute all anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import combine, decode, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import language_model
from collab_jax.models import table, transformer
from collab_jax.models.config import from_hf
from collab_jax.testing import check_lm

VOCAB, NEW, LONGEST = 7, 6, 32
PROMPTS = [[1], [2, 3, 4, 0, 1], [0, 6, 4]]
KEY = jax.random.key(0)

TABLE = table.language_model(2)
TABLES = tuple(
    table.init(key, VOCAB, 2, scale=1.5)
    for key in jax.random.split(jax.random.key(3), 5)
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIG = from_hf(
    {"model_type": "llama", "intermediate_size": 24, "num_hidden_layers": 1, **SIZES}
)
MODEL = language_model(transformer.transformer(CONFIG))


def weights(seed, config=CONFIG):
    """Random weights whose laws are far from flat."""
    params = transformer.init(jax.random.key(seed), config)
    for name, factor in (("embed", 50.0), ("head", 4.0)):
        params[name] = jax.tree.map(lambda x, f=factor: f * x, params[name])
    return params


@functools.cache
def models():
    """Parameters of five models of one architecture."""
    return tuple(weights(seed) for seed in range(5))


def kinds():
    """name -> (an LM, parameters of five members)."""
    return {"table": (TABLE, TABLES), "model": (MODEL, models())}


@functools.cache
def _reader(lm):
    def read(params, tokens):
        return lm.extend(params, lm.init(params, *tokens.shape), tokens)[0]

    return jax.jit(read)


def read(lm, params, text):
    """The output of an LM that reads a text from its start, alone."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(text)] = text
    return _reader(lm)(params, padded)


def last(leaf, text):
    """What stands at the last token of a text, in float64."""
    return np.asarray(leaf, np.float64)[0, len(text) - 1]


def logits(lm, params, text):
    """The logits behind a text, `[V]` float64, computed from its start."""
    return last(read(lm, params, text).logits, text)


def log_softmax(z):
    """Of float64 logits; -inf stays."""
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    if np.isneginf(top).all():
        return z
    with np.errstate(divide="ignore"):
        return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def product_of_experts(factors, laws):
    """`sum_n w_n log p_n[v]` of float64 log-probs `[V]`, by the rules for -inf."""
    found = np.zeros(len(laws[0]))
    for v in range(len(found)):
        for n, (factor, law) in enumerate(zip(factors, laws, strict=True)):
            if np.isneginf(law[v]):
                found[v] += -np.inf if n == 0 or factor > 0 else 0.0
            else:
                found[v] += factor * law[v]
    return found


def jensen_shannon(p, q):
    """Of two laws `[V]`, in nats, by its definition."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * np.log(a / m) if a else 0) / 2 + (
            b * np.log(b / m) if b else 0
        ) / 2
    return total


def knobbed(make):
    """An LM whose parameters are (knob, those of `make(knob)`): one program for all."""
    plain = make(None)

    def verb(name):
        def call(params, *rest):
            return getattr(make(params[0]), name)(params[1], *rest)

        return call

    return plain._replace(
        init=lambda params, *sizes: plain.init(params[1], *sizes),
        extend=verb("extend"),
        branch=verb("branch"),
    )


def one_of(pools, index):
    """The pool of this index, which may be a tracer."""
    if index is None:
        return next(iter(pools.values()))
    return lambda members: jnp.stack([p(members) for p in pools.values()])[index]


def check_twin(result, law, prompts=PROMPTS, atol=2e-5):
    """Every new token is the likeliest of the twin's law, and its log-prob the twin's.

    Args:
      result: of greedy decoding.
      law: from a text and its row to log-probs `[V]` up to a constant.
      prompts: of the rows.
    """
    for row, prompt in enumerate(prompts):
        tokens = np.asarray(result.tokens)[row, : int(result.length[row])].tolist()
        assert len(tokens) == len(prompt) + NEW
        for here in range(len(prompt), len(tokens)):
            log_p = log_softmax(law(tokens[:here], row))
            assert tokens[here] == int(np.argmax(log_p)), (row, here)
            found = np.asarray(result.info.logprob)[row, here]
            np.testing.assert_allclose(found, log_p[tokens[here]], atol=atol)


def check_methods(lm, cases, prompts=PROMPTS, laws=(), atol=2e-5, tolerance=2e-5):
    """An LM under several parameters: its twin, its laws, target and draft.

    Args:
      lm: under test.
      cases: name -> (parameters, the twin's law).
      prompts: three.
      laws: names of the cases that `check_lm` runs for, jitted.
      atol: of log-probs.
      tolerance: of the laws.
    """
    own = TABLES[4]  # of another model, which drafts for the LM, and the LM for it
    best, other = (warp.warp(member, warp.greedy()) for member in (lm, TABLE))

    def rounds(target, proposal):
        return speculate(on_lm(target), draft_lm(proposal, 3), NEW)

    plain = decode.compile(lambda _: decode.greedy(lm, NEW, chunk=4))
    target = decode.compile(lambda _: rounds(best, other))
    proposer = decode.compile(lambda _: rounds(other, best))
    padded = decode.pad(prompts)
    text = decode.run(decode.greedy(TABLE, NEW), own, *padded, KEY).tokens
    for name, (params, law) in cases.items():
        found = plain(None, params, *padded, KEY)
        check_twin(found, law, prompts, atol)
        drafted = target(None, (params, own), *padded, KEY)
        assert same_text(drafted, found), f"{name} as a target"
        drafts = proposer(None, (own, params), *padded, KEY)
        assert same_text(drafts, found._replace(tokens=text)), f"{name} as a draft"
        if name in laws:
            check_lm(lm, params, VOCAB, tolerance=tolerance, jit=True)
    assert plain._cache_size() == target._cache_size() == 1


def same_text(mine, theirs):
    """Whether two results have the same tokens, padding aside."""
    width = min(mine.tokens.shape[1], theirs.tokens.shape[1])
    seen = np.arange(width) < np.asarray(mine.length)[:, None]
    equal = np.asarray(mine.tokens)[:, :width] == np.asarray(theirs.tokens)[:, :width]
    return bool((mine.length == theirs.length).all() and (equal | ~seen).all())


def pooled(lm, pools, count):
    """A product of members whose pool is chosen by the parameters (index, theirs)."""
    return knobbed(lambda index: combine.product([lm] * count, one_of(pools, index)))
