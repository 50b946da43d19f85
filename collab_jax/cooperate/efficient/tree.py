"""Verifiers of trees: which path of drafted nodes stays, and what comes behind it.

A walk starts at the pending token, looks at the children of the node it stands on in
the order of their indices, goes down to the first that is accepted, and stops where
none is. A chain is a tree with one child a node, so these verifiers take chains too.

Shapes: B rows, N nodes, 1 + N places (the pending token, then the nodes), V vocabulary.
"""

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.cooperate.efficient.draft import Draft, Verified
from collab_jax.cooperate.efficient.verify import (
    Verifier,
    check_draft,
    offered,
    round_key,
)
from collab_jax.lm import Out


def tree_parents(draft: Draft) -> jax.Array:
    """The parents of a draft's nodes, `[B, N]`; of a chain, each node's predecessor.

    >>> tree_parents(Draft(jnp.array([[4, 5, 6]]), jnp.array([3]))).tolist()
    [[-1, 0, 1]]
    """
    if draft.parents is not None:
        return draft.parents
    chain = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32) - 1
    return jnp.broadcast_to(chain, draft.tokens.shape)


def path_to(parents: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nodes from the root to a place, in order, and their number.

    Args:
      parents: `[B, N]`.
      place: `[B]`, 0 for the pending token, 1 + i for node i.

    Returns:
      `[B, N]`, behind the number anything; `[B]`.

    >>> path, count = path_to(jnp.array([[-1, -1, 0, 2]]), jnp.array([4]))
    >>> path[0, :3].tolist(), count.tolist()
    ([0, 2, 3], [3])
    """
    nodes = parents.shape[1]
    rows = jnp.arange(parents.shape[0])
    reach = slots.ancestors(parents)
    depth = reach.sum(-1) - 1  # [B, N]
    mine = reach[rows, jnp.maximum(place - 1, 0)] & (place > 0)[:, None]
    path = jnp.argsort(jnp.where(mine, depth, nodes), axis=1, stable=True)
    return path.astype(jnp.int32), mine.sum(-1, dtype=jnp.int32)


def kept(draft: Draft, out: Out, place: jax.Array, token: jax.Array) -> Verified:
    """A verified tree: the path to a place, then `token`.

    Args:
      draft: a tree or a chain.
      out: the target's.
      place: `[B]`, 0 for the pending token, 1 + i for node i.
      token: `[B]`, the verifier's own.

    >>> pair = jnp.array([[-1, -1]])
    >>> draft = Draft(jnp.array([[4, 5]]), jnp.array([2]), parents=pair)
    >>> kept(draft, Out(()), jnp.array([2]), jnp.array([9])).tokens.tolist()
    [[5, 9, 0]]
    """
    path, accepted = path_to(tree_parents(draft), place)
    index = jnp.arange(path.shape[1] + 1)
    tokens = jnp.pad(jnp.take_along_axis(draft.tokens, path, axis=1), ((0, 0), (0, 1)))
    tokens = jnp.where(index < accepted[:, None], tokens, 0)
    tokens = jnp.where(index == accepted[:, None], token[:, None], tokens)
    return Verified(tokens, accepted + 1, accepted, path, draft, out)


def _above(draft: Draft) -> jax.Array:
    """The place that each node hangs from, `[B, N]`; -1 for one that is not meant."""
    return jnp.where(offered(draft), tree_parents(draft) + 1, -1)


def follow(draft: Draft, tokens: jax.Array) -> jax.Array:
    """Where a walk ends that goes down while a child is the token wanted, `[B]`.

    Args:
      draft: a tree or a chain.
      tokens: `[B, 1 + N]`, what the target wants next at every place.

    Returns:
      The place: 0 for the pending token, 1 + i for node i.

    >>> pair = jnp.array([[-1, -1]])
    >>> draft = Draft(jnp.array([[4, 5]]), jnp.array([2]), parents=pair)
    >>> follow(draft, jnp.array([[5, 0, 7]])).tolist()
    [2]
    """
    above = _above(draft)
    batch, places = tokens.shape
    rows = jnp.arange(batch)

    def walk(i, place):
        """Goes down by one node, if it is this one."""
        hit = (above[:, i] == place) & (draft.tokens[:, i] == tokens[rows, place])
        return jnp.where(hit, i + 1, place)

    return jax.lax.fori_loop(0, places - 1, walk, jnp.zeros(batch, jnp.int32))


def sampled() -> Verifier:
    """Draws each token from the target, and goes down where a child is that token.

    Every place draws with the noise of plain sampling, so the text is that of
    `decode.sample(target)` with the same keys, whatever the tree and however it was
    chosen. For trees that are not random it also accepts as much as any lossless
    verifier can. Its `outcomes` hold for a tree that does not depend on this noise.

    Source: EAGLE, arXiv 2401.15077, for the walk; arXiv 2408.07978 for the noise.

    >>> p = jnp.log(jnp.array([[[0.5, 0.3, 0.2]] * 3]))
    >>> pair = jnp.array([[-1, -1]])
    >>> draft = Draft(jnp.array([[0, 1]]), jnp.array([2]), parents=pair)
    >>> sampled().outcomes(p, draft)[0].sum(-1).tolist()
    [0.2, 0.5, 0.3]
    """

    def verify(key, length, out, draft):
        check_draft(out.logits, draft)
        batch, places, vocab = out.logits.shape
        depth = jnp.pad(slots.depths(tree_parents(draft)) + 1, ((0, 0), (1, 0)))
        position = (length[:, None] + depth).reshape(-1)
        flat = out.logits.reshape(-1, vocab)
        drawn = law.draw(flat, jnp.repeat(key, places), position).reshape(batch, places)
        place = follow(draft, drawn)
        return kept(draft, out, place, drawn[jnp.arange(batch), place])

    def outcomes(logits, draft):
        stay, rest = _walks(logits, draft._replace(law=None), replaced=False)
        return stay[:, :, None] * rest

    return Verifier(verify, outcomes, coupled=True)


def _walks(
    logits: jax.Array, draft: Draft, replaced: bool
) -> tuple[jax.Array, jax.Array]:
    """Recursive rejection: where it stops, `[B, 1 + N]`, and what follows, `[.., V]`.

    Node by node: its place has a law r for what comes next, at first p, and the law q
    of its next child. The child x is accepted with `min(1, r(x) / q(x))`; else r
    becomes `max(r - q, 0)` and, without replacement, q loses x; both are normalised.
    """
    check_draft(logits, draft)
    batch, places, vocab = logits.shape
    rows = jnp.arange(batch)
    parents, meant = tree_parents(draft), offered(draft)
    loses = draft.law is not None and not replaced  # a one-hot law has nothing to lose

    def normal(z):
        total = z.sum(-1, keepdims=True)
        return z / jnp.where(total > 0, total, 1.0)

    def look(i, carry):
        stay, rest, gone = carry
        x, place = draft.tokens[:, i], parents[:, i] + 1
        r = rest[rows, place]
        q = jax.nn.one_hot(x, vocab, dtype=r.dtype)
        if draft.law is not None:
            drawn = jnp.exp(law.log_probs(draft.law[:, i]))
            if loses:
                left = normal(jnp.where(gone[rows, place], 0.0, drawn))
                taken = gone[rows, place] | ((q > 0) & meant[:, i, None])
                gone = gone.at[rows, place].set(taken)
            q = left if loses else drawn
        at_x = q[rows, x]
        ratio = r[rows, x] / jnp.where(at_x > 0, at_x, 1.0)
        possible = meant[:, i] & (at_x > 0) & (ratio > 0)  # and not NaN
        accept = jnp.where(possible, jnp.minimum(ratio, 1.0), 0.0)
        here = stay[rows, place]
        stay = stay.at[:, i + 1].set(here * accept)
        stay = stay.at[rows, place].set(here * (1.0 - accept))
        less = jnp.maximum(r - q, 0.0)
        some = meant[:, i, None] & (less.sum(-1, keepdims=True) > 0)
        rest = rest.at[rows, place].set(jnp.where(some, normal(less), r))
        return stay, rest, gone

    stay = jnp.zeros((batch, places)).at[:, 0].set(1.0)
    rest = jnp.exp(law.log_probs(logits))
    gone = jnp.zeros(logits.shape if loses else (), bool)
    stay, rest, _ = jax.lax.fori_loop(0, places - 1, look, (stay, rest, gone))
    return stay, rest


def _from_walks(replaced: bool) -> Verifier:
    def outcomes(logits, draft):
        stay, rest = _walks(logits, draft, replaced)
        return stay[:, :, None] * rest

    def verify(key, length, out, draft):
        stay, rest = _walks(out.logits, draft, replaced)
        where = round_key(key, length, law.ACCEPT)
        place = law.draw(jnp.log(stay), where, length)
        follow = jnp.log(rest[jnp.arange(place.shape[0]), place])
        again = round_key(key, length, law.RESIDUAL)
        return kept(draft, out, place, law.draw(follow, again, length + place))

    return Verifier(verify, outcomes)


def recursive() -> Verifier:
    """Recursive rejection for siblings drawn without replacement.

    A child x is accepted with probability `min(1, r(x) / q(x))`, where r is what the
    target still wants here and q the draft's law over what it has not drawn yet; after
    a rejection r becomes `max(r - q, 0)` and q loses x, both normalised. `Draft.law` is
    that of the first sibling. One child a node is `maximal`.

    Source: arXiv 2402.14160; Sequoia, arXiv 2402.12374.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5]] * 3], [[[0.8, 0.2]] * 3]]))
    >>> draft = Draft(jnp.array([[0, 1]]), jnp.array([2]), q[:, :2],
    ...     parents=jnp.array([[-1, -1]]))
    >>> recursive().outcomes(p, draft)[0].sum(-1).tolist()
    [0.0, 0.625, 0.375]
    """
    return _from_walks(replaced=False)


def independent() -> Verifier:
    """Multi-round rejection for siblings drawn independently of each other.

    As `recursive`, but q stays the same from sibling to sibling.

    Source: SpecInfer, arXiv 2305.09781.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5]] * 3], [[[0.8, 0.2]] * 3]]))
    >>> draft = Draft(jnp.array([[0, 0]]), jnp.array([2]), q[:, :2],
    ...     parents=jnp.array([[-1, -1]]))
    >>> independent().outcomes(p, draft)[0].sum(-1).tolist()
    [0.375, 0.625, 0.0]
    """
    return _from_walks(replaced=True)


def typical_tree(epsilon=0.09, delta=0.3) -> Verifier:
    """Medusa's typical acceptance on a tree. LOSSY, as `verify.typical` is.

    A node is accepted if `p(x) > min(epsilon, delta * exp(-H(p)))`, p the target's law
    at its parent, and its parent is accepted. The deepest accepted node is kept, of
    several the likeliest path; the next token is the target's best.

    Args:
      epsilon: probability that is always enough.
      delta: share of `exp(-entropy)` that is enough where the law is broad.

    Source: arXiv 2401.10774, section 2.3.1.

    >>> p = jnp.log(jnp.array([[[0.5, 0.4, 0.1]] * 3]))
    >>> pair = jnp.array([[-1, -1]])
    >>> draft = Draft(jnp.array([[1, 0]]), jnp.array([2]), parents=pair)
    >>> typical_tree().outcomes(p, draft)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """

    def choose(logits, draft):
        check_draft(logits, draft)
        rows = jnp.arange(logits.shape[0])[:, None]
        parents = tree_parents(draft)
        log_p = law.log_probs(logits)[rows, parents + 1, draft.tokens]
        entropy = law.entropy(logits)[rows, parents + 1]
        enough = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
        good = (jnp.exp(log_p) > enough) & offered(draft)
        reach = slots.ancestors(parents)
        whole = (good[:, None, :] | ~reach).all(-1)
        depth = jnp.where(whole, reach.sum(-1), 0)
        total = jnp.where(reach, log_p[:, None, :], 0.0).sum(-1)
        deepest = whole & (depth == depth.max(1, keepdims=True))
        best = jnp.argmax(jnp.where(deepest, total, -jnp.inf), axis=1)
        place = jnp.where(whole.any(1), best + 1, 0).astype(jnp.int32)
        token = law.best(logits[rows[:, 0], place])
        return place, token

    def verify(key, length, out, draft):
        del key, length
        return kept(draft, out, *choose(out.logits, draft))

    def outcomes(logits, draft):
        place, token = choose(logits, draft)
        rows = jnp.arange(logits.shape[0])
        return jnp.zeros(logits.shape).at[rows, place, token].set(1.0)

    return Verifier(verify, outcomes)
