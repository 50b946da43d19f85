"""Token recycling against plain dictionaries of lists."""

import jax
import jax.numpy as jnp
import naive_drafts as naive
import numpy as np
import pytest
from drafting import histories

from collab_jax.cooperate.efficient import recycle as rc
from collab_jax.cooperate.efficient import topology
from collab_jax.cooperate.efficient.draft import Draft, Verified
from collab_jax.lm import Out

VOCAB = 7
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 2)]


def played(proposer, paths, sparse, rounds=12, rows=24):
    """Yields (draft of the proposer, of its twin) of every row and round.

    Args:
      proposer: on trial.
      paths: of its tree.
      sparse: share of the tokens that the target forbids.
      rounds: how many.
      rows: how many.
    """
    rng = np.random.default_rng(0)
    width = max(max(path) for path in paths) + 1
    texts = histories(1, rows, longest=12, alphabet=VOCAB)
    buffer = rng.integers(0, VOCAB, (rows, 80)).astype(np.int32)
    for row, text in zip(buffer, texts, strict=True):
        row[: len(text)] = text
    length = np.array([len(text) for text in texts], np.int32)
    state = jax.jit(proposer.init, static_argnums=3)((), buffer[:, :12], length, 68)
    lists = [naive.first_lists(text) for text in texts]
    propose, observe = jax.jit(proposer.propose), jax.jit(proposer.observe)
    for _ in range(rounds):
        draft, state = propose((), state, buffer, length, None)
        logits = rng.normal(size=(rows, 1 + len(paths), VOCAB)).astype(np.float32)
        forbidden = rng.random(logits.shape) < sparse
        forbidden[:, :, 0] = False
        logits[forbidden] = -np.inf
        path = rng.integers(0, len(paths), (rows, proposer.depth)).astype(np.int32)
        accepted, count = np.zeros((2, rows), np.int32)
        fresh = rng.integers(0, VOCAB, rows)
        for b in range(rows):
            pending = int(buffer[b, length[b] - 1])
            found = naive.recycle(lists[b], pending, paths)
            yield row_of(draft, b), found
            if rng.random() < 0.2:  # a row that is done
                continue
            places = {p: i for i, (_, p) in enumerate(found)}
            walk = []
            while rng.random() < 0.7:
                last = found[walk[-1]][1] if walk else ()
                below = [i for p, i in places.items() if p[:-1] == last and p]
                if not below:
                    break
                walk.append(int(rng.choice(below)))
            path[b, : len(walk)] = walk
            accepted[b], count[b] = len(walk), len(walk) + 1
            kept = [0, *(i + 1 for i in walk)]
            tokens = [pending, *(token for token, _ in found)]
            naive.read(lists[b], tokens, kept, logits[b], width)
            new = [*(found[i][0] for i in walk), fresh[b]]
            buffer[b, length[b] : length[b] + len(new)] = new
        draft = draft._replace(count=np.where(count > 0, draft.count, 0))
        tokens = np.zeros((rows, proposer.depth + 1), np.int32)
        state = observe(
            (), state, Verified(tokens, count, accepted, path, draft, Out(logits))
        )
        length = length + count


def row_of(draft, b):
    """[(token, parent)] of one row."""
    count, tokens = int(draft.count[b]), np.asarray(draft.tokens[b])
    if draft.parents is None:
        parents = np.arange(-1, len(tokens) - 1)
    else:
        parents = np.asarray(draft.parents[b])
        assert (parents < np.arange(len(parents))).all()
    return [*zip(tokens[:count].tolist(), parents[:count].tolist(), strict=True)]


@pytest.mark.parametrize("sparse", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_lists_are_their_twin(kind, sparse):
    paths = TREE if kind == "tree" else [(0,) * n for n in range(1, 5)]
    proposer = rc.recycle_tree(TREE, VOCAB) if kind == "tree" else rc.recycle(4, VOCAB)
    assert (proposer.size, proposer.depth) == (len(paths), max(map(len, paths)))
    sizes = set()
    for mine, found in played(proposer, paths, sparse):
        places = {path: i for i, (_, path) in enumerate(found)}
        assert mine == [(token, places.get(path[:-1], -1)) for token, path in found]
        sizes.add(len(mine))
    assert len(sizes) > 2


def test_an_accepted_token_has_the_last_word():
    """The mistake: nodes write in their order, rejected ones over accepted ones."""
    proposer = rc.recycle(3, 5)
    text = jnp.array([[1, 2, 1, 2, 0, 0]])
    state = proposer.init((), text, jnp.array([3]), 3)
    draft, state = proposer.propose((), state, text, jnp.array([3]), None)
    assert draft.tokens.tolist() == [[2, 1, 2]]
    says = jnp.log(jnp.eye(5)[jnp.array([[2, 4, 0, 3]])])  # behind 1, 2, 1, 2
    verified = Verified(
        jnp.array([[2, 4, 0, 0]]),
        jnp.array([2]),
        jnp.array([1]),
        jnp.array([[0, 1, 2]]),
        draft,
        Out(says),
    )
    state = proposer.observe((), state, verified)
    assert state.next[0, :3, 0].tolist() == [-1, 2, 4]


def test_trees_grow_where_they_are_likely():
    paths = topology.grow(30)
    parents, _ = topology.check_paths(paths)
    shares = [np.prod([topology.SHARES[rank] for rank in path]) for path in paths]
    assert shares == sorted(shares, reverse=True)
    every = [
        share * topology.SHARES[0]
        for share, path in zip(shares, paths, strict=True)
        if (*path, 0) not in paths
    ]
    assert max(every) <= shares[-1]
    assert parents[0] == -1


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: rc.recycle(0, 5), "length = 0"),
        (lambda: rc.recycle(-2, 5), "length = -2"),
        (lambda: rc.recycle(2, 0), "vocab = 0"),
        (lambda: rc.recycle_tree([], 5), "number of paths = 0"),
        (lambda: rc.recycle_tree([(0,), (4,)], 4), "vocab = 4 for lists of 5"),
        (lambda: rc.recycle_tree([(0,), (1, 0)], 4), r"path \(1, 0\)"),
        (lambda: rc.recycle_tree([(0,), (0,)], 4), r"path \(0,\)"),
        (lambda: rc.recycle_tree([()], 4), r"path \(\)"),
        (lambda: topology.grow(0), "nodes = 0"),
        (lambda: topology.grow(3, [0.2, 0.4]), "shares"),
    ],
)
def test_what_cannot_draft_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()


def test_another_vocabulary_is_refused():
    proposer = rc.recycle(1, 5)
    text = jnp.array([[1, 2]])
    state = proposer.init((), text, jnp.array([2]), 3)
    draft = Draft(jnp.array([[1]]), jnp.array([1]))
    one = jnp.array([1])
    verified = Verified(
        jnp.array([[1, 2]]), one, one, one[None], draft, Out(jnp.zeros((1, 2, 6)))
    )
    with pytest.raises(ValueError, match="over 5 tokens for a target over 6"):
        proposer.observe((), state, verified)
