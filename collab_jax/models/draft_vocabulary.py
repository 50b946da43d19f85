"""A part of the vocabulary for drafts: the tokens that are drafted at all.

Most of what a small drafter costs is its output matrix, and most of what a model writes
are few of its tokens. A drafter over R of V tokens reads a matrix of R columns and
never drafts another token; the text's law stays the target's, because a drafted token
is only ever a guess.

Shapes: `...` any leading axes, W width of the hidden states, V vocabulary, R tokens of
the draft vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.lm import Backbone, Params


class DraftVocabulary(NamedTuple):
    """R tokens out of V, in order; made by `draft_vocabulary` or `frequent`."""

    tokens: tuple[int, ...]
    size: int  # V

    def token(self, place: jax.Array) -> jax.Array:
        """The tokens of places `[...]` in the list."""
        return jnp.asarray(self.tokens, jnp.int32)[place]

    def place(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where tokens `[...]` stand in the list, 0 if nowhere; and whether they do."""
        found = np.full(self.size, -1, np.int32)
        found[list(self.tokens)] = np.arange(len(self.tokens))
        place = jnp.asarray(found)[tokens]
        return jnp.maximum(place, 0), place >= 0

    def widen(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., R]` as `[..., V]`; all other tokens are forbidden."""
        whole = jnp.full((*logits.shape[:-1], self.size), -jnp.inf, logits.dtype)
        return whole.at[..., jnp.asarray(self.tokens)].set(logits)


def output_matrix(backbone: Backbone, base: Params) -> jax.Array:
    """What maps hidden states to logits, `[W, V]` float32, read row by row.

    A cap on the model's logits is left out.

    Args:
      backbone: the model.
      base: its parameters.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> output_matrix(transformer.transformer(config), base).shape
    (8, 10)
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    width = jax.eval_shape(backbone.embed, base, tokens).shape[-1]
    with jax.default_matmul_precision("highest"):
        return backbone.unembed(base, jnp.eye(width)[None])[0]


def draft_vocabulary(tokens: Iterable[int], size: int) -> DraftVocabulary:
    """The given tokens, sorted.

    Args:
      tokens: of the model.
      size: V.

    Raises:
      ValueError: for no tokens, one that stands twice, or one outside of 0 .. V - 1.

    >>> vocabulary = draft_vocabulary([5, 2], size=6)
    >>> vocabulary.widen(jnp.array([1.0, 2.0])).tolist()
    [-inf, -inf, 1.0, -inf, -inf, 2.0]
    >>> vocabulary.token(jnp.array([1, 0])).tolist()
    [5, 2]
    >>> [part.tolist() for part in vocabulary.place(jnp.array([4, 5]))]
    [[0, 1], [False, True]]
    """
    found = sorted(map(int, tokens))
    if not found:
        raise ValueError("a draft vocabulary of no tokens: at least one is expected")
    twice = [token for token, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(f"token {twice[0]} stands twice in a draft vocabulary")
    for token in found[0], found[-1]:
        if not 0 <= token < size:
            raise ValueError(
                f"token {token} in the draft vocabulary of a model with {size} tokens: "
                f"0 to {size - 1} are expected"
            )
    return DraftVocabulary(tuple(found), size)


def frequent(
    texts: Iterable[Sequence[int]],
    count: int,
    size: int,
    always: Iterable[int] = (),
) -> DraftVocabulary:
    """The R most frequent tokens of some texts; of equals, those of a smaller number.

    Text that the model wrote itself tells best what it will write. Where the texts have
    fewer than R tokens, the first others fill the list up.

    Args:
      texts: tokens of each.
      count: R, at most V; `always` is among them.
      size: V.
      always: tokens that are listed in any case, e.g. those that end a text.

    Raises:
      ValueError: for R below 1 or above V, or below the number of `always`.

    Source: FR-Spec, arXiv 2502.14856; EAGLE-3, arXiv 2503.01840, drafts so as well.

    >>> frequent([[3, 3, 1], [4, 1, 3]], count=3, size=6, always=[5]).tokens
    (1, 3, 5)
    """
    kept = list(dict.fromkeys(map(int, always)))
    if not max(1, len(kept)) <= count <= size:
        raise ValueError(
            f"count = {count}: a draft vocabulary has at least 1 token and the "
            f"{len(kept)} of `always`, and at most the {size} of the model"
        )
    seen = Counter(token for text in texts for token in map(int, text))
    order = sorted(seen, key=lambda token: (-seen[token], token))
    rest = (token for token in range(size) if token not in seen)
    listed = dict.fromkeys([*kept, *order])
    while len(listed) < count:
        listed.setdefault(next(rest))
    return draft_vocabulary(list(listed)[:count], size)
