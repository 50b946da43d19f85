"""A language model that reads another tokenizer's text: `spelled`, `translate`.

The text stands in the *pivot's* tokens; the *member* reads it in its own. A `Bridge`
spells every pivot token in member tokens, one after the other, whatever stands around
it. That is not how the member's tokenizer would cut the text (`spelling_cost` says what
this costs it), but only so every prefix of a text is read the same way whatever
follows, which all the laws of an LM rest on.

Shapes: B rows, T tokens of this call, S slots, V tokens of the pivot, U of the member,
M the longest spelling.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import slots
from collab_jax.lm import LM, Out, Params, State, branch_by_rows
from collab_jax.score import score
from collab_jax.warp import warp

WIDTH = 64  # member tokens consumed by one call, at most


class Bridge(NamedTuple):
    """How one vocabulary is spelled in another: a tree of arrays, made before jit.

    `collab_jax.io.bridge` makes it of two tokenizers. It may be a tracer: give it to
    the compiled function as an argument, as it is tens of megabytes for vocabularies of
    hundreds of thousands of tokens.
    """

    spelling: jax.Array  # [V, M] int32, member tokens; behind `size` anything
    size: jax.Array  # [V] int32, 1 to M
    pivot: jax.Array  # [U] int32, the token that a member token stands for; -1 = none

    def shared(self) -> jax.Array:
        """Which pivot tokens a single member token stands for, `[V]` bool."""
        alone = self.size == 1
        return alone & (self.pivot[self.spelling[:, 0]] == jnp.arange(alone.shape[0]))


def from_spellings(
    spellings: Sequence[Sequence[int]], vocab: int, aliases: Iterable[int] = ()
) -> Bridge:
    """A bridge from the spelling of every pivot token.

    Args:
      spellings: V lists of member tokens, each of at least one.
      vocab: U.
      aliases: pivot tokens that no member token stands for, though one spells them:
        another pivot token means the same. Otherwise it stands for the first.

    Raises:
      ValueError: for a token without a spelling, a spelling out of the member's
        vocabulary, or vocabularies that share nothing.

    >>> bridge = from_spellings([[0], [1], [0, 1]], vocab=3)  # a, b, ab in a, b, c
    >>> bridge.spelling.tolist(), bridge.size.tolist(), bridge.pivot.tolist()
    ([[0, 0], [1, 0], [0, 1]], [1, 1, 2], [0, 1, -1])
    >>> bridge.shared().tolist()
    [True, True, False]
    """
    size = np.array([len(s) for s in spellings], np.int32)
    if not len(size) or not size.min():
        what = (
            f"token {int(np.argmin(size))} has none" if len(size) else "none is given"
        )
        raise ValueError(
            f"a spelling of at least one member token is expected for every token: "
            f"{what}"
        )
    spelling = np.zeros((len(size), int(size.max())), np.int32)
    for row, pieces in zip(spelling, spellings, strict=True):
        row[: len(pieces)] = pieces
    if spelling.min() < 0 or spelling.max() >= vocab:
        bad = int(np.flatnonzero(((spelling < 0) | (spelling >= vocab)).any(1))[0])
        raise ValueError(
            f"token {bad} is spelled {list(spellings[bad])}: member tokens from 0 to "
            f"{vocab - 1} are expected, as the member's vocabulary has {vocab}"
        )
    pivot = np.full(vocab, -1, np.int32)
    alone = size == 1
    alone[[*aliases]] = False
    at = np.flatnonzero(alone)[::-1]  # of several, the first is written last
    pivot[spelling[at, 0]] = at
    if not len(at):
        raise ValueError(
            f"no token of {len(size)} is one of the member's {vocab}: the member could "
            "propose nothing; are these the right tokenizers?"
        )
    return Bridge(jnp.asarray(spelling), jnp.asarray(size), jnp.asarray(pivot))


class TranslateState(NamedTuple):
    """State of `spelled`; it has overflowed where `ends` at the last token > room."""

    inner: State  # the member's; has consumed its spelling of the text, up to its room
    ends: jax.Array  # [B, S] int32, member tokens up to and with each pivot token
    length: jax.Array  # [B] int32, pivot tokens consumed


def spelled(lm: LM, bridge: Bridge, ratio: float = 2.0) -> LM:
    """An LM that reads the pivot's tokens and speaks in the member's own.

    It reads every pivot token as its spelling; its logits stay the member's,

        logits[u | x] = lm(u | spelled(x))   for the member's tokens u, [B, T, U]

    so what makes one law of unequal vocabularies takes it as it is: a pool for
    `product`, or a function from U to V logits for `warp`, as `translate` has.

    A call takes as many calls of the member as its longest row needs, so a token that
    both have costs one narrow call. Its loop must not be vmapped (`stacked`), and trees
    are read row by row (`branch_by_rows`).

    Capacity: the member gets `ratio` times as many slots as there are tokens. A row
    that needs more has overflowed: its logits are NaN, which ends it and makes `run`
    raise; as a draft it proposes nothing from there on. Rewinding mends it.

    Args:
      lm: any LM over the member's vocabulary.
      bridge: from the pivot's vocabulary to the member's.
      ratio: member tokens per pivot token that there is room for, on average over a
        row; M is always enough.

    Raises:
      ValueError: for a ratio that is not positive; when first called, for an LM whose
        vocabulary is not the bridge's.

    >>> from collab_jax.models import table
    >>> member, params = table.language_model(1), jnp.arange(12.0).reshape(4, 3)
    >>> lm = spelled(member, from_spellings([[0], [1], [0, 1]], vocab=3))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0, 2]]))
    >>> out.logits[0].tolist()  # behind a, and behind a, b
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    if not ratio > 0:
        raise ValueError(f"ratio = {ratio}: a positive number of tokens is expected")
    longest = bridge.spelling.shape[1]

    def room(capacity: int) -> int:
        return math.ceil(min(ratio, longest) * capacity)

    def used(state):
        return _last(state.ends, state.length)

    def init(params, batch, capacity):
        inner = lm.init(params, batch, room(capacity) + min(capacity, WIDTH))
        ends = jnp.zeros((batch, capacity), jnp.int32)
        return TranslateState(inner, ends, jnp.zeros(batch, jnp.int32))

    def extend(params, state, tokens):
        batch, count = tokens.shape
        size = bridge.size[tokens]
        full = room(state.ends.shape[1])
        before = used(state)
        ends = before[:, None] + jnp.cumsum(size, axis=1)  # [B, T]
        start = jnp.minimum(before, full)
        total = jnp.minimum(ends[:, -1], full) - start
        local = ends - start[:, None]  # member tokens of this call, up to each token
        width = min(count, WIDTH)

        def piece(i):
            """The i-th `width` member tokens of this call; behind `total` anything."""
            place = i * width + jnp.arange(width)
            of = (local[:, None, :] <= place[:, None]).sum(-1)  # [B, width]
            of = jnp.minimum(of, count - 1)
            at = place - jnp.take_along_axis(local - size, of, axis=1)
            token = jnp.take_along_axis(tokens, of, axis=1)
            return bridge.spelling[token, jnp.clip(at, 0, longest - 1)]

        def more(carry):
            i, *_ = carry
            return i * width < total.max()

        def step(carry):
            i, inner, outs = carry
            out, inner = lm.extend(params, inner, piece(i))
            unread = width - jnp.clip(total - i * width, 0, width)
            inner = lm.rewind(inner, unread)
            at = local - 1 - i * width  # where each pivot token ends in this piece
            here = (at >= 0) & (at < width)
            at = jnp.clip(at, 0, width - 1)

            def merge(old, new):
                wide = (...,) + (None,) * (new.ndim - 2)
                new = jnp.take_along_axis(new, at[wide], axis=1)
                return jnp.where(here[wide], new, old)

            return i + 1, inner, jax.tree.map(merge, outs, out)

        shape = jax.eval_shape(lm.extend, params, state.inner, piece(0))[0]
        _check(bridge, shape.logits.shape[-1])
        outs = jax.tree.map(
            lambda x: jnp.zeros((batch, count, *x.shape[2:]), x.dtype), shape
        )
        _, inner, outs = jax.lax.while_loop(
            more, step, (jnp.int32(0), state.inner, outs)
        )
        logits = jnp.where((ends > full)[:, :, None], jnp.nan, outs.logits)
        kept = slots.write(state.ends, ends, state.length)
        state = TranslateState(inner, kept, state.length + count)
        return Out(logits, outs.features), state

    def rewind(state, count):
        full = room(state.ends.shape[1])
        length = state.length - count
        left = jnp.minimum(_last(state.ends, length), full)
        inner = lm.rewind(state.inner, jnp.minimum(used(state), full) - left)
        return TranslateState(inner, state.ends, length)

    def take(state, rows):
        inner = lm.take(state.inner, rows)
        return TranslateState(inner, state.ends[rows], state.length[rows])

    # the member's own trees are of other nodes; `branch_by_rows` does not call them
    return branch_by_rows(LM(init, extend, rewind, take, lm.branch, lm.prune))


