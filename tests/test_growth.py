"""What grows: static shapes, draws without replacement, and EAGLE-2 against a twin."""

import itertools

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
from collab_jax.cooperate.efficient.topology import grow
from collab_jax.models import table

VOCAB, ORDER = 6, 3
LM = table.language_model(ORDER)
PARAMS = table.init(jax.random.key(1), VOCAB, ORDER, scale=1.5)
ROWS = np.asarray(PARAMS, np.float64)
TEXTS = [[1], [2, 0, 5, 1], [3, 3], [0, 1, 2, 3, 4, 5], [4]]


def proposed(growth, texts=TEXTS, key=0, params=PARAMS, lm=LM):
    """The first draft behind each text."""
    text, length = decode.pad(texts)
    proposer = draft_tree(lm, growth, chunk=2)

    def first(params, key):
        state = proposer.init(params, text, length, 40)
        return proposer.propose(params, state, text, length, key)[0]

    return jax.jit(first)(params, law.row_keys(jax.random.key(key), len(texts)))


def log_q(text):
    """The draft's log-probs behind a text, `[V]`, by plain extension."""
    seen = [VOCAB] * ORDER + list(text)
    index = sum(seen[-1 - k] * (VOCAB + 1) ** k for k in range(ORDER))
    z = ROWS[index]
    return z - np.log(np.exp(z).sum())


def paths_of(draft, row):
    """The tokens from the root to each node that is meant, in order."""
    parents, found = np.asarray(draft.parents[row]), []
    for i in range(int(draft.count[row])):
        assert parents[i] < i
        above = found[parents[i]] if parents[i] >= 0 else ()
        found.append((*above, int(draft.tokens[row, i])))
    return found


def closed(paths):
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


def eagle2(text, depth, width, nodes):
    """Lists, sorting, and the whole list of candidates."""
    level, every = [((), 0.0)], []
    for _ in range(depth):
        children = []
        for path, score in level:
            q = log_q([*text, *path])
            for v in np.argsort(-q, kind="stable")[:width]:
                children.append(((*path, int(v)), score + q[v]))
        every += children
        level = sorted(children, key=lambda child: -child[1])[:width]
    return dict(sorted(every, key=lambda child: -child[1])[:nodes])


def every_path(text, depth):
    """The score of every path of the full tree."""
    scores = {(): 0.0}
    for path in itertools.chain.from_iterable(
        itertools.product(range(VOCAB), repeat=n + 1) for n in range(depth)
    ):
        scores[path] = scores[path[:-1]] + log_q([*text, *path[:-1]])[path[-1]]
    del scores[()]
    return scores


@pytest.mark.parametrize("sizes", [(1, 3, 2), (4, 3, 12), (3, 2, 3)])
def test_expansion_is_its_twin(sizes):
    draft = proposed(growth.expanded(*sizes))
    for row, text in enumerate(TEXTS):
        found = paths_of(draft, row)
        assert len(found) == sizes[2]
        assert set(found) == set(eagle2(text, *sizes))
        assert closed(found)


def test_a_wide_expansion_is_the_best_tree_of_all():
    depth, nodes = 3, 6
    draft = proposed(growth.expanded(depth, VOCAB, nodes))
    for row, text in enumerate(TEXTS):
        scores = every_path(text, depth)
        best = sorted(scores, key=lambda path: -scores[path])[:nodes]
        assert set(paths_of(draft, row)) == set(best)


def test_scores_of_single_tokens_are_no_tree():
    """The mistake: nodes are kept by their own probability, not their path's."""
    torn = 0
    for text in TEXTS:
        scores = {p: log_q([*text, *p[:-1]])[p[-1]] for p in every_path(text, 3)}
        torn += not closed(sorted(scores, key=lambda path: -scores[path])[:6])
    assert torn == len(TEXTS)


def test_ties_and_impossible_tokens_keep_the_tree_whole():
    """A greedy draft: children as likely as their parents, all others impossible."""
    draft = proposed(growth.expanded(3, 3, 9), lm=warp.warp(LM, warp.greedy()))
    for row, text in enumerate(TEXTS):
        best = []
        for _ in range(3):
            best.append(int(np.argmax(log_q([*text, *best]))))
        assert paths_of(draft, row) == [tuple(best[: n + 1]) for n in range(3)]
    flat = proposed(growth.expanded(3, 3, 9), params=0 * PARAMS)
    for row in range(len(TEXTS)):
        assert closed(paths_of(flat, row))
        assert len(set(paths_of(flat, row))) == 9


PATHS = [(0,), (2,), (1,), (2, 1), (0, 0), (0, 3), (2, 1, 1), (0, 0, 0), (0, 3, 2)]


def test_ranks_are_followed():
    draft = proposed(growth.ranked(PATHS))
    assert draft.law is None
    assert draft.count.tolist() == [len(PATHS)] * len(TEXTS)
    for row, text in enumerate(TEXTS):
        for ranks, found in zip(PATHS, paths_of(draft, row), strict=True):
            tokens = []
            for rank in ranks:
                order = np.argsort(-log_q([*text, *tokens]), kind="stable")
                tokens.append(int(order[rank]))
            assert found == tuple(tokens)


