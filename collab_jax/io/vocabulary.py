"""The vocabulary of a merge's result, and where each model has its tokens.

`collab_jax.io.rows` brings the matrices to it, `collab_jax.io.folder` writes it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken

from collab_jax.io.rows import Origin, Rows, unknown
from collab_jax.io.tokenizer import load_tokenizer


class Member(NamedTuple):
    """A model whose vocabulary counts."""

    name: str  # as the config writes it
    folder: Path
    rows: int  # of its embedding matrix


class Given(NamedTuple):
    """What a config says about the row of one token: a model's row, or zeros."""

    model: str | None = None
    token: str | None = None  # of that model; without it and an id, the token itself
    token_id: int | None = None
    zero: bool = False
    force: bool = False  # for all models, else for those that lack the token


class Wish(NamedTuple):
    """What a config says about the tokenizer of the result."""

    source: str = "union"  # "base", or a model's name
    tokens: Mapping[str, Given] = {}
    pad_to_multiple_of: int | None = None


class Vocabulary(NamedTuple):
    """The vocabulary of the result."""

    tokens: dict[str, int]
    rows: Rows
    donor: str  # the model whose tokenizer it is, or begins with
    tokenizer: Any | None  # to be saved; None where the donor's files can be copied
    special: dict[str, int | None]  # "bos_token_id": 1, ...
    notes: tuple[str, ...]  # one line for each thing that looks wrong


def vocabulary(members: Sequence[Member], base: str | None, wanted: Wish) -> Vocabulary:
    """Builds the result's vocabulary and finds each model's rows for it.

    A union begins with the tokenizer of the base, or of the first model. The others'
    tokens follow model by model, the ordinary ones first and then those that some model
    had added, each by its id, all as added tokens; last come those of `tokens`.

    Args:
      members: the merged models in the order of the config, and any other model that
        the wish names as its source.
      base: the name of the base model, if there is one.
      wanted: from `the config`.

    Raises:
      FileNotFoundError: for a model without a tokenizer.
      ValueError: for a name or a token that is not there.

    Source: the rules of mergekit 0.1.5, found by running it. It orders a model's tokens
    by chance.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> def member(name, *words):
    ...     made = models.WordLevel({w: i for i, w in enumerate(words)}, words[0])
    ...     made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made))
    ...     folder = Path(tempfile.mkdtemp())
    ...     made.save_pretrained(folder)
    ...     return Member(name, folder, len(words))
    >>> both = [member("m", "?", "a", "b"), member("n", "?", "c", "a")]
    >>> found = vocabulary(both, None, Wish("union"))
    >>> found.tokens
    {'?': 0, 'a': 1, 'b': 2, 'c': 3}
    >>> found.rows.models["n"].tolist()
    [0, 2, -1, 1]
    """
    multiple = wanted.pad_to_multiple_of
    if multiple is None:
        multiple = 1
    if multiple < 1:
        raise ValueError(
            f"tokenizer.pad_to_multiple_of is {multiple}, at least 1 was expected"
        )
    folders = {member.name: member for member in members}
    donor = _donor(folders, base, wanted.source)
    made = _load_all(folders)
    notes: list[str] = []
    known = {
        name: _within(name, made[name], folders[name].rows, notes) for name in folders
    }
    origins = {
        token: _origin(token, given, known, folders)
        for token, given in wanted.tokens.items()
    }
    tokenizer, before = made[donor], made[donor].get_vocab()
    extra: list[AddedToken] = []
    if wanted.source == "union":
        extra += _others(donor, made, known, notes)
    there = before.keys() | {token.content for token in extra}
    extra += [_ordinary(token) for token in wanted.tokens if token not in there]
    if extra:
        tokenizer.add_tokens(extra)
    tokens = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    size = max(tokens.values(), default=-1) + 1
    rows = Rows(
        -(-size // multiple) * multiple,
        {name: _places(tokens, size, known[name]) for name in folders},
        base,
        {tokens[token]: origin for token, origin in origins.items() if origin},
    )
    holes = unknown(rows, rows.models)
    if len(holes):
        names = [tokenizer.convert_ids_to_tokens(int(id)) for id in holes[:3]]
        notes.append(
            f"{len(holes)} tokens have no row in any model and get zeros: "
            + ", ".join(map(repr, names))
        )
    special = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id")
        for kind in ("bos", "eos", "pad")
    }
    return Vocabulary(
        tokens, rows, donor, tokenizer if extra else None, special, tuple(notes)
    )


