"""Trees of an LM: their laws, by enumeration and by chi-square."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec

from collab_jax import decode, law, warp
from collab_jax.cooperate.efficient import growth, tree
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table

VOCAB, COUNT, PROMPT = 3, 3, [1, 2]
TABLE = table.language_model(2)
PARAMS = tuple(
    table.init(key, VOCAB, 2, scale=1.5) for key in jax.random.split(jax.random.key(3))
)
WARPED = warp.warp(TABLE, warp.repetition_penalty(1.6), warp.top_p(0.95))
TAILS = [t.tolist() for n in range(COUNT) for t in spec.strings(VOCAB, n)]
DRAWN = [(0,), (1,), (0, 0), (0, 1), (1, 0)]


@functools.cache
def expected():
    return spec.target_joint(WARPED, PARAMS[0], PROMPT, COUNT)


def drafts(shape):
    """The proposer's draft behind every text, and the target's logits at its places."""
    text, length = decode.pad([[*PROMPT, *tail] for tail in TAILS])
    proposer, target = draft_tree(TABLE, shape), on_lm(WARPED)
    state = proposer.init(PARAMS[1], text, length, 20)
    key = law.row_keys(jax.random.key(0), len(TAILS))
    draft, _ = proposer.propose(PARAMS[1], state, text, length, key)
    state = target.init(PARAMS[0], text, length, 20)
    pending = jnp.take_along_axis(text, length[:, None] - 1, 1)[:, 0]
    return draft, target.score(PARAMS[0], state, draft, pending)[0].logits


def paths_to_places(draft, row):
    """The tokens on the way to each place, the pending token's place first."""
    tokens, parents = np.asarray(draft.tokens[row]), np.asarray(draft.parents[row])
    found = [()]
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*found[parent + 1], int(token)))
    return found


def joined(pieces):
    """The law of the next tokens: rounds follow rounds until `COUNT` tokens stand.

    pieces[i] are what may happen behind the i-th text: (accepted tokens, the law of the
    token behind them times the probability of both).
    """
    joints = {}
    for i, tail in reversed([*enumerate(TAILS)]):
        left = COUNT - len(tail)
        total = np.zeros((VOCAB,) * left)
        for path, law_behind in pieces[i]:
            if len(path) >= left:
                total[path[:left]] += law_behind.sum()
                continue
            for v in range(VOCAB):
                new = (*path, v)
                rest = joints[(*tail, *new)] if len(new) < left else 1.0
                total[new] += law_behind[v] * rest
        joints[tuple(tail)] = total
    return joints[()]


@pytest.mark.parametrize(
    "shape",
    [
        growth.ranked([(0,), (2,), (0, 1), (2, 0), (1,)]),
        growth.expanded(2, 2, 4),
        growth.expanded(3, 3, 6),
    ],
)
def test_one_hot_trees_are_lossless(shape):
    draft, logits = jax.jit(functools.partial(drafts, shape))()
    outcomes = jax.jit(tree.sampled().outcomes)
    for z, good in ((logits, True), (logits[:, ::-1], False)):
        found = np.asarray(outcomes(z, draft), np.float64)
        pieces = [
            [*zip(paths_to_places(draft, row), found[row], strict=True)]
            for row in range(len(TAILS))
        ]
        off = abs(joined(pieces) - expected()).max()
        assert off < 1e-6 if good else off > 1e-2


def in_order(q, order):
    """The probability that draws without replacement come in an order."""
    left, weight = q.sum(), 1.0
    for v in order[:-1]:
        weight *= q[v] / left
        left -= q[v]
    return weight


@functools.cache
def every_draw():
    """All orders of draws on both levels: [(orders, draft, the target's logits)]."""
    shape, length = growth.drawn(DRAWN), 2 + np.array([len(tail) for tail in TAILS])

    @jax.jit
    def forced(rank):
        def noise(key, position, vocab):
            del key, vocab
            return -1000.0 * rank[position - length]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(law, "noise", noise)
            return drafts(shape)

    orders = [*itertools.permutations(range(VOCAB))]
    return [
        (pair, *forced(jnp.array([np.argsort(one) for one in pair])))
        for pair in itertools.product(orders, orders)
    ]


def drawn_off(outcomes, told=lambda draft: draft):
    """How far the law is from the target's, all draws enumerated.

    A place below the first or the second root sees the draws of the roots and those of
    this root's children, and of no others.
    """
    pieces, outcomes = [[] for _ in TAILS], jax.jit(outcomes)
    for pair, draft, logits in every_draw():
        q = np.exp(np.asarray(law.log_probs(draft.law), np.float64))
        told_draft = told(draft)
        found = np.asarray(outcomes(logits, told_draft), np.float64)
        for row in range(len(TAILS)):
            paths = paths_to_places(draft, row)
            assert paths[1:3] == [(v,) for v in pair[0][:2]]
            assert [path[1] for path in paths[3:]] == [*pair[1][:2], pair[1][0]]
            roots = in_order(q[row, 0], pair[0])
            below = [in_order(q[row, node], pair[1]) for node in (2, 4)]
            # the pending place is met once for every order of the level below
            once = 1 / math.factorial(VOCAB)
            weights = roots * np.array([once, *below, below[0], below[0], below[1]])
            paths = paths_to_places(told_draft, row)
            pieces[row] += [*zip(paths, weights[:, None] * found[row], strict=True)]
    return abs(joined(pieces) - expected()).max()


def test_drawn_siblings_are_lossless():
    assert drawn_off(tree.recursive().outcomes) < 1e-6


def test_other_laws_and_orders_are_mistakes():
    def swapped(draft):
        """The second draw given as the first, in the family of the first root."""
        return draft._replace(tokens=draft.tokens[:, jnp.array([0, 1, 3, 2, 4])])

    def of_the_root(draft):
        """One law for all families."""
        return draft._replace(law=draft.law.at[:].set(draft.law[:, :1]))

    for told in (swapped, of_the_root):
        assert drawn_off(tree.recursive().outcomes, told) > 1e-3
    assert drawn_off(tree.independent().outcomes) > 1e-3


@pytest.mark.parametrize(
    ("shape", "verifier"),
    [
        (growth.drawn(DRAWN), tree.recursive),
        (growth.expanded(2, 2, 4), tree.sampled),
    ],
)
def test_runs_follow_the_law(shape, verifier):
    decoder = speculate(on_lm(WARPED), draft_tree(TABLE, shape), 3, verifier=verifier())
    drawn = spec.counts(decoder, PARAMS, PROMPT, 3, 20_000)
    found, limit = spec.chi_square(drawn, expected())
    assert found < limit
