"""Proposers of parallel heads: the target's last hidden state says more than one token.

Before a round the last token of a row is pending: the hidden state of the token before
it, the last one consumed, has said it. The heads read that state again. With `length`
tokens in a row it stands at index `length - 2`, and head i speaks of index
`length - 2 + 1 + i`: head 1 of the token behind the pending one, the first to draft.

The state comes from the target's own call, so a draft costs the heads alone. In the
first round there is none: nothing is drafted then, and the row gets one token. So a run
that is resumed from its text alone follows the same law along another path.

Shapes: B rows, K heads, W width of the hidden states, N nodes of a tree, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import (
    Draft,
    Proposer,
    Verified,
    along,
    of_one_model,
)
from collab_jax.cooperate.efficient.topology import check_paths
from collab_jax.lm import Features
from collab_jax.models.parallel_heads import Heads

Read = Callable[[Any], Features]  # from the target's features to one model's


class Last(NamedTuple):
    """What these proposers keep."""

    hidden: jax.Array  # [B, W], of the last token that the target has consumed
    known: jax.Array  # [B] bool, whether there is one


def parallel(heads: Heads, *, read: Read = of_one_model) -> Proposer:
    """The best token of every head, a chain: `x_i = argmax p_i(. | hidden)`.

    Args:
      heads: K of them; the draft has K tokens.
      read: from the target's features to those of the model that the heads know.

    Returns:
      A proposer of one-hot chains. Its parameters are the pair of the heads' and of the
      model's below them.

    Raises:
      ValueError: when first called, for parameters that are no pair, a target without
        hidden states, or hidden states of another width.

    Source: blockwise parallel decoding, arXiv 1811.03115; arXiv 2401.10774.

    >>> from collab_jax import lm
    >>> from collab_jax.cooperate.efficient.speculate import speculate
    >>> from collab_jax.cooperate.efficient.target import on_lm
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 3)
    >>> decoder = speculate(on_lm(lm.language_model(backbone)), parallel(heads), 8)
    >>> params = base, (heads.init(jax.random.key(1), base), base)
    >>> run(decoder, params, *pad([[1, 2]]), jax.random.key(2)).length.tolist()
    [10]
    """

    def draft(logits, known, key, length):
        del key, length
        best = law.best(logits)
        return _chain(_tokens(heads, best), known)

    return _proposer(heads, read, draft, heads.size, heads.size)


def parallel_sampled(heads: Heads, *warps, read: Read = of_one_model) -> Proposer:
    """A token drawn from every head, a chain: `x_i ~ p_i(. | hidden)`.

    The laws are products: no token depends on the one drafted before it.

    Args:
      heads: K of them; the draft has K tokens.
      *warps: functions of the heads' logits `[B, K, V]`, e.g. `warp.temperature(0.7)`;
        the first is applied first.
      read: from the target's features to those of the model that the heads know.

    Returns:
      A proposer of chains. Its parameters are the pair of the heads' and of the model's
      below them.

    Raises:
      ValueError: when first called, as `parallel`.

    Source: arXiv 2401.10774 for the heads; arXiv 2211.17192 for the law.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 3)
    >>> params = heads.init(jax.random.key(1), base), base
    >>> proposer = parallel_sampled(heads)
    >>> text, length = jnp.array([[1, 2]]), jnp.array([2])
    >>> state = proposer.init(params, text, length, 8)
    >>> key = law.row_keys(jax.random.key(2), 1)
    >>> draft, _ = proposer.propose(params, state, text, length, key)
    >>> draft.law.shape, draft.count.tolist()
    ((1, 3, 10), [0])
    """

    def draft(logits, known, key, length):
        if heads.vocabulary is not None:
            logits = heads.vocabulary.widen(logits)
        for function in warps:
            logits = function(logits)
        tokens = [
            law.draw(logits[:, i], key, length + i) for i in range(logits.shape[1])
        ]
        return _chain(jnp.stack(tokens, axis=1), known)._replace(law=logits)

    return _proposer(heads, read, draft, heads.size, heads.size)


def parallel_tree(
    heads: Heads, paths: Sequence[Sequence[int]], *, read: Read = of_one_model
) -> Proposer:
    """A tree of the best tokens of every head: a node of rank r at depth i is head i's
    r-th best, behind every node of depth i - 1 that a path leads through.

    Args:
      heads: K of them.
      paths: the ranks of the tokens from the root to each node, e.g. of
        `topology.grow(32, shares)` with the shares that `parallel_training.accuracies`
        measures; none is longer than K.
      read: from the target's features to those of the model that the heads know.

    Returns:
      A proposer of one-hot trees. Its parameters are the pair of the heads' and of the
      model's below them.

    Raises:
      ValueError: for no paths, one that has no beginning, stands twice or is longer
        than there are heads; when first called, as `parallel`.

    Source: arXiv 2401.10774, section 2.1.2.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> heads = medusa(transformer.transformer(config), 2)
    >>> proposer = parallel_tree(heads, [(0,), (1,), (0, 0), (1, 0)])
    >>> proposer.size, proposer.depth
    (4, 2)
    """
    parents, ranks = check_paths(paths)
    levels = [len(path) - 1 for path in paths]
    width, depth = max(ranks) + 1, max(levels) + 1
    if depth > heads.size:
        raise ValueError(
            f"a path of {depth} tokens for {heads.size} heads: one head a token is "
            "expected; leave out the longer paths, or train more heads"
        )

    def draft(logits, known, key, length):
        del key, length
        if width > logits.shape[-1]:
            raise ValueError(
                f"rank {width - 1} of a vocabulary of {logits.shape[-1]} tokens: "
                "smaller ranks are expected"
            )
        _, best = jax.lax.top_k(logits[:, :depth], width)  # [B, D, ranks]
        nodes = best[:, jnp.asarray(levels), jnp.asarray(ranks)]
        found = _chain(_tokens(heads, nodes), known)
        above = jnp.asarray(parents, jnp.int32)
        return found._replace(parents=jnp.broadcast_to(above, found.tokens.shape))

    return _proposer(heads, read, draft, len(parents), depth)


def _tokens(heads: Heads, places: jax.Array) -> jax.Array:
    """The tokens that the places in the heads' logits speak of."""
    return places if heads.vocabulary is None else heads.vocabulary.token(places)