def translate(lm: LM, bridge: Bridge, ratio: float = 2.0) -> LM:
    """An LM over the pivot's vocabulary, made of one over the member's.

    It reads as `spelled` does. Its law is the member's, restricted to the tokens that
    both have, and renormalised:

        p(v | x) = q(spelling[v] | spelled(x)) / sum_shared q,   0 if v is not shared

    As a draft, this is token-level intersection: `draft_lm(translate(small, bridge),
    K)` proposes in the target's tokens and every lossless verifier stays lossless.

    Args:
      lm: any LM over the member's vocabulary.
      bridge: from the pivot's vocabulary to the member's.
      ratio: as in `spelled`.

    Raises:
      ValueError: as `spelled`.

    Source: token-level intersection, arXiv 2502.05202.

    >>> from collab_jax.models import table
    >>> member, params = table.language_model(1), jnp.log(jnp.array(
    ...     [[0.2, 0.4, 0.4], [0.5, 0.25, 0.25], [1, 0, 0], [1, 0, 0]]))
    >>> lm = translate(member, from_spellings([[0], [1], [0, 1]], vocab=3))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0, 2]]))
    >>> jax.nn.softmax(out.logits[0]).round(3).tolist()  # behind a, and behind a, b
    [[0.333, 0.667, 0.0], [0.667, 0.333, 0.0]]
    """

    def restricted(logits):
        return jnp.where(bridge.shared(), logits[..., bridge.spelling[:, 0]], -jnp.inf)

    return warp(spelled(lm, bridge, ratio), restricted)


