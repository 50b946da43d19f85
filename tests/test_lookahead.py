"""Lookahead decoding against lists and dictionaries."""

import jax
import jax.numpy as jnp
import naive_drafts as naive
import numpy as np
import pytest
from drafting import histories

from collab_jax.cooperate.efficient.draft import Draft, Verified
from collab_jax.cooperate.efficient.lookahead import lookahead, merged
from collab_jax.lm import Out

VOCAB = 5


@pytest.mark.parametrize("shape", [(3, 4, 2), (5, 2, 3), (1, 3, 1)])
def test_lookahead_is_its_twin(shape):
    window, order, guesses = shape
    rng = np.random.default_rng(0)
    proposer = lookahead(VOCAB, window, order, guesses)
    texts = histories(2, rows=16, longest=12, alphabet=VOCAB)
    rows, width = len(texts), 12
    prompt = rng.integers(0, VOCAB, (rows, width)).astype(np.int32)
    for row, text in zip(prompt, texts, strict=True):
        row[: len(text)] = text
    length = np.array([len(text) for text in texts], np.int32)
    twins = [naive.Lookahead(text, *shape) for text in texts]
    state = jax.jit(proposer.init, static_argnums=3)((), prompt, length, 9)
    propose, observe = jax.jit(proposer.propose), jax.jit(proposer.observe)
    sizes = set()
    for _ in range(12):
        draft, state = propose((), state, prompt, length, None)
        said = rng.integers(0, VOCAB, (rows, 1 + proposer.size))
        count = rng.integers(0, proposer.depth + 2, rows).astype(np.int32)
        for b, twin in enumerate(twins):
            paths = twin.paths(int(prompt[b, length[b] - 1]))
            assert paths_of(draft, b) == paths
            sizes.add(len(paths))
            if count[b]:
                tips = said[b, len(paths) - window + 1 : len(paths) + 1]
                twin.hear(tips.tolist(), int(count[b]))
        draft = draft._replace(count=np.where(count > 0, draft.count, 0))
        path = np.zeros((rows, proposer.depth), np.int32)
        logits = np.eye(VOCAB, dtype=np.float32)[said]
        verified = Verified(
            path, count, np.maximum(count - 1, 0), path, draft, Out(logits)
        )
        state = observe((), state, verified)
        prompt[np.arange(rows), length - 1] = rng.integers(0, VOCAB, rows)
    assert len(sizes) > 1
    assert max(sizes) == proposer.size


def paths_of(draft, b):
    """The path of tokens of every node of a row."""
    found = []
    tokens, parents = np.asarray(draft.tokens[b]), np.asarray(draft.parents[b])
    for token, parent in zip(
        tokens[: draft.count[b]].tolist(), parents.tolist(), strict=False
    ):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def test_equal_beginnings_are_one_path():
    chains = jnp.array([[[1, 2, 3], [1, 4, 3], [1, 2, 5], [6, 2, 3]]])
    parents = merged(chains)[0].reshape(-1).tolist()
    assert parents == [-1, 0, 1, -1, 0, 4, -1, 0, 1, -1, 9, 10]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: lookahead(0), "vocab = 0"),
        (lambda: lookahead(9, 0), "window = 0"),
        (lambda: lookahead(9, 3, 1), "order = 1: at least 2"),
        (lambda: lookahead(9, 3, 3, -1), "guesses = -1"),
    ],
)
def test_what_cannot_draft_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()


def test_another_vocabulary_is_refused():
    one = jnp.array([1])
    proposer = lookahead(5, 1, 2, 1)
    state = proposer.init((), jnp.array([[1, 2]]), jnp.array([2]), 3)
    draft = Draft(jnp.array([[1, 1]]), jnp.array([2]))
    out = Out(jnp.zeros((1, 3, 6)))
    verified = Verified(one[None], one, one, one[None], draft, out)
    with pytest.raises(ValueError, match="over 5 tokens for a target over 6"):
        proposer.observe((), state, verified)
