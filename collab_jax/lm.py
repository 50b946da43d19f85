"""The value that collaboration over distributions joins: `LM`, with `Backbone` below.

An `LM` is an action of token strings on states which can be undone. It is six pure
functions; parameters stay outside and are always an argument. The laws it obeys are in
`collab_jax.testing.check_lm`.

Shapes: B rows, T tokens of this call, N nodes of a tree, D nodes of a path, V
vocabulary, S slots, W width of the hidden states, H key-value heads, K size of a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import slots

Params = Any  # a pytree of arrays
State = Any  # opaque to every loop; whatever has a row axis lives here


class Features(NamedTuple):
    """What a backbone saw on its way to the logits; unread, it costs nothing in jit."""

    hidden: jax.Array  # [B, T, W], after the last norm: what `unembed` takes
    taps: dict[str, jax.Array] = {}  # chosen by name when the model is built


class Out(NamedTuple):
    """Output of `LM.extend` and `LM.branch`."""

    logits: jax.Array  # [B, T, V] float32; -inf means forbidden
    features: Any = ()  # Features of a model, a tuple of the members' in a composite


class LM(NamedTuple):
    """A language model as six pure functions.

    Every combinator takes LMs and returns an LM, so that they nest. `State` is made by
    `init` and is opaque. Capacity (in tokens) is the longest row plus the widest call.
    """

    # (params, batch, capacity) -> state of B empty rows
    init: Callable[[Params, int, int], State]
    # (params, state, tokens[B, T]) -> (Out, state): every row consumes its T tokens
    extend: Callable[[Params, State, jax.Array], tuple[Out, State]]
    # (state, count[B]) -> state: row b forgets its last count[b] tokens
    rewind: Callable[[State, jax.Array], State]
    # (state, rows[B2]) -> state: gathers rows, for beams and best-of-n
    take: Callable[[State, jax.Array], State]
    # (params, state, tokens[B, N], parents[B, N]) -> (Out, state): a tree of
    # continuations; parents[i] < i, -1 is the prefix; position = length + depth
    branch: Callable[[Params, State, jax.Array, jax.Array], tuple[Out, State]]
    # (state, path[B, D], count[B]) -> state: keeps the first count[b] nodes of the path
    # of the last branch, and forgets the other nodes
    prune: Callable[[State, jax.Array, jax.Array], State]


class Backbone(NamedTuple):
    """One level below `LM`: hidden states in the place of tokens and logits.

    `embed` apart from `features` serves feature drafters, soft prompts and gist tokens.
    A state of None means no memory: `features` then reads the T inputs alone, from
    position 0, and returns None as the state (training, full-text scoring).
    """

    init: Callable[[Params, int, int], State]  # (params, batch, capacity)
    embed: Callable[[Params, jax.Array], jax.Array]  # tokens[B, T] -> [B, T, W]
    # (params, state, x[B, T, W]) -> (Features, state)
    features: Callable[[Params, State, jax.Array], tuple[Features, State]]
    unembed: Callable[[Params, jax.Array], jax.Array]  # [B, T, W] -> [B, T, V] float32
    rewind: Callable[[State, jax.Array], State]
    take: Callable[[State, jax.Array], State]
    # (params, state, x[B, N, W], parents[B, N]) -> (Features, state)
    branch: Callable[[Params, State, jax.Array, jax.Array], tuple[Features, State]]
    prune: Callable[[State, jax.Array, jax.Array], State]


class KVCache(NamedTuple):
    """Keys and values of a transformer; slot == position (see `collab_jax.slots`)."""

    k: tuple[jax.Array, ...]  # per layer [B, H, S, K], rotated where the model rotates
    v: tuple[jax.Array, ...]  # per layer [B, H, S, K]
    length: jax.Array  # [B] int32, tokens consumed

    def rewind(self, count: jax.Array) -> "KVCache":
        """Forgets the last `count[b]` tokens of row b: a smaller length, no copy."""
        return self._replace(length=self.length - count)

    def take(self, rows: jax.Array) -> "KVCache":
        """Gathers rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def prune(self, path: jax.Array, count: jax.Array) -> "KVCache":
        """Keeps `count[b]` nodes of the path `[B, D]` and makes the rows longer."""

        def keep(leaf: jax.Array) -> jax.Array:
            return slots.compact(leaf, self.length, path, axis=2)

        return KVCache(
            jax.tree.map(keep, self.k), jax.tree.map(keep, self.v), self.length + count
        )


