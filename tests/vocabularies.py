"""Two vocabularies of words, their union spelled out, and naive readings in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import speculation as spec

from collab_jax import decode, lm, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer
from collab_jax.translate import from_spellings

# the second has two tokens that add the same to a text
WORDS = (["a", "b", "ab", "c"], ["b", "a", "c", "ba", "cab", "a"])
ORDERS = (2, 1)
LMS = tuple(table.language_model(order) for order in ORDERS)


def tables(seed):
    """One table for each list of words."""
    return tuple(
        table.init(jax.random.key(seed + n), len(words), order, scale=2.0)
        for n, (words, order) in enumerate(zip(WORDS, ORDERS, strict=True))
    )


PARAMS = tables(0)


def spelled(word, words):
    """The fewest of some words that give another, the first such."""
    found = [([], "")]
    while found:
        pieces, text = found.pop(0)
        if text == word:
            return pieces
        found += [
            ([*pieces, i], text + w)
            for i, w in enumerate(words)
            if word.startswith(text + w)
        ]
    raise AssertionError(word)


def united(*lists):
    """All words once, and for each list its bridge from all of them."""
    every = list(dict.fromkeys(w for words in lists for w in words))
    return every, [bridge(every, words) for words in lists]


def bridge(every, words):
    """From all words to some; words that mean the same have the same home."""
    made = from_spellings([spelled(w, words) for w in every], len(words))
    home = [every.index(w) if w in every else -1 for w in words]
    return made._replace(pivot=jnp.array(home, jnp.int32))


UNION, BRIDGES = united(*WORDS)
V = len(UNION)
TEXT = [UNION.index(w) for w in ("ab", "cab", "c", "ba", "b", "a", "cab", "ab", "c")]


def softmax(z):
    z = np.asarray(z, np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def table_logits(params, order, tokens):
    """Logits of a table behind a text, in float64."""
    params = np.asarray(params, np.float64)
    vocab = params.shape[1]
    context = [*reversed(tokens)][:order] + [vocab] * max(0, order - len(tokens))
    return params[sum(u * (vocab + 1) ** k for k, u in enumerate(context))]


def readings(text, words=WORDS, every=UNION, params=PARAMS, orders=ORDERS):
    """Every member's logits behind every token of a text, `[T][N][U_n]`."""
    found = []
    for t in range(len(text)):
        own = [
            [u for v in text[: t + 1] for u in spelled(every[v], some)]
            for some in words
        ]
        rows = zip(params, orders, own, strict=True)
        found.append([table_logits(*row) for row in rows])
    return found


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, rows):
    """What an LM says of rows of tokens."""
    return model.extend(params, model.init(params, *rows.shape), rows)[0]


def laws(model, params, text=TEXT):
    """What an LM says behind every token of a text, `[T, V]` probabilities."""
    out = read(model, params, jnp.array([text]))
    return np.asarray(jax.nn.softmax(out.logits[0]), np.float64)


def small(vocab, seed=0, family="llama"):
    """A random transformer with a lively law."""
    config = from_hf(
        {
            "model_type": family,
            "vocab_size": vocab,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    )
    params = init(jax.random.key(seed), config)
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params)
    return lm.language_model(transformer(config)), params


SMALL = tuple(small(len(words), n) for n, words in enumerate(WORDS))


def model_readings(text, members=SMALL, words=WORDS, every=UNION):
    """As `readings`, of transformers that read every prefix anew."""
    found = [[] for _ in text]
    for (model, params), some in zip(members, words, strict=True):
        spelt = [
            [u for v in text[: t + 1] for u in spelled(every[v], some)]
            for t in range(len(text))
        ]
        width = max(map(len, spelt))
        rows = jnp.array([row + [0] * (width - len(row)) for row in spelt])
        out = read(model, params, rows)
        for t, own in enumerate(spelt):
            found[t].append(np.asarray(out.logits[t, len(own) - 1], np.float64))
    return found


PROMPTS = [[0], [4, 1, 2, 0, 5], [3, 3]]


def check_speculates(model, params, vocab=V, new=10, prompts=PROMPTS):
    """As target and as draft it leaves the greedy tokens as they are."""
    best = warp.greedy()
    other, own = table.language_model(2), table.init(jax.random.key(7), vocab, 2)
    pairs = {"target": (model, other), "draft": (other, model)}
    trees = {"target": (params, own), "draft": (own, params)}
    for role, (target, draft) in pairs.items():
        decoder = speculate(
            on_lm(warp.warp(target, best), chunk=4),
            draft_lm(warp.warp(draft, best), 2, chunk=4),
            new,
        )
        found = spec.draws(decoder, trees[role], prompts)
        plain = spec.draws(decode.greedy(target, new), trees[role][0], prompts)
        for row in range(len(prompts)):
            assert spec.new_tokens(found, row) == spec.new_tokens(plain, row), role
