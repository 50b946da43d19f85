"""The decoder that the flags ask for, its keys, and what it needs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax import beam, decode, stop, warp
from collab_jax.commands.drafting import ROOM, Drafter
from collab_jax.commands.opening import Opened, check_lengths
from collab_jax.commands.options import Sampling
from collab_jax.commands.plan import Plan, check
from collab_jax.decoder import Decoder
from collab_jax.lm import LM, piece
from collab_jax.respond import Codec, batches


class Strategy(NamedTuple):
    """How a text is continued."""

    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...]
    beams: int
    length_penalty: float
    drafter: Drafter | None = None

    def decoder(self, lm: LM, codec: Codec, drafting: LM | None = None) -> Decoder:
        """The decoder of an LM; `drafting` is the model that drafts, if one does."""
        automaton = None
        if self.stops:
            assert codec.spelling is not None
            automaton = stop.automaton(self.stops, codec.spelling())
        ends: dict[str, Any] = {"eos": codec.eos, "stop": automaton}
        if self.beams > 1:
            return beam.search(
                lm,
                self.max_new_tokens,
                self.beams,
                length_penalty=self.length_penalty,
                **ends,
            )
        warps = self.sampling.warps()
        if self.drafter is not None:
            greedy, warps = warps is None, warps or ()
            if drafting is not None:
                drafting = warp.warp(self.drafter.read_as(drafting), *warps)
            return self.drafter.decoder(
                warp.warp(lm, *warps), drafting, self.max_new_tokens, greedy, **ends
            )
        if warps is None:
            return decode.greedy(lm, self.max_new_tokens, **ends)
        warped = warp.warp(lm, *warps) if warps else lm
        return decode.sample(warped, self.max_new_tokens, **ends)


def row_keys(seed: int, rows: Sequence[int]) -> jax.Array:
    """The key of each text is that of its place among all, also where some are done.

    >>> bool((row_keys(0, [0, 1, 2])[2:] == row_keys(0, [2])).all())
    True
    """
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return fold(jax.random.key(seed), np.array(rows, np.uint32))


def check_run(
    members: Sequence[Opened],
    texts: Sequence[str],
    new: int,
    batch_size: int,
    beams: int,
    drafter: Drafter | None = None,
    rooms: Sequence[float] | None = None,
) -> None:
    """Refuses what cannot run, before the parameters are read; prints the plan.

    Args:
      members: the models that speak as one, or one of them, with what encodes their
        prompts; one that stands there twice is loaded once.
      texts: the prompts.
      new: tokens of a reply, at most.
      batch_size: texts that run together.
      beams: of each.
      drafter: what drafts.
      rooms: slots of each member for a token of the text; None for one.

    >>> from pathlib import Path
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 128, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...     "max_position_embeddings": 8})
    >>> letters = Codec(lambda texts: [[*map(ord, t)] for t in texts], str)
    >>> opened = Opened(Path(), config, letters, None, lambda: None)
    >>> check_run([opened], ["abc"], new=5, batch_size=1, beams=1)
    >>> check_run([opened], ["abcd"], new=5, batch_size=1, beams=1)
    Traceback (most recent call last):
    ValueError: text 1 has 4 tokens, and with 5 new ones exceeds the model's 8...
    """
    drafted = 0 if drafter is None else drafter.length
    tokens = [opened.codec.encode(texts) for opened in members]
    for each, opened in zip(tokens, members, strict=True):
        check_lengths(each, opened.config, new)
    longest = [max(map(len, prompts)) for prompts in zip(*tokens, strict=True)]
    first = batches(longest, batch_size)[0]
    rows, capacity = first.size * beams, first.width + new + drafted
    models = [*zip(members, rooms or [1.0] * len(members), strict=True)]
    if drafter is not None and drafter.opened is not None:
        check_lengths(tokens[0], drafter.opened.config, new)
        models.append((drafter.opened, 1.0 if drafter.bridge is None else ROOM))
    needs, known = Plan(0, 0, 0, 0), set[Path]()
    for opened, room in models:
        own = opened.plan(
            rows,
            math.ceil(room * capacity),
            wide=min(first.width, piece(None, first.size)),
            read=1 + drafted,
        )
        own = own._replace(params=0) if opened.path in known else own
        needs = Plan(*(a + b for a, b in zip(needs, own, strict=True)))
        known.add(opened.path)
    if beams > 1:  # beams move by copying the cache
        needs = needs._replace(cache=2 * needs.cache)
    check(needs)
