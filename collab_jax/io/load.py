"""Loads a model with everything that belongs to it, and saves it again."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from collab_jax import lm as lms
from collab_jax.io import canonical, convert, gguf, names, safetensors
from collab_jax.io.hub import fetch
from collab_jax.io.json_file import read_json, write_json
from collab_jax.io.new_folder import new_folder
from collab_jax.io.safetensors import Checkpoint, Layout
from collab_jax.io.tokenizer import load_tokenizer
from collab_jax.models.config import Config, from_hf, to_hf
from collab_jax.models.packed import pack_leaf, plain
from collab_jax.models.transformer import transformer

# path of a leaf, its shape -> where it lies
Place = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


class Model(NamedTuple):
    """A language model with everything that is needed to use it on text."""

    params: lms.Params  # a nested dict of arrays
    lm: lms.LM
    backbone: lms.Backbone
    tokenizer: Any  # a fast tokenizer of transformers
    config: Config


def load(
    source: str | Path,
    dtype: Any = None,
    sharding: Sharding | Place | None = None,
    taps: tuple[str, ...] = (),
    matrices: str | None = None,
) -> Model:
    """Loads a language model, leaf by leaf: read, convert, put where it belongs.

    Never more than the model and one leaf of it are in memory. With a sharding over
    several devices, each device gets its slice only.

    Args:
      source: what `collab_jax.io.hub.fetch` takes: a folder in the Hugging Face layout,
        a .gguf file, a short name such as "smollm2-135m-instruct", or "org/name".
      dtype: type of all parameters. None means the one that the checkpoint stores its
        embedding in, float32 where that is quantised.
      sharding: None for the default device; a `jax.sharding.Sharding` for all leaves;
        or a function of a leaf's path ("layers_0", "mlp", "up", "kernel") and shape.
      taps: what the backbone reports beside the hidden states, see
        `collab_jax.models.transformer.transformer`.
      matrices: None for plain matrices; "packed", "bfloat16" or "int8" for such as
        decode faster on a CPU, see `collab_jax.models.packed.pack`. The type of all
        else is `dtype`.

    Returns:
      A `Model`.

    Raises:
      FileNotFoundError: where there is no such model, or it lacks a file.
      ValueError: for an unknown architecture or type, a missing or unexpected tensor, a
        wrong shape, or a file that is cut off; for matrices together with a sharding.

    >>> from collab_jax.models.transformer import init
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer(config)
    >>> params = init(jax.random.key(0), config)
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> model = Model(params, lms.language_model(backbone), backbone, tokenizer, config)
    >>> import tempfile
    >>> folder = save(model, Path(tempfile.mkdtemp()) / "tiny")
    >>> again = load(folder, dtype="bfloat16")
    >>> again.params["norm"]["scale"].dtype, again.tokenizer("b").input_ids
    (dtype(bfloat16), [1])
    """
    folder = fetch(source)
    config = read_config(folder)
    backbone = transformer(config, taps)
    checkpoint = canonical.checked(
        _checkpoint(folder, config),
        names.rules(config),
        functools.partial(names.canonical, config),
        config.family,
        folder,
    )
    tokenizer = load_tokenizer(folder)
    params = read_params(config, checkpoint, dtype, sharding, matrices)
    return Model(params, lms.language_model(backbone), backbone, tokenizer, config)


def read_config(folder: Path) -> Config:
    """What a folder says about its model.

    Args:
      folder: in the Hugging Face layout. The end tokens of generation_config.json are
        added to those of config.json.

    Raises:
      FileNotFoundError: where there is no config.json.
      ValueError: for JSON that is damaged, and where `from_hf` does.

    >>> raw = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1,
    ...     "n_head": 2, "n_positions": 16, "eos_token_id": 7}
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_json(folder / "config.json", raw)
    >>> write_json(folder / "generation_config.json", {"eos_token_id": [7, 5]})
    >>> read_config(folder).eos
    (7, 5)
    """
    config = from_hf(read_json(folder / "config.json"))
    if (folder / "generation_config.json").exists():
        more = read_json(folder / "generation_config.json").get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        ends = dict.fromkeys((*config.eos, *more))
        config = dataclasses.replace(config, eos=tuple(ends))
    return config


def _checkpoint(folder: Path, config: Config) -> Checkpoint:
    files = sorted(folder.glob("*.gguf"))
    if any(folder.glob("model*.safetensors*")) or not files:
        return safetensors.open_folder(folder)
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} .gguf files: name one of them")
    return convert.canonical_checkpoint(gguf.open_file(files[0]), config)


def read_params(
    config: Config,
    checkpoint: Checkpoint,
    dtype: Any = None,
    sharding: Sharding | Place | None = None,
    matrices: str | None = None,
) -> dict[str, Any]:
    """The params tree of a checkpoint with canonical names.

    Args:
      config: what the model is made of.
      checkpoint: its tensors.
      dtype: see `load`.
      sharding: see `load`.
      matrices: see `load`.

    Raises:
      ValueError: for matrices together with a sharding.

    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> layouts = {name: Layout(np.dtype("float32"), shape)
    ...     for rule in names.rules(config)
    ...     for name, shape in zip(rule.names, rule.shapes)}
    >>> zeros = Checkpoint(layouts, lambda name: np.zeros(layouts[name].shape, 'f4'))
    >>> read_params(config, zeros)["embed"]["embedding"].shape
    (3, 4)
    """
    if matrices is not None and sharding is not None:
        raise ValueError(
            f"matrices={matrices!r} packs matrices for one device; leave it out with a "
            "sharding"
        )
    rules = names.rules(config)
    dtype = np.dtype(dtype or checkpoint.layouts[rules[0].names[0]].dtype)
    tree: dict[str, Any] = {}
    for rule in rules:
        leaves = rule.load([checkpoint.read(name) for name in rule.names])
        for path, leaf in zip(rule.paths, leaves, strict=True):
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = _put(path, leaf, dtype, sharding)
            if matrices is not None:
                name = "/".join(path)
                node[path[-1]] = pack_leaf(name, node[path[-1]], matrices, config.tied)
        del leaves
    return tree


def _put(path, leaf: np.ndarray, dtype: np.dtype, sharding) -> jax.Array:
    if sharding is None:
        # a copy in memory of its own: jax may keep it, and the file may change
        return jax.numpy.asarray(np.array(leaf, dtype))
    where = sharding if isinstance(sharding, Sharding) else sharding(path, leaf.shape)
    return jax.make_array_from_callback(
        leaf.shape, where, lambda index: np.array(leaf[index], dtype)
    )


def save(model: Model, folder: str | Path, max_shard_size: int = 5_000_000_000) -> Path:
    """Writes a folder in the Hugging Face layout, which torch transformers loads too.

    config.json, generation_config.json, the tokenizer with its chat template, and
    model.safetensors, or shards with an index. The types of the parameters are kept.

    Args:
      model: its params must be arrays; adapters are merged into them beforehand, packed
        matrices are unpacked here.
      folder: must not exist, or be empty. It appears whole or not at all.
      max_shard_size: bytes of a file.

    Returns:
      The folder.

    Raises:
      ValueError: for a folder that holds something, for params that are not those of
        `model.config`, and for packed matrices that were rounded.

    >>> from collab_jax.models.transformer import init
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer(config)
    >>> params = init(jax.random.key(0), config)
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> model = Model(params, lms.language_model(backbone), backbone, tokenizer, config)
    >>> import tempfile
    >>> folder = save(model, Path(tempfile.mkdtemp()) / "tiny")
    >>> sorted(path.name for path in folder.glob("*.*"))
    ['config.json', 'generation_config.json', 'model.safetensors',
     'tokenizer.json', 'tokenizer_config.json']
    """
    folder = Path(folder).expanduser()
    layouts = _layouts(model)
    with new_folder(folder) as partial:
        embedding = next(iter(layouts.values())).dtype
        write_json(
            partial / "config.json", to_hf(model.config) | {"dtype": embedding.name}
        )
        write_json(partial / "generation_config.json", _generation(model.config))
        model.tokenizer.save_pretrained(partial)
        safetensors.write_folder(partial, layouts, _tensors(model), max_shard_size)
    return folder


def _generation(config: Config) -> dict[str, Any]:
    tokens: dict[str, Any] = {
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if len(config.eos) > 1 else None,
        "pad_token_id": config.pad,
    }
    if len(config.eos) == 1:
        tokens["eos_token_id"] = config.eos[0]
    return {key: value for key, value in tokens.items() if value is not None}


def _leaf(params: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(params, dict) or part not in params:
            raise ValueError(f"params lack {'/'.join(path)}, which config asks for")
        params = params[part]
    params = plain(params, "/".join(path))
    if not isinstance(params, jax.Array | np.ndarray):
        raise ValueError(
            f"{'/'.join(path)} is a {type(params).__name__}, an array was expected: "
            "merge adapters into the parameters first"
        )
    return params


def _layouts(model: Model) -> dict[str, Layout]:
    layouts = {}
    known = 0
    for rule in names.rules(model.config):
        leaves = [_leaf(model.params, path) for path in rule.paths]
        known += len(leaves)
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            layouts[name] = Layout(np.dtype(leaves[0].dtype), shape)
    total = len(
        jax.tree.leaves(model.params, is_leaf=lambda x: not isinstance(x, dict))
    )
    if total != known:
        raise ValueError(f"params have {total} leaves, config asks for {known}")
    return layouts


def _tensors(model: Model) -> Iterator[np.ndarray]:
    return (tensor for _, tensor in canonical.save_tree(model.config, model.params))
