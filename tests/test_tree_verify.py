"""Verifiers of trees: every tree enumerated, and the loop on trees by chi-square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from speculation import draws, new_tokens

from collab_jax import decode, law, warp
from collab_jax.cooperate.efficient import tree, verify
from collab_jax.cooperate.efficient.draft import Draft, Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table

VOCAB, COUNT = 3, 3
PROMPT = [1, 2]
PARENTS = np.array([-1, -1, 0, 0, 1])  # two roots; the first has two children
TABLE = table.language_model(2)
PARAMS = tuple(
    table.init(key, VOCAB, 2, scale=1.5) for key in jax.random.split(jax.random.key(3))
)
WARPED = warp.warp(TABLE, warp.repetition_penalty(1.6), warp.top_p(0.95))
PLAIN = table.language_model(2)


def drawn_with(q, x, replaced):
    """The probability of the tokens x [R, N] of a tree, q [R, N, V] at each parent."""
    total = np.ones(len(x))
    for node, parent in enumerate(PARENTS):
        p = q[:, node].copy()
        for other in range(node):
            if PARENTS[other] == parent and not replaced:
                p[np.arange(len(x)), x[:, other]] = 0
        mass = p.sum(1)
        p = p / np.where(mass > 0, mass, 1)[:, None]
        total *= p[np.arange(len(x)), x[:, node]]
    return total


@functools.cache
def read():
    """All texts, all trees behind them, and both laws at every place."""
    tails = [t.tolist() for n in range(COUNT) for t in spec.strings(VOCAB, n)]
    trees = spec.strings(VOCAB, len(PARENTS))
    text, length = decode.pad([[*PROMPT, *t] for t in tails for _ in trees])
    x = jnp.asarray(np.tile(trees, (len(tails), 1)))
    parents = jnp.broadcast_to(PARENTS, x.shape)
    pending = jnp.take_along_axis(text, length[:, None] - 1, 1)[:, 0]

    def logits(lm, params):
        target = on_lm(lm)
        state = target.init(params, text, length, 12)
        for tokens in ((x + 1) % VOCAB, x):  # another tree first, and forgotten
            draft = Draft(tokens, length, parents=parents)
            out, state = target.score(params, state, draft, pending)
            state = target.prune(state, jnp.zeros((len(x), 3), int), 0 * length)
        return out.logits

    p, q = (
        jax.jit(functools.partial(logits, lm))(w)
        for lm, w in zip((WARPED, PLAIN), PARAMS, strict=True)
    )
    return tails, trees, x, parents, p, q[:, PARENTS + 1]


@functools.cache
def expected():
    return spec.target_joint(WARPED, PARAMS[0], PROMPT, COUNT)


def joint(outcomes, reported, weight, count=None):
    """The law of the next tokens, all trees enumerated."""
    tails, trees, x, parents, p, _ = read()
    count = jnp.full(len(x), len(PARENTS)) if count is None else count
    draft = Draft(x, count.astype(jnp.int32), reported, parents)
    found = np.asarray(jax.jit(outcomes)(p, draft), np.float64) * weight[:, None, None]
    found = found.reshape(len(tails), len(trees), 1 + len(PARENTS), VOCAB)
    paths = [[]]
    for node, parent in enumerate(PARENTS):
        paths.append([*paths[parent + 1], node])
    joints = {}
    for i, tail in reversed([*enumerate(tails)]):
        left = COUNT - len(tail)
        total = np.zeros((VOCAB,) * left)
        for j, tokens in enumerate(trees.tolist()):
            for place, path in enumerate(paths):
                text = [tokens[node] for node in path]
                if len(text) >= left:
                    total[tuple(text[:left])] += found[i, j, place].sum()
                    continue
                for v in range(VOCAB):
                    new = (*text, v)
                    rest = joints[(*tail, *new)] if len(new) < left else 1.0
                    total[new] += found[i, j, place, v] * rest
        joints[tuple(tail)] = total
    return joints[()]


def off(outcomes, replaced, hot=False, **rest):
    *_, x, _, _, q = read()
    laws = np.asarray(jnp.exp(law.log_probs(q)), np.float64)
    if hot:  # a tree of the likeliest tokens
        rank = np.argsort(-laws, axis=-1, kind="stable")
        sibling = [sum(PARENTS[:n] == PARENTS[n]) for n in range(len(PARENTS))]
        best = rank[:, np.arange(len(PARENTS)), sibling]
        weight = (best == np.asarray(x)).all(1).astype(float)
        return abs(joint(outcomes, None, weight, **rest) - expected()).max()
    weight = drawn_with(laws, np.asarray(x), replaced)
    return abs(joint(outcomes, q, weight, **rest) - expected()).max()


def test_lossless():
    assert off(tree.recursive().outcomes, False) < 1e-6
    assert off(tree.independent().outcomes, True) < 1e-6


def test_one_hot_trees_are_lossless():
    for verifier in (tree.recursive(), tree.independent(), tree.sampled()):
        assert off(verifier.outcomes, False, hot=True) < 1e-6


def test_shorter_trees_are_lossless():
    """Nodes behind the count are not meant: the tree stops behind a token 2."""
    x = read()[2]
    count = jnp.where((x[:, :2] == 2).any(1), 2, len(PARENTS))
    assert off(tree.recursive().outcomes, False, count=count) < 1e-6


def test_mistakes_are_seen():
    """The rule for one kind of siblings on the other; softmax for argmax."""
    assert off(tree.independent().outcomes, False) > 1e-3
    assert off(tree.recursive().outcomes, True) > 1e-3

    def softmax(logits, draft):
        return tree.recursive().outcomes(logits, draft._replace(law=read()[-1]))

    assert off(softmax, False, hot=True) > 1e-2


def test_a_chain_is_maximal():
    z, w = 2 * jax.random.normal(jax.random.key(0), (2, 40, 5, 6))
    x = jax.random.randint(jax.random.key(1), (40, 4), 0, 6)
    draft = Draft(x, jnp.arange(40) % 5, w[:, :4])
    chain = jax.jit(verify.maximal().outcomes)(z, draft)
    for verifier in (tree.recursive(), tree.independent()):
        found = jax.jit(verifier.outcomes)(z, draft)
        np.testing.assert_allclose(found, chain, atol=1e-6)


def test_paths_are_those_of_the_parents():
    parents = jnp.array([[-1, -1, 0, 2, 2, 1]])
    expected = [[], [0], [1], [0, 2], [0, 2, 3], [0, 2, 4], [1, 5]]
    for place, path in enumerate(expected):
        found, count = tree.path_to(parents, jnp.array([place]))
        assert found[0, : int(count[0])].tolist() == path


def grown(lm, replaced):
    """Drafts the tree of PARENTS, siblings with or without putting back.

    For tests only: every node reads the whole tree again.
    """
    nodes = len(PARENTS)
    parents = jnp.asarray(PARENTS)

    def init(params, prompt, prompt_length, room):
        return on_lm(lm).init(params, prompt, prompt_length, room)

    def propose(params, state, tokens, length, key):
        batch = len(length)
        rows = jnp.arange(batch)
        pending = tokens[rows, length - 1]
        x = jnp.zeros((batch, nodes), jnp.int32)
        above = jnp.broadcast_to(parents, x.shape)
        laws = jnp.zeros((batch, nodes, VOCAB))
        for node in range(nodes):
            draft = Draft(x, length, parents=above)
            out, after = on_lm(lm).score(params, state, draft, pending)
            state = lm.prune(after, jnp.zeros((batch, 3), int), 0 * length)
            q = out.logits[:, PARENTS[node] + 1]
            laws = laws.at[:, node].set(q)
            if not replaced:
                for other in range(node):
                    if PARENTS[other] == PARENTS[node]:
                        q = q.at[rows, x[:, other]].set(-jnp.inf)
            x = x.at[:, node].set(law.draw(q, key, length, 10 + node))
        draft = Draft(x, jnp.full(batch, nodes), laws, above)
        out, state = on_lm(lm).score(params, state, draft, pending)
        return draft, state

    def observe(params, state, verified):
        path = jnp.pad(verified.path + 1, ((0, 0), (1, 0)))
        return lm.prune(state, path, verified.count)

    return Proposer(init, propose, observe, nodes, 2)


@pytest.mark.parametrize(
    ("verifier", "replaced"), [(tree.recursive, False), (tree.independent, True)]
)
def test_runs_follow_the_law(verifier, replaced):
    decoder = speculate(on_lm(WARPED), grown(TABLE, replaced), 3, verifier=verifier())
    drawn = spec.counts(decoder, PARAMS, PROMPT, 3, 20_000)
    found, limit = spec.chi_square(drawn, expected())
    assert found < limit


def test_sampled_runs_are_plain_sampling():
    """Token for token, on random trees too; rows end inside a path."""
    prompts = [[1], [2, 0, 1, 1, 2], [0, 2], [1, 1, 1]]
    plain = draws(decode.sample(WARPED, 10, eos=[0]), PARAMS[0], prompts)
    decoder = speculate(
        on_lm(WARPED), grown(TABLE, False), 10, verifier=tree.sampled(), eos=[0]
    )
    found = draws(decoder, PARAMS, prompts)
    for row in range(len(prompts)):
        assert new_tokens(found, row) == new_tokens(plain, row)
    info = found.info
    assert (info.taken.sum(-1) == info.accepted).all()
    assert info.taken.shape == (4, 2)
    assert int(info.accepted.sum()) > 5


def test_typical_keeps_the_deepest_then_the_likeliest():
    p = np.full((1, 6, 4), 0.02)
    p[0, 0] = [0.5, 0.4, 0.08, 0.02]  # the roots 0 and 1 are good
    p[0, 1] = [0.3, 0.3, 0.2, 0.2]
    p[0, 2] = [0.01, 0.01, 0.01, 0.97]
    draft = Draft(
        jnp.array([[0, 1, 0, 1, 3]]), jnp.array([5]), None, jnp.asarray(PARENTS)[None]
    )
    found = tree.typical_tree(0.09, 0.3).outcomes(jnp.log(jnp.asarray(p)), draft)
    best = np.unravel_index(np.argmax(found[0]), found[0].shape)
    assert best[0] == 5  # node 4: 0.4 * 0.97 beats 0.5 * 0.3
    draft = draft._replace(count=jnp.array([4]))
    found = tree.typical_tree(0.09, 0.3).outcomes(jnp.log(jnp.asarray(p)), draft)
    assert np.unravel_index(np.argmax(found[0]), found[0].shape)[0] == 3


def test_a_draft_over_another_vocabulary_is_refused():
    draft = Draft(jnp.zeros((1, 2), int), jnp.array([2]), jnp.zeros((1, 2, 7)))
    for verifier in (tree.recursive(), tree.independent(), tree.typical_tree()):
        with pytest.raises(ValueError, match="7 tokens for a target over 5"):
            verifier.outcomes(jnp.zeros((1, 3, 5)), draft)
