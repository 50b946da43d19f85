"""How a draft becomes a tree: which tokens are nodes, and which nodes are read.

A `Growth` gets the draft's law behind the pending token. Level by level it chooses the
nodes that hang from what was read, and asks for the laws behind those of them that get
children themselves. Leaves are never read. Who reads is another choice: an LM
(`draft_tree`), or a layer over the target's features (`feature_drafter`).

Shapes: B rows, N nodes of the draft, D nodes of its longest path, M nodes that are read
(R of them so far), V vocabulary, W children of a node.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import law
from collab_jax.cooperate.efficient.draft import Draft, check_size
from collab_jax.cooperate.efficient.topology import check_paths
from collab_jax.lm import State

# (state, tokens [B, R], parents [B, R], new) -> (logits [B, new, V], state): the laws
# behind the last `new` of the R nodes; the others were read before, in this order
Read = Callable[[State, jax.Array, jax.Array, int], tuple[jax.Array, State]]


class Growth(NamedTuple):
    """A shape of trees, or a rule that finds one."""

    # (read, state, logits [B, V] behind the pending token, key [B], length [B]) ->
    # (draft, place [B, N], state): place is which of the M nodes read a node is, -1 for
    # one that was not
    grow: Callable[..., tuple[Draft, jax.Array, State]]
    size: int  # N
    depth: int  # D
    reads: int  # M


def ranked(paths: Sequence[Sequence[int]]) -> Growth:
    """The draft's best tokens in a fixed topology; the tree is a function of the text.

    The child of rank r is the token with the r-th largest probability.

    Args:
      paths: the ranks of the tokens from the root to each node, 0 is the best; every
        path comes behind its own beginning. `topology.grow(N, shares)` makes the best N
        paths from guesses of how often each rank is right.

    Returns:
      A growth of one-hot trees.

    Raises:
      ValueError: for no paths, or one that has no beginning or stands twice; when first
        called, for a rank that the vocabulary does not have.

    Source: EAGLE, arXiv 2401.15077; Medusa, arXiv 2401.10774.

    >>> z = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]])
    >>> def read(state, tokens, parents, new):
    ...     return z[:, -new:], state
    >>> growth = ranked([(0,), (1,), (0, 0)])
    >>> draft, place, _ = growth.grow(read, (), z[:, 0], None, jnp.array([5]))
    >>> draft.tokens.tolist(), draft.parents.tolist(), place.tolist()
    ([[1, 2, 0]], [[-1, -1, 0]], [[0, -1, -1]])
    """
    return _fixed(paths, random=False)


def drawn(paths: Sequence[Sequence[int]]) -> Growth:
    """Siblings drawn without replacement, in a fixed topology.

    The children of a node are the best of `log q(v) + g(v)`, with Gumbel noise g: the
    first is drawn from q, the next from what is left of q, and so on. `Draft.law` is q,
    for `tree.recursive`. One g serves a whole level, because no two of its families are
    both looked at; with a coupled verifier it is that of plain sampling.

    Args:
      paths: as in `ranked`; rank r is the r-th draw, so that siblings come in the order
        0, 1, 2, ..

    Returns:
      A growth of trees with a law.

    Raises:
      ValueError: as in `ranked`, and for siblings in another order.

    Source: Sequoia, arXiv 2402.12374; the noise, arXiv 1903.06059.

    >>> z = jnp.zeros((1, 3))
    >>> key = law.row_keys(jax.random.key(0), 1)
    >>> growth = drawn([(0,), (1,), (2,)])
    >>> draft, _, _ = growth.grow(None, (), z, key, jnp.array([5]))
    >>> sorted(draft.tokens[0].tolist()), draft.law.shape
    ([0, 1, 2], (1, 3, 3))
    """
    family: Counter[tuple[int, ...]] = Counter()
    for path in map(tuple, paths):
        if path and path[-1] != family[path[:-1]]:
            raise ValueError(
                f"path {path}: siblings are drawn one after the other, and the next "
                f"behind {path[:-1]} has rank {family[path[:-1]]}; give them in order"
            )
        family[path[:-1]] += 1
    return _fixed(paths, random=True)


def chain(length: int) -> Growth:
    """A chain `x_i ~ q(. | x_<i)`, i = 1 .. K, with its law, for verifiers of chains.

    It ends before a law that is NaN. (Verifiers of trees never accept from such a law.)

    Args:
      length: K.

    Raises:
      ValueError: for a length below 1.

    >>> chain(3).size, chain(3).depth, chain(3).reads
    (3, 3, 2)
    """
    size = check_size("length", length)
    tree = drawn([(0,) * (i + 1) for i in range(size)])

    def grow(*arguments):
        draft, place, state = tree.grow(*arguments)
        assert draft.law is not None  # of `drawn`
        known = ~jnp.isnan(draft.law).any(-1)
        count = jnp.cumprod(known, axis=1).sum(1, dtype=jnp.int32)
        return draft._replace(count=count, parents=None), place, state

    return tree._replace(grow=grow)


def _fixed(paths: Sequence[Sequence[int]], random: bool) -> Growth:
    parents, ranks = check_paths(paths)
    size, depth = len(paths), max(map(len, paths))
    level = [len(path) - 1 for path in paths]
    inner = sorted(set(parents) - {-1}, key=lambda node: (level[node], node))
    place = {-1: -1} | {node: i for i, node in enumerate(inner)}
    of_parent = np.array([place[parent] for parent in parents])

    def grow(read, state, logits, key, length):
        batch, vocab = logits.shape
        if max(ranks) >= vocab:
            raise ValueError(
                f"a path goes to rank {max(ranks)} of a vocabulary of {vocab} tokens: "
                f"ranks up to {vocab - 1} are expected"
            )
        laws, first = [logits[:, None]], -1  # place of the first law of the last call
        tokens = jnp.zeros((batch, size), jnp.int32)
        for depth_here in range(depth):
            here = [node for node in range(size) if level[node] == depth_here]
            scores = laws[-1]  # [B, parents of this level, V]
            if random:
                scores = scores + law.noise(key, length + depth_here, vocab)[:, None]
            most = 1 + max(ranks[node] for node in here)
            best = jax.lax.top_k(scores, most)[1]
            rank = np.array([ranks[node] for node in here])
            chosen = best[:, of_parent[here] - first, rank]
            tokens = tokens.at[:, np.array(here)].set(chosen)
            seen = [node for node in inner if level[node] <= depth_here]
            first = sum(level[node] < depth_here for node in inner)
            if first < len(seen):
                above = jnp.broadcast_to(of_parent[seen], (batch, len(seen)))
                text = tokens[:, np.array(seen)]
                found, state = read(state, text, above, len(seen) - first)
                laws.append(found)
        draft = Draft(
            tokens,
            jnp.full(batch, size, jnp.int32),
            jnp.concatenate(laws, axis=1)[:, of_parent + 1] if random else None,
            jnp.broadcast_to(jnp.array(parents, jnp.int32), tokens.shape),
        )
        read_as = jnp.array([place.get(node, -1) for node in range(size)], jnp.int32)
        return draft, jnp.broadcast_to(read_as, tokens.shape), state

    return Growth(grow, size, depth, len(inner))


def expanded(depth: int, width: int, nodes: int) -> Growth:
    """A tree that grows where the draft is sure, and keeps its best nodes.

    The score of a node is `s = sum_ancestors log q`, an estimate of the probability
    that it is accepted. On every level the W best nodes of the level before are read,
    and each gets its W likeliest children. In the end the N best of all these nodes are
    the draft. A child never scores above its parent, so they are a tree.

    Nodes of probability 0 are left out: behind a greedy warp the tree is a chain.

    Args:
      depth: D, at least 1.
      width: W, at least 1.
      nodes: N, at most `W + (D - 1) * W * W`.

    Returns:
      A growth of one-hot trees; it reads `(D - 1) * W` nodes.

    Raises:
      ValueError: for sizes below 1, or more nodes than there are; when first called,
        for more children than the vocabulary has tokens.

    Source: EAGLE-2, arXiv 2406.16858; its code has D = 6, W = 10, N = 58.

    >>> z = jnp.log(jnp.array([[[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]]]))
    >>> def read(state, tokens, parents, new):
    ...     return z[:, -new:], state
    >>> growth = expanded(2, 2, 3)
    >>> draft, place, _ = growth.grow(read, (), z[:, 0], None, jnp.array([5]))
    >>> draft.tokens.tolist(), draft.parents.tolist(), place.tolist()
    ([[0, 1, 0]], [[-1, -1, 0]], [[0, 1, -1]])
    """
    for name, value in (("depth", depth), ("width", width), ("nodes", nodes)):
        check_size(name, value)
    total = width + (depth - 1) * width**2
    if nodes > total:
        raise ValueError(
            f"nodes = {nodes}: {depth} levels of {width} expanded nodes have {total}; "
            "fewer nodes, or a larger depth or width is expected"
        )
    reads = (depth - 1) * width

    def grow(read, state, logits, key, length):
        del key, length
        batch, vocab = logits.shape
        if width > vocab:
            raise ValueError(
                f"width = {width} children for a vocabulary of {vocab} tokens"
            )
        rows = jnp.arange(batch)[:, None]

        def flat(x):
            return x.reshape(batch, -1)

        def spread(x):  # one entry a child
            return jnp.repeat(x, width, axis=1)

        # all nodes that were looked at, by level: token, score, and the parent's index
        score, token = jax.lax.top_k(law.log_probs(logits), width)
        tokens, scores = [token], [score]
        parents = [jnp.full((batch, width), -1)]
        # the best of the last level, which are read next
        best = jnp.broadcast_to(jnp.arange(width), (batch, width))  # index, as above
        above = parents[0]  # the parent's place among those read
        read_tokens, read_parents, read_nodes = (jnp.zeros((batch, 0), int),) * 3
        for level in range(1, depth):
            read_tokens = jnp.concatenate([read_tokens, token], axis=1)
            read_parents = jnp.concatenate([read_parents, above], axis=1)
            read_nodes = jnp.concatenate([read_nodes, best], axis=1)
            found, state = read(state, read_tokens, read_parents, width)
            log_q, child = jax.lax.top_k(law.log_probs(found), width)
            children = flat(score[:, :, None] + log_q), flat(child)
            scores.append(children[0])
            tokens.append(children[1])
            parents.append(spread(best))
            score, pick = jax.lax.top_k(children[0], width)
            token = children[1][rows, pick]
            above = (level - 1) * width + pick // width
            best = width + (level - 1) * width**2 + pick
        all_scores, all_tokens, all_parents = (
            jnp.concatenate(parts, axis=1) for parts in (scores, tokens, parents)
        )
        # of equals the first is taken, and parents stand before their children
        value, kept = jax.lax.top_k(all_scores, nodes)
        possible = value > -jnp.inf  # and not NaN
        order = jnp.argsort(jnp.where(possible, kept, kept + total), axis=1)
        kept = kept[rows, order]

        def index_of(listed):
            """Where each node stands in a list, [B, 1 + total]; else -1, as for -1."""
            nowhere = jnp.full((batch, total + 1), -1, jnp.int32)
            return nowhere.at[rows, listed + 1].set(jnp.arange(listed.shape[1]))

        draft = Draft(
            all_tokens[rows, kept].astype(jnp.int32),
            possible.sum(1, dtype=jnp.int32),
            None,
            index_of(kept)[rows, all_parents[rows, kept] + 1],
        )
        return draft, index_of(read_nodes)[rows, kept + 1], state

    return Growth(grow, nodes, depth, reads)
