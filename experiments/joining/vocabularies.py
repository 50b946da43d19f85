"""Ways to join two models of unequal vocabularies, and what each has to build first.

Texts stand in the first model's tokens. Whatever is large is an argument of the
compiled function: `make(weight, parts)` is an LM, where the weight is the first
model's share.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from joining.member import Member

from collab_jax import combine, translate, warp
from collab_jax.ensemble.vocabulary.alignment import Alignment, align, exact_pairs
from collab_jax.ensemble.vocabulary.edit_distance import complete
from collab_jax.ensemble.vocabulary.eva import eva
from collab_jax.ensemble.vocabulary.lift import borrow
from collab_jax.ensemble.vocabulary.relative import (
    common_tokens,
    deepen_lm,
    matrix,
    relative,
)
from collab_jax.ensemble.vocabulary.top_union import top_union
from collab_jax.ensemble.vocabulary.union import union
from collab_jax.ensemble.weighted import weighted
from collab_jax.io.bridge import bridge
from collab_jax.io.tokenizer import token_bytes
from collab_jax.io.union import unite
from collab_jax.lm import LM
from collab_jax.pool import linear, mixture
from collab_jax.translate import Bridge, from_spellings, spelled


class Joined(NamedTuple):
    """A way to join two models."""

    make: Callable[[Any, Any], LM]  # (weight of the first, parts) -> LM
    parts: Any  # arrays


class Pair(NamedTuple):
    """Two models."""

    first: Member
    second: Member
    twins: dict[str, str]  # special tokens of the first and what they are in the second

    @property
    def params(self) -> tuple[Any, Any]:
        """Of both."""
        return self.first.params, self.second.params

    @property
    def lms(self) -> list[LM]:
        """Both."""
        return [self.first.lm, self.second.lm]

    @property
    def vocabs(self) -> tuple[int, int]:
        """Rows of both."""
        return self.first.config.vocab, self.second.config.vocab


class Built(NamedTuple):
    """Everything that is made of the tokenizers and the embeddings."""

    united: tuple[Bridge, ...]  # from the union to each
    own: Bridge  # of the first to itself
    across: Bridge  # from the first to the second
    exact: jax.Array  # [V] the second's token for each of the first's; -1 for none
    nearest: jax.Array  # [V] the same, completed by edit distance
    alignment: Alignment  # of the second's tokens with the first's
    spaces: tuple[jax.Array, jax.Array]  # over common tokens
    seconds: dict[str, float]  # how long each took


def build(pair: Pair, aligned: int, anchors: int) -> Built:
    """Makes all bridges and maps.

    Args:
      pair: the models.
      aligned: rows of the second's embedding that are aligned; tokens behind them stand
        for nothing. All rows of a large vocabulary take minutes.
      anchors: tokens that span the space of DeePEn.
    """
    seconds = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        made = jax.block_until_ready(make())
        seconds[name] = round(time.perf_counter() - begin, 2)
        return made

    first, second = pair.first, pair.second
    both = first.tokenizer, second.tokenizer
    sizes = pair.vocabs
    unknown = second.encode("?")[0]  # read where nothing can be
    united = timed(
        "union",
        lambda: (
            unite(
                *both,
                vocabs=sizes,
                twins=pair.twins,
                fallbacks=(first.encode("?")[0], unknown),
            ).bridges
        ),
    )
    across = timed(
        "bridge",
        lambda: bridge(
            *both,
            vocab=sizes[0],
            member_vocab=sizes[1],
            twins=pair.twins,
            fallback=unknown,
        ),
    )
    own = from_spellings([[v] for v in range(sizes[0])], sizes[0])
    exact = jnp.where(across.shared(), across.spelling[:, 0], -1)

    def texts(member: Member, size: int) -> list[bytes]:
        found = token_bytes(member.tokenizer)[:size]
        return [*found, *[b""] * (size - len(found))]

    nearest = timed(
        "MinED",
        lambda: complete(
            np.asarray(exact), texts(first, sizes[0]), texts(second, sizes[1]), True
        ),
    )
    rows = [np.asarray(m.params["embed"]["embedding"]) for m in (first, second)]
    pairs = exact_pairs(across)
    few = pairs[pairs[:, 0] < aligned]
    found = timed(
        "EVA", lambda: align(rows[1][:aligned], rows[0], few, matches=10, keep=True)
    )
    fill = ((0, max(0, sizes[1] - aligned)), (0, 0))
    alignment = Alignment(*(jnp.pad(leaf, fill) for leaf in found))
    common = common_tokens([own, across], anchors)
    spaces = timed(
        "DeePEn",
        lambda: tuple(
            matrix(relative(embedding, common[:, n]))
            for n, embedding in enumerate(rows)
        ),
    )
    return Built(
        united, own, across, exact, jnp.asarray(nearest), alignment, spaces, seconds
    )


def ways(pair: Pair, built: Built) -> dict[str, Joined]:
    """Every method, by name."""
    lms, (_, other) = pair.lms, pair.vocabs
    bridges = built.own, built.across

    def mapped(w, parts):
        across, index = parts
        second = warp.warp(spelled(lms[1], across), borrow(index, other))
        return combine.product([lms[0], second], mixture(w, 1 - w))

    def translated(w, across):
        second = translate.translate(lms[1], across)
        return combine.product([lms[0], second], mixture(w, 1 - w))

    def aligned(w, parts):
        bridges, alignment = parts
        return eva(lms, bridges, [None, alignment], w, 1 - w)

    return {
        "union (GaC)": Joined(
            lambda w, parts: union(lms, parts, w, 1 - w), built.united
        ),
        "UniTE": Joined(lambda w, parts: top_union(lms, parts, w, 1 - w), built.united),
        "exact": Joined(translated, built.across),
        "MinED": Joined(mapped, (built.across, built.nearest)),
        "EVA": Joined(aligned, (bridges, built.alignment)),
        "DeePEn": Joined(
            lambda w, parts: deepen_lm(lms, parts[0], parts[1], w, 1 - w),
            (bridges, built.spaces),
        ),
    }


def lifted(pair: Pair, across: Bridge, index: jax.Array) -> list[LM]:
    """Both models over the first's vocabulary, as PackLLM has them."""
    second = warp.warp(spelled(pair.lms[1], across), borrow(index, pair.vocabs[1]))
    return [pair.lms[0], second]


def packed(pair: Pair) -> Callable[[Any, Any], LM]:
    """From weights `[B, 2]` and (bridge, map) to PackLLM's ensemble of logits."""

    def make(weights, parts):
        lm = weighted(lifted(pair, *parts), linear)

        def init(params, batch, capacity):
            return lm.init((params, weights), batch, capacity)

        def extend(params, state, tokens):
            return lm.extend((params, weights), state, tokens)

        return lm._replace(init=init, extend=extend)

    return make
