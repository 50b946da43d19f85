"""Two tokenizers as a bridge: how the tokens of one are spelled in those of the other.

Tokens are compared by the bytes that they add to a text, so that a space is the same
whether a tokenizer writes it as \u0120 or as \u2581, and a byte token is the character
that it stands for.

Shapes: V tokens of the pivot, U of the member.
"""

from collections.abc import Mapping
from typing import Any

from collab_jax.io.tokenizer import token_bytes
from collab_jax.translate import Bridge, from_spellings

_ROLES = ("bos", "eos", "pad", "unk")


def bridge(
    pivot: Any,
    member: Any,
    *,
    vocab: int | None = None,
    member_vocab: int | None = None,
    twins: Mapping[str, str] | None = None,
    fallback: int | None = None,
) -> Bridge:
    """How every token of a tokenizer is spelled in the tokens of another.

    An ordinary token is the member's token of the same bytes; if there is none, it is
    what the member's tokenizer makes of its text, or the fewest tokens that give its
    bytes. A special token is the one of the same name; or of the same role (start, end,
    padding, unknown); or its name, as text.

    Args:
      pivot: the tokenizer that the text is written in, the target's.
      member: the tokenizer of the model that is to be translated, the draft's.
      vocab: V, rows of the pivot's model if they are more than its tokens.
      member_vocab: U, of the member's model, likewise.
      twins: special tokens of the pivot and what they are in the member, by name, e.g.
        `{"<start_of_turn>": "<|im_start|>"}`; they come first.
      fallback: the member token that is read where there is no spelling, such as for a
        byte that no text has.

    Returns:
      A bridge for `collab_jax.translate.translate`.

    Raises:
      ValueError: for a token that cannot be spelled and no fallback, an unknown twin,
        tokenizers without a common token, or one whose bytes are not known.

    Source: token-level intersection, arXiv 2502.05202.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> def made(*words):
    ...     backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    ...     backend.decoder = decoders.ByteLevel()
    ...     return PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> found = bridge(made("a", "b", "ab"), made("b", "a", "c"))
    >>> found.spelling.tolist(), found.pivot.tolist()
    ([[1, 0], [0, 0], [1, 0]], [1, 0, -1])
    """
    ours, theirs = named_bytes(pivot, vocab), named_bytes(member, member_vocab)
    known: dict[bytes, int] = {}
    for i in ordinary(theirs):
        known.setdefault(theirs[i][1], i)
    spelled: dict[int, list[int]] = {}
    aliases: list[int] = []
    seen: set[bytes] = set()
    missing: dict[int, bytes] = {}
    for i in ordinary(ours):
        text = ours[i][1]
        if text in seen:
            aliases.append(i)
        seen.add(text)
        if text in known:
            spelled[i] = [known[text]]
        else:
            missing[i] = text
    taken: set[int] = set()
    for i, token in special_twins(pivot, member, twins).items():
        if i in ours and token in theirs:
            spelled[i] = [token]
            if token in taken or theirs[token][1]:
                aliases.append(i)
            taken.add(token)
    special = {i: name for i, (name, text) in ours.items() if not text}
    named = {i: name.encode() for i, name in special.items() if i not in spelled}
    aliases += named
    spelled |= spellings({**missing, **named}, member, theirs, known)
    rows = max(ours) + 1 if vocab is None else vocab
    columns = max(theirs) + 1 if member_vocab is None else member_vocab
    lost = [i for i in ours if i not in spelled]
    if lost and fallback is None:
        names = ", ".join(f"{ours[i][0]!r}" for i in lost[:3])
        raise ValueError(
            f"{len(lost)} tokens cannot be spelled in the member's tokens, such as "
            f"{names}: give fallback, the member token to read in their place"
        )
    blank = [0 if fallback is None else fallback]
    others = [i for i in range(rows) if i not in spelled]
    return from_spellings(
        [spelled.get(i, blank) for i in range(rows)], columns, [*aliases, *others]
    )


def named_bytes(
    tokenizer: Any, vocab: int | None = None
) -> dict[int, tuple[str, bytes]]:
    """Name and bytes of every token that the model has a row for, by id.

    Args:
      tokenizer: byte-level BPE, or SentencePiece with byte tokens.
      vocab: rows of the model; None for every token.

    Raises:
      ValueError: for a tokenizer of another kind.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.BPE({"\u0120": 0, "a": 1}, []))
    >>> backend.decoder = decoders.ByteLevel()
    >>> named_bytes(PreTrainedTokenizerFast(tokenizer_object=backend), 1)
    {0: ('\u0120', b' ')}
    """
    content = token_bytes(tokenizer)
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {i: (n, content[i]) for n, i in names if vocab is None or i < vocab}


