"""Trees of a small random transformer: the text, and the state between the rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from speculation import new_tokens

from collab_jax import decode, law, lm, warp
from collab_jax.cooperate.efficient import growth, tree
from collab_jax.cooperate.efficient.draft import Verified
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.cooperate.efficient.topology import grow
from collab_jax.lm import Out
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer

TOKENS = 61
CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
MODEL = lm.language_model(transformer(CONFIG))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, TOKENS, n).tolist() for n in (3, 17, 1, 9, 6)]
SHAPES = {
    "ranked": growth.ranked(grow(8, [0.5, 0.3, 0.1])),
    "drawn": growth.drawn(grow(6, [0.5, 0.3])),
    "expanded": growth.expanded(3, 3, 9),
    "one level": growth.ranked([(0,), (1,), (2,)]),
}


def sharp(seed):
    params = init(jax.random.key(seed), CONFIG)
    return jax.tree.map(lambda x: 5.0 * x if x.ndim > 1 else x, params)


BIG = sharp(0)
SMALL = jax.tree.map(lambda a, b: a + 0.04 * b, BIG, sharp(1))


@functools.cache
def plain(new, eos=()):
    return spec.draws(decode.greedy(MODEL, new, eos=eos), BIG, PROMPTS)


@pytest.mark.parametrize("name", ["ranked", "expanded"])
def test_greedy_text_is_that_of_plain_greedy(name):
    """Ragged rows, each of which ends where it does, one by an end in mid-path."""
    new = 20
    eos = (int(plain(new).tokens[0, 3 + 8]),)
    target = on_lm(warp.warp(MODEL, warp.greedy()))
    decoder = speculate(
        target, draft_tree(MODEL, SHAPES[name]), new, verifier=tree.sampled(), eos=eos
    )
    found = spec.draws(decoder, (BIG, SMALL), PROMPTS)
    lengths = found.length - found.prompt_length
    assert len({*lengths.tolist()}) > 1
    for row in range(len(PROMPTS)):
        assert new_tokens(found, row) == new_tokens(plain(new, eos), row)
    assert int(found.info.calls.sum()) < 0.7 * int(lengths.sum())


def play(model, shape, rounds=6):
    """Drafts of a state that is carried on, beside those of a state that is new.

    Rows keep a random part of a random path, or nothing at all as when they are done.
    """
    rng = np.random.default_rng(1)
    proposer = draft_tree(model, shape, chunk=8)
    first = jax.jit(proposer.init, static_argnums=3)
    propose, observe = jax.jit(proposer.propose), jax.jit(proposer.observe)
    key = law.row_keys(jax.random.key(2), len(PROMPTS))
    text, length = map(np.asarray, decode.pad(PROMPTS))
    width = text.shape[1] + 40
    text = np.pad(text, ((0, 0), (0, 40)))
    state = first(SMALL, text[:, :-40], length, 60)
    lags = set()
    for _ in range(rounds):
        draft, state = propose(SMALL, state, text, length, key)
        fresh = first(SMALL, text, length, 20)
        again, _ = propose(SMALL, fresh, text, length, key)
        yield draft, again
        path = np.zeros((len(PROMPTS), proposer.depth), np.int32)
        accepted = np.zeros(len(PROMPTS), np.int32)
        count = np.zeros(len(PROMPTS), np.int32)
        tokens = np.zeros((len(PROMPTS), proposer.depth + 1), np.int32)
        parents = np.asarray(draft.parents)
        for row in range(len(PROMPTS)):
            if rng.random() < 0.2:
                continue
            node, way = int(rng.integers(proposer.size)), []
            while node >= 0:
                way.insert(0, node)
                node = int(parents[row, node])
            way = way if rng.random() < 0.7 else way[: rng.integers(0, len(way) + 1)]
            path[row, : len(way)], accepted[row] = way, len(way)
            tokens[row, : len(way)] = np.asarray(draft.tokens)[row, way]
            tokens[row, len(way)] = rng.integers(TOKENS)
            # a row may end inside
            count[row] = 1 + (len(way) if rng.random() < 0.8 else len(way) // 2)
            end = length[row] + count[row]
            text[row, length[row] : end] = tokens[row, : count[row]]
        length = length + count
        assert length.max() < width
        verified = Verified(tokens, count, accepted, path, draft, Out(()))
        state = observe(SMALL, state, verified)
        lags |= set(state.lag.tolist())
    assert lags == {0, 1}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("ranked", MODEL),
        ("one level", MODEL),
        # the state of the fallback has another structure behind a branch
        ("expanded", lm.branch_by_rows(MODEL)),
        # a history that follows the paths
        ("drawn", warp.warp(MODEL, warp.repetition_penalty(1.3))),
    ],
)
def test_a_state_that_is_carried_on_is_that_of_the_text(name, model):
    for draft, again in play(model, SHAPES[name]):
        np.testing.assert_array_equal(draft.tokens, again.tokens)
        np.testing.assert_array_equal(draft.parents, again.parents)
        if draft.law is not None:
            np.testing.assert_allclose(draft.law, again.law, atol=1e-3)


def test_a_state_that_keeps_the_wrong_nodes_is_seen():
    """The mistake: the draft's own nodes are pruned for the nodes that were read."""
    shape = SHAPES["expanded"]

    def mixed(*arguments):
        draft, place, state = shape.grow(*arguments)
        return draft, jnp.where(place >= 0, place[:, ::-1], place), state

    pairs = play(MODEL, shape._replace(grow=mixed))
    assert not all((one.tokens == two.tokens).all() for one, two in pairs)