def _chain(tokens: jax.Array, known: jax.Array) -> Draft:
    """All tokens `[B, N]`, or none in the rows that have no hidden state yet."""
    count = jnp.where(known, tokens.shape[1], 0)
    return Draft(tokens.astype(jnp.int32), count.astype(jnp.int32))


def _proposer(
    heads: Heads,
    read: Read,
    draft: Callable[..., Draft],
    size: int,
    depth: int,
) -> Proposer:
    """A proposer of (logits [B, K, V], known [B], key [B], length [B]) -> Draft."""

    def init(params, prompt, prompt_length, room):
        del prompt_length, room
        _, base = _pair(params)
        batch = prompt.shape[0]
        return Last(heads.blank(base, batch), jnp.zeros(batch, bool))

    def propose(params, state, tokens, length, key):
        del tokens
        own, base = _pair(params)
        logits = heads.apply(own, base, state.hidden)
        return draft(logits, state.known, key, length), state

    def observe(params, state, verified: Verified):
        del params
        hidden = read(verified.out.features).hidden
        if hidden.shape[-1] != state.hidden.shape[-1]:
            raise ValueError(
                f"hidden states of width {hidden.shape[-1]} for heads of width "
                f"{state.hidden.shape[-1]}: let read give those of the model that the "
                "heads belong to"
            )
        kept = along(verified, hidden)
        last = jnp.maximum(verified.count - 1, 0)[:, None, None]
        new = jnp.take_along_axis(kept, last, axis=1)[:, 0]
        moved = verified.count > 0
        return Last(
            jnp.where(moved[:, None], new.astype(state.hidden.dtype), state.hidden),
            state.known | moved,
        )

    return Proposer(init, propose, observe, size, depth)


def _pair(params):
    if not isinstance(params, tuple | list) or len(params) != 2:
        raise ValueError(
            f"parallel heads got parameters of type {type(params).__name__}: the pair "
            "(parameters of the heads, parameters of the model below them) is expected"
        )
    return params
