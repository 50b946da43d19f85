"""A GGUF file as a folder in the layout of Hugging Face."""

from pathlib import Path

import numpy as np

from collab_jax.io import gguf_names, names, safetensors, tokenizer
from collab_jax.io.gguf import Gguf
from collab_jax.io.json_file import write_json
from collab_jax.io.safetensors import Checkpoint, Layout
from collab_jax.models.config import Config, from_hf
from collab_jax.models.defaults import ARCHITECTURES


def describe(file: Gguf, folder: Path) -> None:
    """Writes config.json, generation_config.json and the tokenizer of a GGUF file.

    Args:
      file: opened.
      folder: exists.

    >>> import tempfile
    >>> sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8,
    ...     "feed_forward_length": 16, "attention.head_count": 2,
    ...     "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6}
    >>> metadata = {f"qwen2.{k}": v for k, v in sizes.items()}
    >>> metadata |= {"general.architecture": "qwen2", "qwen2.vocab_size": 2}
    >>> metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [],
    ...     "tokenizer.ggml.tokens": ["a", "b"]}
    >>> folder = Path(tempfile.mkdtemp())
    >>> describe(Gguf(Path("a.gguf"), metadata, {}), folder)
    >>> tokenizer.load_tokenizer(folder)("ba").input_ids
    [1, 0]
    """
    raw = gguf_names.config_dict(file)
    from_hf(raw)  # raises where the model is not supported
    write_json(folder / "config.json", architectures(raw) | {"dtype": "float32"})
    ends = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(
        folder / "generation_config.json",
        {key: token for key, token in ends.items() if token is not None},
    )
    tokenizer.from_gguf(file).save_pretrained(folder)


def canonical_checkpoint(file: Gguf, config: Config) -> Checkpoint:
    """The tensors of a GGUF file under the checkpoint's names.

    Args:
      file: opened.
      config: of the model in it.

    >>> from gguf import GGMLQuantizationType
    >>> from collab_jax.io.gguf import Tensor
    >>> sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8,
    ...     "feed_forward_length": 16, "attention.head_count": 2,
    ...     "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6}
    >>> metadata = {f"qwen2.{k}": v for k, v in sizes.items()}
    >>> metadata |= {"general.architecture": "qwen2", "qwen2.vocab_size": 2}
    >>> norm = Tensor(GGMLQuantizationType.F32, (8,), 0, 32)
    >>> file = Gguf(Path("a.gguf"), metadata, {"output_norm.weight": norm})
    >>> config = from_hf(gguf_names.config_dict(file))
    >>> list(canonical_checkpoint(file, config).layouts)
    ['model.norm.weight']
    """
    wanted = tuple(name for rule in names.rules(config) for name in rule.names)
    return gguf_names.checkpoint(file, wanted, gguf_names.config_dict(file))


def to_safetensors(file: Gguf, folder: Path) -> None:
    """Writes a GGUF file as a folder that transformers loads, the weights in float32.

    Args:
      file: opened.
      folder: exists.

    >>> import tempfile
    >>> from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    >>> from collab_jax.io.gguf import Tensor
    >>> sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8,
    ...     "feed_forward_length": 16, "attention.head_count": 2,
    ...     "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6}
    >>> metadata = {f"qwen2.{k}": v for k, v in sizes.items()}
    >>> metadata |= {"general.architecture": "qwen2", "qwen2.vocab_size": 2}
    >>> metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [],
    ...     "tokenizer.ggml.tokens": ["a", "b"]}
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = folder / "zeros.gguf"
    >>> size = path.write_bytes(bytes(512))
    >>> config = from_hf(gguf_names.config_dict(Gguf(path, metadata, {})))
    >>> theirs = get_tensor_name_map(MODEL_ARCH.QWEN2, 1).get_name
    >>> tensors = {theirs(name, (".weight", ".bias")):
    ...     Tensor(GGMLQuantizationType.F32, shape, 0, 512)
    ...     for rule in names.rules(config)
    ...     for name, shape in zip(rule.names, rule.shapes)}
    >>> to_safetensors(Gguf(path, metadata, tensors), folder)
    >>> safetensors.open_folder(folder).layouts["model.norm.weight"].shape
    (8,)
    """
    describe(file, folder)
    config = from_hf(gguf_names.config_dict(file))
    source = canonical_checkpoint(file, config)
    float32 = np.dtype(np.float32)
    layouts = {
        name: Layout(float32, source.layouts[name].shape)
        for rule in names.rules(config)
        for name in rule.names
    }
    tensors = (np.asarray(source.read(name), float32) for name in layouts)
    safetensors.write(folder / "model.safetensors", layouts, tensors)


def architectures(raw: dict) -> dict:
    """A config.json with the name of the class that transformers loads it with.

    >>> architectures({"model_type": "gpt2", "n_layer": 2})
    {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_layer': 2}
    """
    return {"architectures": [ARCHITECTURES[raw["model_type"]]], **raw}
