"""Self-speculation: the first layers draft, the others verify what they have begun.

The draft is the model's first E layers with its last norm and head. The target goes on
from the hidden states of the draft, so no layer reads a token twice, and each half has
the cache of its own layers. The first layers' cache is the draft's.

Shapes: B rows, T tokens of a call, N tokens of a draft, W width.
"""

from typing import Any, NamedTuple

import jax

from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.target import Target, on_lm
from collab_jax.lm import LM, Backbone, Features, Out, State


class Begun(NamedTuple):
    """The hidden states of the tokens of a call; put there by `early_exit`."""

    hidden: Any = None  # [B, 1 + N, W]; None where the first layers are still to run


class Halves(NamedTuple):
    """State of `upper`."""

    first: State  # of the first layers, while the prompt is read; then ()
    last: State


def upper(first: Backbone, last: Backbone, tap: str) -> LM:
    """The whole model as an LM that goes on from hidden states, if it is given some.

    Its parameters are the pair (the model's, `Begun()`). Warps and pools stand above it
    as above any LM.

    Args:
      first: the first layers, with `tap` among its taps.
      last: the layers behind them.
      tap: what `last` reads of `first`, "hidden.E".

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> first = transformer.transformer(config, ("hidden.1",), (0, 1))
    >>> lm = upper(first, transformer.transformer(config, (), (1, 2)), "hidden.1")
    >>> params = transformer.init(jax.random.key(0), config), Begun()
    >>> text = jax.numpy.array([[1, 2, 3]])
    >>> lm.extend(params, lm.init(params, 1, 4), text)[0].logits.shape
    (1, 3, 10)
    """

    def init(params, batch, capacity):
        own, _ = params
        return Halves(first.init(own, batch, capacity), last.init(own, batch, capacity))

    def begin(params, state, tokens, parents):
        own, begun = params
        if begun.hidden is not None:
            if begun.hidden.shape[:2] != tokens.shape:
                raise ValueError(
                    f"hidden states of {begun.hidden.shape[:2]} tokens were handed "
                    f"over for {tokens.shape} tokens of this call"
                )
            return begun.hidden, state.first
        x = first.embed(own, tokens)
        if parents is None:
            features, state = first.features(own, state.first, x)
        else:
            features, state = first.branch(own, state.first, x, parents)
        return features.taps[tap], state

    def end(params, features):
        return Out(last.unembed(params[0], features.hidden), features)

    def extend(params, state, tokens):
        x, lower = begin(params, state, tokens, None)
        features, higher = last.features(params[0], state.last, x)
        return end(params, features), Halves(lower, higher)

    def branch(params, state, tokens, parents):
        x, lower = begin(params, state, tokens, parents)
        features, higher = last.branch(params[0], state.last, x, parents)
        return end(params, features), Halves(lower, higher)

    def both(name):
        def change(state, *args):
            lower = state.first
            if not _gone(lower):
                lower = getattr(first, name)(lower, *args)
            return Halves(lower, getattr(last, name)(state.last, *args))

        return change

    return LM(init, extend, both("rewind"), both("take"), branch, both("prune"))


def early_exit(lm: LM, tap: str, chunk: int | None = None) -> Target:
    """The target that goes on from where the draft's layers ended.

    The draft is `draft_lm(language_model(first), K, whole=True)`, warped as the target
    is, with the model's parameters.

    Args:
      lm: `upper(first, last, tap)`, or any LM made of it; its parameters have `Begun()`
        in its place.
      tap: which hidden states of the draft are handed over, "hidden.E".
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Raises:
      ValueError: when first called, if the draft hands over no such hidden states.

    Source: LayerSkip, arXiv 2404.16710.

    >>> from collab_jax.cooperate.efficient.draft_model import draft_lm
    >>> from collab_jax.cooperate.efficient.speculate import speculate
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> first = transformer.transformer(config, ("hidden.1",), (0, 1))
    >>> lm = upper(first, transformer.transformer(config, (), (1, 2)), "hidden.1")
    >>> draft = draft_lm(language_model(first), 3, whole=True)
    >>> decoder = speculate(early_exit(lm, "hidden.1"), draft, 6)
    >>> params = transformer.init(jax.random.key(0), config)
    >>> both = (params, Begun()), params
    >>> result = run(decoder, both, *pad([[1, 2]]), jax.random.key(0))
    >>> result.length.tolist()
    [8]
    """
    plain = on_lm(lm, chunk)

    def init(params, prompt, prompt_length, room):
        state = plain.init(params, prompt, prompt_length, room)
        return jax.tree.map(
            lambda node: node._replace(first=()) if _is(node, Halves) else node,
            state,
            is_leaf=lambda node: _is(node, Halves),
        )

    def score(params, state, draft: Draft, pending):
        hidden = _handed_over(draft, tap)
        filled = jax.tree.map(
            lambda node: Begun(hidden) if _is(node, Begun) else node,
            params,
            is_leaf=lambda node: _is(node, Begun),
        )
        return plain.score(filled, state, draft, pending)

    return plain._replace(init=init, score=score)


def _handed_over(draft: Draft, tap: str) -> jax.Array:
    """The hidden states of the pending token and of all drafted ones."""
    features = None if draft.out is None else draft.out.features
    if not isinstance(features, Features) or tap not in features.taps:
        raise ValueError(
            f"the target goes on from {tap} of the draft, and the draft has none: "
            f"propose with draft_lm(language_model(first), K, whole=True), where first "
            f"was built with the tap {tap!r}"
        )
    return features.taps[tap]


def _is(node: Any, kind: type) -> bool:
    return isinstance(node, kind)


def _gone(state: Any) -> bool:
    return isinstance(state, tuple) and len(state) == 0