def language_model(backbone: Backbone) -> LM:
    """The `LM` of a backbone: logits = unembed(features(embed(tokens))).

    Args:
      backbone: hidden states in and out; its parameters become those of the LM.

    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.transformer import init, transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = init(jax.random.key(0), config)
    >>> lm = language_model(transformer(config))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[1, 2, 3]]))
    >>> out.logits.shape
    (1, 3, 10)
    """

    def extend(params, state, tokens):
        features, state = backbone.features(
            params, state, backbone.embed(params, tokens)
        )
        return Out(backbone.unembed(params, features.hidden), features), state

    def branch(params, state, tokens, parents):
        features, state = backbone.branch(
            params, state, backbone.embed(params, tokens), parents
        )
        return Out(backbone.unembed(params, features.hidden), features), state

    return LM(
        backbone.init, extend, backbone.rewind, backbone.take, branch, backbone.prune
    )


def prefill(
    lm: LM,
    params: Params,
    state: State,
    tokens: jax.Array,
    count: jax.Array,
    chunk: int | None = None,
) -> State:
    """Consumes the first `count[b]` tokens of every row; no logits are computed.

    The rows are extended together, chunk by chunk, padding included; then `rewind`
    takes the padding back. The capacity must hold what `padded` says of T and the
    chunk.

    Args:
      lm: any LM.
      params: its parameters.
      state: B rows.
      tokens: `[B, T]`, right-padded with any token of the vocabulary.
      count: `[B]`, how many tokens of each row to consume, 0 to T.
      chunk: tokens of a row consumed by one call; None is what `piece` says.

    >>> from collab_jax.models import table
    >>> lm = table.language_model(order=1)
    >>> params = table.init(jax.random.key(0), vocab=3, order=1)
    >>> state = lm.init(params, 2, padded(3, 2))
    >>> tokens = jnp.array([[0, 1, 2], [2, 0, 0]])
    >>> prefill(lm, params, state, tokens, jnp.array([3, 1]), chunk=2).length.tolist()
    [3, 1]
    """
    width = tokens.shape[1]
    if width == 0:
        return state
    chunk = piece(chunk, tokens.shape[0])
    total = padded(width, chunk)
    chunk = min(chunk, total)
    tokens = jnp.pad(tokens, ((0, 0), (0, total - width)), mode="edge")

    def consume(i, state):
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        return lm.extend(params, state, part)[1]

    if total == chunk:
        state = consume(0, state)
    else:
        state = jax.lax.fori_loop(0, total // chunk, consume, state)
    return lm.rewind(state, total - count)


def read_prompt(
    lm: LM,
    params: Params,
    prompt: jax.Array,
    prompt_length: jax.Array,
    room: int,
    chunk: int | None = None,
) -> State:
    """The state that has consumed all but the last token of each prompt.

    Args:
      lm: any LM.
      params: its parameters.
      prompt: `[B, P]`, right-padded.
      prompt_length: `[B]`, at least 1.
      room: slots wanted behind the longest prompt.
      chunk: see `prefill`.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 3, 1)
    >>> read_prompt(lm, params, jnp.array([[1, 2]]), jnp.array([2]), 3).length.tolist()
    [1]
    """
    batch, width = prompt.shape
    capacity = max(width + room, padded(width - 1, piece(chunk, batch)))
    state = lm.init(params, batch, capacity)
    return prefill(lm, params, state, prompt[:, :-1], prompt_length - 1, chunk)


def piece(chunk: int | None, batch: int) -> int:
    """Tokens of each row that one call of `prefill` consumes.

    Every call reads all weights. An accelerator does 200 to 600 products of a row in
    the time in which it reads a weight of bfloat16, a CPU core a few: calls of 512
    tokens in all keep the former busy, and 128 of a row are enough for the latter. All
    are powers of two.

    Args:
      chunk: what was asked for, or None.
      batch: B rows.

    >>> piece(64, 1), piece(None, 1) >= 128, piece(None, 8)
    (64, True, 128)
    """
    if chunk is not None:
        return chunk
    if jax.default_backend() == "cpu":
        return 128
    return max(128, 512 >> (batch - 1).bit_length())


def padded(width: int, chunk: int) -> int:
    """Slots that `prefill` needs for T tokens: T, or its chunks if there are several.

    >>> padded(5, 128), padded(130, 128)
    (5, 256)
    """
    return width if width <= chunk else -(-width // chunk) * chunk


class ByRows(NamedTuple):
    """State of `branch_by_rows`: the member's, and after a branch one row a node."""

    state: State  # B rows
    nodes: State = ()  # (1 + N) * B rows: first the prefixes, then node after node


def branch_by_rows(lm: LM) -> LM:
    """An LM whose trees are rows: every node extends a copy of the prefix by its path.

    The fallback for a member without tree attention, and the oracle for one that has
    it. A tree of N nodes costs N + 1 copies of the state, each N tokens longer.

    Args:
      lm: any LM; its own `branch` and `prune` are not called.

    Returns:
      An LM. Its state has another structure between a branch and the next call.

    >>> from collab_jax.models import table
    >>> lm = branch_by_rows(table.language_model(order=2))
    >>> params = table.init(jax.random.key(0), vocab=3, order=2)
    >>> state = lm.init(params, 1, 8)
    >>> tokens, parents = jnp.array([[1, 2, 0]]), jnp.array([[-1, 0, 0]])
    >>> out, state = lm.branch(params, state, tokens, parents)
    >>> out.logits.shape
    (1, 3, 3)
    """

    def init(params, batch, capacity):
        return ByRows(lm.init(params, batch, capacity))

    def extend(params, state, tokens):
        out, inner = lm.extend(params, state.state, tokens)
        return out, ByRows(inner)

    def rewind(state, count):
        return ByRows(lm.rewind(state.state, count))

    def take(state, rows):
        return ByRows(lm.take(state.state, rows))

    def branch(params, state, tokens, parents):
        batch, nodes = tokens.shape
        depth = slots.depths(parents)  # [B, N]
        # order[b, i]: the ancestors of node i by depth; behind its end, anything
        level = jnp.where(slots.ancestors(parents), depth[:, None, :], nodes)
        order = jnp.argsort(level, axis=-1, stable=True)
        paths = jnp.take_along_axis(tokens[:, None, :], order, axis=2)  # [B, N, N]
        paths = jnp.concatenate([tokens[:, None, :], paths], axis=1)
        paths = jnp.moveaxis(paths, 1, 0).reshape(-1, nodes)  # [(1 + N) * B, N]
        rows = jnp.tile(jnp.arange(batch), nodes + 1)
        out, copies = lm.extend(params, lm.take(state.state, rows), paths)
        kept = jnp.moveaxis(jnp.pad(depth + 1, ((0, 0), (1, 0))), 1, 0).reshape(-1)
        copies = lm.rewind(copies, nodes - kept)

        def at_node(leaf):  # [(1 + N) * B, N, ...] -> [B, N, ...]
            row = (1 + jnp.arange(nodes)) * batch + jnp.arange(batch)[:, None]
            return leaf[row, depth]

        return jax.tree.map(at_node, out), ByRows(state.state, copies)

    def prune(state, path, count):
        batch = path.shape[0]
        last = jnp.take_along_axis(path, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]
        chosen = jnp.where(count > 0, last + 1, 0)
        return ByRows(lm.take(state.nodes, chosen * batch + jnp.arange(batch)))

    return LM(init, extend, rewind, take, branch, prune)
