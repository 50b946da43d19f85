"""What is proposed, and what the proposer hears back: `Draft`, `Verified`, `Proposer`.

A round starts with the last token of each row pending: it stands in the text, and no LM
has consumed it. A draft continues the text behind it; it is a chain, or a tree whose
roots are the children of the pending token. The target scores the pending token and all
nodes at once; the verifier keeps a path of nodes, and adds one token of its own.

The same rule holds for every state of the loop: before a round it has consumed
`length - 1` tokens, and after it n more, where n is the number of tokens that the row
became longer: the pending token, and all new ones but the last.

Shapes: B rows, N tokens of a draft (its nodes), D tokens of its longest path (D = N in
a chain), V vocabulary, P longest prompt, L slots of the text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.lm import Features, Out, Params, State


class Draft(NamedTuple):
    """Tokens proposed for every row, and the law that they were drawn from.

    The law must be the very one that the tokens were drawn from, after temperature and
    every other warp. A token that is not random given the tokens before it (an argmax,
    a look-up) has a one-hot law: say `law=None`, not the softmax that it was the best
    of.

    Rows may propose fewer than N tokens. Whether to stop may depend on the tokens
    proposed so far, the last one included, and then these tokens stay: one that was
    drawn and then thrown away for its low probability leaves the others biased.
    """

    tokens: jax.Array  # [B, N] int32; at or behind `count` anything of the vocabulary
    # [B] int32, tokens proposed: 0 to N (the name hides tuple.count, here and below)
    count: jax.Array  # type: ignore[assignment]
    # [B, N, V] logits of the law that each token was drawn from, given its ancestors
    # (and in a tree: of the first draw among its siblings); None = one-hot
    law: jax.Array | None = None
    # [B, N] int32, as in `LM.branch`: smaller than the node's own index, -1 = a child
    # of the pending token; None = a chain
    parents: jax.Array | None = None
    # of the proposer's own LM at the pending token and at every node, [B, 1 + N, ...];
    # for targets of which that LM is a component
    out: Out | None = None


class Verified(NamedTuple):
    """What became of a draft."""

    # [B, D + 1] int32: the accepted tokens, the verifier's own, then anything
    tokens: jax.Array
    # [B] int32, how many of them the row was extended by: 0 if it was done, fewer than
    # `accepted + 1` where it ended among them
    count: jax.Array  # type: ignore[assignment]
    accepted: jax.Array  # [B] int32, drafted tokens that the verifier accepted
    path: jax.Array  # [B, D] int32, their nodes; behind `accepted` anything
    draft: Draft  # its `count` is 0 in rows that were done
    # of the target at the pending token and at every node, [B, 1 + N, ...]; its logits
    # are the law that the text follows. `along` picks what lies on the path
    out: Out


class Proposer(NamedTuple):
    """A source of drafts: a smaller LM, heads, the text itself.

    A proposer never sees whether a row is done: it proposes for every row, and hears a
    count of 0 where nothing was appended.
    """

    # (params, prompt [B, P], prompt_length [B], room) -> state; the text may become
    # P + room tokens long, drafts included. A state with an LM inside has consumed all
    # but the last token of each prompt
    init: Callable[[Params, jax.Array, jax.Array, int], State]
    # (params, state, tokens [B, L], length [B], key [B]) -> (draft, state). The token
    # for position p is drawn as `law.draw(logits, key, p)`, where the first one has
    # p = length; these keys belong to this round
    propose: Callable[..., tuple[Draft, State]]
    # (params, state, verified) -> state
    observe: Callable[[Params, State, Verified], State]
    size: int  # N
    depth: int  # D


def along(verified: Verified, leaf: jax.Array) -> jax.Array:
    """What the target said at the tokens kept: the pending one, then the accepted ones.

    Entry i is where `verified.tokens[:, i]` was drawn from; entry `count - 1` belongs
    to the last token that the target has consumed.

    Args:
      verified: of this round.
      leaf: `[B, 1 + N, ...]`, of `verified.out`.

    Returns:
      `[B, D + 1, ...]`; behind `accepted` anything.

    >>> draft = Draft(jnp.array([[7, 8, 9]]), jnp.array([3]))
    >>> found = jnp.array([[0, 10, 20, 30]])
    >>> verified = Verified(jnp.array([[7, 9, 5]]), jnp.array([3]), jnp.array([2]),
    ...     jnp.array([[0, 2]]), draft, Out(found))
    >>> along(verified, found).tolist()
    [[0, 10, 30]]
    """
    place = jnp.pad(verified.path + 1, ((0, 0), (1, 0)))
    place = place.reshape(place.shape + (1,) * (leaf.ndim - 2))
    return jnp.take_along_axis(leaf, place, axis=1)


def check_size(name: str, value: Any) -> int:
    """Refuses a draft without tokens.

    Args:
      name: what the number is called.
      value: the number of tokens.

    Raises:
      ValueError: for anything but an integer of at least 1.

    >>> check_size("length", 4)
    4
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name} = {value!r}: a draft of at least 1 token is expected; without a "
            "draft, use decode.sample"
        )
    return value


def of_one_model(features: Any) -> Features:
    """The features of a target that is one model, warped or not.

    Args:
      features: of the target.

    Raises:
      ValueError: for those of a composite, or of an LM that has none.

    >>> of_one_model(Features(jnp.ones((1, 2, 4)))).hidden.shape
    (1, 2, 4)
    """
    if not isinstance(features, Features):
        raise ValueError(
            "the draft goes on from the hidden states of one model, and the target has "
            f"features of type {type(features).__name__}: say where they are, e.g. "
            "read=lambda features: features[0] for the first member"
        )
    return features
