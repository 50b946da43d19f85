"""Text of one tokenizer in the tokens of another, cut anew every time.

A model reads text best as its own tokenizer cuts it. How it cuts the end of a text may
change with what follows, so this is for decoding that verifies what it is given
(`collab_jax.cooperate.efficient.universal`), and runs on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.io.bridge import special_twins
from collab_jax.io.tokenizer import token_bytes


class Retokenizer(NamedTuple):
    """How text goes from a target's tokens to a draft's, and back."""

    # target tokens of the whole text -> draft tokens, at least one
    to_draft: Callable[[Sequence[int]], list[int]]
    # (target tokens of the whole text, draft tokens behind it) -> target tokens behind
    # it. They are a proposal: any will do, and none where the text cannot be cut there
    to_target: Callable[[Sequence[int], Sequence[int]], list[int]]


def retokenizer(
    target: Any,
    draft: Any,
    *,
    twins: Mapping[str, str] | None = None,
    start: Sequence[int] = (),
    window: int = 10,
) -> Retokenizer:
    """Goes to and fro between two tokenizers, special tokens included.

    New text is cut together with the last tokens before it, so that a word is cut as
    its tokenizer would; where no token ends between the old text and the new, it is cut
    alone.

    Args:
      target: the tokenizer that the text is written in.
      draft: the tokenizer of the draft.
      twins: special tokens of the target and what they are in the draft, by name;
        otherwise those of the same name or role. Others are left out.
      start: draft tokens that every text begins with, such as a start-of-text token.
      window: tokens before the new text that are cut with it.

    Raises:
      ValueError: for a twin that is not there, or a tokenizer whose bytes are not
        known.

    Source: universal assisted generation in transformers; arXiv 2502.05202.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> def made(words, merges):
    ...     words = {w: i for i, w in enumerate(words)}
    ...     backend = Tokenizer(models.BPE(words, merges))
    ...     backend.decoder = decoders.ByteLevel()
    ...     return PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> both = retokenizer(made(["a", "b", "ab"], [("a", "b")]), made(["b", "a"], []))
    >>> both.to_draft([2, 0]), both.to_target([2], [1, 0, 1])
    ([1, 0, 1], [2, 0])
    """
    ours, theirs = token_bytes(target), token_bytes(draft)
    there = special_twins(target, draft, twins)
    back: dict[int, int] = {}
    for token, twin in there.items():
        back.setdefault(twin, token)
    named = (draft.bos_token_id, draft.eos_token_id, 0)
    blank = next(token for token in named if token is not None)

    def to_draft(ids: Sequence[int]) -> list[int]:
        found, text = [*start], b""
        for token in ids:
            if piece := _content(ours, token):
                text += piece
                continue
            found += _cut(draft, text)
            text = b""
            if token in there:
                found.append(there[token])
        return found + _cut(draft, text) or [blank]

    def to_target(ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        new, ends = b"", list[int]()
        for token in drafted:
            piece = _content(theirs, token)
            if not piece:
                ends = [back[token]] if token in back else []
                break
            new += piece
        whole = _whole(new)
        if whole < len(new):  # ends within a character
            new, ends = new[:whole], []
        before = b""
        for token in reversed(ids[-window:]):
            if not (piece := _content(ours, token)):
                break
            before = piece + before
        if _whole(before) < len(before):
            return []  # the draft has not read the beginning of this character
        while before and before[0] & 0xC0 == 0x80:
            before = before[1:]  # nor did the window begin with one
        for old in (before, b""):
            pieces = _cut(target, old + new)
            text = b"".join(ours[token] for token in pieces)
            extra = len(text) - len(old + new)  # some begin every text with a space
            if text != b" " * extra + old + new:
                continue
            sizes = [0]
            for token in pieces:
                sizes.append(sizes[-1] + len(ours[token]))
            if len(old) + extra in sizes[:-1] and (old or not extra):
                return pieces[sizes.index(len(old) + extra) :] + ends
        return ends if not new else []

    return Retokenizer(to_draft, to_target)


def _content(table: Sequence[bytes], token: int) -> bytes:
    return table[token] if token < len(table) else b""


def _cut(tokenizer: Any, content: bytes) -> list[int]:
    """The tokens of a text, without those that begin or end one."""
    text = content[: _whole(content)].decode(errors="replace")
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return list(ids)


def _whole(content: bytes) -> int:
    """Where a character begins that the bytes do not end; else how many they are."""
    for back in range(1, min(3, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 == 0xC0:  # the first byte of a character of several
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) - back if back < size else len(content)
        if byte < 0x80:
            break
    return len(content)