def without_replacement(text, count):
    """The law of the first `count` draws, `[V] * count`."""
    joint = np.zeros((VOCAB,) * count)
    p = np.exp(log_q(text))
    for tokens in itertools.permutations(range(VOCAB), count):
        left, weight = 1.0, 1.0
        for v in tokens:
            weight *= p[v] / left
            left -= p[v]
        joint[tokens] = weight
    return joint


def test_siblings_are_drawn_without_replacement():
    text, runs = [2, 0, 1], 20_000
    paths = [(0,), (1,), (0, 0), (1, 0), (1, 1), (2,)]
    draft = proposed(growth.drawn(paths), [text] * runs)
    tokens = np.asarray(draft.tokens)
    roots = tokens[:, [0, 1, 5]]
    found, limit = spec.chi_square(roots, without_replacement(text, 3))
    assert found < limit
    pairs, often = np.unique(roots[:, :2], axis=0, return_counts=True)
    for first, second in pairs[np.argsort(-often)[:2]]:
        # the children of the second root, given both roots
        here = (roots[:, 0] == first) & (roots[:, 1] == second)
        given, joint = tokens[here][:, 3:5], without_replacement([*text, second], 2)
        found, limit = spec.chi_square(given, joint)
        assert len(given) > 500
        assert found < limit
        other, limit = spec.chi_square(given, without_replacement([*text, first], 2))
        assert other > limit  # the control: another family's law
    p = np.exp(log_q(text))
    again = p[:, None, None] * p[:, None] * p
    found, limit = spec.chi_square(roots, again)
    assert found > limit


def test_the_law_is_that_of_the_first_sibling():
    paths = grow(8, [0.5, 0.3])
    draft = proposed(growth.drawn(paths))
    assert draft.law.shape == (len(TEXTS), 8, VOCAB)
    for row, text in enumerate(TEXTS):
        for node, path in enumerate(paths_of(draft, row)):
            want = log_q([*text, *path[:-1]])
            got = law.log_probs(draft.law[row, node])
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_coupled_draws_of_the_target_itself_all_stay():
    """The noise of a level is that of plain sampling, and the first draw is its."""
    growths = growth.drawn(grow(6, [0.5, 0.3]))
    proposer = draft_tree(LM, growths)
    decoder = speculate(on_lm(LM), proposer, 12, verifier=tree.sampled())
    found = spec.draws(decoder, (PARAMS, PARAMS), TEXTS)
    plain = spec.draws(decode.sample(LM, 12), PARAMS, TEXTS)
    for row in range(len(TEXTS)):
        assert spec.new_tokens(found, row) == spec.new_tokens(plain, row)
    assert growths.depth == 3
    assert found.info.accepted.tolist() == [3 * n for n in found.info.calls.tolist()]


def test_a_chain_is_that_of_plain_draws():
    """Position for position `law.draw`, as the interface of proposers says."""
    keys = law.row_keys(jax.random.key(0), len(TEXTS))
    draft = proposed(growth.chain(3))
    assert draft.parents is None
    for row, text in enumerate(TEXTS):
        tokens = list(text)
        for _ in range(3):
            z = jnp.asarray(log_q(tokens), jnp.float32)[None]
            key, place = keys[row : row + 1], jnp.array([len(tokens)])
            tokens.append(int(law.draw(z, key, place)[0]))
        assert draft.tokens[row].tolist() == tokens[len(text) :]


def test_nothing_is_drafted_from_nan():
    """The law behind token 2 is NaN: a chain ends there, and a tree is not followed."""
    one = table.language_model(1)
    broken = table.init(jax.random.key(2), 3, 1).at[2].set(jnp.nan)
    chain = proposed(growth.chain(4), [[2], [0], [1]] * 40, 1, broken, one)
    for row, tokens in enumerate(chain.tokens.tolist()):
        said = (
            [[2, 0, 1][row % 3], *tokens].index(2) if 2 in tokens or not row % 3 else 4
        )
        assert int(chain.count[row]) == said
    pair = proposed(growth.drawn([(0,), (1,)]), [[2]], 1, broken, one)
    target = jnp.zeros((1, 3, 3))
    found = tree.recursive().outcomes(target, pair)[0]
    np.testing.assert_allclose(found, jnp.eye(3, 1) * jnp.full(3, 1 / 3), atol=1e-6)
    dead = proposed(growth.expanded(2, 2, 4), [[2]], 1, broken, one)
    assert dead.count.tolist() == [0]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: growth.ranked([]), "number of paths = 0"),
        (lambda: growth.ranked([(0,), (1, 0)]), r"path \(1, 0\)"),
        (lambda: growth.drawn([(1,), (0,)]), r"path \(1,\): siblings are drawn"),
        (lambda: growth.drawn([(0,), (0, 1)]), r"next behind \(0,\) has rank 0"),
        (lambda: growth.chain(0), "length = 0"),
        (lambda: growth.expanded(0, 2, 2), "depth = 0"),
        (lambda: growth.expanded(2, 0, 2), "width = 0"),
        (lambda: growth.expanded(2, 2, -1), "nodes = -1"),
        (lambda: growth.expanded(2, 2, 7), "nodes = 7: 2 levels of 2"),
        (lambda: proposed(growth.ranked([(VOCAB,)])), "rank 6 of a vocabulary of 6"),
        (lambda: proposed(growth.expanded(1, 7, 2)), "width = 7 children"),
    ],
)
def test_what_cannot_grow_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()
