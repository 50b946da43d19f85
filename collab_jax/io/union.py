"""Several tokenizers as one vocabulary: their union, and how each spells it.

Shapes: V tokens of the union, U of a member.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from collab_jax.io.bridge import named_bytes, ordinary, special_twins, spellings
from collab_jax.translate import Bridge, from_spellings


class Union(NamedTuple):
    """The union of vocabularies.

    The first tokenizer's tokens keep their numbers, so that what it encodes is a text
    of the union, and its end-of-text token is the union's.
    """

    tokens: tuple[bytes, ...]  # [V], what each adds to a text; b"" for special tokens
    names: tuple[str, ...]  # [V], as the first tokenizer that has it writes it
    # from the union to each member. `pivot[u]` is the token of the union for every
    # token of the member, also for several that add the same bytes; -1 where a model
    # has rows beyond its tokenizer
    bridges: tuple[Bridge, ...]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens of the union; special tokens are left out."""
        content = b"".join(self.tokens[int(i)] for i in ids)
        return content.decode(errors="replace")


def unite(
    *tokenizers: Any,
    vocabs: Sequence[int | None] | None = None,
    twins: Mapping[str, str] | None = None,
    fallbacks: Sequence[int | None] | None = None,
) -> Union:
    """One vocabulary that holds every token of several tokenizers.

    Ordinary tokens are the same when they add the same bytes to a text, however a space
    or a byte is written. Special tokens are the same when they have the same name or
    the same role, see `collab_jax.io.bridge.special_twins`. A token that a member lacks
    is spelled in the member's own tokens as by `collab_jax.io.bridge.bridge`.

    Args:
      *tokenizers: two or more; the first member's come first and keep their numbers.
      vocabs: rows of each model, if they are more than its tokens.
      twins: special tokens of the first tokenizer and what they are in the others, by
        name; where one of the others lacks the token, this twin does not hold for it.
      fallbacks: for each member, the token that is read where there is no spelling.

    Raises:
      ValueError: for fewer than two tokenizers, a token without a spelling and no
        fallback, or a tokenizer whose bytes are not known.

    Source: arXiv 2406.12585.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> def made(*words):
    ...     backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    ...     backend.decoder = decoders.ByteLevel()
    ...     return PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> both = unite(made("a", "b", "ab"), made("b", "a", "ba"))
    >>> both.tokens, both.bridges[1].pivot.tolist()
    ((b'a', b'b', b'ab', b'ba'), [1, 0, 3])
    >>> both.bridges[0].spelling.tolist(), both.bridges[0].size.tolist()
    ([[0, 0], [1, 0], [2, 0], [1, 0]], [1, 1, 1, 2])
    """
    count = len(tokenizers)
    if count < 2:
        raise ValueError(f"a union of {count} tokenizers: at least two are expected")
    rows = _each("vocabs", vocabs, count)
    spare = _each("fallbacks", fallbacks, count)
    read = [named_bytes(t, v) for t, v in zip(tokenizers, rows, strict=True)]
    shared = [dict[int, int](), *_shared(tokenizers, twins or {})]
    first = max(read[0]) + 1 if rows[0] is None else rows[0]
    found = dict(read[0])  # token of the union -> its name and bytes
    homes = [{i: i for i in read[0]}]
    for theirs, same in zip(read[1:], shared[1:], strict=True):
        homes.append(_settle(found, first, theirs, same))
    total = max([first, *(i + 1 for i in found)])
    bridges = []
    for n, tokenizer in enumerate(tokenizers):
        spelled = _spellings(found, homes[n], read[n], shared[n], tokenizer)
        lost = [i for i in found if i not in spelled]
        blank = spare[n]
        if lost and blank is None:
            some = ", ".join(f"{found[i][0]!r}" for i in lost[:3])
            raise ValueError(
                f"{len(lost)} tokens of the union cannot be spelled in the tokens of "
                f"tokenizer {n}, such as {some}: give fallbacks, for each member the "
                "token to read in their place"
            )
        columns = rows[n]
        columns = max(read[n]) + 1 if columns is None else columns
        made = from_spellings(
            [spelled.get(i, [blank or 0]) for i in range(total)], columns
        )
        pivot = np.full(columns, -1, np.int32)
        pivot[[*homes[n]]] = [*homes[n].values()]
        bridges.append(made._replace(pivot=jnp.asarray(pivot)))
    listed = [found.get(i, ("", b"")) for i in range(total)]
    names, tokens = zip(*listed, strict=True)
    return Union(tokens, names, tuple(bridges))


def _each(name: str, given: Sequence[int | None] | None, count: int) -> list:
    values = [None] * count if given is None else list(given)
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} tokenizers: give one each")
    return values


def _shared(tokenizers: Sequence[Any], twins: Mapping[str, str]) -> list:
    """Special tokens of the first tokenizer in each of the others."""
    others = [(t, t.get_vocab()) for t in tokenizers[1:]]
    nowhere = {n: x for n, x in twins.items() if not any(x in v for _, v in others)}
    return [
        special_twins(
            tokenizers[0],
            t,
            {n: x for n, x in twins.items() if x in v or n in nowhere},
        )
        for t, v in others
    ]


def _settle(
    found: dict[int, tuple[str, bytes]],
    first: int,
    theirs: Mapping[int, tuple[str, bytes]],
    same: Mapping[int, int],
) -> dict[int, int]:
    """Where a member's tokens are in the union; those that it lacks are added to it."""
    alike = {entry: i for i, entry in reversed([*found.items()])}
    by_bytes: dict[bytes, int] = {}
    for i in ordinary(found):
        by_bytes.setdefault(found[i][1], i)
    special = {u: None for u in theirs if not theirs[u][1]}
    twin = {u: v for v, u in reversed([*same.items()]) if u in special and v in found}
    end = max([first, *(i + 1 for i in found)])
    home: dict[int, int] = {}
    for u in [*ordinary(theirs), *special]:
        entry = theirs[u]
        at = twin.get(u, alike.get(entry, by_bytes.get(entry[1])))
        if at is None:
            at, end = end, end + 1
            found[at] = entry
            if entry[1]:
                by_bytes[entry[1]] = at
        home[u] = at
    return home


def _spellings(
    found: Mapping[int, tuple[str, bytes]],
    home: Mapping[int, int],
    theirs: Mapping[int, tuple[str, bytes]],
    same: Mapping[int, int],
    tokenizer: Any,
) -> dict[int, list[int]]:
    """The member's tokens for every token of the union that it can spell."""
    known: dict[bytes, int] = {}
    for u in ordinary(theirs):
        known.setdefault(theirs[u][1], u)
    spelled: dict[int, list[int]] = {}
    for u in [*ordinary(theirs), *(u for u in theirs if not theirs[u][1])]:
        spelled.setdefault(home[u], [u])
    for i, u in same.items():
        if i in found and u in theirs:
            spelled.setdefault(i, [u])
    for i, (_, text) in found.items():
        if i not in spelled and text in known:
            spelled[i] = [known[text]]
    missing = {
        i: text or name.encode()
        for i, (name, text) in found.items()
        if i not in spelled
    }
    return spelled | spellings(missing, tokenizer, theirs, known)
