"""Loads an encoder with its tokenizer, and embeds texts with it."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from collab_jax.io import canonical
from collab_jax.io.encoder_names import prefix, rules
from collab_jax.io.hub import fetch
from collab_jax.io.safetensors import Checkpoint, missing, open_folder
from collab_jax.models.encoder import Encoder, encoder, first_token, mean_of_tokens
from collab_jax.models.encoder_config import EncoderConfig, from_hf

POOLER = "pooler.dense.weight"


class EncoderModel(NamedTuple):
    """An encoder with everything that is needed to embed text."""

    params: Any
    encoder: Encoder
    tokenizer: Any  # its model_max_length is where texts are cut
    config: EncoderConfig


def load_encoder(
    source: str | Path, dtype: Any = None, taps: tuple[str, ...] = ()
) -> EncoderModel:
    """Loads an encoder from a folder, a repository or a short name.

    How a sentence is pooled is read from the files of sentence-transformers where the
    folder has them; else it is the mean of the tokens, brought to length 1.

    Args:
      source: what `collab_jax.io.hub.fetch` takes, for example "minilm-l6-v2".
      dtype: type of the parameters; None keeps the checkpoint's.
      taps: see `collab_jax.models.encoder.encoder`.

    Raises:
      FileNotFoundError: where a file is missing.
      ValueError: for an unknown architecture or pooling, a missing tensor, a wrong
        shape, or a truncated file.

    >>> import tempfile
    >>> from collab_jax.io.safetensors import Layout, write
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> folder = Path(tempfile.mkdtemp())
    >>> files = tokenizer.save_pretrained(folder)
    >>> raw = {"model_type": "bert", "vocab_size": 3, "hidden_size": 4,
    ...     "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    ...     "max_position_embeddings": 8, "pad_token_id": 0}
    >>> size = (folder / "config.json").write_text(json.dumps(raw))
    >>> layouts = {name: Layout(np.dtype("float32"), shape)
    ...     for rule in rules(_with_pooler(from_hf(raw), False))
    ...     for name, shape in zip(rule.names, rule.shapes)}
    >>> zeros = (np.zeros(layout.shape, np.float32) for layout in layouts.values())
    >>> write(folder / "model.safetensors", layouts, zeros)
    >>> load_encoder(folder).config.width
    4
    """
    folder = Path(fetch(source))
    config = from_hf(_read_json(folder / "config.json"))
    file = open_folder(folder)
    start = prefix(file.layouts)
    config = _with_pooler(config, start + POOLER in file.layouts)
    params = _read(config, start, file, dtype)
    pool, normalise, longest = _sentence_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = min(config.capacity, longest or config.capacity)
    made = encoder(config, taps, pool, normalise)
    return EncoderModel(params, made, tokenizer, config)


def embed_texts(
    model: EncoderModel, texts: Sequence[str], batch_size: int = 32, multiple: int = 32
) -> np.ndarray:
    """Sentence embeddings of texts, in batches of similar length.

    Args:
      model: from `load_encoder`.
      texts: N texts; one longer than `model.tokenizer.model_max_length` is cut there.
      batch_size: B, texts per call.
      multiple: padded lengths are multiples of this, so that few shapes are compiled.

    Returns:
      `[N, W]` float32.

    >>> from collab_jax.models.encoder import init
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> config = from_hf({"model_type": "bert", "vocab_size": 3, "hidden_size": 4,
    ...     "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    ...     "max_position_embeddings": 8, "pad_token_id": 0})
    >>> params = init(jax.random.key(0), config)
    >>> model = EncoderModel(params, encoder(config), tokenizer, config)
    >>> rows = embed_texts(model, ["a", "b a", "a"], batch_size=2)
    >>> rows.shape, bool(np.allclose(rows[0], rows[2]))
    ((3, 4), True)
    """
    if not texts:
        return np.zeros((0, model.config.width), np.float32)
    ids = model.tokenizer(list(texts), truncation=True, padding=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    embed = _jitted(model.encoder)
    rows = np.zeros((len(ids), model.config.width), np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = -(-len(ids[chosen[-1]]) // multiple) * multiple
        shape = (batch_size, min(longest, model.config.capacity))
        tokens = np.full(shape, model.config.pad_id, np.int32)
        length = np.zeros(batch_size, np.int32)
        for row, n in enumerate(chosen):
            tokens[row, : len(ids[n])] = ids[n]
            length[row] = len(ids[n])
        out = embed(model.params, jnp.asarray(tokens), jnp.asarray(length))
        rows[chosen] = np.asarray(out)[: len(chosen)]
    return rows


@functools.lru_cache(maxsize=8)
def _jitted(made: Encoder):
    return jax.jit(made.embed_sentences)


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a Hugging Face folder is expected")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error


def _with_pooler(config: EncoderConfig, pooler: bool) -> EncoderConfig:
    return EncoderConfig(**{**vars(config), "pooler": pooler})


def _read(
    config: EncoderConfig, start: str, file: Checkpoint, dtype: Any
) -> dict[str, Any]:
    """The params tree."""

    def read(name: str) -> np.ndarray:
        if start + name not in file.layouts:
            raise missing(start + name, file.layouts)
        return file.read(start + name)

    tree = canonical.tree_of(rules(config), read)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _sentence_settings(folder: Path):
    """Pool, normalisation and longest text, as sentence-transformers says them."""
    if not (folder / "modules.json").exists():
        return mean_of_tokens, True, None
    pool, normalise = first_token, False
    for module in _read_json(folder / "modules.json"):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            pool = _pool(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise ValueError(f"module {module['type']!r} in {folder} is not supported")
    longest = None
    if (folder / "sentence_bert_config.json").exists():
        settings = _read_json(folder / "sentence_bert_config.json")
        longest = settings.get("max_seq_length")
    return pool, normalise, longest


def _pool(path: Path):
    settings = _read_json(path)
    chosen = [n for n, on in settings.items() if n.startswith("pooling_mode") and on]
    known = {
        "pooling_mode_mean_tokens": mean_of_tokens,
        "pooling_mode_cls_token": first_token,
    }
    if len(chosen) != 1 or chosen[0] not in known:
        raise ValueError(f"{path} asks for {chosen}; one of {list(known)} is supported")
    return known[chosen[0]]
