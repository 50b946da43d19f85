"""Small random checkpoints of torch transformers, and mergekit run on them."""

import logging
import warnings
from pathlib import Path

import torch
import transformers
import yaml

from tests import small_tokenizers as small

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

transformers.utils.logging.disable_progress_bar()
for name in ("mergekit", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)

COMMON = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 40}
COMMON |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 64, "pad_token_id": None}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
        | {"num_experts_per_tok": 2},
    ),
}
GPT2 = {"vocab_size": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def family(name, **more):
    """The configuration of a small model."""
    if name == "gpt2":
        return transformers.GPT2Config(**GPT2 | more, bos_token_id=1, eos_token_id=2)
    kind, own = FAMILIES[name]
    return kind(**COMMON | own | more)


def write(folder, config, seed, dtype=torch.float32, tokenizer=None, **options):
    """A fine-tune of the model with seed 0: norms and biases differ too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    draw = torch.Generator().manual_seed(17 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            start = torch.Generator().manual_seed(parameter.numel())
            parameter += 0.2 * torch.randn(parameter.shape, generator=start)
            noise = torch.randn(parameter.shape, generator=draw)
            parameter += 0.05 * bool(seed) * noise
    folder = Path(folder)
    model.to(dtype).save_pretrained(folder, **options)
    (tokenizer or small.first()).save_pretrained(folder)
    return folder


def mergekit(text, out, **options):
    """mergekit's folder for a document."""
    document = MergeConfiguration.model_validate(yaml.safe_load(text))
    defaults = {"quiet": True, "random_seed": 0, "write_model_card": False}
    given = MergeOptions(**defaults | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_merge(document, str(out), given, config_source=text)
    return Path(out)