def _donor(members: Mapping[str, Member], base: str | None, source: str) -> str:
    """The model whose tokenizer the result has, or begins with."""
    names = ", ".join(members)
    if base is not None and base not in members:
        raise ValueError(f"base_model {base} is none of the models ({names})")
    if source in ("union", "base"):
        return base or next(iter(members))
    if source not in members:
        raise ValueError(
            f"tokenizer source {source} is none of the models ({names}), nor union or "
            "base"
        )
    return source


def _load_all(members: Mapping[str, Member]) -> dict[str, Any]:
    """The tokenizers by name; equal files are read once, for it takes seconds."""
    made, by_content = dict[str, Any](), dict[str, Any]()
    for name, member in members.items():
        digest = _digest(member.folder)
        if digest not in by_content:
            by_content[digest] = _load(member)
        made[name] = by_content[digest]
    return made


def _digest(folder: Path) -> str:
    """Of all files that a tokenizer may be made of."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken"):
            total.update(path.name.encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _load(member: Member) -> Any:
    try:
        return load_tokenizer(member.folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{member.name}: {error}") from None
    except Exception as error:  # whatever transformers makes of a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{member.name}: its tokenizer cannot be read ({reason}); put the "
            f"tokenizer.json of this model into {member.folder}"
        ) from None


def _within(name: str, tokenizer: Any, rows: int, notes: list[str]) -> dict[str, int]:
    """The tokens that a model has rows for, by id."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    inside = {token: id for token, id in by_id if id < rows}
    if len(inside) < len(by_id):
        token, id = by_id[len(inside)]
        notes.append(
            f"{name} has {rows} rows for {len(by_id)} tokens; {token!r} ({id}) and all "
            "above count as tokens that it lacks"
        )
    return inside


def _ordinary(token: str) -> AddedToken:
    return AddedToken(token, normalized=True, special=False)


def _others(
    donor: str,
    made: Mapping[str, Any],
    known: Mapping[str, Mapping[str, int]],
    notes: list[str],
) -> list[AddedToken]:
    """What the union adds to the donor's tokenizer, in order."""
    present = made[donor].get_vocab()
    fixed = {token.content for token in made[donor].added_tokens_decoder.values()}
    added: dict[str, AddedToken] = {}
    for name, tokenizer in made.items():
        for _, token in sorted(tokenizer.added_tokens_decoder.items()):
            if token.content not in known[name]:
                continue
            first = added.setdefault(token.content, token)
            if _manner(first) != _manner(token):
                notes.append(
                    f"{name} treats the added token {token.content!r} in another way "
                    "than a model before it; the first counts"
                )
    ordinary = {
        token: None
        for name in made
        for token in known[name]
        if token not in present and token not in added
    }
    return [
        *map(_ordinary, ordinary),
        *(token for content, token in added.items() if content not in fixed),
    ]


def _manner(token: AddedToken) -> tuple[bool, ...]:
    stripped = (token.lstrip, token.rstrip)
    return (*stripped, token.single_word, token.normalized, token.special)


def _places(
    tokens: Mapping[str, int], size: int, known: Mapping[str, int]
) -> np.ndarray:
    """int64[V]: the row of a model for each id of the result, -1 where it has none."""
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    found = np.fromiter(map(known.get, tokens, repeat(-1)), np.int64, len(tokens))
    out = np.full(size, -1, np.int64)
    out[ids] = found
    return out


def _origin(
    token: str,
    given: Given,
    known: Mapping[str, Mapping[str, int]],
    members: Mapping[str, Member],
) -> Origin | None:
    """Where the row of a token comes from; None where the common rules decide."""
    path = f"tokenizer.tokens.{token}"
    if given.zero:
        return Origin(None, -1, given.force)
    if given.model is None:
        if given.force or not any(token in tokens for tokens in known.values()):
            why = "force needs one" if given.force else "no model has this token"
            raise ValueError(
                f"{path} names no source, and {why}; name a model, or kind: zero"
            )
        return None
    path, model, row = f"{path}.source", given.model, given.token_id
    if model not in members:
        raise ValueError(
            f"{path} takes a row of {model}, which is none of the models "
            f"({', '.join(members)})"
        )
    if row is None:
        wanted = given.token or token
        if wanted not in known[model]:
            raise ValueError(f"{path}: {model} has no token {wanted!r}")
        row = known[model][wanted]
    if not 0 <= row < members[model].rows:
        raise ValueError(
            f"{path}.token_id is {row}, {model} has {members[model].rows} rows"
        )
    return Origin(model, row, given.force)
