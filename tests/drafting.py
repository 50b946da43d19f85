"""The proposers without a model, and rounds whose drafts are right at random."""

import jax
import numpy as np

from collab_jax.cooperate.efficient.adaptive import adaptive
from collab_jax.cooperate.efficient.lookahead import lookahead
from collab_jax.cooperate.efficient.ngram import ngram, prompt_lookup
from collab_jax.cooperate.efficient.recycle import recycle, recycle_tree
from collab_jax.cooperate.efficient.suffix import suffix
from collab_jax.cooperate.efficient.topology import grow

# vocabulary -> a proposer of chains; small tables
PROPOSERS = {
    "ngram": lambda vocab: ngram(4),
    "prompt lookup": lambda vocab: prompt_lookup(4),
    "adaptive": lambda vocab: adaptive(4, 3, 64),
    "suffix": lambda vocab: suffix(4, 6, occurrences=8),
    "recycle": lambda vocab: recycle(4, vocab),
}
# the same, of trees
TREES = {
    "recycled tree": lambda vocab: recycle_tree(grow(12, [0.5, 0.3]), vocab),
    "lookahead": lambda vocab: lookahead(vocab, 3, 3, 2),
}
ROOM = 40  # tokens that a played text may grow by


def histories(seed, rows=48, longest=40, alphabet=3):
    """Ragged random texts; every other one repeats itself."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(rows):
        text = rng.integers(0, alphabet, rng.integers(1, longest + 1))
        if row % 2:
            text = np.tile(text[: rng.integers(1, 7)], longest)[: len(text)]
        found.append(text.tolist())
    return found


def play(proposer, texts, rounds=8, seed=0, alphabet=3, width=None):
    """Yields (texts, drafts, counts) of every round; checks that nothing is retraced.

    A row accepts a part of its draft and gets one more token, or nothing at all, like a
    row that is done. Behind the end of a text lies garbage.

    Args:
      proposer: of chains.
      texts: lists of tokens.
      rounds: how many.
      seed: of what is accepted.
      alphabet: tokens that are drawn.
      width: P; the longest text unless given.
    """
    rng = np.random.default_rng(seed)
    texts = [list(text) for text in texts]
    width = width or max(map(len, texts))
    buffer = rng.integers(0, alphabet, (len(texts), width + ROOM)).astype(np.int32)
    traces = []

    def propose(state, tokens, length):
        traces.append(None)
        return proposer.propose((), state, tokens, length, None)

    propose = jax.jit(propose)
    begin = jax.jit(proposer.init, static_argnums=3)
    for _ in range(rounds):
        length = np.array([len(text) for text in texts], np.int32)
        for row, text in zip(buffer, texts, strict=True):
            row[: len(text)] = text
        if not traces:
            state = begin((), buffer[:, :width], length, ROOM)
        draft, state = propose(state, buffer, length)
        assert draft.law is None
        assert draft.tokens.shape == (len(texts), proposer.size)
        tokens, count = np.asarray(draft.tokens), np.asarray(draft.count)
        drafts = [row[:n].tolist() for row, n in zip(tokens, count, strict=True)]
        yield [list(text) for text in texts], drafts
        for text, drafted in zip(texts, drafts, strict=True):
            if rng.random() < 0.2:
                continue
            kept = rng.integers(0, len(drafted) + 1)
            new = [*drafted[:kept], int(rng.integers(0, alphabet))]
            text.extend(new[: max(0, width + ROOM - len(text))])
    assert len(traces) == 1
