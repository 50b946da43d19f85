"""The `Codec` of a tokenizer, plain or in its chat template."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from collab_jax.io import tokenizer as texts
from collab_jax.respond import Codec


def codec(
    tokenizer: Any,
    eos: Sequence[int] = (),
    *,
    chat: bool = False,
    system: str | None = None,
) -> Codec:
    """How texts become tokens and tokens become text, for responders and evaluation.

    An empty text becomes the start token, or the end token where there is no start.

    Args:
      tokenizer: of `load`, `model.tokenizer`.
      eos: tokens that end a text beside the tokenizer's own, `model.config.eos`.
      chat: put each text into the chat template, as what the user says.
      system: first message of the chat.

    Raises:
      ValueError: for a system message without a chat, and by `encode`, for a chat with
        a tokenizer that has no template.

    >>> from types import SimpleNamespace
    >>> codec(SimpleNamespace(eos_token_id=2), eos=[7]).eos
    (2, 7)
    """
    if system is not None and not chat:
        raise ValueError(f"system message {system!r}: only a chat has one (chat=True)")
    own = tokenizer.eos_token_id
    ends = {*eos, *([] if own is None else [own])}
    return Codec(
        partial(_encode, tokenizer, chat, system),
        partial(texts.decode, tokenizer),
        tuple(sorted(ends)),
        cache(partial(texts.token_bytes, tokenizer)),
    )


def _encode(tokenizer: Any, chat: bool, system: str | None, prompts: Sequence[str]):
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    empty = [] if start is None else [start]
    found = texts.encode(tokenizer, list(prompts), chat=chat, system=system)
    return [list(ids) or empty for ids in found]
