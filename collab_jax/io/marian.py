"""Loads a Marian translation model with its tokenizer, and saves it again."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.decoder import pad
from collab_jax.io import canonical, marian_names, pickled, safetensors
from collab_jax.io.hub import fetch
from collab_jax.io.json_file import read_json, write_json
from collab_jax.io.new_folder import new_folder
from collab_jax.io.safetensors import Checkpoint, Layout
from collab_jax.lm import LM, Backbone, Params
from collab_jax.models.marian import marian, translator
from collab_jax.models.marian_config import MarianConfig, from_hf, to_hf


class Translator(NamedTuple):
    """A translation model with everything that is needed to use it on text."""

    params: Params
    lm: LM  # its parameters are (params, source [B, U], length [B]), see `sources`
    backbone: Backbone  # likewise
    tokenizer: Any  # of transformers; None where the folder has none
    config: MarianConfig


def load_translator(source: str | Path, dtype: Any = None) -> Translator:
    """Loads a Marian model from a folder.

    Args:
      source: what `collab_jax.io.hub.fetch` takes: a folder in the Hugging Face layout,
        with model.safetensors or pytorch_model.bin. Where it has source.spm, the
        tokenizer is loaded too, for which sentencepiece must be installed.
      dtype: type of all parameters; None is the checkpoint's.

    Raises:
      FileNotFoundError: where a file is missing.
      ValueError: for another architecture, a missing or unexpected tensor, or a wrong
        shape.
      ImportError: for a tokenizer without sentencepiece.

    >>> from collab_jax.models.marian import init
    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> params = init(jax.random.key(0), config)
    >>> model = Translator(params, translator(config), marian(config), None, config)
    >>> import tempfile
    >>> folder = save_translator(model, Path(tempfile.mkdtemp()) / "tiny")
    >>> load_translator(folder).config == config
    True
    """
    folder = Path(fetch(source))
    config = from_hf(read_json(folder / "config.json"))
    if any(folder.glob("model*.safetensors*")):
        file = safetensors.open_folder(folder)
    else:
        file = pickled.open_folder(folder)
    params = _read(config, file, folder, dtype)
    tokenizer = _tokenizer(folder)
    return Translator(params, translator(config), marian(config), tokenizer, config)


def _read(config: MarianConfig, file: Checkpoint, folder: Path, dtype: Any) -> Params:
    rename = functools.partial(marian_names.canonical, config)
    rules = marian_names.rules(config)
    if marian_names.BIAS not in map(rename, file.layouts):
        file = _without_bias(config, file)
    file = canonical.checked(file, rules, rename, "marian", folder)
    kind = np.dtype(dtype or file.layouts[rules[0].names[0]].dtype)
    tree = canonical.tree_of(rules, lambda name: np.array(file.read(name), kind))
    return jax.tree.map(jnp.asarray, tree)


def _without_bias(config: MarianConfig, file: Checkpoint) -> Checkpoint:
    """The checkpoint with the bias that some writers leave out: zeros."""
    zeros = np.zeros((1, config.vocab), np.float32)
    layouts = {**file.layouts, marian_names.BIAS: Layout(zeros.dtype, zeros.shape)}
    return Checkpoint(
        layouts, lambda name: zeros if name == marian_names.BIAS else file.read(name)
    )


def _tokenizer(folder: Path) -> Any:
    if not (folder / "source.spm").exists():
        return None
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise ImportError(
            f"the tokenizer in {folder} needs sentencepiece: pip install "
            "'collab-jax[translation]'"
        ) from None
    from transformers import MarianTokenizer  # it takes seconds to import

    with warnings.catch_warnings():
        # without it, quotes and the like are left as they are
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
        return MarianTokenizer.from_pretrained(folder)


def sources(
    params: Params, tokenizer: Any, texts: Sequence[str]
) -> tuple[Params, jax.Array, jax.Array]:
    """The parameters of a translator's LM for some source texts.

    Args:
      params: of the model.
      tokenizer: of `load_translator`.
      texts: B; a multilingual model is told the language in front, as in ">>fra<< ...".

    Returns:
      `(params, source[B, U], length[B])`.

    Raises:
      ValueError: without a tokenizer.

    >>> class Letters:
    ...     def __call__(self, text):
    ...         return type("", (), {"input_ids": [*map(ord, text), 0]})
    >>> _, tokens, length = sources((), Letters(), ["ab", "c"])
    >>> tokens.tolist(), length.tolist()
    ([[97, 98, 0], [99, 0, 0]], [3, 2])
    """
    if tokenizer is None:
        raise ValueError(
            "this translator has no tokenizer: its folder lacks source.spm; give the "
            "LM tokens instead"
        )
    return params, *pad([tokenizer(text).input_ids for text in texts])


def save_translator(model: Translator, folder: str | Path) -> Path:
    """Writes a folder in the Hugging Face layout, which torch transformers loads too.

    Args:
      model: its params must be arrays; adapters are merged into them beforehand.
      folder: must not exist, or be empty. It appears whole or not at all.

    Returns:
      The folder.

    Raises:
      ValueError: for a folder that holds something, and for params that are not those
        of `model.config`.

    >>> from collab_jax.models.marian import init
    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> params = init(jax.random.key(0), config)
    >>> model = Translator(params, translator(config), marian(config), None, config)
    >>> import tempfile
    >>> folder = save_translator(model, Path(tempfile.mkdtemp()) / "tiny")
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    folder = Path(folder).expanduser()
    rules = marian_names.rules(model.config)
    leaves = sum(len(rule.paths) for rule in rules)
    if (found := len(jax.tree.leaves(model.params))) != leaves:
        raise ValueError(f"params have {found} leaves, config asks for {leaves}")
    tensors = dict(canonical.tensors_of(rules, model.params, np.asarray))
    layouts = {name: Layout(x.dtype, x.shape) for name, x in tensors.items()}
    for rule in rules:
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            if layouts[name].shape != shape:
                raise ValueError(
                    f"{name} has the shape {layouts[name].shape}, config asks for "
                    f"{shape}"
                )
    with new_folder(folder) as partial:
        raw = to_hf(model.config)
        kind = layouts[rules[0].names[0]].dtype.name
        write_json(partial / "config.json", raw | {"dtype": kind})
        ends = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        written = {key: raw[key] for key in ends if raw[key] not in (None, [])}
        if model.config.pad is not None:
            written["bad_words_ids"] = [[model.config.pad]]
        write_json(partial / "generation_config.json", written)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        safetensors.write(partial / "model.safetensors", layouts, tensors.values())
    return folder