def _last(ends: jax.Array, length: jax.Array) -> jax.Array:
    """Member tokens of the first `length[b]` pivot tokens, `[B]`."""
    at = jnp.clip(length - 1, 0, ends.shape[1] - 1)
    return jnp.where(length > 0, jnp.take_along_axis(ends, at[:, None], 1)[:, 0], 0)


def _check(bridge: Bridge, vocab: int) -> None:
    if vocab != (known := bridge.pivot.shape[0]):
        raise ValueError(
            f"the bridge leads to a vocabulary of {known} tokens and the LM has "
            f"{vocab}: make the bridge for this model (member_vocab={vocab})"
        )


def opened(lm: LM, tokens: Sequence[int]) -> LM:
    """An LM that has read some tokens before the text, such as a start-of-text token.

    A member whose tokenizer begins every text with a token that the pivot lacks needs
    it: `translate(opened(small, [bos]), bridge)`.

    Args:
      lm: any LM.
      tokens: what every row begins with; not to be rewound.

    Raises:
      ValueError: without tokens.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(2), table.init(jax.random.key(0), 3, 2)
    >>> out, _ = opened(lm, [2]).extend(
    ...     params, opened(lm, [2]).init(params, 1, 1), jnp.array([[1]]))
    >>> bool((out.logits[0, 0] == params[1 + 2 * 4]).all())
    True
    """
    if not tokens:
        raise ValueError("no tokens to open a text with: at least one is expected")

    def init(params, batch, capacity):
        state = lm.init(params, batch, capacity + len(tokens))
        first = jnp.tile(jnp.asarray(tokens, jnp.int32), (batch, 1))
        return lm.extend(params, state, first)[1]

    return lm._replace(init=init)


def spell(bridge: Bridge, tokens: Sequence[int]) -> list[int]:
    """The member tokens that a text is read as, on the host.

    Args:
      bridge: from the pivot's vocabulary.
      tokens: of the pivot.

    >>> spell(from_spellings([[0], [1], [0, 1]], vocab=3), [2, 1])
    [0, 1, 1]
    """
    at = np.asarray(tokens, np.int32)
    rows, size = np.asarray(bridge.spelling[at]), np.asarray(bridge.size[at])
    return [int(u) for row, n in zip(rows, size, strict=True) for u in row[:n]]


def spelling_cost(
    lm: LM,
    params: Params,
    bridge: Bridge,
    tokens: Sequence[int],
    own: Sequence[int],
) -> tuple[float, float]:
    """What spelling token by token costs the member, in likelihood.

    Args:
      lm: over the member's vocabulary; `opened` where its texts begin with a token.
      params: its parameters.
      bridge: from the pivot's vocabulary.
      tokens: a text in the pivot's tokens.
      own: the same text as the member's tokenizer cuts it.

    Returns:
      Nats of the text in the member's own tokens, and as it is spelled; both without
      the first token.

    Raises:
      ValueError: for a text of fewer than two tokens.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> bridge = from_spellings([[0], [1], [0, 1]], vocab=3)
    >>> [round(x, 3) for x in spelling_cost(lm, params, bridge, [2, 0], [0, 1, 0])]
    [2.197, 2.197]
    """
    found = []
    for text in ([*own], spell(bridge, tokens)):
        if len(text) < 2:
            raise ValueError(
                f"a text of {len(text)} member tokens has nothing to predict: at least "
                "2 are expected"
            )
        row = jnp.asarray([text], jnp.int32)
        logprob = score(lm, params, row, jnp.array([len(text)])).logprob
        found.append(-float(logprob.sum()))
    return found[0], found[1]
