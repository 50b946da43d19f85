"""The feature drafter: its laws and its alignment, against reading everything anew."""

import features as small
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import decode, law, slots
from collab_jax.cooperate.efficient import growth
from collab_jax.cooperate.efficient.draft import Verified
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.cooperate.efficient.topology import grow
from collab_jax.lm import Features, Out
from collab_jax.models.extrapolator import extrapolator

BACKBONE, MODEL, LAYER, BASE = small.BACKBONE, small.MODEL, small.LAYER, small.BASE
PROMPTS = small.PROMPTS
FUSED = extrapolator(small.CONFIG, small.TAPS)
TREE = growth.drawn(grow(7, [0.5, 0.3]))


def nodes_of(draft, row):
    """The tokens from the root to each node, in the order of the nodes."""
    parents = np.broadcast_to(above(draft), draft.tokens.shape)[row]
    found = []
    for token, parent in zip(np.asarray(draft.tokens[row]), parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), int(token)))
    return found


def above(draft):
    """The parents of the nodes, of a chain too."""
    chain = np.arange(draft.tokens.shape[1])[None] - 1
    return chain if draft.parents is None else draft.parents


def play(proposer, own, rounds=3):
    """Yields (texts, draft); rows keep a part of a path, or nothing as when done."""
    rng = np.random.default_rng(1)
    first = jax.jit(proposer.init, static_argnums=3)
    propose = jax.jit(proposer.propose)
    texts = [list(prompt) for prompt in PROMPTS]
    prompt, length = decode.pad(PROMPTS)
    params, rows = (own, BASE), len(PROMPTS)
    key = law.row_keys(jax.random.key(2), rows)
    state = first(params, prompt, length, 24)
    buffer = np.full((rows, prompt.shape[1] + 24), 7, np.int32)  # garbage behind
    depth = proposer.depth

    @jax.jit
    def observe(state, draft, path, accepted, tokens, count, text, begin):
        # what the target says at the pending token and at every node
        parents = jnp.broadcast_to(above(draft), draft.tokens.shape)
        target = on_lm(MODEL, chunk=8)
        pending = jnp.take_along_axis(text, begin[:, None] - 1, 1)[:, 0]
        inner = target.init(BASE, text, begin, 24)
        tree_draft = draft._replace(parents=parents)
        out, _ = target.score(BASE, inner, tree_draft, pending)
        verified = Verified(tokens, count, accepted, path, draft, out)
        return proposer.observe(params, state, verified)

    for _ in range(rounds):
        for row, text in zip(buffer, texts, strict=True):
            row[: len(text)] = text
        begin = np.array([len(text) for text in texts], np.int32)
        draft, state = propose(params, state, buffer, begin, key)
        yield texts, draft
        path, tokens = np.zeros((rows, depth), np.int32), np.zeros((rows, depth + 1))
        accepted, count = np.zeros((2, rows), np.int32)
        parents = np.broadcast_to(above(draft), draft.tokens.shape)
        for b in range(rows):
            if rng.random() < 0.2:
                continue
            node, way = int(rng.integers(-1, proposer.size)), []
            while node >= 0:
                way.insert(0, node)
                node = int(parents[b, node])
            path[b, : len(way)], accepted[b] = way, len(way)
            tokens[b, : len(way)] = np.asarray(draft.tokens)[b, way]
            tokens[b, len(way)] = rng.integers(small.VOCAB)
            count[b] = rng.integers(1, len(way) + 2)
            texts[b] += tokens[b, : count[b]].astype(int).tolist()
        tokens = tokens.astype(np.int32)
        state = observe(
            state, draft, path, accepted, tokens, count, buffer.copy(), begin
        )


def off(proposer, own, layer=LAYER, rounds=3):
    """The largest distance of a law from reading the whole text anew, of each round.

    The model's features are known up to the token before the pending one; behind it the
    layer reads its own guesses.
    """
    worst = []
    for texts, draft in play(proposer, own, rounds):
        worst.append(0.0)
        for row, text in enumerate(texts):
            for node, path in enumerate(nodes_of(draft, row)):
                whole = [*text, *path[:-1]]
                _, laws = small.one_by_one(whole, len(text), own, layer)
                far = abs(laws[-1] - draft.law[row, node]).max()
                worst[-1] = max(worst[-1], float(far))
    return worst


@pytest.mark.parametrize(("shape", "layer"), [(growth.chain(3), LAYER), (TREE, FUSED)])
def test_laws_are_those_of_reading_everything_again(shape, layer):
    """Ragged rows, prompts of several pieces, three rounds."""
    own = layer.init(jax.random.key(1), BASE)
    proposer = feature_drafter(BACKBONE, layer, shape, chunk=4)
    assert max(off(proposer, own, layer)) < 1e-3


def test_features_shifted_by_one_are_seen():
    """In the prompt and in the rounds behind it."""
    own = small.NEW_LAYER

    def later(features):
        return jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=1), features)

    shifted = feature_drafter(BACKBONE, LAYER, growth.chain(2), read=later)
    first, second = off(shifted, own, rounds=2)
    assert first < 1e-3
    assert second > 0.1

    def see(own, features):
        return jnp.roll(LAYER.see(own, features), 1, axis=1)

    shifted = feature_drafter(BACKBONE, LAYER._replace(see=see), growth.chain(2))
    assert off(shifted, own, rounds=1)[0] > 0.1


def test_a_model_in_bfloat16():
    """What it guesses is near what the same layer guesses in float32."""
    params = small.NEW_LAYER, BASE
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    drafter = feature_drafter(BACKBONE, LAYER, growth.chain(2))
    text, length = decode.pad(PROMPTS)
    wide, state = (drafter.init(p, text, length, 4) for p in (params, short))
    assert state.guess.dtype == jnp.bfloat16
    assert state.cache.k[0].dtype == slots.held(jnp.bfloat16)
    gap = jnp.abs(wide.guess - state.guess).max(-1) / jnp.abs(wide.guess).max(-1)
    assert (gap < 0.05).all()
    decoder = speculate(on_lm(MODEL), drafter, 6)
    both = short[1], short
    found = decode.run(decoder, both, text, length, jax.random.key(0))
    assert (found.length == length + 6).all()


def test_bad_input():
    text, length = decode.pad([[1, 2, 3]])
    drafter = feature_drafter(BACKBONE, LAYER, growth.chain(2))
    with pytest.raises(ValueError, match="got parameters of type dict: the pair"):
        drafter.init(BASE, text, length, 4)
    params, key = (small.NEW_LAYER, BASE), law.row_keys(jax.random.key(0), 1)
    state = drafter.init(params, text, length, 4)
    draft, state = drafter.propose(params, state, text, length, key)
    one, path = jnp.array([1]), jnp.array([[0, 1]])
    tokens = jnp.array([[1, 2, 3]])
    for features, message in (
        ((), r"features of type tuple: say where they are"),
        (Features(jnp.zeros((1, 3, 16))), "of width 16 for a layer of width 32"),
    ):
        out = Out(jnp.zeros((1, 3, small.VOCAB)), features)
        with pytest.raises(ValueError, match=message):
            drafter.observe(
                params, state, Verified(tokens, one, 0 * one, path, draft, out)
            )
    with pytest.raises(ValueError, match="length = 0"):
        feature_drafter(BACKBONE, LAYER, growth.chain(0))
