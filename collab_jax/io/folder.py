"""The files beside the weights in the folder of a merge's result.

config.json, generation_config.json, the tokenizer, the chat template, what else is
needed to load the model, the recipe and the model card.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from collab_jax.io.described import Change, result_config, result_generation
from collab_jax.io.json_file import read_json, write_json
from collab_jax.io.templates import choose_template, read_template

if TYPE_CHECKING:
    from collab_jax.io.vocabulary import Vocabulary

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.jinja",
    "chat_template.json",
)
_BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor*.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class Shape(NamedTuple):
    """What of the result differs from its donor, None for what does not."""

    layers: Sequence[tuple[str, int]] | None = None  # per layer: a model, its layer
    rows: int | None = None  # of the embedding matrix
    dtype: str | None = None
    tied: bool | None = None  # no head of its own


def donor(models: Sequence[str], base: str | None) -> str:
    """The model whose config.json and other files the result inherits.

    It is the base where there is one, and else the first: the same in every run.

    >>> donor(["b", "c"], None), donor(["b", "c"], "a")
    ('b', 'a')
    """
    return models[0] if base is None else base


def describe(
    out: str | Path,
    folders: Mapping[str, Path],
    donor: str,
    shape: Shape,
    recipe: str,
    card: str | Callable[[Sequence[str]], str],
    vocabulary: "Vocabulary | None" = None,
    chat_template: str | None = None,
    merged: Sequence[str] | None = None,
) -> list[str]:
    """Writes every file of the result but the weights and their index.

    Args:
      out: an empty folder; the caller moves it to its place when all is written.
      folders: of the models by name, in the order of the config.
      donor: of config.json and of the files beside the tokenizer.
      shape: what differs from the donor.
      recipe: the text of the configuration, for mergekit_config.yml.
      card: README.md, or what makes it of the notes.
      vocabulary: None where no tokenizer was asked for: the donor's files are copied.
      chat_template: "auto", a name, a template; None for that of the tokenizer's model.
      merged: the models whose templates "auto" counts, None for all: not those that
        only tokens are taken from.

    Returns:
      The notes: one line for each thing that a user should look at.

    Raises:
      FileNotFoundError: for a donor without config.json.
      ValueError: for a damaged config.json, or a chat template that is none.

    >>> import tempfile
    >>> base, out = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> write_json(base / "config.json", {"vocab_size": 4, "dtype": "float32"})
    >>> describe(out, {"m": base}, "m", Shape(dtype="bfloat16"), "a: 1", "# m")
    ['m holds no tokenizer, the result neither']
    >>> read_json(out / "config.json")
    {'vocab_size': 4, 'dtype': 'bfloat16'}
    """
    out, source = Path(out), Path(folders[donor])
    template = None
    if chat_template is not None:
        counted = folders if merged is None else merged
        template = choose_template(chat_template, [Path(folders[m]) for m in counted])
    config = read_json(source / "config.json")
    change = _change(shape, folders, donor, vocabulary)
    made, notes = result_config(config, change)
    write_json(out / "config.json", made)
    generation = _read(source / "generation_config.json")
    if generation is not None:
        written, more = result_generation(generation, change)
        write_json(out / "generation_config.json", written)
        notes += more
    if vocabulary is not None and vocabulary.tokenizer is not None:
        _save(vocabulary.tokenizer, out, template)
        notes += vocabulary.notes
    else:
        owner = donor if vocabulary is None else vocabulary.donor
        notes += () if vocabulary is None else vocabulary.notes
        if not _copy(Path(folders[owner]), out, _TOKENIZER):
            notes.append(f"{owner} holds no tokenizer, the result neither")
        if template is not None:
            _set_template(out, template)
    _copy(source, out, _BESIDE)
    if config.get("auto_map"):
        code = _copy(source, out, ("*.py",))
        notes.append(
            f"config.json of {donor} asks for code of its own"
            + (f" ({', '.join(code)})" if code else ", which its folder lacks")
            + "; transformers runs it only with trust_remote_code"
        )
    (out / "mergekit_config.yml").write_text(recipe, "utf-8")
    text = card if isinstance(card, str) else card(notes)
    (out / "README.md").write_text(text, "utf-8")
    return notes


def _read(path: Path) -> dict[str, Any] | None:
    """A file that need not be there."""
    return read_json(path) if path.is_file() else None


def _change(
    shape: Shape,
    folders: Mapping[str, Path],
    donor: str,
    vocabulary: "Vocabulary | None",
) -> Change:
    layers = None
    if shape.layers is not None:
        named = dict.fromkeys(model for model, _ in shape.layers)
        configs = {m: _read(Path(folders[m]) / "config.json") or {} for m in named}
        layers = [(configs[model], i) for model, i in shape.layers]
    change = Change(layers, shape.rows, shape.dtype, shape.tied)
    if vocabulary is None:
        return change
    own = vocabulary.rows.models[donor]
    new = {int(row): id for id, row in enumerate(own) if row >= 0}
    rows = vocabulary.rows.padded if shape.rows is None else shape.rows
    return change._replace(vocabulary=rows, place=new.get, special=vocabulary.special)


def _copy(source: Path, out: Path, patterns: Sequence[str]) -> list[str]:
    """Copies files, following links; the names of what was there."""
    names = sorted({p.name for pattern in patterns for p in source.glob(pattern)})
    names = [name for name in names if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


def _save(tokenizer: Any, out: Path, template: str | None) -> None:
    """Saves a tokenizer that no model has."""
    old = tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    tokenizer.chat_template = old
    written = _read(out / "tokenizer_config.json") or {}
    for key in ("is_local", "local_files_only", "name_or_path"):  # of this machine
        written.pop(key, None)
    write_json(out / "tokenizer_config.json", written)


def _set_template(out: Path, template: str) -> None:
    """Makes a template the only one of copied tokenizer files."""
    (out / "chat_template.json").unlink(missing_ok=True)
    settings = _read(out / "tokenizer_config.json")
    if settings and settings.pop("chat_template", None) is not None:
        write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(template, "utf-8")
    assert read_template(out) == template