def ordinary(tokens: Mapping[int, tuple[str, bytes]]) -> list[int]:
    """Tokens with bytes; those that spell a byte by its number come last.

    Args:
      tokens: name and bytes by id, as of `named_bytes`.

    >>> ordinary({0: ("<0x61>", b"a"), 1: ("a", b"a"), 2: ("<s>", b"")})
    [1, 0]
    """

    def numbered(i: int) -> bool:
        name, text = tokens[i]
        return name.lower() == f"<0x{text.hex()}>"

    return sorted((i for i in tokens if tokens[i][1]), key=lambda i: (numbered(i), i))


def special_twins(
    pivot: Any, member: Any, twins: Mapping[str, str] | None = None
) -> dict[int, int]:
    """Special tokens of a tokenizer that another has as well.

    Those of `twins` come first, then those of the same name, then of the same role.

    Args:
      pivot: the one tokenizer.
      member: the other.
      twins: what a special token of the pivot is in the member, by name.

    Returns:
      Token of the pivot to token of the member, the surest first.

    Raises:
      ValueError: for a twin that is not there.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> def made(end):
    ...     backend = Tokenizer(models.BPE({"a": 0}, []))
    ...     backend.decoder = decoders.ByteLevel()
    ...     return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    >>> special_twins(made("</s>"), made("<end>"))
    {1: 1}
    """
    twins = {} if twins is None else twins
    content = token_bytes(pivot)
    ours = {name: i for name, i in pivot.get_vocab().items() if not content[i]}
    every = member.get_vocab()
    for name, twin in twins.items():
        if name not in ours or twin not in every:
            whose, what = ("pivot", name) if name not in ours else ("member", twin)
            raise ValueError(
                f"twins: {name!r} is to be {twin!r}, but the {whose} has no special "
                f"token {what!r}"
            )
    roles = {
        getattr(pivot, f"{role}_token_id"): getattr(member, f"{role}_token_id")
        for role in reversed(_ROLES)
    }
    found: dict[int, int] = {}
    named = sorted(ours.items(), key=lambda item: item[1])
    for of in (
        {i: every.get(twins.get(name, "")) for name, i in named},
        {i: every.get(name) for name, i in named},
        {i: roles.get(i) for _, i in named},
    ):
        for i, twin_id in of.items():
            if twin_id is not None:
                found.setdefault(i, twin_id)
    return found


def spellings(
    texts: Mapping[int, bytes],
    member: Any,
    theirs: Mapping[int, tuple[str, bytes]],
    known: Mapping[bytes, int],
) -> dict[int, list[int]]:
    """Spellings of the texts that have one.

    What the member's tokenizer makes of a text, where that gives its bytes, or else the
    fewest tokens that do.

    Args:
      texts: bytes by any key.
      member: the tokenizer.
      theirs: its tokens, of `named_bytes`.
      known: bytes to token of those that may be used.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    >>> backend.decoder = decoders.ByteLevel()
    >>> member = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> known = {b"a": 0, b"b": 1}
    >>> spellings({7: b"ba", 8: b"c"}, member, named_bytes(member), known)
    {7: [1, 0]}
    """
    found: dict[int, list[int]] = {}
    readable = {i: t.decode() for i, t in texts.items() if _is_text(t)}
    made = member.backend_tokenizer.encode_batch(
        [*readable.values()], add_special_tokens=False
    )
    for i, encoding in zip(readable, made, strict=True):
        pieces = [theirs.get(u, ("", b""))[1] for u in encoding.ids]
        if b"".join(pieces) == texts[i]:
            found[i] = list(encoding.ids)
    longest = max(map(len, known), default=0)
    for i, text in texts.items():
        pieces = found.get(i) or fewest(text, known, longest)
        if pieces:
            found[i] = pieces
    return found


def fewest(text: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    """The fewest tokens whose bytes give a text; of equals, the longer first.

    Args:
      text: at least one byte.
      known: bytes to token.
      longest: of these, in bytes.

    Returns:
      Token ids; none where there is no such spelling.

    >>> fewest(b"abab", {b"a": 0, b"b": 1, b"ab": 2, b"aba": 3}, 3)
    [3, 1]
    >>> fewest(b"ac", {b"a": 0}, 1)
    []
    """
    end = len(text)
    count: list[float] = [float("inf")] * end + [0]  # tokens from here to the end
    step = [0] * end  # bytes of the first of them
    for i in reversed(range(end)):
        for size in range(min(longest, end - i), 0, -1):
            if text[i : i + size] in known and count[i + size] + 1 < count[i]:
                count[i], step[i] = count[i + size] + 1, size
    if count[0] == float("inf"):
        return []
    pieces, i = list[int](), 0
    while i < end:
        pieces.append(known[text[i : i + step[i]]])
        i += step[i]
    return pieces


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
