"""Members that write one text in words of their own: tables, transformers, readings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import vocabularies as voc

from collab_jax import decode
from collab_jax.combine import prefixed
from collab_jax.ensemble.vocabulary.symbols import symbols
from collab_jax.models import table

# "$" stands for the end
WORDS = (["a", "b", "ab", "c", "$"], ["b", "a", "c", "ba", "cab", "$"])
LETTERS = (["a", "b", "c", "$"],) * 2
PROMPTS = ([[3, 1], [0], [2, 2, 4]], [[5], [1, 0, 3], [2]])  # of the members, by row
ROWS = 3
ORDERS = (2, 1)
START = decode.pad([[0]] * ROWS)


def written(lists):
    """What the words of each list write."""
    return [
        symbols([b"" if w == "$" else w.encode() for w in words], [words.index("$")])
        for words in lists
    ]


small = functools.cache(voc.small)  # the same weights for the same size and seed


def members(kind, lists=WORDS, seed=0):
    """The LMs, and their parameters with a prompt for every row."""
    if kind == "table":
        plain = [table.language_model(order) for order in ORDERS]
        trees = [
            table.init(jax.random.key(seed + n), len(words), order, scale=1.5)
            for n, (words, order) in enumerate(zip(lists, ORDERS, strict=True))
        ]
    else:
        plain, trees = zip(
            *(small(len(words), n + seed) for n, words in enumerate(lists)),
            strict=True,
        )
    prompts = [decode.pad([[v % 4 for v in p] for p in own]) for own in PROMPTS]
    own = tuple((p, *given) for p, given in zip(trees, prompts, strict=True))
    return [prefixed(lm, 2) for lm in plain], own


def readers(kind, row, lists=WORDS, seed=0):
    """For each member: its tokens behind the prompt -> log-probs, read anew."""
    lms, own = members(kind, lists, seed)
    found = []
    for n, (lm, (tree, *_)) in enumerate(zip(lms, own, strict=True)):
        prompt = [v % 4 for v in PROMPTS[n][row]]

        def read(tokens, lm=lm, tree=tree, n=n, prompt=prompt):
            text = [*prompt, *tokens]
            if kind == "table":
                return log_softmax(voc.table_logits(tree, ORDERS[n], text))
            plain = small(len(lists[n]), n + seed)[0]
            return log_softmax(last(plain, tree, tuple(text), n))

        found.append(functools.cache(read))
    return found


_RUN = {}


def last(lm, params, text, n):
    """Logits behind a text, one program a member."""
    if n not in _RUN:
        _RUN[n] = jax.jit(lambda p, t: lm.extend(p, lm.init(p, *t.shape), t)[0].logits)
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(_RUN[n](params, jnp.asarray(padded)))[0, len(text) - 1]


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.logaddexp.reduce(z)


def string(found):
    """Symbols as a string, "$" for the end."""
    return "".join("$" if s == 256 else chr(s) for s in found)
